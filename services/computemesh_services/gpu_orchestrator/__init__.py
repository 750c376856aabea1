"""gpu-orchestrator (8098): who may use how much memory of which GPU.

Owns       the bucket ``compute-gpus``: what is reserved, one record a node
Answers    ``compute.gpus.{reserve,renew,release,can_fit,states,get,list}.v1`` and their HTTP routes
Publishes  ``compute.gpus.{reserved,released,pressure}.v1``; ``compute.nodes.discover.v1`` to nodes with GPUs of
           which it knows no use yet
Promises   no MiB is granted twice, however many replicas answer and whatever is killed; a reservation is granted
           whole or not at all, and stands until it is released, runs out, or what it is bound to ends
"""
