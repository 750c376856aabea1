"""A look at what runs on a server and what is stored there: for operators, and read-only.

The replies are the NATS server's, which says more than is read here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import datetime
from typing import Any

import msgspec
from nats.aio.msg import Msg

from computemesh.bus.connection import ApiError, Bus
from computemesh.bus.errors import NotStored


class AccountLimits(msgspec.Struct, frozen=True, kw_only=True):
    max_storage: int = -1
    """-1 = not bounded."""


class AccountInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the account uses of JetStream."""

    storage: int = 0
    reserved_storage: int = 0
    limits: AccountLimits = AccountLimits()
    error: ApiError | None = None


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    current: bool = False
    offline: bool = False


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    leader: str = ""
    replicas: list[Replica] = []


class StreamState(msgspec.Struct, frozen=True, kw_only=True):
    messages: int = 0
    bytes: int = 0


class StreamInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A stream as it is."""

    config: dict[str, Any] = {}
    state: StreamState = StreamState()
    cluster: Cluster = Cluster()
    ts: str = ""
    """The server's time when it answered, RFC 3339."""
    error: ApiError | None = None


class Pong(msgspec.Struct, frozen=True, kw_only=True):
    """An answer to ``$SRV.PING``."""

    name: str
    id: str
    version: str = ""
    metadata: dict[str, str] = {}


async def account(bus: Bus) -> AccountInfo:
    """What this account uses of JetStream; its ``error`` says when it may not use any."""
    reply = await bus.call("$JS.API.INFO", b"")
    return msgspec.json.decode(reply.data, type=AccountInfo)


async def stream(bus: Bus, name: str) -> StreamInfo | None:
    """A stream as it is; None when there is none of that name.

    Raises:
        NotStored: the server does not tell.
    """
    reply = await bus.call(f"$JS.API.STREAM.INFO.{name}", b"")
    info = msgspec.json.decode(reply.data, type=StreamInfo)
    if info.error is None:
        return info
    if info.error.code == 404:
        return None
    raise NotStored(f"{name}: {info.error.description}", code=info.error.err_code)


async def clock_ahead_s(bus: Bus, name: str) -> tuple[float, float] | None:
    """How far the server's clock is ahead of ours, and how far off that may be, both in seconds.

    Args:
        name: of a stream that is there; its leader's clock is the one compared.
    """
    asked_at = time.time()
    info = await stream(bus, name)
    heard_at = time.time()
    if info is None or not info.ts:
        return None
    return _unix_s(info.ts) - (asked_at + heard_at) / 2, (heard_at - asked_at) / 2


def _unix_s(text: str) -> float:
    """RFC 3339 with up to nanoseconds; Python reads microseconds."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    return datetime.fromisoformat(f"{whole}.{(fraction or '0')[:6]:0<6}+00:00").timestamp()


async def ping(bus: Bus, *, expected: set[str], wait_s: float) -> list[Pong]:
    """Every service that answers in time.

    Args:
        expected: instances whose answers are waited for; once all have come, it returns at once.
        wait_s: how long it waits otherwise.
    """
    found: list[Pong] = []
    complete = asyncio.Event()

    async def on_pong(message: Msg) -> None:
        with contextlib.suppress(ValueError):
            found.append(msgspec.json.decode(message.data, type=Pong))
        if expected and expected <= {pong.metadata.get("instance", "") for pong in found}:
            complete.set()

    inbox = bus.new_inbox()
    heard = await bus.listen(inbox, on_pong)
    await bus.send("$SRV.PING", b"", reply=inbox)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(complete.wait(), wait_s)
    await bus.forget(heard)
    return found
