"""A virtual machine with RDMA devices on a host that has none: ``python -m tests.rdma.vm -- COMMAND``."""
