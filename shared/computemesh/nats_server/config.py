"""The configuration file of the NATS server, as text made from values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from computemesh.contracts.base import Role
from computemesh.contracts.permissions import RESPONSES_EXPIRE_S, RESPONSES_MAX, Permissions, permissions
from computemesh.nats_server.credentials import Credentials

ANY_PORT: Final = -1
MAX_PAYLOAD_BYTES: Final = 8 * 1024 * 1024
"""Bound on one message; above it the server closes the sender's connection."""

LOGIN_TIMEOUT_S: Final = 5
"""How long a connection may take to present its credentials."""


@dataclass(frozen=True, kw_only=True)
class User:
    """Someone who may connect, and what they may do then."""

    name: str
    password: str = field(repr=False)
    permissions: Permissions


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What the server is told."""

    store_dir: Path
    ports_file_dir: Path
    """Where the server writes the port it listens on."""
    pid_file: Path
    users: tuple[User, ...]
    host: str = "127.0.0.1"
    port: int = ANY_PORT
    max_payload_bytes: int = MAX_PAYLOAD_BYTES
    max_file_store_bytes: int | None = None
    """Bound on everything stored; left out, three quarters of the free disk."""
    sync_always: bool = False
    """Write through to the disk before each acknowledgement: survives power loss, costs throughput."""


def users(credentials: Credentials) -> tuple[User, ...]:
    """One user for each role, with the permissions that follow from the contracts."""
    return tuple(
        User(name=credentials.user(role), password=credentials.password(role), permissions=permissions(role))
        for role in Role
    )


def render(config: ServerConfig) -> str:
    """The text of the configuration file. It holds passwords."""
    blocks = [
        f"listen: {_quoted(f'{config.host}:{config.port}')}",
        f"ports_file_dir: {_quoted(str(config.ports_file_dir))}",
        f"pid_file: {_quoted(str(config.pid_file))}",
        f"max_payload: {config.max_payload_bytes}",
        _block("jetstream", _store(config)),
        _block(
            "authorization",
            [f"timeout: {LOGIN_TIMEOUT_S}", "users: [", *_indented(map(_user, config.users)), "]"],
        ),
    ]
    return "\n".join(blocks) + "\n"


def _store(config: ServerConfig) -> list[str]:
    lines = [f"store_dir: {_quoted(str(config.store_dir))}"]
    if config.max_file_store_bytes is not None:
        lines.append(f"max_file_store: {config.max_file_store_bytes}")
    if config.sync_always:
        lines.append("sync_interval: always")
    return lines


def _user(user: User) -> str:
    allowed = [
        f"publish: {{ allow: {_list(user.permissions.publish)} }}",
        f"subscribe: {{ allow: {_list(user.permissions.subscribe)} }}",
    ]
    if user.permissions.may_respond:
        allowed.append(
            f'allow_responses: {{ max: {RESPONSES_MAX}, expires: "{RESPONSES_EXPIRE_S}s" }}',
        )
    return _block(
        "",
        [
            f"user: {_quoted(user.name)}",
            f"password: {_quoted(user.password)}",
            _block("permissions", allowed),
        ],
    )


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
