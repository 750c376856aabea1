"""The shorter way through nats-py sends the same bytes and reads the same messages as nats-py itself.

Method: both clients send the same; both parsers read the same bytes, in pieces of any size; and a server that stops
reading for a while.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import nats.errors
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.protocol.parser import Parser

from computemesh.bus.client import UNDRAINED_BYTES_MAX, LeanClient, LeanParser
from computemesh.testing import until

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false

REPLACED: tuple[Callable[..., Any], ...] = (
    Client.publish,
    Client._send_publish,
    Client._flush_pending,
    Client._flusher,
    Client._close,
    Client._parse_header_lines,
    Client._process_headers,
    Client._process_msg,
    Client._process_op_err,
    Client._read_loop,
    Client._remove_sub,
    Parser.parse,
    Parser.reset,
)


def test_what_is_replaced_of_nats_py_is_what_was_read() -> None:
    """When this fails nats-py changed there: read how, adapt computemesh.bus.client, and note the new sum here."""
    source = "".join(inspect.getsource(function) for function in REPLACED)
    assert (
        hashlib.sha256(source.encode()).hexdigest()
        == "c2e3bd5fe1f36c9a6d53e923fc1c29b65b194d6ec54b9fffc68f39e22b67b22b"
    )


# --- out ---------------------------------------------------------------------------------------------------------

SUBJECTS = st.sampled_from(["a", "a.b-c.1", "$KV.x.ü", "", " a", "a b", "a\r\nPUB b", "a\t", "\x1c"])
HEADERS = st.one_of(
    st.none(),
    st.dictionaries(
        st.sampled_from(["Nats-TTL", "a", "traceparent", "", "a:b", " a", "ü", "x\r\n"]),
        st.text(max_size=9),
        max_size=3,
    ),
)


async def sent(client: Client, *message: Any) -> bytes | str:
    """The command that *client* would write, or the name of what it raises."""
    client._status = Client.CONNECTED
    try:
        await client.publish(*message)
    except nats.errors.Error as error:
        return type(error).__name__
    return b"".join(client._pending)


def words(sent: bytes | str) -> list[bytes] | str:
    """A command line by its words, since any number of spaces may part them, and what follows it."""
    if isinstance(sent, str):
        return sent
    line, _, rest = sent.partition(b"\r\n")
    return [*line.split(), rest]


@given(SUBJECTS, st.binary(max_size=50), st.one_of(st.just(""), SUBJECTS), HEADERS)
async def test_a_message_is_sent_in_the_bytes_of_nats_py_or_refused_as_there(
    subject: str, payload: bytes, reply: str, headers: dict[str, str] | None
) -> None:
    """Whatever its subject, reply and headers are; headers that could inject a command are made harmless."""
    ours, theirs = LeanClient(), Client()
    assert words(await sent(ours, subject, payload, reply, headers)) == words(
        await sent(theirs, subject, payload, reply, headers)
    )
    assert ours.stats == theirs.stats


async def test_a_payload_above_the_servers_limit_is_refused() -> None:
    """Before anything of it is sent."""
    client = LeanClient()
    client._max_payload = 10
    assert await sent(client, "a", b"x" * 11) == "MaxPayloadError"
    assert client._pending == []


class StoppingServer:
    """Speaks as much of the protocol as a client needs to connect, and reads only while it is told to."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.received = bytearray()

    async def on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"max_payload": 1048576, "headers": true}\r\n')
        await reader.readuntil(b"PING\r\n")
        writer.write(b"PONG\r\n")
        while not reader.at_eof():
            await self.reads.wait()
            self.received += await reader.read(2**20)
        writer.close()


async def test_a_server_that_stops_reading_holds_up_the_sender_and_gets_everything_in_order_afterwards() -> None:
    """What is buffered stays bounded, and nothing is lost or sent twice."""
    stopping = StoppingServer()
    server = await asyncio.start_server(stopping.on_client, "127.0.0.1", limit=2**16)
    client = LeanClient()
    bound = 4 * UNDRAINED_BYTES_MAX
    port = server.sockets[0].getsockname()[1]
    await client.connect(f"nats://127.0.0.1:{port}", pending_size=bound, flush_timeout=30)
    count, payload = 0, b"x" * 100_000

    async def publish_forever() -> None:
        nonlocal count
        while count < 400:
            await client.publish(f"n.{count}", payload)
            count += 1
            await asyncio.sleep(0)

    publishing = asyncio.create_task(publish_forever())
    await until(lambda: client.pending_data_size >= bound, what="the buffer to be full")
    held_up_at = count
    await asyncio.sleep(0.05)
    assert count <= held_up_at + 1
    assert client.pending_data_size <= bound + 200_000
    stopping.reads.set()
    await publishing
    await until(lambda: stopping.received.count(b"PUB ") == 400, what="all of it to arrive")
    assert [int(line.split()[1][2:]) for line in stopping.received.split(b"\r\n") if line[:4] == b"PUB "] == list(
        range(400)
    )
    await client.close()
    server.close()


