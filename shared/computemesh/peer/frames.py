"""Frames of :mod:`computemesh.peer.signals` on a Unix socket: bytes and descriptors in, frames out, and back.

Descriptors that came in belong to whoever takes the frame; those that no frame names are closed here. A frame that
cannot be read is a value, :class:`Unreadable`, since what follows it can. What leaves no way to go on, as a length
beyond the bound, is a :class:`FrameError`: the connection must end.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from computemesh.contracts.base import Refused, decode, encode
from computemesh.peer.signals import FDS_MAX, FRAME_MAX, Called, Frame, PutEpochs, PutRegion, RegionsResolved

OUTBOX_BYTES_MAX: Final = 16 * 1024 * 1024
OUTBOX_FDS_MAX: Final = 1024
"""Bounds on what waits for a side that does not read."""

_HEAD: Final = struct.Struct("!I")
_CHUNK: Final = 256 * 1024
_INTS: Final = array("i")
_CLOEXEC: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class FrameError(Exception):
    """The connection cannot go on."""


@dataclass(frozen=True, slots=True)
class Said:
    """A frame, and the descriptors that it names. They belong to the taker."""

    frame: Frame
    fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A frame that is none, and what is wrong with it. Its descriptors are closed."""

    id: int
    """As far as it could be read; else 0."""
    answers: bool
    """It was to answer a question of ours."""
    refused: Refused


class _Outline(msgspec.Struct):
    """What a frame that cannot be read may still say."""

    id: int = 0
    ask: msgspec.Raw = msgspec.Raw()


def pack(frame: Frame) -> bytes:
    """The bytes of a frame.

    Raises:
        FrameError: it is larger than the other side takes.
    """
    body = encode(frame)
    if len(body) > FRAME_MAX:
        raise FrameError(f"a frame of {len(body)} bytes; {FRAME_MAX} may be sent")
    return _HEAD.pack(len(body)) + body


def named_fds(frame: Frame) -> int:
    """How many descriptors come with a frame."""
    match frame.ask, frame.answer:
        case (PutRegion() | PutEpochs()) as ask, _:
            return ask.fds
        case _, Called(body=RegionsResolved() as body):
            return len(body.fds)
        case _:
            return 0


