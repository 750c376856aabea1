"""A process's end of the Unix socket to its node's peer-agent.

When the peer-agent goes away, the socket looks for it until it is back, says hello with the same alias, and puts again
the regions that were put: connections between processes go on meanwhile, since no byte of theirs passes here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from computemesh.contracts.base import Refused
from computemesh.contracts.peers import Close, Connect, Connected, Resolve
from computemesh.ids import EntityId
from computemesh.paths import home
from computemesh.peer.errors import BAD_MESSAGE, CLOSED, FORKED, NO_AGENT, UNAVAILABLE, PeerError
from computemesh.peer.frames import FrameError, Outbox, Said, Splitter, close_fds, copy_fds, discard, receive
from computemesh.peer.signals import (
    SOCKET_NAME,
    Accept,
    Accepted,
    Answer,
    Begun,
    Call,
    Called,
    Desired,
    DropRegion,
    Ended,
    Frame,
    Hello,
    HostedTransfer,
    Lost,
    Order,
    PutEpochs,
    PutRegion,
    Question,
    Told,
    Traffic,
    Welcome,
)

SOCKET_VARIABLE: Final = "COMPUTEMESH_PEER_SOCKET"
ASK_TIMEOUT_S: Final = 30.0
CONNECT_TIMEOUT_S: Final = 30.0
"""For the peer-agent to take a process, which may wait for the control plane."""
SEND_TIMEOUT_S: Final = 10
"""A peer-agent that takes nothing for so long is halted; the connection is given up."""
RETRY_S: Final = (0.02, 1.0)
"""The first pause between attempts to reach a peer-agent that went away, which doubles, and the longest."""
WORKERS: Final = 4
"""Questions of the peer-agent that are answered at once."""
CLOSE_S: Final = 2.0
ENDS_MAX: Final = 1000
ADDRESS_MAX: Final = 100
"""Bytes of a path that the system surely takes as the address of a Unix socket."""


OnTold = Callable[[Told], Answer | Refused | None]
OnClosed = Callable[[str], None]

_log = logging.getLogger(__name__)


def socket_path() -> Path:
    """Where the peer-agent of this node listens: ``COMPUTEMESH_PEER_SOCKET``, else in the home of the mesh."""
    named = os.environ.get(SOCKET_VARIABLE)
    return Path(named).expanduser() if named else home().run / SOCKET_NAME


@contextmanager
def socket_address(path: Path) -> Generator[str]:
    """*path* as the address of a Unix socket, which may be no longer than 107 bytes; valid inside the block.

    Raises:
        OSError: it is longer, and its folder is not there or cannot be named in a shorter way.
    """
    if len(os.fsencode(path)) <= ADDRESS_MAX:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


@dataclass(slots=True, eq=False)
class _Waiting:
    """Somebody waits for an answer."""

    question: Question
    done: threading.Event = field(default_factory=threading.Event)
    answer: Answer | Refused | None = None
    """None when the connection broke before it came."""
    fds: tuple[int, ...] = ()


class _Connection:
    """One connection. Its end is the reader's to notice."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            OSError: nobody listens there.
        """
        self.splitter = Splitter()
        self.early: list[Said] = []
        """What came right behind the welcome."""
        self.waiting: dict[int, _Waiting] = {}
        self.broken = False
        self._sending = threading.Lock()
        self._outbox = Outbox()
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT_S, 0))
            with socket_address(path) as address:
                self.sock.connect(address)
        except BaseException:
            self.sock.close()
            raise

    def open(self, hello: Hello, timeout_s: float) -> Welcome:
        """Says hello, and waits until the process is taken.

        Raises:
            OSError: the connection has ended.
            PeerError: the peer-agent refuses, or does not answer in time.
        """
        deadline_s = time.monotonic() + timeout_s
        self.send(Frame(id=1, ask=hello))
        welcome: Welcome | None = None
        while welcome is None:
            self.sock.settimeout(max(0.001, deadline_s - time.monotonic()))
            try:
                found = self.read()
            except TimeoutError:
                raise PeerError(UNAVAILABLE, f"the peer-agent did not answer within {timeout_s:g} s") from None
            for said in found:
                if said.frame.id != 1 or said.frame.ask is not None:
                    self.early.append(said)
                elif said.frame.refused is not None:
                    raise PeerError.of(said.frame.refused)
                elif isinstance(said.frame.answer, Welcome):
                    welcome = said.frame.answer
        self.sock.settimeout(None)
        return welcome

    def read(self) -> list[Said]:
        """The next frames.

        Raises:
            OSError: the connection has ended.
        """
        data, fds = receive(self.sock)
        if not data:
            raise ConnectionResetError("the peer-agent closed the connection")
        try:
            found = self.splitter.feed(data, fds)
        except FrameError as error:
            raise ConnectionResetError(f"the peer-agent sent {error}") from error
        good: list[Said] = []
        for one in found:
            if isinstance(one, Said):
                good.append(one)
                continue
            _log.warning("the peer-agent said what cannot be read: %s: %s", one.refused.field, one.refused.reason)
            if one.answers:
                self.answered(one.id, one.refused, ())
            elif one.id:
                self.send(Frame(id=one.id, refused=one.refused))
        return good

    def send(self, frame: Frame, fds: Sequence[int] = ()) -> None:
        """
        Raises:
            FrameError: it is too large, or a descriptor cannot be copied; nothing was sent.
            OSError: the connection is broken, or the peer-agent takes nothing.
        """
        with self._sending:
            try:
                self._outbox.put(frame, fds)
            except OSError as error:
                raise FrameError(f"a descriptor cannot be copied: {error.strerror}") from error
            if not self._outbox.flush(self.sock):
                self.shut()
                raise TimeoutError(f"the peer-agent took nothing for {SEND_TIMEOUT_S} s")

    def answered(self, number: int, answer: Answer | Refused | None, fds: tuple[int, ...]) -> None:
        waiting = self.waiting.pop(number, None)
        if waiting is None:  # It came too late, or nobody asked.
            close_fds(fds)
            return
        waiting.answer, waiting.fds = answer, fds
        waiting.done.set()

    def shut(self) -> None:
        """Ends it for both sides; whoever reads is woken."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """By the reader, when it reads no longer."""
        self.broken = True
        for said in self.early:
            discard(said)
        self.splitter.close()
        with self._sending:
            self._outbox.close()
        self.sock.close()
        for number in list(self.waiting):
            self.answered(number, None, ())


class AgentSocket:
    """Asks the peer-agent of this node, and is asked by it. Methods may be called from any thread.

    Args:
        path: where the peer-agent listens.
        hello: what it is told of this process.
        on_told: answers what the peer-agent asks (``Accept``, ``Order``), on one of a few threads, and hears what it
            tells (``Lost``, ``Desired``), on a thread of its own and in that order. A :class:`PeerError` that it raises
            is told as a refusal.
        on_closed: called once, when the peer-agent does not want this process any more, with the reason; not when
            :meth:`close` was called.

    Raises:
        PeerError: there is no peer-agent (``no_agent``), or it refuses, as when the alias is taken (``alias_taken``).
    """

    def __init__(
        self,
        path: Path,
        hello: Hello,
        *,
        on_told: OnTold,
        on_closed: OnClosed = lambda _: None,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self.path: Final = path
        self._hello = hello
        self._pid = os.getpid()
        self._on_told = on_told
        self._on_closed = on_closed
        self._numbers = 1
        self._lock = threading.Lock()
        """Of what is said again after a reconnect, of the number, and of which connection is the current one."""
        self._epochs: int | None = None
        self._regions: dict[str, tuple[PutRegion, tuple[int, ...]]] = {}
        self._links: dict[str, EntityId] = {}
        self._ends: deque[Ended] = deque(maxlen=ENDS_MAX)
        """Not told yet, since the peer-agent is away."""
        self._there = threading.Condition(self._lock)
        self._closed = ""
        """Why there will be no further connection."""
        self._opening: _Connection | None = None
        try:
            self._connection, self.welcome = self._open(hello, timeout_s)
        except OSError as error:
            raise PeerError(
                NO_AGENT,
                f"no peer-agent listens at {path} ({error.strerror or error}): start a mesh with `computemesh up`, "
                "or join one with `computemesh join`; COMPUTEMESH_HOME names its home if it is another",
            ) from None
        _living.add(self)
        self._questions: queue.SimpleQueue[tuple[_Connection, int, Told] | None] = queue.SimpleQueue()
        self._notices: queue.SimpleQueue[tuple[_Connection, int, Told] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._live, name="peer-socket", daemon=True),
            *(
                threading.Thread(target=self._work, args=(work,), name="peer-told", daemon=True)
                for work in [self._notices, *[self._questions] * WORKERS]
            ),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def connected(self) -> bool:
        """Whether the peer-agent is there now."""
        return not self._connection.broken

    def ask(
        self, question: Question, fds: Sequence[int] = (), *, timeout_s: float = ASK_TIMEOUT_S
    ) -> tuple[Answer, tuple[int, ...]]:
        """The answer, and the descriptors that came along, which are the caller's to close.

        The descriptors that are sent are copied. What may be asked twice is asked again when the peer-agent went away
        and came back in time; a :class:`HostedTransfer` fails then, and a :class:`Call` unless it only asks where
        regions are.

        Raises:
            PeerError: a refusal, by its code; ``unavailable`` when the peer-agent is not there or does not answer in
                time, ``closed`` after :meth:`close`.
        """
        if os.getpid() != self._pid:  # The socket is the parent's, and so would be the answer.
            raise PeerError(CLOSED, FORKED)
        replaced = self._remember(question, fds)
        try:
            answer = self._ask(question, fds, timeout_s)
        except BaseException:
            self._unlearn(question, replaced)
            raise
        if replaced is not None:
            close_fds(replaced[1])
        return answer

    def _ask(self, question: Question, fds: Sequence[int], timeout_s: float) -> tuple[Answer, tuple[int, ...]]:
        deadline_s = time.monotonic() + timeout_s
        while True:
            connection, number, waiting = self._begin(question, deadline_s)
            try:
                connection.send(Frame(id=number, ask=question), fds)
            except OSError:
                connection.shut()
            except FrameError as error:
                connection.waiting.pop(number, None)
                raise PeerError(BAD_MESSAGE, str(error)) from None
            if not waiting.done.wait(max(0.0, deadline_s - time.monotonic())) and (
                connection.waiting.pop(number, None) is not None
            ):
                raise PeerError(UNAVAILABLE, f"the peer-agent did not answer within {timeout_s:g} s")
            waiting.done.wait()  # It came at the last moment.
            if isinstance(waiting.answer, Refused):
                raise PeerError.of(waiting.answer)
            if waiting.answer is not None:
                return waiting.answer, waiting.fds
            if isinstance(question, HostedTransfer) or (
                isinstance(question, Call) and not isinstance(question.body, Resolve)
            ):
                raise PeerError(UNAVAILABLE, "the peer-agent went away before it answered")

    def tell(self, said: Ended) -> None:
        """Says what has no answer: now, or when the peer-agent is back. Of many that wait the first are lost."""
        with self._lock:
            self._ends.append(said)
        self._tell_ends()

    def report(self, said: Traffic) -> bool:
        """Says what has no answer and can be said later; False if the peer-agent is not there now."""
        connection = self._connection
        try:
            connection.send(Frame(ask=said))
        except OSError:
            connection.shut()
            return False
        return True

    def _tell_ends(self) -> None:
        with self._lock:
            connection = self._connection
            while self._ends and not connection.broken:
                try:
                    connection.send(Frame(ask=self._ends[0]))
                except OSError:
                    connection.shut()
                    return
                self._ends.popleft()

    def close(self) -> None:
        """Ends the connection, and with it the peer: the peer-agent forgets it. Twice is fine.

        What :class:`AgentSocket` was given to call is not called any more when this returns, unless a call takes
        longer than :data:`CLOSE_S`, or this is called from one.
        """
        self._end("this agent was shut down", tell=False)
        if threading.current_thread() not in self._threads:
            deadline_s = time.monotonic() + CLOSE_S
            for thread in self._threads:
                thread.join(max(0.0, deadline_s - time.monotonic()))

    def after_fork(self) -> None:
        """The child closes its end. The connection shows that the parent lives, and must not outlive it."""
        self._connection.sock.close()

    # --- what is said again ----------------------------------------------------------------------------------------

    def _remember(self, question: Question, fds: Sequence[int]) -> tuple[PutRegion, tuple[int, ...]] | None:
        """What is said again. Returns the region that another one takes the place of, if that is not refused."""
        match question:
            case PutRegion():
                kept = (question, copy_fds(fds))
                with self._lock:
                    old = self._regions.pop(question.name, None)
                    self._regions[question.name] = kept
                return old
            case PutEpochs():
                copy = os.dup(fds[0])
                with self._lock:
                    old_page, self._epochs = self._epochs, copy
                if old_page is not None:
                    os.close(old_page)
            case DropRegion():
                with self._lock:
                    there = self._regions.get(question.name)
                    if there is None or there[0].epoch != question.epoch:
                        return None
                    del self._regions[question.name]
                close_fds(there[1])
            case Call(body=Close() as body):
                with self._lock:
                    self._links.pop(body.link, None)
            case _:
                pass
        return None

    def _unlearn(self, question: Question, replaced: tuple[PutRegion, tuple[int, ...]] | None) -> None:
        """A region was not taken: it is not said again, but the one before it is."""
        if not isinstance(question, PutRegion):
            return
        with self._lock:
            there = self._regions.get(question.name)
            useless = replaced
            if there is not None and there[0] is question:
                useless = self._regions.pop(question.name)
                if replaced is not None:
                    self._regions[question.name] = replaced
        if useless is not None:
            close_fds(useless[1])

    def _learn(self, said: Frame, question: Question | None) -> None:
        """By the reader, so that what is told of a link comes behind what made it."""
        match question, said.answer, said.ask:
            case Call(body=Connect() as body), Called(body=Connected()), _:
                self._links[body.link] = question.peer
            case _, _, Lost(link=None) as lost:
                for link in [link for link, peer in self._links.items() if peer == lost.peer]:
                    del self._links[link]
            case _, _, Lost(link=str() as link):
                self._links.pop(link, None)
            case _:
                pass

    def _say_again(self, connection: _Connection) -> None:
        """Within the lock, so that nothing is asked before, and what is put meanwhile comes behind."""
        if self._epochs is not None:
            self._numbers += 1
            connection.send(Frame(id=self._numbers, ask=PutEpochs()), [self._epochs])
        for region, fds in self._regions.values():
            self._numbers += 1
            connection.send(Frame(id=self._numbers, ask=region), fds)

    # --- the connection --------------------------------------------------------------------------------------------

    def _begin(self, question: Question, deadline_s: float) -> tuple[_Connection, int, _Waiting]:
        """A number for a question, once there is a connection to ask it over."""
        with self._there:
            while self._connection.broken or self._closed:
                if self._closed:
                    raise PeerError(CLOSED, self._closed)
                if not self._there.wait(max(0.0, deadline_s - time.monotonic())):
                    raise PeerError(UNAVAILABLE, f"the peer-agent at {self.path} is not there")
            self._numbers += 1
            waiting = _Waiting(question)
            self._connection.waiting[self._numbers] = waiting
            return self._connection, self._numbers, waiting

    def _live(self) -> None:
        """The reader: reads, and reconnects when there is nothing more to read."""
        connection: _Connection | None = self._connection
        while connection is not None:
            try:
                early, connection.early = connection.early, []
                for said in early:
                    self._heard(connection, said)
                while True:
                    for said in connection.read():
                        self._heard(connection, said)
            except OSError as error:
                with self._lock:
                    connection.close()
                    closed = self._closed
                if not closed:
                    _log.warning("the peer-agent at %s is gone: %s", self.path, error)
            connection = self._reconnect()

    def _heard(self, connection: _Connection, said: Said) -> None:
        frame = said.frame
        waiting = connection.waiting.get(frame.id) if frame.ask is None else None
        with self._lock:
            self._learn(frame, waiting.question if waiting is not None else None)
        match frame.ask:
            case None if not frame.id and frame.refused is not None:
                _log.warning("what was told is refused: %s", PeerError.of(frame.refused))
            case None:
                connection.answered(frame.id, frame.answer or frame.refused, said.fds)
            case Accept() | Order():
                self._questions.put((connection, frame.id, frame.ask))
            case Lost() | Desired():
                self._notices.put((connection, frame.id, frame.ask))
            case _:
                discard(said)
                if frame.id:
                    refused = Refused(code="bad_message", reason="a process is not asked this", field="ask.kind")
                    connection.send(Frame(id=frame.id, refused=refused))

    def _open(self, hello: Hello, timeout_s: float) -> tuple[_Connection, Welcome]:
        connection = _Connection(self.path)
        with self._lock:  # So that close() need not wait for it.
            self._opening = connection
            if self._closed:
                connection.shut()
        try:
            return connection, connection.open(hello, timeout_s)
        except BaseException:
            connection.close()
            raise
        finally:
            self._opening = None

    def _reconnect(self) -> _Connection | None:
        pause_s = RETRY_S[0]
        while not self._closed:
            with self._lock:
                links = dict(self._links)
            hello = replace(self._hello, alias=self.welcome.alias, instance=self.welcome.instance, links=links)
            connection = None
            try:
                connection, welcome = self._open(hello, CONNECT_TIMEOUT_S)
                with self._there:
                    self._say_again(connection)
                    self.welcome, self._connection = welcome, connection
                    self._there.notify_all()
                    if self._closed:
                        connection.shut()
                self._tell_ends()
                _log.info("the peer-agent at %s is back", self.path)
                return connection
            except (OSError, FrameError) as error:
                _log.debug("the peer-agent is not back: %s", error)
                if connection is not None:
                    connection.close()
            except PeerError as error:
                if error.code != UNAVAILABLE:
                    self._end(f"the peer-agent does not take this process back: {error}", tell=True)
                    return None
            with self._there:
                if not self._closed:
                    self._there.wait(pause_s)
            pause_s = min(RETRY_S[1], 2 * pause_s)
        return None

    def _end(self, reason: str, *, tell: bool) -> None:
        with self._there:
            if self._closed:
                return
            self._closed = reason
            regions, self._regions = self._regions, {}
            epochs, self._epochs = self._epochs, None
            self._there.notify_all()
            for connection in (self._opening, self._connection):
                if connection is not None:
                    connection.shut()
        for _, fds in regions.values():
            close_fds(fds)
        if epochs is not None:
            os.close(epochs)
        self._notices.put(None)
        for _ in range(WORKERS):
            self._questions.put(None)
        if tell:
            self._on_closed(reason)

    # --- what the peer-agent asks ----------------------------------------------------------------------------------

    def _work(self, work: queue.SimpleQueue[tuple[_Connection, int, Told] | None]) -> None:
        while (task := work.get()) is not None:
            connection, number, told = task
            answer = self._answer(told)
            if number and answer is not None:
                frame = (
                    Frame(id=number, refused=answer) if isinstance(answer, Refused) else Frame(id=number, answer=answer)
                )
                with contextlib.suppress(OSError, FrameError):
                    connection.send(frame)

    def _answer(self, told: Told) -> Answer | Refused | None:
        try:
            answer = self._on_told(told)
        except PeerError as error:
            return Refused(code=error.code, reason=str(error), status=409)
        except Exception as error:  # A defect; who asks must not wait for it.
            _log.exception("could not answer the peer-agent")
            return Refused(code="failed", reason=f"{type(error).__name__}: {error}", status=500)
        match told, answer:
            case Accept() as accept, Accepted():
                with self._lock:
                    self._links[accept.body.link] = accept.peer
            case ((Accept() | Order()), None):
                return Refused(code="refused", reason="not wanted", status=403)
            case Order(), Begun():
                pass
            case _:
                pass
        return answer


_living: Final[weakref.WeakSet[AgentSocket]] = weakref.WeakSet()


def _in_child() -> None:
    for one in list(_living):
        one.after_fork()


os.register_at_fork(after_in_child=_in_child)
