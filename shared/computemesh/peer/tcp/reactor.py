"""A thread that looks after many sockets."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

logger: Final = logging.getLogger(__name__)

STOP_S: Final = 2.0
"""So long the end of a thread is waited for: it may itself wait for the one that ends it."""

GLANCE_S: Final = 0.002

SPIN_S: Final = 0.0001
"""So long a thread that has just had something to read looks for more before it sleeps. To be woken where the processor
sleeps, too, costs about as much."""

Handler = Callable[[int], None]
"""Is told what epoll says of its socket."""


class Reactor:
    """Waits for sockets, and calls whom they belong to; descriptors are closed nowhere but in its thread.

    A descriptor that is closed may be given out again at once. Where only this thread closes them, and not while it
    goes through what epoll said, nobody is ever called for another one's socket.
    """

    def __init__(self, name: str, tick_s: float, on_tick: Callable[[], None] | None = None) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._glances: list[Callable[[], bool]] = []
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._tick_s = tick_s
        self._on_tick = on_tick
        self._stopping = False
        self._stopped = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def register(self, fd: int, handler: Handler, events: int) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def call(self, what: Callable[[], None]) -> None:
        """Runs it in the reactor's thread, soon. Once the reactor has stopped, in this one."""
        with self._lock:
            if not self._stopped:
                self._calls.append(what)
                os.eventfd_write(self._wake, 1)
                return
        what()

    def glance(self, look: Callable[[], bool]) -> None:
        """Calls it every `GLANCE_S` in the reactor's thread, until it says False."""
        self.call(lambda: self._glances.append(look))

    def stop(self) -> None:
        """Runs what it was given, and ends. Returns when it has, unless it was called by the reactor itself, or by what
        the reactor waits for, as a callback of a transfer that another thread drives."""
        with self._lock:
            self._stopping = True
            if not self._stopped:
                os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join(STOP_S)

    def after_fork(self) -> None:
        """The child has no such thread. To close its descriptors takes nothing from what the parent waits for."""
        self._lock = threading.Lock()
        self._stopped = True
        if not self._epoll.closed:
            self._epoll.close()
            os.close(self._wake)

    def _run(self) -> None:
        handlers = self._handlers
        poll = self._epoll.poll
        tick_at = time.monotonic() + self._tick_s
        glance_at = 0.0
        spin_until = 0.0
        while True:
            found = poll(0)
            if not found:
                if (now := time.perf_counter()) < spin_until:
                    os.sched_yield()
                    if not self._calls:
                        continue
                found = poll(GLANCE_S if self._glances else self._tick_s)
            for fd, events in found:
                spin_until = time.perf_counter() + SPIN_S if events & select.EPOLLIN else 0.0
                if (handler := handlers.get(fd)) is not None:
                    try:
                        handler(events)
                    except Exception:
                        logger.exception("the tcp transport failed")
                elif fd == self._wake:
                    os.eventfd_read(fd)
            while self._calls:
                self._guarded(self._calls.popleft())
            if self._glances and (now := time.monotonic()) >= glance_at:
                glance_at = now + GLANCE_S
                self._glances = [look for look in self._glances if look()]
            if self._on_tick is not None and (now := time.monotonic()) >= tick_at:
                tick_at = now + self._tick_s
                self._guarded(self._on_tick)
            if self._stopping:
                with self._lock:
                    if not self._calls:
                        self._stopped = True
                        self._epoll.close()
                        os.close(self._wake)
                        return

    @staticmethod
    def _guarded(what: Callable[[], None]) -> None:
        try:
            what()
        except Exception:
            logger.exception("the tcp transport failed in %r", what)