class Splitter:
    """Makes frames of what comes in, wherever it is cut."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._fds: deque[int] = deque()
        """Came, and no frame has named them yet."""

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> list[Said | Unreadable]:
        """The frames that are whole now.

        Raises:
            FrameError: a frame is too long, or more descriptors came than one may have. All of them are closed.
        """
        self._bytes += data
        self._fds.extend(fds)
        found: list[Said | Unreadable] = []
        at = 0
        try:
            if len(self._fds) > FDS_MAX:
                raise FrameError(f"{len(self._fds)} descriptors that no frame names; {FDS_MAX} may come with one")
            while len(self._bytes) - at >= _HEAD.size:
                (size,) = _HEAD.unpack_from(self._bytes, at)
                if size > FRAME_MAX:
                    raise FrameError(f"a frame of {size} bytes; {FRAME_MAX} may be sent")
                if len(self._bytes) - at - _HEAD.size < size:
                    break
                body = bytes(memoryview(self._bytes)[at + _HEAD.size : at + _HEAD.size + size])
                at += _HEAD.size + size
                found.append(self._read(body))
        except FrameError:
            for one in found:
                discard(one)
            self.close()
            raise
        del self._bytes[:at]
        if not self._bytes:  # The frames that they came with are whole, and named none.
            self._close_fds()
        return found

    def close(self) -> None:
        """Closes the descriptors of frames that did not become whole."""
        self._bytes.clear()
        self._close_fds()

    def _read(self, body: bytes) -> Said | Unreadable:
        frame = decode(body, Frame)
        if isinstance(frame, Frame) and (frame.ask is None) + (frame.answer is None) + (frame.refused is None) != 2:
            frame = Refused(code="bad_message", reason="a frame has one of 'ask', 'answer' and 'refused'")
        if isinstance(frame, Frame) and named_fds(frame) > len(self._fds):
            frame = Refused(
                code="bad_message",
                reason=f"names {named_fds(frame)} descriptors, and {len(self._fds)} came along",
                field="ask.fds" if frame.ask is not None else "answer.body.fds",
            )
        if isinstance(frame, Refused):
            self._close_fds()
            outline = _outline(body)
            return Unreadable(outline.id, answers=not bytes(outline.ask), refused=frame)
        return Said(frame, tuple(self._fds.popleft() for _ in range(named_fds(frame))))

    def _close_fds(self) -> None:
        close_fds(self._fds)
        self._fds.clear()


def _outline(body: bytes) -> _Outline:
    try:
        return msgspec.json.decode(body, type=_Outline)
    except (ValueError, RecursionError):
        return _Outline(ask=msgspec.Raw(b"?"))


class Outbox:
    """Frames that are to be sent, in their order, each with its descriptors. The descriptors are copied."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._size = 0
        self._fds = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, frame: Frame, fds: Sequence[int] = ()) -> None:
        """Adds a frame.

        Raises:
            FrameError: it is too large, or too much waits already; nothing was added.
            OSError: a descriptor cannot be copied.
        """
        assert len(fds) == named_fds(frame) <= FDS_MAX, f"{len(fds)} descriptors for {named_fds(frame)}"
        data = pack(frame)
        if self._size + len(data) > OUTBOX_BYTES_MAX and self._waiting:
            raise FrameError(f"{self._size} bytes wait to be read; {OUTBOX_BYTES_MAX} may")
        if self._fds + len(fds) > OUTBOX_FDS_MAX:
            raise FrameError(f"{self._fds} descriptors wait to be taken; {OUTBOX_FDS_MAX} may")
        self._waiting.append((memoryview(data), copy_fds(fds)))
        self._size += len(data)
        self._fds += len(fds)

    def flush(self, sock: socket.socket) -> bool:
        """Sends what the socket takes, and says whether that was all.

        Raises:
            OSError: the connection is broken.
        """
        while self._waiting:
            data, fds = self._waiting[0]
            try:
                # What is sent at all takes the descriptors along.
                sent = socket.send_fds(sock, [data], list(fds)) if fds else sock.send(data)
            except (BlockingIOError, InterruptedError):
                return False
            close_fds(fds)
            self._size -= sent
            self._fds -= len(fds)
            if sent < len(data):
                self._waiting[0] = (data[sent:], ())
            else:
                self._waiting.popleft()
        return True

    def close(self) -> None:
        """Forgets what was not sent."""
        for _, fds in self._waiting:
            close_fds(fds)
        self._waiting.clear()
        self._size = self._fds = 0


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """What came next; no bytes when the other side has closed.

    Raises:
        OSError: the connection is broken, or nothing is there and the socket does not wait.
    """
    # As socket.recv_fds, which ignores its flags.
    data, extra, _, _ = sock.recvmsg(_CHUNK, socket.CMSG_SPACE(FDS_MAX * _INTS.itemsize), _CLOEXEC)
    fds: list[int] = []
    for level, kind, numbers in extra:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds += array("i", numbers[: len(numbers) - len(numbers) % _INTS.itemsize])
    if not _CLOEXEC:
        for fd in fds:
            os.set_inheritable(fd, False)
    return data, fds


def discard(said: Said | Unreadable) -> None:
    """Closes the descriptors of a frame that nobody takes."""
    if isinstance(said, Said):
        close_fds(said.fds)


def copy_fds(fds: Iterable[int]) -> tuple[int, ...]:
    """Copies of all of them.

    Raises:
        OSError: one is none, or this process has too many; nothing is left open.
    """
    with contextlib.ExitStack() as undo:
        copies: list[int] = []
        for fd in fds:
            copies.append(copy := os.dup(fd))
            undo.callback(os.close, copy)
        undo.pop_all()
        return tuple(copies)


def close_fds(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
