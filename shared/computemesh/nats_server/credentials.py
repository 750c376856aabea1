"""Passwords of each role and node and the token of the HTTP edges, generated and kept in one private file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Final

import msgspec

from computemesh.contracts.base import Role
from computemesh.contracts.permissions import user_name
from computemesh.ids import Id
from computemesh.paths import write_private

_SECRET_BYTES: Final = 24

# Nothing that a URL or the server's configuration would need to quote: nats-py takes the password out of
# the URL as it stands, and the server reads one that begins with `$2a$` as a bcrypt hash.
Secret = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{16,128}$")]


class BadCredentialsError(Exception):
    """The credentials file cannot be used."""


class Credentials(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A password for each role and each node, and the token of the HTTP edges."""

    services: Secret
    client: Secret
    observer: Secret
    token: Secret
    nodes: dict[Id, Secret] = {}
    """By node id."""

    def password(self, role: Role, node_id: str = "") -> str:
        """The password of the user of *role*, or of one node.

        Raises:
            KeyError: the node has no user.
        """
        if role is Role.NODE:
            return self.nodes[node_id]
        password: str = getattr(self, role.value)
        return password

    def login(self, role: Role, node_id: str = "") -> str:
        """``user:password``, as it stands in a URL.

        Raises:
            KeyError: the node has no user.
        """
        return f"{user_name(role, node_id)}:{self.password(role, node_id)}"

    def __repr__(self) -> str:
        """Names no secret, so that none ends in a log."""
        return "Credentials(...)"


def generate() -> Credentials:
    """Fresh random credentials, without nodes."""
    return Credentials(services=_secret(), client=_secret(), observer=_secret(), token=_secret())


def load_or_create(path: Path) -> Credentials:
    """The credentials in *path*; when there is no such file it is made, readable by its owner only.

    Any number of processes may call this at the same time: all get the same credentials. A file that
    others could read is made private again.

    Raises:
        BadCredentialsError: the file is there and holds something else.
    """
    with held(path) as present:
        return present


def add_node(path: Path, node_id: str) -> Credentials:
    """The credentials in *path*, with a user for the node, made unless it has one.

    Raises:
        BadCredentialsError: the file is there and holds something else.
    """
    with held(path) as present:
        if node_id in present.nodes:
            return present
        return _save(path, msgspec.structs.replace(present, nodes=present.nodes | {node_id: _secret()}))


def remove_node(path: Path, node_id: str) -> Credentials:
    """The credentials in *path*, without a user for the node.

    Raises:
        BadCredentialsError: the file is there and holds something else.
    """
    with held(path) as present:
        left = {name: secret for name, secret in present.nodes.items() if name != node_id}
        return _save(path, msgspec.structs.replace(present, nodes=left))


@contextlib.contextmanager
def held(path: Path) -> Generator[Credentials]:
    """The credentials in *path*, which nobody else changes meanwhile.

    Raises:
        BadCredentialsError: the file is there and holds something else.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield _load(path)
    finally:
        os.close(descriptor)


def _load(path: Path) -> Credentials:
    if not path.exists():
        return _save(path, generate())
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Credentials)
    except ValueError as error:
        raise BadCredentialsError(
            f"{path} holds no credentials ({error}); remove it and new ones are made at the next start"
        ) from error


def _save(path: Path, credentials: Credentials) -> Credentials:
    write_private(path, msgspec.json.format(msgspec.json.encode(credentials), indent=2).decode() + "\n")
    return credentials


def _secret() -> str:
    return secrets.token_urlsafe(_SECRET_BYTES)
