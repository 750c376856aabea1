"""Passwords of each role and the token of the HTTP edges, generated once and kept in one private file."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import Annotated, Final

import msgspec

from computemesh.contracts.base import Role
from computemesh.paths import write_private

_SECRET_BYTES: Final = 24

# Nothing that a URL or the server's configuration would need to quote: nats-py takes the password out of
# the URL as it stands, and the server reads one that begins with `$2a$` as a bcrypt hash.
Secret = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{16,128}$")]


class BadCredentialsError(Exception):
    """The credentials file cannot be used."""


class Credentials(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A password for each role, whose user name is the role's value, and the token of the HTTP edges."""

    services: Secret
    node: Secret
    client: Secret
    observer: Secret
    token: Secret

    def user(self, role: Role) -> str:
        """The user name of *role*."""
        return role.value

    def password(self, role: Role) -> str:
        """The password of *role*."""
        password: str = getattr(self, role.value)
        return password

    def __repr__(self) -> str:
        """Names no secret, so that none ends in a log."""
        return "Credentials(...)"


def generate() -> Credentials:
    """Fresh random credentials."""
    new = {field: secrets.token_urlsafe(_SECRET_BYTES) for field in Credentials.__struct_fields__}
    return Credentials(**new)


def load_or_create(path: Path) -> Credentials:
    """The credentials in *path*; when there is no such file it is made, readable by its owner only.

    Any number of processes may call this at the same time: all get the same credentials. A file that
    others could read is made private again.

    Raises:
        BadCredentialsError: the file is there and holds something else.
    """
    if not path.exists():
        _create(path)
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Credentials)
    except ValueError as error:
        raise BadCredentialsError(
            f"{path} holds no credentials ({error}); remove it and new ones are made at the next start"
        ) from error


def _create(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    write_private(draft, msgspec.json.format(msgspec.json.encode(generate()), indent=2).decode() + "\n")
    try:
        # Unlike a rename, a link never replaces the file of another process that was faster.
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(draft)
    finally:
        draft.unlink()
