"""Asks engines of other nodes over the bus, and watches over their answers.

With each node it holds one conversation at a time, a session of :mod:`computemesh.contracts.infer`, for as long as
answers of that node are open. A node that falls silent is asked whether it is there. An answer breaks off as soon as it
is known that it will not be whole: a part is missing, the node does not know it any more, the node or the connection is
gone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, Final, Self

from msgspec.structs import replace

from computemesh import log
from computemesh.answers import Answer, AnswerFailed
from computemesh.bus import Bus, BusError, NoResponder, NotStored, PartsInbox, TimedOut
from computemesh.contracts.base import Refused
from computemesh.contracts.infer import ASK, CONTROL, CONTROL_S, InferAsk, InferControl, InferPart
from computemesh.ids import new_id
from computemesh.tasks import end_all

CONNECT_S: Final = 2.0
"""How long a question waits for a connection that is being made again."""

SILENCE_S: Final = 1.0
"""A node of which nothing was heard for so long, with answers open, is asked whether it is there."""

REPLY_S: Final = 1.5
"""How long it may take to say so; one that does not say so twice is lost."""

NOBODY_AGAIN_S: Final = 0.05
"""While the NATS server takes in a change of its configuration it knows nobody, for some microseconds. So it is asked
again after this pause."""

NAMED_MAX: Final = 4096
"""Streams that one message names, at most."""

GOODBYE_S: Final = 1.0
"""How long the end waits for nodes to hear that their answers are not wanted any more."""

_log = log.get("infer")


class InferClient:
    """Asks engines on behalf of one process, over one connection.

    ::

        async with InferClient(bus) as engines:
            answer = await engines.open("n1", InferAsk(stream=new_id("i"), model="smollm2-135m-instruct", body={...}))
            if isinstance(answer, Refused):
                ...
            async with contextlib.aclosing(answer):
                async for text in answer:
                    ...
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._inbox = PartsInbox(bus)
        self._nodes: dict[str, _Conversation] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listens for answers. Before the first :meth:`open`, and once."""
        await self._inbox.start()
        self._spawn(self._watch_connection())

    async def stop(self) -> None:
        """Stops every answer that is open."""
        attending = [node.attending for node in self._nodes.values() if node.attending is not None]
        for node in list(self._nodes.values()):
            for stream in list(node.streams.values()):
                await stream.aclose()
        if attending:
            await asyncio.wait(attending, timeout=GOODBYE_S)
        await end_all(self._tasks)
        await self._inbox.stop()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def open(self, node_id: str, ask: InferAsk) -> Answer | Refused:
        """Asks an engine of a node, and waits until it begins to answer.

        Args:
            ask: its ``session`` is put in here.

        Returns:
            The answer, or the node's refusal. Also one where the node is not there or is lost before the answer begins
            (``node_lost``, 503), the connection breaks or is gone (``stream_broken``, ``unavailable``, 503), and where
            the question is too large for the bus (``too_large``, 413).
        """
        if not self._bus.connected.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._bus.connected.wait(), CONNECT_S)
            if not self._bus.connected.is_set():
                return Refused(code="unavailable", reason="no connection to NATS", status=503, retry="later")
        stream = await self._ask(node_id, ask)
        if isinstance(stream, Refused):
            return stream
        try:
            refused = await stream.begun
            if refused is not None and refused.code == _NOBODY.code:
                await asyncio.sleep(NOBODY_AGAIN_S)
                again = await self._ask(node_id, ask)
                if isinstance(again, Refused):
                    return again
                stream = again
                refused = await stream.begun
        except asyncio.CancelledError:
            await stream.aclose()
            raise
        return stream if refused is None else _lost(node_id) if refused.code == _NOBODY.code else refused

    async def _ask(self, node_id: str, ask: InferAsk) -> _Stream | Refused:
        node = self._nodes.get(node_id)
        if node is None:
            node = self._nodes[node_id] = _Conversation(node_id, self._bus, self._leave)
        stream = _Stream(ask.stream, node, ask.window, self._inbox.forget)
        node.streams[stream.id] = stream
        try:
            asked = replace(ask, session=node.session)
            stream.inbox_name = await self._inbox.ask(ASK, asked, stream.on_part, target=node_id)
        except NotStored as error:
            stream.finish()
            return Refused(code="too_large", reason=str(error), status=413)
        except BusError as error:
            stream.finish()
            return Refused(code="unavailable", reason=str(error), status=503, retry="later")
        finally:
            if node.attending is None:
                node.attending = self._spawn(node.attend())
        return stream

    def _leave(self, node: _Conversation) -> None:
        """The conversation is over. The next answer of that node is of a new one."""
        if self._nodes.get(node.node_id) is node:
            del self._nodes[node.node_id]

    async def _watch_connection(self) -> None:
        """What was asked on a connection that broke is answered nowhere."""
        while True:
            await self._bus.interrupted.wait()
            for node in list(self._nodes.values()):
                node.end(_broken("the connection to NATS broke"))
            await self._bus.connected.wait()

    def _spawn(self, doing: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(doing)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Conversation:
    """The answers of one node that are open, and what it is told of them."""

    def __init__(self, node_id: str, bus: Bus, on_end: Callable[[_Conversation], None]) -> None:
        self.node_id: Final = node_id
        self.session: Final = new_id("s")
        self.streams: dict[str, _Stream] = {}
        self.unwanted: list[str] = []
        """Streams that the node is still to be told to stop."""
        self.attending: asyncio.Task[None] | None = None
        self.heard_s = asyncio.get_running_loop().time()
        self._bus = bus
        self._on_end = on_end
        self._due = asyncio.Event()
        """Something is to be told at once."""
        self._taken: set[_Stream] = set()
        """Those of which the node is to be told how much was taken."""
        self._told_all_s = self.heard_s
        self._its_session = ""
        self._failures = 0

    def tell_taken(self, stream: _Stream) -> None:
        self._taken.add(stream)
        self._due.set()

    def leave(self, stream: _Stream, *, unwanted: bool) -> None:
        """Nothing more of an answer is expected."""
        if self.streams.pop(stream.id, None) is None:
            return
        self._taken.discard(stream)
        if unwanted:
            self.unwanted.append(stream.id)
        if unwanted or not self.streams:
            self._due.set()

    def end(self, why: Refused) -> None:
        """Breaks off all answers; the conversation is over."""
        for stream in list(self.streams.values()):
            stream.fail(why, stop=False)
        self.unwanted.clear()
        self._on_end(self)
        self._due.set()

    async def attend(self) -> None:
        """Tells the node what it must know, for as long as there is something to tell."""
        loop = asyncio.get_running_loop()
        try:
            while self.streams or self.unwanted:
                pause_s = min(self._told_all_s + CONTROL_S, self.heard_s + SILENCE_S) - loop.time()
                if pause_s > 0 and not self._due.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._due.wait(), pause_s)
                    continue
                self._due.clear()
                await self._tell(everything=self._told_all_s + CONTROL_S <= loop.time())
        finally:
            self._on_end(self)

    async def _tell(self, *, everything: bool) -> None:
        loop = asyncio.get_running_loop()
        named = list(self.streams.values() if everything else self._taken)
        self._taken.clear()
        cancel, self.unwanted = self.unwanted[:NAMED_MAX], self.unwanted[NAMED_MAX:]
        if everything:
            self._told_all_s = loop.time()
        while True:
            part, named = named[:NAMED_MAX], named[NAMED_MAX:]
            await self._control({stream.id: stream.tell() for stream in part}, cancel)
            if not named or not self.streams:
                return
            cancel = []

    async def _control(self, taken: dict[str, int], cancel: list[str]) -> None:
        asked_s = asyncio.get_running_loop().time()
        asked = InferControl(session=self.session, taken=taken, cancel=cancel)
        try:
            answer = await self._bus.ask(CONTROL, asked, target=self.node_id, timeout_s=REPLY_S)
        except NoResponder:
            await self._failed(cancel, "nobody answers for it")
            await asyncio.sleep(NOBODY_AGAIN_S)
        except BusError as error:
            if self.heard_s < asked_s:  # Else parts came meanwhile: it is slow, but there.
                await self._failed(cancel, str(error))
            elif isinstance(error, TimedOut):
                self._again(cancel)
        else:
            self._failures = 0
            self.heard_s = asyncio.get_running_loop().time()
            if isinstance(answer, Refused):
                _log.warning("a node does not understand", node=self.node_id, reason=answer.reason)
                self.end(_broken(f"node {self.node_id} does not understand: {answer.reason}"))
                return
            for stream in [found for name in answer.unknown if (found := self.streams.get(name))]:
                stream.fail(_broken(f"node {self.node_id} does not have this answer any more"), stop=False)
            if answer.session != self._its_session:
                # Which of the answers were begun in its last life? It knows.
                if self._its_session:
                    self._told_all_s = 0.0
                    self._due.set()
                self._its_session = answer.session

    async def _failed(self, cancel: list[str], why: str) -> None:
        self._failures += 1
        if self._failures == 1:
            self._again(cancel)
            return
        _log.warning("a node is lost", node=self.node_id, reason=why, answers=len(self.streams))
        self.end(_lost(self.node_id))

    def _again(self, cancel: list[str]) -> None:
        """What one message was to tell is told once more."""
        self.unwanted += cancel
        self._told_all_s = 0.0
        self._due.set()


class _Stream:
    """One answer, as it is asked for and read. Implements :class:`computemesh.answers.Answer`."""

    def __init__(self, stream_id: str, node: _Conversation, window: int, forget: Callable[[str], None]) -> None:
        self.id: Final = stream_id
        self.status = 200
        self.content_type = ""
        self.device = ""
        self.inbox_name = ""
        self.begun: asyncio.Future[Refused | None] = asyncio.get_running_loop().create_future()
        """Done once the answer begins, or it is known why it does not."""
        self._node = node
        self._window = window
        self._forget = forget
        self._next = 0
        self._texts: list[str] = []
        """What has come and is not read yet."""
        self._come = 0
        """Characters, from the beginning of the answer, as the following."""
        self._read = 0
        self._taken = 0
        self._told = 0
        self._ended = False
        self._failed: Refused | None = None
        self._reader: asyncio.Future[None] | None = None

    # --- from the node -----------------------------------------------------------------------------------------

    def on_part(self, part: InferPart | Refused | None) -> None:
        node = self._node
        node.heard_s = asyncio.get_running_loop().time()
        if part is None:
            self.fail(_NOBODY, stop=False)
            return
        if isinstance(part, Refused):
            self.fail(part, stop=False)
            return
        if part.seq != self._next:
            self.fail(_broken(f"part {self._next} of an answer of node {node.node_id} was lost"), stop=True)
            return
        self._next += 1
        if part.text:
            self._texts.append(part.text)
            self._come += len(part.text)
            if self._come - self._told > self._window:
                self.fail(_broken(f"node {node.node_id} sends more than is taken"), stop=True)
                return
        if part.content_type and not self.begun.done():
            self.status, self.content_type, self.device = part.status, part.content_type, part.device
            self.begun.set_result(None)
        if part.failed is not None:
            self.fail(part.failed, stop=False)
        elif part.last:
            self.finish()
        self._wake()

    def fail(self, why: Refused, *, stop: bool) -> None:
        """The answer breaks off here.

        Args:
            stop: the node may still be giving it.
        """
        if not self._ended:
            self._failed = why
            self.finish(unwanted=stop)

    def finish(self, *, unwanted: bool = False) -> None:
        self._ended = True
        self._forget(self.inbox_name)
        self._node.leave(self, unwanted=unwanted)
        if not self.begun.done():
            self.begun.set_result(self._failed or _broken("the answer ended before it began"))
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # --- to the node -------------------------------------------------------------------------------------------

    def tell(self) -> int:
        """Characters taken, as the node is told now."""
        self._told = self._taken
        return self._taken

    # --- for the reader ----------------------------------------------------------------------------------------

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> str:
        # Who asks for more has done with what he got.
        if self._taken < self._read:
            self._taken = self._read
            if not self._ended and self._taken - self._told >= self._window // 2:
                self._node.tell_taken(self)
        while not self._texts:
            if self._failed is not None:
                raise AnswerFailed(self._failed)
            if self._ended:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        text = self._texts[0] if len(self._texts) == 1 else "".join(self._texts)
        self._texts.clear()
        self._read += len(text)
        return text

    async def aclose(self) -> None:
        self._texts.clear()
        if not self._ended:
            self.finish(unwanted=True)


_NOBODY: Final = Refused(code="nobody", reason="nobody answers for the node", status=503, retry="elsewhere")


def _lost(node_id: str) -> Refused:
    return Refused(code="node_lost", reason=f"node {node_id} is not there", status=503, retry="elsewhere")


def _broken(reason: str) -> Refused:
    return Refused(code="stream_broken", reason=reason, status=503, retry="elsewhere")
