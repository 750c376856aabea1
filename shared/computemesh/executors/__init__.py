"""Executors: what a node does with a work item. Write one, name it in an entry point, and nodes offer it.

    [project.entry-points."computemesh.executors"]
    reverse = "my_package:ReverseExecutor"

The entry point's name is the work type. Each run happens in a process of its own, in its own process
group: an executor may block, crash or fill its memory without hurting the node, and cancelling kills
whatever it started.
"""

from computemesh.executors.base import EngineAddress, ExecutionError, Executor, Progress, Task

__all__ = ["EngineAddress", "ExecutionError", "Executor", "Progress", "Task"]
