"""Trace context (W3C): which request a message, a log line or a run belongs to, across all processes.

A trace id is carried in the ``traceparent`` header of bus messages and HTTP requests, and in the environment
of executors. Whoever handles a message works in a span of its own, so a line of any log leads to all the
others of the same request. Nothing is exported from here; the ids are those that OpenTelemetry uses.

A work item that was submitted without a trace belongs to one that follows from its ``work_id``: every process
comes to the same id, and nothing has to be sent.

Source: https://www.w3.org/TR/trace-context/
"""

from __future__ import annotations

import random
import re
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from hashlib import blake2b
from types import TracebackType
from typing import Final

import msgspec

HEADER: Final = "traceparent"
"""On the bus and over HTTP."""

VARIABLE: Final = "TRACEPARENT"
"""The environment variable that programs started in a trace find theirs in."""

_SAMPLED: Final = "01"
_FORM: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class Trace(msgspec.Struct, frozen=True, gc=False):
    """A trace and the span within it in which this process works."""

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16 hexadecimal digits."""
    flags: str = _SAMPLED

    @property
    def header(self) -> str:
        """What to send, so that the receiver's span becomes a child of this one."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"

    def child(self) -> Trace:
        """A new span of the same trace."""
        return Trace(self.trace_id, _random(64), self.flags)


def begin() -> Trace:
    """A new trace."""
    return Trace(_random(128), _random(64))


def parse(header: str) -> Trace | None:
    """The sender's span; None when *header* is no trace context, which is then ignored as the standard asks."""
    found = _FORM.fullmatch(header)
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    # A later version may add fields behind these; 00 may not, and ff is none.
    if version == "ff" or (version == "00" and more):
        return None
    if trace_id == "0" * 32 or span_id == "0" * 16:
        return None
    return Trace(trace_id, span_id, flags)


def of_work(work_id: str) -> Trace:
    """The trace of an item that came without one."""
    digest = blake2b(work_id.encode(), digest_size=24).hexdigest()
    return Trace(digest[:32], digest[32:])


# Text is the id of a work item whose trace is derived only if someone asks.
_here: ContextVar[Trace | str | None] = ContextVar("trace", default=None)


def current() -> Trace | None:
    """The trace this code runs in."""
    here = _here.get()
    return of_work(here) if isinstance(here, str) else here


def to_send() -> str:
    """The header for a message sent from here; empty when there is none, or the receiver can derive it."""
    here = _here.get()
    return here.header if isinstance(here, Trace) else ""


def within(header: str = "", work_id: str = "") -> AbstractContextManager[None]:
    """Runs a block in a trace: that of a message's header, else that of a work item, else the one around it.

    Args:
        header: a ``traceparent``; what is none is ignored.
        work_id: the item the block is about.
    """
    return _Within(header, work_id) if header or work_id else _UNCHANGED


class _Within:
    __slots__ = ("_here", "_token")

    def __init__(self, header: str, work_id: str) -> None:
        sender = parse(header) if header else None
        self._here: Trace | str | None = sender.child() if sender else work_id or None
        self._token: Token[Trace | str | None] | None = None

    def __enter__(self) -> None:
        if self._here is not None:
            self._token = _here.set(self._here)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            _here.reset(self._token)


_UNCHANGED: Final[AbstractContextManager[None]] = nullcontext()


def enter(trace: Trace) -> None:
    """Puts the rest of this task, and the tasks it starts, into *trace*."""
    _here.set(trace)


def at_work(work_id: str) -> None:
    """Puts the rest of this task into the trace of an item, unless the message that brought it has one."""
    if _here.get() is None:
        _here.set(work_id)


def _random(bits: int) -> str:
    # Unique is enough; zero, which means none, is left out.
    return f"{random.getrandbits(bits) or 1:0{bits // 4}x}"
