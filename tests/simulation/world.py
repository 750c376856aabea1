"""Virtual time, processes that can be killed and halted, and the network between them and the server.

An event loop whose clock jumps to the next timer. Every callback belongs to the process in whose context it was
made; those of a process that is dead never run again, not even their ``finally``, and those of one that is halted
wait. Nothing here knows what the processes do.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
import secrets
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final
from unittest.mock import patch

# pyright: reportPrivateUsage=false

EPOCH_S: Final = 1_800_000_000.0
"""What the clocks show when a simulation begins, Unix seconds."""

STEPS_MAX: Final = 300_000
"""Callbacks that may run before time passes."""

HERE: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)
"""The process whose code runs."""

Failed = Callable[[str, BaseException], None]


class NoProgress(Exception):
    """Callbacks call each other, and time does not pass."""


@dataclass(eq=False)
class Process:
    """One life of a program on some machine."""

    name: str
    clock: Clock
    alive: bool = True
    halted: bool = False
    steps: int = 0
    """Callbacks that ran."""
    fuse: int = -1
    """The callback after which :attr:`on_fuse` is called; -1: none. Callbacks at one time lie between two instants of
    the outside, so this is how something happens between them."""
    on_fuse: Callable[[], None] | None = None
    backlog: list[asyncio.Handle] = field(default_factory=list[asyncio.Handle])
    grave: list[Any] = field(default_factory=list[Any])
    """Keeps what never runs again from being torn down, which would run its ``finally``."""
    ends: list[End] = field(default_factory=list["End"])
    """Its connections."""


@dataclass
class Clock:
    """A machine's, which is off by so much and may leap."""

    wall_s: float = 0.0
    monotonic_s: float = 0.0


class SimulatedTask(asyncio.Task[Any]):
    """A task whose place in a set does not follow from its address."""

    number: int
    process: Process | None

    def __hash__(self) -> int:
        return self.number


class SimulatedFuture(asyncio.Future[Any]):
    number: int

    def __hash__(self) -> int:
        return self.number


