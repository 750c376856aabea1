"""peer-agent: the way of this machine's processes to those of others. Runs on every node, on port 8092.

    a process --Unix socket (computemesh.peer.signals)--> peer-agent --NATS--> control-plane --NATS--> peer-agent …

Owns
    The processes of this node that are peers: their aliases, regions, connections and pages of epochs, and the
    transfers that run. Nothing is stored: processes say it again to its next life.

Answers
    ``compute.peers.answer.v1.<node_id>``: what a process of this node says to a peer on another node.
    ``compute.peers.transfer.v1.<node_id>``: begins to move bytes between a process of this node and a peer.

Publishes
    ``compute.peers.transferred.v1`` when such a transfer has ended, once.

Promises
    - Bytes do not pass through it, but for those of a process that asked it to move them. When it ends, connections
      between processes go on.
    - A process that ends, or is killed, is forgotten by the control plane within a second; those that it was connected
      to are told; what they have mapped of it is stale from then on.
    - Processes of this machine connect to each other while the bus is away.
    - Only processes of the same user, or of root, are taken. A process gets the descriptor of a region only over a
      connection that its owner has taken, and one that cannot write where the owner does not let it.
    - A transfer that was ordered with an id is done once in a life of the peer-agent, however often it is asked for.
"""
