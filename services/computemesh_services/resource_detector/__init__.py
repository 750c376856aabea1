"""resource-detector: tells the mesh what one machine is made of. Runs on every node, on port 8116.

Owns
    The inventory of its own node: CPU, memory, disks, network, GPUs and how they reach each other, the tier
    that follows, and the engines and models that are installed. Nothing is stored; it is read from the
    machine again on each request.

Answers
    ``compute.resources.get.v1.<node_id>`` with an ``Inventory``, read afresh.

Publishes
    ``compute.resources.changed.v1.<node_id>`` when hardware came, went, broke or changed size.
    ``compute.resources.load.v1.<node_id>`` every few seconds: how busy the node is.

Promises
    - GPU facts come from the platform's own interface (NVML, amdsmi or the kernel's files, macOS's tools)
      behind one provider; without a GPU it reports no GPU. It makes none up, but for the provider that is
      asked for by the name ``scripted``, and then everything says so.
    - A GPU that cannot be read is reported with what is known and what the driver answered; a MIG slice is
      a GPU, and the whole it is cut from is none.
    - Reading GPUs never fails: what could not be read is a warning in the inventory, and the next read
      tries again. A driver that hangs holds up neither the service nor its end: the facts that were read
      last stand, with a warning that says since when.
    - Inside a container it reports what the container may use, where the kernel tells.
"""
