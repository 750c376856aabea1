"""The embedded NATS server: a child process with credentials, permissions and a store of its own.

A machine that runs a whole mesh starts it here; a mesh on an existing NATS server uses only the
configuration, to grant each role exactly what the contracts say.
"""

from computemesh.nats_server.config import ClusterConfig, ServerConfig, User, render, render_accounts, users
from computemesh.nats_server.credentials import BadCredentialsError, Credentials, add_node, load_or_create
from computemesh.nats_server.process import (
    LOOPBACK,
    AlreadyRunning,
    NatsServer,
    PortTaken,
    ServerError,
    addresses,
    admit_node,
    expel_node,
)

__all__ = [
    "LOOPBACK",
    "AlreadyRunning",
    "BadCredentialsError",
    "ClusterConfig",
    "Credentials",
    "NatsServer",
    "PortTaken",
    "ServerConfig",
    "ServerError",
    "User",
    "add_node",
    "addresses",
    "admit_node",
    "expel_node",
    "load_or_create",
    "render",
    "render_accounts",
    "users",
]
