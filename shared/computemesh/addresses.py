"""Addresses of the bus: one NATS server, or several of one cluster, separated by commas."""

from __future__ import annotations

from typing import Final

SCHEME: Final = "nats"


def servers_of(url: str) -> list[str]:
    """The servers that *url* names, each with a scheme and, where it has none of its own, the login of the first."""
    named = [name.strip() for name in url.split(",") if name.strip()]
    first = login_of(url)
    found: list[str] = []
    for name in named:
        scheme, _, rest = name.rpartition("://")
        own, _, host = rest.rpartition("@")
        own = own or first
        found.append(f"{scheme or SCHEME}://{own + '@' if own else ''}{host}")
    return found


def login_of(url: str) -> str:
    """``user:password`` as it stands in the address of the first server; empty when it has none."""
    return url.partition(",")[0].rpartition("://")[2].rpartition("@")[0]


def with_login(url: str, login: str) -> str:
    """The same servers with another login."""
    return ",".join(f"{scheme}://{login}@{host}" for scheme, host in map(_parts, servers_of(url)))


def without_login(url: str) -> str:
    """The same servers without credentials, for messages."""
    return ",".join(f"{scheme}://{host}" for scheme, host in map(_parts, servers_of(url)))


def _parts(server: str) -> tuple[str, str]:
    scheme, _, rest = server.partition("://")
    return scheme, rest.rpartition("@")[2]
