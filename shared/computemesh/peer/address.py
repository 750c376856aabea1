"""What programs give as the address of a mesh: the socket of a peer-agent, a control plane, or a bus."""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final, NamedTuple, cast
from urllib.parse import urlsplit

from computemesh.peer.core import Core
from computemesh.peer.errors import OTHER_MESH, UNAVAILABLE, PeerError
from computemesh.peer.socket import socket_path

_HTTP_TIMEOUT_S: Final = 10.0
_HOST_AND_PORT: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^/:\s]+):[0-9]+/?")


class Address(NamedTuple):
    """Where the peer-agent is, and what is asked whether it is the right one."""

    socket: Path
    url: str
    """Of a control plane or a bus; empty where none was given."""


def read_address(text: str) -> Address:
    """What a program means; empty stands for the peer-agent of this machine.

    A host and a port, as ``127.0.0.1:3000``, are those of a control plane. A socket of such a name is ``./NAME:1``.
    """
    if not text:
        return Address(socket_path(), "")
    if _HOST_AND_PORT.fullmatch(text):
        return Address(socket_path(), f"http://{text}")
    if "://" in text and not text.startswith("unix:"):
        return Address(socket_path(), text)
    return Address(Path(text.removeprefix("unix://").removeprefix("unix:")), "")


def check_mesh(url: str, core: Core) -> None:
    """Whether the peer-agent of this machine belongs to the mesh that a program was told of.

    Raises:
        PeerError: `other_mesh`; or `unavailable`, since no control plane answers there.
        ValueError: it is no address.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"nanoctrl_url: {url!r} is no address: {error}") from None
    other = PeerError(OTHER_MESH, f"the peer-agent of this machine belongs to another mesh than {url}")
    if parts.scheme in ("nats", "tls"):
        bus = urlsplit(core.welcome.bus)
        if (parts.hostname, port or 4222) != (bus.hostname, bus.port or 4222):
            raise other
        return
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"nanoctrl_url: {url!r} is neither a path nor an address with http:// or nats://")
    body = json.dumps({"scope": core.scope}).encode()
    request = urllib.request.Request(  # noqa: S310  # The scheme was looked at above.
        f"{url.rstrip('/')}/query", data=body, headers={"Content-Type": "application/json"}, method="POST"
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_HTTP_TIMEOUT_S) as answer:
            found: Any = json.loads(answer.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = error.reason if isinstance(error, urllib.error.URLError) else error
        raise PeerError(
            UNAVAILABLE,
            f"nanoctrl_url: no control plane answers at {url} ({why}); `computemesh status` shows where that of this "
            "machine listens, and without an address none is asked",
        ) from None
    names: set[object] = set()
    if isinstance(found, list):
        names = {cast(dict[str, Any], one).get("name") for one in cast(list[object], found) if isinstance(one, dict)}
    if core.alias not in names:
        raise other
