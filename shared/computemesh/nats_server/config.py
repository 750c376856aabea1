"""The configuration files of the NATS server, as text made from values.

The accounts stand in a file of their own, which the other includes: it is what changes when a node is
invited, and all that a server which somebody else runs needs to have.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from computemesh.contracts.base import Role
from computemesh.contracts.permissions import ACCOUNTS, Crossing, Permissions, crossings, permissions, user_name
from computemesh.nats_server.credentials import Credentials

ANY_PORT: Final = -1
MAX_PAYLOAD_BYTES: Final = 8 * 1024 * 1024
"""Bound on one message; above it the server closes the sender's connection."""

ROUTE_USER: Final = "route"
"""As whom the servers of a cluster know each other."""

LOGIN_TIMEOUT_S: Final = 5
"""How long a connection may take to present its credentials."""


@dataclass(frozen=True, kw_only=True)
class User:
    """Someone who may connect, and what they may do then."""

    name: str
    password: str = field(repr=False)
    permissions: Permissions


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How a server is one of several, which keep what is stored between them."""

    server: str
    """This server's name, another for each."""
    port: int
    """Where it hears the others, on the address where it hears clients."""
    routes: tuple[str, ...]
    """``HOST:PORT`` of each server of the cluster; its own may be among them."""
    password: str = field(repr=False)
    """What the servers show each other."""
    name: str = "computemesh"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What the server is told, its accounts aside."""

    store_dir: Path
    ports_file_dir: Path
    """Where the server writes the port it listens on."""
    pid_file: Path
    accounts_file: str
    """The file with the accounts, relative to the one with this configuration."""
    host: str = "127.0.0.1"
    port: int = ANY_PORT
    max_file_store_bytes: int | None = None
    """Bound on everything stored; left out, three quarters of the free disk."""
    sync_always: bool = False
    """Write through to the disk before each acknowledgement: survives power loss, costs throughput."""
    cluster: ClusterConfig | None = None


def users(credentials: Credentials, role: Role) -> tuple[User, ...]:
    """The users in the account of *role*: one for each node, or one for all who have the role."""
    node_ids = sorted(credentials.nodes) if role is Role.NODE else [""]
    return tuple(
        User(
            name=user_name(role, node_id),
            password=credentials.password(role, node_id),
            permissions=permissions(role, node_id),
        )
        for node_id in node_ids
    )


def render(config: ServerConfig) -> str:
    """The text of the configuration file, without the accounts."""
    blocks = [
        f"listen: {_quoted(f'{config.host}:{config.port}')}",
        f"ports_file_dir: {_quoted(str(config.ports_file_dir))}",
        f"pid_file: {_quoted(str(config.pid_file))}",
        _block("jetstream", _store(config)),
        *(_cluster(config.host, config.cluster) if config.cluster else []),
        f"include {_quoted(config.accounts_file)}",
    ]
    return "\n".join(blocks) + "\n"


def render_accounts(credentials: Credentials) -> str:
    """The text of the file with the accounts. It holds passwords.

    Beside them it says only what a mesh needs of any server, so that it may be included in the
    configuration of one that somebody else runs. That server must have JetStream enabled.
    """
    blocks = [
        f"max_payload: {MAX_PAYLOAD_BYTES}",
        _block("authorization", [f"timeout: {LOGIN_TIMEOUT_S}"]),
        _block("accounts", [_account(role, users(credentials, role), crossings()) for role in Role]),
    ]
    return "\n".join(blocks) + "\n"


def _store(config: ServerConfig) -> list[str]:
    lines = [f"store_dir: {_quoted(str(config.store_dir))}"]
    if config.max_file_store_bytes is not None:
        lines.append(f"max_file_store: {config.max_file_store_bytes}")
    if config.sync_always:
        lines.append("sync_interval: always")
    return lines


def _cluster(host: str, cluster: ClusterConfig) -> list[str]:
    login = f"{ROUTE_USER}:{cluster.password}"
    return [
        f"server_name: {_quoted(cluster.server)}",
        _block(
            "cluster",
            [
                f"name: {_quoted(cluster.name)}",
                f"listen: {_quoted(f'{host}:{cluster.port}')}",
                f"authorization {{ user: {ROUTE_USER}, password: {_quoted(cluster.password)} }}",
                f"routes: {_list(tuple(f'nats://{login}@{route}' for route in cluster.routes))}",
                # Clients have the addresses of all servers; those that they would be told come without a login.
                "no_advertise: true",
            ],
        ),
    ]


def _account(role: Role, members: Iterable[User], passing: list[Crossing]) -> str:
    exported: dict[tuple[str, str, bool], list[str]] = {}
    for c in passing:
        if c.exporter is role:
            exported.setdefault((c.kind, c.subject, c.many_answers), []).append(ACCOUNTS[c.importer])
    return _block(
        ACCOUNTS[role],
        [
            *(["jetstream: enabled"] if role is Role.SERVICES else []),
            _listed("exports", [_export(*what, to) for what, to in exported.items()]),
            _listed("imports", [_import(crossing) for crossing in passing if crossing.importer is role]),
            _listed("users", map(_user, members)),
        ],
    )


def _export(kind: str, subject: str, many_answers: bool, to: list[str]) -> str:
    answers = ", response_type: stream" if many_answers else ""
    return f"{{ {kind}: {_quoted(subject)}, accounts: [{', '.join(to)}]{answers} }}"


def _import(crossing: Crossing) -> str:
    source = f"{{ account: {ACCOUNTS[crossing.exporter]}, subject: {_quoted(crossing.subject)} }}"
    return f"{{ {crossing.kind}: {source} }}"


def _user(user: User) -> str:
    return _block(
        "",
        [
            f"user: {_quoted(user.name)}",
            f"password: {_quoted(user.password)}",
            _block(
                "permissions",
                [
                    f"publish: {{ allow: {_list(user.permissions.publish)} }}",
                    f"subscribe: {{ allow: {_list(user.permissions.subscribe)} }}",
                ],
            ),
        ],
    )


def _listed(name: str, entries: Iterable[str]) -> str:
    return "\n".join([f"{name}: [", *_indented(entries), "]"])


def _block(name: str, lines: list[str]) -> str:
    return "\n".join([f"{name} {{".lstrip(), *_indented(lines), "}"])


def _indented(blocks: Iterable[str]) -> list[str]:
    return [f"  {line}" for block in blocks for line in block.splitlines()]


def _list(subjects: tuple[str, ...]) -> str:
    return f"[{', '.join(map(_quoted, subjects))}]"


def _quoted(text: str) -> str:
    """*text* as a string of the configuration language.

    Nearly JSON's, but a character by number is ``\\x`` and two digits, and ``\\u`` is unknown.
    """
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() or ord(c) > 0xFF else _numbered(c) for c in plain) + '"'


def _numbered(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode())
