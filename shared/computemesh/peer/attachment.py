"""What the parts of a peer have in common: the way to the node's peer-agent, threads for what must wait, and an end."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol, TypeVar

from computemesh.contracts.base import Refused
from computemesh.peer.errors import BAD_MESSAGE, CLOSED, PeerError
from computemesh.peer.signals import Answer, Ended, Question, Told, Traffic, Welcome

logger: Final = logging.getLogger(__name__)

ASK_S: Final = 30.0
A = TypeVar("A")


class Signals(Protocol):
    """The way to the node's peer-agent: a socket in a process, the peer-agent itself for those that it hosts."""

    welcome: Welcome

    def ask(
        self, question: Question, fds: Sequence[int] = (), *, timeout_s: float = ASK_S
    ) -> tuple[Answer, tuple[int, ...]]: ...

    def tell(self, said: Ended) -> None: ...

    def report(self, said: Traffic) -> bool: ...

    def close(self) -> None: ...


OnTold = Callable[[Told], Answer | Refused | None]
OnClosed = Callable[[str], None]
Attach = Callable[[OnTold, OnClosed], Signals]
"""Says hello, and is given what answers the peer-agent from then on, perhaps before it returns."""


class Attachment:
    """A peer's hold on its peer-agent.

    Attributes:
        lock: of the peer's tables; nothing blocks under it.
        closed: why the peer has ended; empty while it lives.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.closed = ""
        self.alias = ""
        self._signals: Signals | None = None
        self._ready = threading.Event()
        self._chores: queue.SimpleQueue[Callable[[], None] | None] | None = None

    def begin(self, signals: Signals | None) -> None:
        """From here on there is a peer; None if it was not to be."""
        self._signals = signals
        if signals is None:
            self.closed = "not attached"
        else:
            self.alias = signals.welcome.alias
        self._ready.set()

    def end(self, reason: str) -> bool:
        """False if it has ended before."""
        with self.lock:
            if self.closed:
                return False
            self.closed = reason
            if self._chores is not None:
                self._chores.put(None)
            return True

    def after_fork(self, reason: str) -> None:
        """The child has ended: the way to the peer-agent is its parent's, and so are the threads."""
        self.lock = threading.RLock()
        self.closed = self.closed or reason
        self._chores = None

    def ready(self) -> bool:
        """Waits until it is known whether there is a peer, and says so."""
        self._ready.wait()
        return not self.closed

    @property
    def signals(self) -> Signals:
        assert self._signals is not None, "asked before the welcome"
        return self._signals

    @property
    def scope(self) -> str:
        return self.signals.welcome.scope

    @property
    def node_id(self) -> str:
        return self.signals.welcome.node_id

    def check_open(self) -> None:
        if self.closed:
            raise PeerError(CLOSED, self.closed)

    def ask(self, question: Question, kind: type[A], fds: Sequence[int] = (), *, timeout_s: float = ASK_S) -> A:
        """What the peer-agent answers, where no descriptors come along.

        Raises:
            PeerError: it refuses, or is not there.
        """
        self.check_open()
        answer, came = self.signals.ask(question, fds, timeout_s=timeout_s)
        close_all(came)
        if not isinstance(answer, kind):
            raise PeerError(
                BAD_MESSAGE, f"the peer-agent answered {type(question).__name__} by {type(answer).__name__}"
            )
        return answer

    def spawn(self, what: str, run: Callable[[], None]) -> None:
        """Runs it in a thread of its own, which does not keep the process from ending."""
        threading.Thread(target=run, name=f"peer-{what}-{self.alias}", daemon=True).start()

    def chore(self, run: Callable[[], None]) -> None:
        """Runs, one after the other, what a transport's thread must not wait for; also when the peer has ended, since
        there may be somebody who waits for what comes of it."""
        with self.lock:
            if self.closed:
                chores = queue.SimpleQueue[Callable[[], None] | None]()
                chores.put(run)
                chores.put(None)
            elif self._chores is None:
                self._chores = chores = queue.SimpleQueue[Callable[[], None] | None]()
                chores.put(run)
            else:
                self._chores.put(run)
                return
        self.spawn("chores", lambda: _do(chores))


def _do(chores: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (run := chores.get()) is not None:
        try:
            run()
        except Exception:
            logger.exception("a chore failed")


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
