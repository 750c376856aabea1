"""nats-py's client with a shorter way for each message. The life of the connection stays its own.

- Out: command and headers are joined at once, and all that one turn of the event loop sends is one write. nats-py has
  a queue, a future and a task in between. After :data:`UNDRAINED_BYTES_MAX` that task takes over until the socket has
  taken everything, so a slow server still slows us down.
- In: messages are split by searching for line ends, and headers read as text; nats-py tries six regular expressions on
  each, and looks at each letter of a header's name.
- Handlers that never wait for an answer may run *inline*, as the message is read, without a queue and a task.

Whatever is unusual (odd subjects or headers, no connection, other commands of the protocol) goes nats-py's own way.
This relies on names of nats-py that are not public: ``pyproject.toml`` bounds its version, and
``tests/unit/test_lean_client.py`` fails when the code that is replaced here changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.protocol.parser import Parser

UNDRAINED_BYTES_MAX: Final = 1024 * 1024
"""Written without waiting for the socket to take it."""

OnMessage = Callable[[Msg], Awaitable[None]]


class LeanClient(Client):
    """As :class:`nats.aio.client.Client`."""

    def __init__(self) -> None:
        super().__init__()
        self._ps = LeanParser(self)
        self._inline: dict[int, OnMessage] = {}
        self._write_planned = False
        self._undrained = 0
        self._draining_task: asyncio.Task[None] | None = None

    # --- out ---------------------------------------------------------------------------------------------------

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        if (
            not self.is_connected
            or subject.split() != [subject]  # Empty, or with white space: nats-py refuses it.
            or (reply and reply.split() != [reply])
            or (lines := _header_lines(headers)) is None
        ):
            await super().publish(subject, payload, reply, headers)
            return
        size = len(payload)
        if size > self._max_payload:
            raise nats.errors.MaxPayloadError
        if lines:
            head = lines.encode()
            command = b"HPUB %b %d %d\r\n%b%b\r\n" % (
                f"{subject} {reply}".encode(), len(head), len(head) + size, head, payload,
            )  # fmt: skip
        else:
            command = b"PUB %b %d\r\n%b\r\n" % (f"{subject} {reply}".encode(), size, payload)
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += size
        self._pending.append(command)
        self._pending_data_size += len(command)
        if self._pending_data_size > self._max_pending_size > 0:
            await super()._flush_pending(force_flush=True)
        elif not self._write_planned:
            self._plan_write()

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        if force_flush or not self.is_connected:
            return await super()._flush_pending(force_flush)
        self._plan_write()
        return None

    def _plan_write(self) -> None:
        if not self._write_planned:
            self._write_planned = True
            asyncio.get_running_loop().call_soon(self._write)

    def _write(self) -> None:
        self._write_planned = False
        if not self.is_connected or not self._pending or self._draining_task is not None or self._transport is None:
            return
        if self._undrained > UNDRAINED_BYTES_MAX:
            self._draining_task = asyncio.get_running_loop().create_task(self._drain_then_write())
            return
        try:
            self._transport.writelines(self._pending)
        except (OSError, RuntimeError):  # It is closed; the reader notices, and what is pending waits for the next.
            return
        self._undrained += self._pending_data_size
        self._pending = []
        self._pending_data_size = 0

    async def _drain_then_write(self) -> None:
        """nats-py's flusher writes all that is pending, and waits until the socket took it."""
        try:
            await super()._flush_pending(force_flush=True)
        finally:
            self._undrained = 0
            self._draining_task = None
        self._plan_write()

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        try:
            await super()._close(status, do_cbs)
        except (OSError, RuntimeError):
            # The connection is gone, and with it what nats-py wanted to send first. It stops there, with everything
            # still to be ended, and of one that is closed it ends nothing more.
            self._pending = []
            self._pending_data_size = 0
            self._status = Client.DISCONNECTED
            await super()._close(status, do_cbs)

    # --- in ----------------------------------------------------------------------------------------------------

    async def _process_pong(self) -> None:
        """As nats-py does, which ends its reader when nobody waits for the answer to a flush any more."""
        pongs: list[asyncio.Future[Any]] = self._pongs  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        if pongs and pongs[0].done():
            pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def subscribe_inline(self, subject: str, on_message: OnMessage, *, queue: str = "") -> Subscription:
        """Subscribes with a handler that runs while the connection is read, so nothing else is read meanwhile.

        It must not raise, nor wait for anything that comes over this connection; see :attr:`reading`.
        """
        subscription = await self.subscribe(subject, queue=queue, cb=on_message)  # pyright: ignore[reportUnknownMemberType]
        self._inline[subscription._id] = on_message  # pyright: ignore[reportPrivateUsage]
        return subscription

    @property
    def reading(self) -> bool:
        """Whether this code runs in an inline handler, where no answer can be waited for."""
        reader: Any = self._reading_task  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return reader is not None and asyncio.current_task() is reader

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        read = _plain_headers(headers)
        return read or await super()._process_headers(headers)  # pyright: ignore[reportUnknownMemberType]

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        self._inline.pop(sid, None)
        super()._remove_sub(sid, max_msgs)

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        on_message = self._inline.get(sid)
        if on_message is None:
            await super()._process_msg(sid, subject, reply, data, headers)
            return
        self.stats["in_msgs"] += 1
        self.stats["in_bytes"] += len(data)
        self._subs[sid]._received += 1  # pyright: ignore[reportPrivateUsage]
        read = await self._process_headers(headers) if headers else None
        await on_message(Msg(self, subject.decode(), reply.decode(), data, read))


