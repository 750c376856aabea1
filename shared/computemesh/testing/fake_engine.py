"""A fast stand-in for ``llama-server``, for tests of what lies in front of an engine.

It takes llama-server's arguments (those that it does not know are ignored) and answers ``/health``, ``/v1/models``,
``/v1/chat/completions``, ``/v1/completions``, ``/v1/embeddings`` and ``/metrics`` as that does. Its tokens are
numbered. It runs as a file, with nothing of the mesh imported: :func:`install` makes a command of it.

What it does is told by words in the prompt (of a chat: in the last message):

=============  ==========================================================================================
``id=X``       each token is ``X:number`` and a space; left out, ``t``
``tokens=N``   so many tokens; left out, ``max_tokens`` of the request, else 16
``rate=R``     tokens per second; 0: as fast as they are taken; left out, ``COMPUTEMESH_FAKE_TOKENS_PER_S``, else 0
``size=B``     each token is made at least so many characters long
``wait=S``     seconds before the first token, after the headers are out
``status=C``   an error with that HTTP status
``crash=N``    the process ends after N tokens
``break=N``    the connection is closed after N tokens
``hang=N``     nothing more comes after N tokens
=============  ==========================================================================================

``GET /fake/state`` tells what it has: ``running``, ``waiting`` (for one of the ``-np`` slots), ``served``,
``cancelled`` (the client went first), ``tokens``, ``pid``, ``traceparent`` (of the last request).

Environment: ``COMPUTEMESH_FAKE_TOKENS_PER_S``, ``COMPUTEMESH_FAKE_START_S`` (it is loading for so long),
``COMPUTEMESH_FAKE_START_STATUS`` (it ends at once, with that status).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, Final, cast

import httptools
import msgspec
import uvloop

BURST: Final = 64
"""Tokens that are written at once when they come as fast as they are taken."""

UNKNOWN: Final = b'{"error":{"code":404,"message":"File Not Found","type":"not_found_error"}}'


def install(folder: Path) -> Path:
    """A command in *folder* that runs this file, to be named as ``llama-server``."""
    command = folder / "fake-llama-server"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} "$@"\n')
    command.chmod(0o755)
    return command


class Ask(msgspec.Struct):
    """What is read of a request."""

    messages: list[dict[str, Any]] = []
    prompt: Any = ""
    input: Any = ""
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None

    def words(self) -> dict[str, str]:
        text = self.messages[-1].get("content", "") if self.messages else self.prompt
        pairs = (word.partition("=") for word in str(text).split())
        return {name: value for name, equals, value in pairs if equals}


class Engine:
    """One engine: its slots, and what it has done."""

    def __init__(self, model: str, slots: int) -> None:
        self.model = model
        self.slots = slots
        self.rate = float(os.environ.get("COMPUTEMESH_FAKE_TOKENS_PER_S", "0"))
        self.ready_at_s = time.monotonic() + float(os.environ.get("COMPUTEMESH_FAKE_START_S", "0"))
        self.running: set[Generation] = set()
        self.waiting: deque[Generation] = deque()
        self.served = 0
        self.cancelled = 0
        self.tokens = 0
        self.traceparent = ""

    @property
    def ready(self) -> bool:
        return time.monotonic() >= self.ready_at_s

    def begin(self, generation: Generation) -> None:
        if len(self.running) < self.slots:
            self.running.add(generation)
            generation.begin()
        else:
            self.waiting.append(generation)

    def end(self, generation: Generation, *, cancelled: bool) -> None:
        if cancelled:
            self.cancelled += 1
        else:
            self.served += 1
        if generation in self.running:
            self.running.remove(generation)
        else:
            self.waiting.remove(generation)
        while self.waiting and len(self.running) < self.slots:
            following = self.waiting.popleft()
            self.running.add(following)
            following.begin()

    def state(self) -> bytes:
        return msgspec.json.encode(
            {
                "running": len(self.running),
                "waiting": len(self.waiting),
                "served": self.served,
                "cancelled": self.cancelled,
                "tokens": self.tokens,
                "pid": os.getpid(),
                "traceparent": self.traceparent,
            }
        )

    def metrics(self) -> bytes:
        return (
            f"llamacpp:tokens_predicted_total {self.tokens}\n"
            f"llamacpp:requests_processing {len(self.running)}\n"
            f"llamacpp:requests_deferred {len(self.waiting)}\n"
        ).encode()


class Generation:
    """One answer that is being made."""

    def __init__(self, engine: Engine, connection: Connection, ask: Ask, *, chat: bool) -> None:
        words = ask.words()
        self.engine = engine
        self.connection = connection
        self.ask = ask
        self.chat = chat
        self.name = words.get("id", "t")
        self.total = int(words.get("tokens", ask.max_completion_tokens or ask.max_tokens or 16))
        self.rate = float(words.get("rate", engine.rate))
        self.size = int(words.get("size", 0))
        self.wait_s = float(words.get("wait", 0))
        self.crash_at = int(words.get("crash", -1))
        self.break_at = int(words.get("break", -1))
        self.hang_at = int(words.get("hang", -1))
        self.made = 0
        self.texts: list[str] = []
        """Of an answer that does not stream."""
        self.timer: asyncio.Handle | None = None
        self.due_s = 0.0
        self.over = False
        head = {"id": f"fake-{self.name}", "created": int(time.time()), "model": engine.model}
        kind = "chat.completion.chunk" if chat else "text_completion"
        common = msgspec.json.encode({**head, "object": kind})[1:]
        self.before = b'data: {"choices":[{"index":0,"finish_reason":null,' + (
            b'"delta":{"content":"' if chat else b'"text":"'
        )
        self.after = (b'"}}],' if chat else b'"}],') + common + b"\n\n"
        self.common = common

    def begin(self) -> None:
        if self.ask.stream:
            self.connection.start_chunks("text/event-stream")
        self._in(self.wait_s)

    def _in(self, pause_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.due_s = loop.time() + pause_s
        self.timer = loop.call_at(self.due_s, self.go_on) if pause_s > 0 else loop.call_soon(self.go_on)

    def go_on(self) -> None:
        """Makes what is due."""
        self.timer = None
        if self.over or self.connection.paused:  # The connection calls again once there is room.
            return
        loop = asyncio.get_running_loop()
        # What a late timer has missed comes along.
        due = 1 + int((loop.time() - self.due_s) * self.rate) if self.rate > 0 else BURST
        chunks: list[bytes] = []
        for _ in range(min(due, self.total - self.made)):
            if self.made == self.crash_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.made == self.break_at:
                self.connection.write_chunk(b"".join(chunks))
                self.connection.close()
                return
            if self.made == self.hang_at:
                self.connection.write_chunk(b"".join(chunks))
                return
            text = f"{self.name}:{self.made} ".ljust(self.size)
            self.made += 1
            self.engine.tokens += 1
            if self.ask.stream:
                chunks += (self.before, text.encode(), self.after)
            else:
                self.texts.append(text)
        if chunks:
            self.connection.write_chunk(b"".join(chunks))
        if self.made >= self.total:
            self.finish()
        elif self.rate > 0:
            self.due_s += due / self.rate
            self.timer = loop.call_at(self.due_s, self.go_on)
        elif not self.connection.paused:
            self.timer = loop.call_soon(self.go_on)

    def finish(self) -> None:
        self.over = True
        usage = {"prompt_tokens": 1, "completion_tokens": self.made, "total_tokens": 1 + self.made}
        self.engine.end(self, cancelled=False)
        if self.ask.stream:
            last = b'{"choices":[{"index":0,"finish_reason":"stop",' + (b'"delta":{}' if self.chat else b'"text":""')
            events = b"data: " + last + b"}]," + self.common + b"\n\n"
            if (self.ask.stream_options or {}).get("include_usage"):
                events += b'data: {"choices":[],"usage":' + msgspec.json.encode(usage) + b"," + self.common + b"\n\n"
            self.connection.write_chunk(events + b"data: [DONE]\n\n")
            self.connection.end_chunks()
            return
        text = "".join(self.texts)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        common = msgspec.json.decode(b"{" + self.common)
        common["object"] = "chat.completion" if self.chat else "text_completion"
        self.connection.answer(200, msgspec.json.encode({"choices": [choice], "usage": usage, **common}))

    def cancel(self) -> None:
        if not self.over:
            self.over = True
            if self.timer is not None:
                self.timer.cancel()
            self.engine.end(self, cancelled=True)


class Connection(asyncio.Protocol):
    """One HTTP connection: one request after the other."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.paused = False
        self.generation: Generation | None = None
        self.transport: asyncio.Transport
        self.parser = httptools.HttpRequestParser(self)
        self.path = ""
        self.body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class.

    def connection_lost(self, exc: Exception | None) -> None:
        if self.generation is not None:
            self.generation.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self.generation is not None and self.generation.timer is None:
            self.generation.go_on()

    # --- a request ---------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self.path, self.body = "", []

    def on_url(self, url: bytes) -> None:
        self.path += url.decode()

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"traceparent":
            self.engine.traceparent = value.decode()

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        engine = self.engine
        path = self.path.partition("?")[0]
        if path == "/fake/state":
            self.answer(200, engine.state())
        elif not engine.ready:
            self.answer(503, b'{"error":{"code":503,"message":"Loading model","type":"unavailable_error"}}')
        elif path == "/health":
            self.answer(200, b'{"status":"ok"}')
        elif path == "/v1/models":
            self.answer(200, msgspec.json.encode({"object": "list", "data": [{"id": engine.model, "object": "model"}]}))
        elif path == "/metrics":
            self.answer(200, engine.metrics(), content_type="text/plain")
        elif path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
            self.infer(path)
        else:
            self.answer(404, UNKNOWN)

    def infer(self, path: str) -> None:
        try:
            ask = msgspec.json.decode(b"".join(self.body), type=Ask)
            words = ask.words()
        except (ValueError, msgspec.MsgspecError) as error:
            self.complain(400, str(error))
            return
        if "status" in words:
            self.complain(int(words["status"]), "as the prompt says")
        elif path == "/v1/embeddings":
            inputs: list[Any] = ask.input if isinstance(ask.input, list) else [ask.input]  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
            data = [
                {"object": "embedding", "index": n, "embedding": [float(len(str(text))), 0.5, -0.5]}
                for n, text in enumerate(inputs)
            ]
            usage = {"prompt_tokens": len(inputs), "total_tokens": len(inputs)}
            answer = {"object": "list", "model": self.engine.model, "data": data, "usage": usage}
            self.answer(200, msgspec.json.encode(answer))
        else:
            self.generation = Generation(self.engine, self, ask, chat=path == "/v1/chat/completions")
            self.engine.begin(self.generation)

    # --- an answer ---------------------------------------------------------------------------------------------

    def answer(self, status: int, body: bytes, *, content_type: str = "application/json; charset=utf-8") -> None:
        head = f"HTTP/1.1 {status} -\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.generation = None
        self.transport.write(head.encode() + body)
        self.keep_or_close()

    def complain(self, status: int, reason: str) -> None:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.answer(status, msgspec.json.encode({"error": {"code": status, "message": reason, "type": kind}}))

    def start_chunks(self, content_type: str) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n"
        self.transport.write(head.encode())

    def write_chunk(self, data: bytes) -> None:
        if data:
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end_chunks(self) -> None:
        self.generation = None
        self.transport.write(b"0\r\n\r\n")
        self.keep_or_close()

    def keep_or_close(self) -> None:
        if not self.parser.should_keep_alive():
            self.transport.close()

    def close(self) -> None:
        self.transport.close()


async def serve(host: str, port: int, engine: Engine) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = await loop.create_server(lambda: Connection(engine), host, port, backlog=2048)
    address = server.sockets[0].getsockname()
    sys.stderr.write(f"main: server is listening on http://{address[0]}:{address[1]}\n")
    sys.stderr.flush()
    await stop.wait()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("-m", "--model", default="fake")
    parser.add_argument("-a", "--alias", default="")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("-np", "--parallel", type=int, default=4)
    options, _ = parser.parse_known_args()
    if status := os.environ.get("COMPUTEMESH_FAKE_START_STATUS"):
        sys.stderr.write("error: it ends at once, as it was told\n")
        sys.exit(int(status))
    engine = Engine(options.alias or Path(options.model).stem, options.parallel)
    uvloop.run(serve(options.host, options.port, engine))


if __name__ == "__main__":
    main()
