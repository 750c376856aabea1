"""node-registry (8115): who is here, what they can do, who is alive.

Owns       the bucket ``compute-nodes``
Answers    ``compute.nodes.{register,query,get}.v1`` and their HTTP routes
Publishes  ``compute.nodes.discover.v1``, ``compute.nodes.lost.v1``
Promises   a node is never called lost because the registry, or the bus, was away; a node that comes back
           has a higher epoch
"""
