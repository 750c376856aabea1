"""gateway (8000): the front door for people and programs that speak HTTP. MLOC's tasks, as YAML.

Owns       nothing: what it is asked it asks on the bus, as a client; any number may run
Answers    MLOC's routes over HTTP: ``/api/v1/tasks``, ``/workers``, ``/admin/cleanup``; nothing on the bus
Publishes  nothing
Promises   - A task that was answered with ``ok`` is stored, and ends with one outcome, whatever becomes of the gateway.
           - A task that no node can run yet waits; it does not fail for that.
           - The text of a task is kept with the item, to the letter.
"""
