"""Bytes of peers over TCP: several sockets a link, straight into the memory that they are for.

:mod:`~computemesh.peer.tcp.wire` says what goes over the sockets, :mod:`~computemesh.peer.tcp.lanes` has their two
ends, :mod:`~computemesh.peer.tcp.link` the connection made of them, :mod:`~computemesh.peer.tcp.endpoint` the rest.
"""

from computemesh.peer.tcp.endpoint import HOST_VARIABLE, TcpEndpoint
from computemesh.peer.tcp.link import TcpLink

__all__ = ["HOST_VARIABLE", "TcpEndpoint", "TcpLink"]
