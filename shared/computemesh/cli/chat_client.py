"""What `chat` asks a gateway over HTTP, and what it hears: OpenAI's interface, from the side of a client."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import msgspec

from computemesh import trace
from computemesh.cli.common import Failure, NoMesh, WorkFailure

CONNECT_S: Final = 5.0

LIST_S: Final = 15.0
"""How long the gateway may take to tell its models."""

Chat = list[dict[str, str]]
"""The messages of a conversation, the first one first."""


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta = _Delta()
    finish_reason: str | None = None


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Said(msgspec.Struct, frozen=True):
    """What went wrong, in OpenAI's shape."""

    message: str = ""
    code: str | int | None = None
    param: str | None = None


class _Event(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: _Said | None = None


class _Refusal(msgspec.Struct, frozen=True):
    error: _Said = _Said()


class _Model(msgspec.Struct, frozen=True):
    id: str
    embeddings: bool = False


class _Models(msgspec.Struct, frozen=True):
    data: list[_Model]


@dataclass(frozen=True)
class Piece:
    """A part of an answer."""

    text: str = ""
    thought: str = ""
    """What a model says to itself before it answers."""


class Listener:
    """Reads an answer as its bytes come, wherever they are cut."""

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.finish_reason = ""
        self.error: _Said | None = None
        self.done = False
        """The end mark was there: the answer is whole."""
        self._rest = b""

    def feed(self, data: bytes) -> list[Piece]:
        """The pieces that are complete now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        pieces: list[Piece] = []
        for line in lines:
            if not line.startswith(b"data:"):
                continue  # A comment, or the empty line between two events.
            said = line[5:].strip()
            if said == b"[DONE]":
                self.done = True
            elif (piece := self._read(said)) is not None:
                pieces.append(piece)
        return pieces

    def _read(self, said: bytes) -> Piece | None:
        try:
            event = msgspec.json.decode(said, type=_Event)
        except (ValueError, RecursionError):
            return None
        self.usage = event.usage or self.usage
        self.error = event.error or self.error
        for choice in event.choices[:1]:
            self.finish_reason = choice.finish_reason or self.finish_reason
            piece = Piece(choice.delta.content or "", choice.delta.reasoning_content or "")
            return piece if piece.text or piece.thought else None
        return None


@dataclass
class Answer:
    """What came of a question."""

    model: str
    text: str = ""
    node: str = ""
    finish_reason: str = ""
    usage: Usage | None = None
    asked_s: float = 0.0
    first_s: float | None = None
    last_s: float = 0.0
    """When it was asked, and when the first and the last piece came, by :func:`time.perf_counter`."""

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token."""
        return None if self.first_s is None else self.first_s - self.asked_s

    @property
    def tokens_per_s(self) -> float | None:
        """After the first token; None when there is nothing to measure."""
        if self.usage is None or self.first_s is None or self.usage.completion_tokens < 2:
            return None
        took_s = self.last_s - self.first_s
        return (self.usage.completion_tokens - 1) / took_s if took_s > 0 else None

    def document(self) -> dict[str, Any]:
        """All of it, for programs."""
        ttft_s, speed = self.ttft_s, self.tokens_per_s
        return {
            "model": self.model,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "usage": self.usage,
            "ttft_ms": None if ttft_s is None else round(ttft_s * 1e3, 1),
            "tokens_per_s": None if speed is None else round(speed, 2),
            "duration_ms": round((self.last_s - self.asked_s) * 1e3, 1),
            "node": self.node,
        }

    def summary(self) -> str:
        """How fast it was, in a line."""
        ttft_s, speed = self.ttft_s, self.tokens_per_s
        words = [f"{self.usage.completion_tokens} tokens" if self.usage else ""]
        words.append(f"{speed:.1f} tokens/s" if speed is not None else "")
        words.append(f"first after {ttft_s * 1e3:.0f} ms" if ttft_s is not None else "")
        words.append(f"on {self.node}" if self.node else "")
        words.append("cut off at its bound" if self.finish_reason == "length" else "")
        return ", ".join(word for word in words if word)


@dataclass(frozen=True)
class Gateway:
    """Where to ask.

    Args:
        url: of the edge, without ``/v1``.
        key: an API key, or the mesh's token; empty for none.
    """

    url: str
    key: str

    async def models(self) -> list[str]:
        """Models to chat with.

        Raises:
            Failure: it does not tell.
        """
        async with self._session() as session, _answering(self.url):
            timeout = aiohttp.ClientTimeout(total=LIST_S, sock_connect=CONNECT_S)
            async with session.get(f"{self.url}/v1/models", timeout=timeout) as answer:
                body = await answer.read()
                if answer.status != 200:
                    raise refusal(answer.status, body, answer.headers.get("retry-after", ""))
        try:
            found = msgspec.json.decode(body, type=_Models)
        except (ValueError, RecursionError):
            raise Failure(f"{self.url} is no gateway: it does not speak OpenAI's interface") from None
        return [model.id for model in found.data if not model.embeddings]

    async def ask(self, messages: Chat, options: dict[str, Any], answer: Answer) -> AsyncGenerator[Piece]:
        """The pieces of an answer as they come; what is known of it is kept in *answer*.

        Raises:
            Failure: it was refused.
            WorkFailure: it broke off.
        """
        listener = Listener()
        body = {"model": answer.model, "messages": messages, "stream": True, **options}
        body["stream_options"] = {"include_usage": True}
        answer.asked_s = answer.last_s = time.perf_counter()
        async with self._session() as session, _answering(self.url):
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
            headers = {"content-type": "application/json"}
            async with session.post(
                f"{self.url}/v1/chat/completions", data=msgspec.json.encode(body), headers=headers, timeout=timeout
            ) as response:
                answer.node = response.headers.get("x-computemesh-node", "")
                if response.status != 200:
                    raise refusal(response.status, await response.read(), response.headers.get("retry-after", ""))
                async for data in response.content.iter_any():
                    for piece in listener.feed(data):
                        answer.last_s = time.perf_counter()
                        answer.first_s = answer.last_s if answer.first_s is None else answer.first_s
                        answer.text += piece.text
                        yield piece
                    answer.usage, answer.finish_reason = listener.usage, listener.finish_reason
        if listener.error is not None:
            raise WorkFailure(f"the answer broke off: {listener.error.message}", code=str(listener.error.code or ""))
        if not listener.done:
            raise WorkFailure("the answer broke off", code="broke_off")

    @asynccontextmanager
    async def _session(self) -> AsyncGenerator[aiohttp.ClientSession]:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        if here := trace.current():
            headers["traceparent"] = here.header
        async with aiohttp.ClientSession(headers=headers) as session:
            yield session


@asynccontextmanager
async def _answering(url: str) -> AsyncGenerator[None]:
    """Raises what went wrong on the way as a failure of this command."""
    try:
        yield
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
        raise Failure(f"{url!r} is no address of a gateway: write http://HOST:PORT", field="url") from None
    except aiohttp.ClientPayloadError:
        raise WorkFailure("the answer broke off", code="broke_off") from None
    except (aiohttp.ClientError, TimeoutError) as error:
        reason = str(error.strerror if isinstance(error, OSError) else error) or "no answer in time"
        raise NoMesh(f"{url} does not answer: {reason}", hint="is the gateway running?", code="no_answer") from None


def refusal(status: int, body: bytes, retry_after: str) -> Failure:
    """A refusal in OpenAI's shape as the failure of this command."""
    try:
        said = msgspec.json.decode(body, type=_Refusal).error
    except (ValueError, RecursionError):
        said = _Said(message=body[:200].decode("utf-8", "replace"))
    hints = {
        401: "give a key with --key; `computemesh keys create NAME` makes one",
        429: f"try again in {retry_after} s" if retry_after else "try again in a moment",
        503: "`computemesh engines` shows what there is",
    }
    message = said.message or f"the gateway answered with status {status}"
    return Failure(message, hint=hints.get(status, ""), field=said.param or "", code=str(said.code or f"http_{status}"))


def listed(models: Sequence[str]) -> str:
    """Models as a hint."""
    return (
        f"there are {', '.join(models)}" if len(models) > 1 else f"there is {models[0]}" if models else "there is none"
    )