class LeanParser(Parser):
    """Splits what the server sends into messages; all other commands are left to nats-py's parser."""

    def __init__(self, client: LeanClient) -> None:
        super().__init__(client)  # pyright: ignore[reportUnknownMemberType]
        self._client = client

    def reset(self) -> None:
        super().reset()
        self._rest: list[bytes] = []
        """The beginning of a command that is not whole yet. A reset puts a new list here."""
        self._missing: int = 0
        """Bytes of it that are known to be missing."""

    async def parse(self, data: bytes = b"") -> None:
        if self._rest:
            self._rest.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return
            data = b"".join(self._rest)
        rest: list[bytes] = []
        self._rest, self._missing = rest, 0
        at, size = 0, len(data)
        while at < size and self._rest is rest:
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                break
            body = line_end + 2
            kind = data[at : at + 4]
            if kind == b"MSG ":
                words = data[at:line_end].split()
                head_size, end = 0, body + int(words[-1])
            elif kind == b"HMSG":
                words = data[at:line_end].split()
                head_size, end = int(words[-2]), body + int(words[-1])
                del words[-2]
            else:
                line, at = data[at:body], body
                await super().parse(line)
                continue
            if end + 2 > size:
                self._missing = end + 2 - size
                break
            head = data[body : body + head_size]
            at = end + 2
            await self._client._process_msg(  # pyright: ignore[reportPrivateUsage]
                int(words[2]), words[1], words[3] if len(words) == 5 else b"", data[body + head_size : end], head
            )
        if at < size and self._rest is rest:
            rest.append(data[at:])


def _header_lines(headers: dict[str, str] | None) -> str | None:
    """The header block of a message; empty when there is none to be, None when one of them is not plain."""
    if headers is None:
        return ""
    lines = "NATS/1.0\r\n"
    for name, value in headers.items():
        if not (name.isascii() and name.replace("-", "").isalnum()):
            return None
        if not value.isprintable() or value != value.strip(" "):
            return None
        lines += f"{name}: {value}\r\n"
    return lines + "\r\n"


def _plain_headers(block: bytes) -> dict[str, str] | None:
    """The headers in a block; None when it is not plain: a status, an odd name or value."""
    if not block.startswith(b"NATS/1.0\r\n") or not block.isascii():
        return None
    found: dict[str, str] = {}
    for line in block[10:].decode().split("\r\n"):
        if line:
            name, parted, value = line.partition(":")
            if not parted or not name.replace("-", "").isalnum() or not value.isprintable():
                return None
            found[name] = value.strip()
    return found
