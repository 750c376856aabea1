"""The transport `rdma`: network interfaces move bytes from the memory of one process into that of another."""

from computemesh.peer.rdma.endpoint import RdmaEndpoint

__all__ = ["RdmaEndpoint"]
