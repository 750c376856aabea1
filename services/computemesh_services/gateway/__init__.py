"""gateway (8000): the front door for people and programs that speak HTTP. OpenAI's interface, and MLOC's tasks as YAML.

Owns       nothing: what it is asked it asks on the bus, as a client; any number may run
Answers    over HTTP OpenAI's routes, ``/v1``, and MLOC's: ``/api/v1/tasks``, ``/workers``, ``/admin/cleanup``; nothing
           on the bus
Publishes  nothing
Promises   - A task that was answered with ``ok`` is stored, and ends with one outcome, whatever becomes of the gateway.
           - A task that no node can run yet waits; it does not fail for that.
           - The text of a task is kept with the item, to the letter.
           - A request for inference of which nothing is answered yet survives the loss of its engine.
           - An answer that is not whole never looks as if it were.
"""
