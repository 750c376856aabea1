"""The embedded NATS server: a child process with credentials, permissions and a store of its own.

A machine that runs a whole mesh starts it here; a mesh on an existing NATS server uses only the
configuration, to grant each role exactly what the contracts say.
"""

from computemesh.nats_server.config import ServerConfig, User, render, users
from computemesh.nats_server.credentials import BadCredentialsError, Credentials, load_or_create
from computemesh.nats_server.process import AlreadyRunning, NatsServer, PortTaken, ServerError

__all__ = [
    "AlreadyRunning",
    "BadCredentialsError",
    "Credentials",
    "NatsServer",
    "PortTaken",
    "ServerConfig",
    "ServerError",
    "User",
    "load_or_create",
    "render",
    "users",
]
