"""resource-detector: tells the mesh what one machine is made of. Runs on every node, on port 8116.

Owns
    The inventory of its own node: CPU, memory, disks and GPUs, and the tier that follows from them. Nothing
    is stored; it is read from the machine again on each request.

Answers
    ``compute.resources.get.v1.<node_id>`` with an ``Inventory``, read afresh.

Publishes
    ``compute.resources.changed.v1.<node_id>`` when hardware came, went or changed size.
    ``compute.resources.load.v1.<node_id>`` every few seconds: how busy the node is.

Promises
    - GPU facts come from the platform's own interface (NVML today) behind one provider; without a GPU it
      reports no GPU, and it never makes one up.
    - A GPU that cannot be read is reported with what is known and what the driver answered.
    - Reading GPUs never fails: what could not be read is a warning in the inventory, and the next read
      tries again.
    - Inside a container it reports what the container may use, where the kernel tells.
"""
