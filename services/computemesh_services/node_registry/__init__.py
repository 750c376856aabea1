"""node-registry (8115): who is here, what they can do, who is alive; and the API keys of the gateways.

Owns       the bucket ``compute-nodes``: a record for each node, and up to where losses were told; ``compute-keys``
Answers    ``compute.nodes.{register,alive,query,list,get,drain,undrain,forget,cleanup,stats}.v1`` and their routes;
           ``POST /v1/nodes/register`` and ``/v1/nodes/heartbeat`` as RoleMesh's node agents post them;
           ``compute.keys.{create,list,revoke}.v1``, on the bus alone
Publishes  ``compute.nodes.{discover,lost,marked,refused}.v1``; ``compute.keys.changed.v1``;
           ``compute.nodes.heartbeat.v1`` for those that come as requests
Promises   - Any replica answers. Whoever writes answers with what is then recorded; a node that another replica wrote
             is found at once, and what another changed is seen milliseconds later.
           - A node is never called suspect or lost because a registry, or the bus, was away, halted or behind, or
             because a clock jumped. Whoever starts, or hears of the bus again, gives everyone full patience: a node
             that died just before that is found one patience later.
           - A node that comes back from being lost, or with a new session, has a higher epoch, until it is forgotten.
           - Each loss that is stored is told, once; twice only when the last registry that lived ended between telling
             it and noting that; not, when the node was back before anybody could tell it.
           - Of two agents with one node id one has it, and they do not take turns: while its heartbeats are heard, the
             one on its machine; on the same machine, the one that came last.
           - An answer is at most one message; pages taken together have each node once.
           - A key that was revoked is in no list that is asked for with the revision that was told.
           - A heartbeat is never stored; lost nodes are forgotten after ``forget_after_s``.
"""