# --- in ----------------------------------------------------------------------------------------------------------


class Heard(LeanClient):
    """A client that notes what its parser makes of the bytes."""

    def __init__(self, parser: type[Parser]) -> None:
        super().__init__()
        self.parser = LeanParser(self) if parser is LeanParser else Parser(self)
        self.heard: list[Any] = []
        self.reset_at = -1

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        self.heard.append((sid, subject, reply, data, headers or None))
        if len(self.heard) == self.reset_at:
            self.parser.reset()

    async def _process_ping(self) -> None:
        self.heard.append("PING")

    async def _process_pong(self) -> None:
        self.heard.append("PONG")

    async def _process_err(self, err_msg: str) -> None:
        self.heard.append(err_msg)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        self.heard.append(info)


def a_message(subject: str, reply: str, data: bytes, headers: bytes) -> bytes:
    address = f"{subject} 7 {reply}".rstrip()
    if headers:
        return f"HMSG {address} {len(headers)} {len(headers) + len(data)}\r\n".encode() + headers + data + b"\r\n"
    return f"MSG {address} {len(data)}\r\n".encode() + data + b"\r\n"


MESSAGES = st.builds(
    a_message,
    st.sampled_from(["a", "a.b.c"]),
    st.sampled_from(["", "_INBOX.1"]),
    st.one_of(st.binary(max_size=40), st.just(b"MSG a 7 3\r\nabc\r\n")),
    st.sampled_from([b"", b"NATS/1.0 503\r\n\r\n", b"NATS/1.0\r\na: b\r\n\r\n"]),
)
OTHERS = st.sampled_from(
    [b"PING\r\n", b"PONG\r\n", b"+OK\r\n", b"-ERR 'Odd'\r\n", b'INFO {"server_id": "MSG a 7 1"}\r\n']
)


async def feed(client: Heard, data: bytes, cuts: list[int]) -> list[Any]:
    at = 0
    for cut in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        await client.parser.parse(data[at:cut])
        at = cut
    return client.heard


@given(st.lists(st.one_of(MESSAGES, OTHERS), max_size=8), st.lists(st.integers(0, 10_000), max_size=6))
async def test_bytes_mean_the_same_as_to_nats_py_however_they_are_cut(commands: list[bytes], cuts: list[int]) -> None:
    """Messages, headers, payloads that look like commands, and all other commands."""
    data = b"".join(commands)
    assert await feed(Heard(LeanParser), data, cuts) == await feed(Heard(Parser), data, cuts)


async def test_a_reset_drops_the_rest_of_what_was_read() -> None:
    """As when the connection breaks while a message is handled: the rest is not mixed with the next connection's."""
    client = Heard(LeanParser)
    client.reset_at = 1
    message = a_message("a", "", b"data", b"")
    await client.parser.parse(message + message + message[:7])
    await client.parser.parse(message)
    assert len(client.heard) == 2


async def test_bytes_that_are_no_command_are_an_error() -> None:
    """So that nats-py ends the connection."""
    with pytest.raises(nats.errors.ProtocolError):
        await LeanParser(LeanClient()).parse(b"HTTP/1.1 400 Bad Request\r\n")


HEADER_BLOCKS = st.one_of(
    st.dictionaries(
        st.sampled_from(["Nats-TTL", "a", "traceparent", "", " a", "ü", "a b", "Status"]),
        st.one_of(st.text(max_size=9), st.sampled_from(["1", "60s", " x ", "a: b", "\x1c"])),
        max_size=4,
    ).map(lambda found: b"NATS/1.0\r\n%b\r\n" % "".join(f"{k}: {v}\r\n" for k, v in found.items()).encode()),
    st.sampled_from(
        [
            b"NATS/1.0 503\r\n\r\n",
            b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 16\r\n\r\n",
            b"NATS/1.0\r\nno-colon\r\na:b\r\n\r\n",
            b"NATS/1.0\r\na:\tb\r\na: c\r\n\r\n",
            b"NATS/1.0\r\n\r\n",
        ]
    ),
)


@given(HEADER_BLOCKS)
async def test_headers_mean_the_same_as_to_nats_py(block: bytes) -> None:
    assert await LeanClient()._process_headers(block) == await Client()._process_headers(block)


def test_a_message_of_ours_has_all_fields_of_one_of_nats_py() -> None:
    """It is made without names, so their order matters."""
    assert list(Msg.__dataclass_fields__)[:5] == ["_client", "subject", "reply", "data", "headers"]
