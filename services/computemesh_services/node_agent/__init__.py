"""node-agent (8091): runs engines and work on one machine.

Owns       the engines and executor processes of its machine
Answers    ``compute.work.{assigned,stop,log}.v1.<node_id>``, ``compute.infer{,.control,.log}.v1.<node_id>``; over HTTP
           OpenAI's interface to the engines beside it, and RoleMesh's inventory
Publishes  ``compute.nodes.{announce,heartbeat}.v1``, ``compute.work.{progress,completed,failed}.v1``
Promises   an accepted attempt is reported once its outcome is stored, or listed in heartbeats until then;
           cancelling ends whatever it started within a second, answers of engines too; nothing outlives the
           agent, and nothing runs here twice or beyond what the machine has for work
"""