class Loop(asyncio.AbstractEventLoop):
    """Runs what is ready, then lets time pass to the next timer."""

    def __init__(self, on_defect: Failed) -> None:
        self.now = 0.0
        self.connect: Callable[[Callable[[], asyncio.Protocol]], Coroutine[Any, Any, asyncio.Transport]] | None = None
        """Where :meth:`create_connection` leads."""
        self._on_defect = on_defect
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = count()

    # --- what asyncio asks for ---------------------------------------------------------------------------------------

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is passed over when its time comes."""

    def create_future(self) -> asyncio.Future[Any]:
        future = SimulatedFuture(loop=self)
        future.number = next(self._numbers)
        return future

    def create_task(self, coro: Any, *, name: object = None, context: contextvars.Context | None = None) -> Any:
        task = SimulatedTask.__new__(SimulatedTask)
        task.number = next(self._numbers)  # Before it is put into the set of all tasks.
        task.process = context.get(HERE) if context is not None else HERE.get()
        task.__init__(coro, loop=self, name=str(task.number), context=context)  # type: ignore[misc]
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is not None:
            self._on_defect(str(context.get("message")), error)

    async def create_connection(self, protocol_factory: Any, *_: Any, **__: Any) -> Any:
        assert self.connect is not None
        protocol = protocol_factory()
        return await self.connect(lambda: protocol), protocol

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        """At once: there are no threads."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    # --- running -----------------------------------------------------------------------------------------------------

    def run_until(self, when: float, done: Callable[[], bool] = lambda: False) -> None:
        """Lets time pass up to *when*, or until *done*, which is asked each time the clock moves."""
        asyncio._set_running_loop(self)
        steps = 0
        try:
            while True:
                while self._ready:
                    self._run(self._ready.popleft())
                    steps += 1
                    if steps > STEPS_MAX:
                        raise NoProgress(
                            f"{steps} callbacks at {self.now:.6f} s: {self._ready[0] if self._ready else ''}"
                        )
                steps = 0
                if done() or not self._timers or self._timers[0][0] > when:
                    break
                self.now, _, handle = heapq.heappop(self._timers)
                self._run(handle)
                while self._timers and self._timers[0][0] <= self.now:
                    self._ready.append(heapq.heappop(self._timers)[2])
            if not done():
                self.now = max(self.now, when)
        finally:
            asyncio._set_running_loop(None)

    def _run(self, handle: asyncio.Handle) -> None:
        if handle._cancelled:
            return
        process: Process | None = handle._context.get(HERE)  # type: ignore[attr-defined]
        if process is None:
            handle._run()
        elif not process.alive:
            process.grave.append(handle)
        elif process.halted:
            process.backlog.append(handle)
        else:
            handle._run()
            process.steps += 1
            if process.steps == process.fuse and process.on_fuse is not None:
                process.on_fuse()

    def start(self, process: Process, main: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """Begins a process."""
        context = contextvars.Context()
        context.run(HERE.set, process)
        task: asyncio.Task[None] = context.run(lambda: self.create_task(main(), context=context))
        return task

    def kill(self, process: Process) -> None:
        """No more of its code runs. What it has sent arrives, and then the end of its connections."""
        if not process.alive:
            return
        process.alive = False
        process.grave += [task for task in asyncio.all_tasks(self) if task.process is process]  # type: ignore[attr-defined]
        process.grave += process.backlog
        for end in process.ends:
            end.close_by_kernel()

    def halt(self, process: Process) -> None:
        process.halted = True

    def go_on(self, process: Process) -> None:
        if process.halted:
            process.halted = False
            self._ready.extend(process.backlog)
            process.backlog.clear()


def _here_clock() -> Clock:
    process = HERE.get()
    return process.clock if process is not None else _TRUE_CLOCK


_TRUE_CLOCK: Final = Clock()


@contextmanager
def virtual_time(loop: Loop, seed: int) -> Generator[None]:
    """Clocks, chance and names follow from the loop and the seed."""
    chance = random.Random(seed)
    random.seed(seed)

    def wall() -> float:
        return EPOCH_S + loop.now + _here_clock().wall_s

    def monotonic() -> float:
        return 1000.0 + loop.now + _here_clock().monotonic_s

    def token_hex(size: int = 16) -> str:
        return chance.randbytes(size).hex()

    with (
        patch.object(time, "time", wall),
        patch.object(time, "monotonic", monotonic),
        patch.object(secrets, "token_hex", token_hex),
        patch("nats.aio.client.token_hex", token_hex),
        patch("nats.nuid.token_bytes", chance.randbytes),
        patch("nats.nuid.randbelow", chance.randrange),
    ):
        yield


# --- the network -----------------------------------------------------------------------------------------------------


class Path:
    """One direction of a connection: bytes arrive late, in order, and only while it is not cut."""

    def __init__(self, loop: Loop, link: Link, context: contextvars.Context, direction: str) -> None:
        self._loop = loop
        self._link = link
        self._context = context
        self._direction = direction
        self._queue: deque[tuple[float, Callable[[], None]]] = deque()
        self._last = 0.0
        self._pending = False
        self.broken = False

    def send(self, arrive: Callable[[], None]) -> None:
        self._last = max(self._last, self._loop.now + self._link.delay_s())
        self._queue.append((self._last, arrive))
        self._arm()

    def drop(self) -> None:
        """What is on its way is gone."""
        self.broken = True
        self._queue.clear()

    def _arm(self) -> None:
        if self._queue and not self._pending:
            self._pending = True
            when = max(self._queue[0][0], self._link.cut_until[self._direction])
            self._loop.call_at(when, self._deliver, context=self._context)

    def _deliver(self) -> None:
        self._pending = False
        if self._queue and self._loop.now >= self._link.cut_until[self._direction]:
            _, arrive = self._queue.popleft()
            arrive()
        self._arm()


@dataclass
class Link:
    """Between one machine and the server."""

    rng: random.Random
    delays_s: tuple[float, ...]
    cut_until: dict[str, float] = field(default_factory=lambda: {"up": 0.0, "down": 0.0})
    """Until when nothing arrives at the server, and nothing from it."""

    def delay_s(self) -> float:
        chance = self.rng.random()
        return self.delays_s[int(chance * len(self.delays_s))] * (0.5 + (chance * 1009) % 1)


class End(asyncio.Transport):
    """The client's end of a connection."""

    def __init__(self, loop: Loop, link: Link, protocol: asyncio.Protocol, server_end: ServerEnd) -> None:
        super().__init__()
        self._loop = loop
        self._protocol = protocol
        self._server_end = server_end
        self._closing = False
        self._lost = False
        self.up = Path(loop, link, contextvars.Context(), "up")
        self.down = Path(loop, link, contextvars.copy_context(), "down")

    # --- what asyncio's streams ask for ------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._closing and data:
            chunk = bytes(data)
            self.up.send(lambda: self._server_end.received(chunk))

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self.close_by_kernel()
            self._loop.call_soon(self._lose, None)

    abort = close

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None:
        """The reader's buffer is large enough."""

    def resume_reading(self) -> None:
        pass

    # --- the network's side ------------------------------------------------------------------------------------------

    def deliver(self, data: bytes) -> None:
        """From the server."""

        def arrive() -> None:
            if not self._lost:
                self._protocol.data_received(data)

        self.down.send(arrive)

    def close_by_kernel(self) -> None:
        if not self._closing:
            self._closing = True
            self.up.send(self._server_end.closed)

    def reset(self, *, lose_up: bool) -> None:
        """The connection breaks. What is on its way down is lost; what is on its way up, perhaps."""
        self.down.drop()
        if lose_up:
            self.up.drop()
        if not self._closing:
            self._closing = True
            self.up.send(self._server_end.closed)
        self.down._context.run(self._loop.call_soon, self._lose, ConnectionResetError("connection reset"))

    def _lose(self, error: Exception | None) -> None:
        if not self._lost:
            self._lost = True
            self._protocol.connection_lost(error)


class ServerEnd:
    """The server's end: what the server must offer."""

    def received(self, data: bytes) -> None:
        raise NotImplementedError

    def closed(self) -> None:
        raise NotImplementedError
