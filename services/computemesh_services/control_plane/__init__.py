"""control-plane (3000): which engines and peer agents there are, what memory they offer, who connects to whom.

Owns       the buckets ``compute-engines``, ``compute-engine-changes``, ``compute-peers``, ``compute-memory`` and
           ``compute-topology``
Answers    ``compute.engines.{register,unregister,heartbeat,get,list,changes}.v1`` and their routes;
           ``compute.peers.{register,unregister,heartbeat,get,list}.v1``,
           ``compute.peers.{memory_put,memory_drop,memory_get,memory_list,topology_put,topology_get,call}.v1``;
           NanoCtrl's interface, over HTTP
Publishes  ``compute.engines.changed.v1.<scope>``, by the store; ``compute.peers.changed.v1``
Promises   - Any replica answers. What it was asked to do is stored before it says so; what another replica stored is
             found at once by name, and in lists milliseconds later.
           - Nothing in one scope is seen, changed or counted from another.
           - An engine or peer of which nothing is heard for ``entity_ttl_s`` is gone. Each change of an engine is told,
             that one included, once and in order, also when the replica that tells it is killed; revisions only rise.
           - Who lists a scope and asks for the changes since that revision misses none, or is told to list it again.
           - A peer is dropped, and its memory changed, only by the instance that registered it, or by time. With it go
             its memory and its topology.
           - Lists are answered from memory, also while the bus is away, for as long as a record lives.
"""
