"""OpenAI's interface: requests checked, refusals in its words, and answers read along as they pass. Pure.

The gateway and the edge of each node agent speak it; the routes are declared in ``contracts.openai``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec
from msgspec.structs import replace

from computemesh.contracts.base import Message, Refused, convert, encode, refused, too_deep
from computemesh.contracts.infer import Path
from computemesh.contracts.openai import (
    ApiError,
    ApiRefusal,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Generation,
)

ROOT: Final = "/v1/"
"""Where paths begin whose refusals are in OpenAI's shape, on an edge that has its interface."""

DONE: Final = "data: [DONE]\n\n"
"""The last event of an answer that is whole."""

KINDS: Final[dict[Path, type[Message]]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
}
"""What is asked at each path."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request that can be given to an engine."""

    path: Path
    model: str
    body: dict[str, Any]
    """As the client sent it."""
    stream: bool
    include_usage: bool
    """The client asked for the usage at the end of the stream."""
    tokens_max: int | None
    """Bound on each answer; None when the client set none."""
    answers: int = 1
    """How many it asks for: ``n`` for each of its prompts."""

    @property
    def embeds(self) -> bool:
        """It asks for embeddings, not texts."""
        return self.path == "/v1/embeddings"


# --- requests ----------------------------------------------------------------------------------------------------


def read(path: Path, data: bytes) -> Question | Refused:
    """The request in a body, or the refusal that names its field."""
    if too_deep(data):
        return Refused(code="bad_message", reason="nested too deep")
    try:
        body = msgspec.json.decode(data or b"{}", type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        return refused(error, data=data)
    asked = convert(body, KINDS[path])
    if isinstance(asked, Refused):
        return asked
    if isinstance(asked, EmbeddingRequest):
        if body.get("stream"):
            return Refused(code="bad_message", field="stream", reason="embeddings do not stream")
        return Question(path=path, model=asked.model, body=body, stream=False, include_usage=False, tokens_max=None)
    assert isinstance(asked, Generation)
    stream = bool(asked.stream)
    if asked.stream_options is not None and not stream:
        return Refused(code="bad_message", field="stream_options", reason="only with 'stream': true")
    return Question(
        path=path,
        model=asked.model,
        body=body,
        stream=stream,
        include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        tokens_max=_tokens_max(asked),
        answers=_prompts(asked) * (asked.n or 1),
    )


def _tokens_max(asked: Generation) -> int | None:
    bounds: list[int | None] = []
    if isinstance(asked, ChatRequest):
        bounds = [asked.max_completion_tokens, asked.max_tokens]
    elif isinstance(asked, CompletionRequest):
        bounds = [asked.max_tokens]
    return next((bound for bound in bounds if bound is not None and bound >= 0), None)


def _prompts(asked: Generation) -> int:
    """How many prompts a request has. Tokens, and tokens among texts, are one."""
    prompt = asked.prompt if isinstance(asked, CompletionRequest) else ""
    if isinstance(prompt, str) or any(isinstance(part, int) for part in prompt):
        return 1
    return max(1, len(prompt))


def prompt_chars(question: Question) -> int:
    """Characters of what the answer follows, roughly: four of them are about a token."""
    return _chars(question.body.get("messages") or question.body.get("prompt") or question.body.get("input"))


def _chars(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(_chars(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        texts: list[Any] = [value.get("content"), value.get("text")]  # pyright: ignore[reportUnknownMemberType]
        return sum(_chars(item) for item in texts)
    return 4 if isinstance(value, int) else 0  # A token of a prompt that is given as tokens.


# --- refusals ----------------------------------------------------------------------------------------------------

_CODES: Final = {"no_token": "invalid_api_key", "bad_token": "invalid_api_key", "unknown_model": "model_not_found"}


def in_its_words(told: Refused) -> Refused:
    """A refusal with the code, and the status, that OpenAI's clients know it by."""
    status = 401 if told.code == "bad_token" else told.status
    return replace(told, code=_CODES.get(told.code, told.code), status=status)


def wrong_kind(asked: Question, others: Iterable[str]) -> Refused:
    """What is said when a model gives embeddings and was asked for texts, or the other way round.

    Args:
        others: models that give what is asked for.
    """
    wants, gives = ("embeddings", "texts") if asked.embeds else ("texts", "embeddings")
    there = ", ".join(sorted(others)) or "none"
    reason = f"model {asked.model!r} gives {gives}, not {wants}; models that give {wants}: {there}"
    return Refused(code="unsupported_model", field="model", reason=reason, status=400)


def error_of(told: Refused) -> ApiRefusal:
    """A refusal in OpenAI's shape. Its status is that of :func:`in_its_words`."""
    told = in_its_words(told)
    error = ApiError(message=_message(told), type=_type(told.status), param=told.field or None, code=told.code)
    return ApiRefusal(error=error)


def _message(told: Refused) -> str:
    """The reason, with the field before it where it does not name it: OpenAI's clients print the message alone."""
    if not told.field or re.search(rf"(?<!\w){re.escape(told.field)}(?!\w)", told.reason):
        return told.reason
    return f"{told.field}: {told.reason}"


def error_event(told: Refused) -> str:
    """The event that ends a stream whose answer is not whole; the end mark does not follow."""
    return f"data: {encode(error_of(told)).decode()}\n\n"


def _type(status: int) -> str:
    match status:
        case 401:
            return "authentication_error"
        case 403:
            return "permission_error"
        case 429:
            return "rate_limit_error"
        case _:
            return "invalid_request_error" if status < 500 else "server_error"


class _Complaint(msgspec.Struct):
    error: dict[str, Any] | str | None = None


def complaint(status: int, text: str) -> Refused:
    """What an engine complained of, as a refusal of ours.

    Args:
        status: the engine's, other than 200.
        text: its answer: OpenAI's shape, or anything.
    """
    message, code, param = text.strip()[:500], "", ""
    try:
        error = msgspec.json.decode(text, type=_Complaint).error
    except (ValueError, RecursionError):
        error = None
    if isinstance(error, str):
        message = error
    elif error is not None:
        message = str(error.get("message") or message)
        # llama.cpp has the status there.
        code = error["code"] if isinstance(error.get("code"), str) else str(error.get("type") or "")
        param = str(error.get("param") or "")
    retry: Literal["never", "later"] = "later" if status in (429, 503) else "never"
    return Refused(
        code=code or ("bad_message" if status < 500 else "engine_failed"),
        reason=message or f"the engine answered with status {status}",
        field=param,
        status=status,
        retry=retry,
    )


# --- answers -----------------------------------------------------------------------------------------------------


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of a request, as its engine counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Answer(msgspec.Struct, gc=False):
    choices: list[Any] | None = None
    usage: Usage | None = None


class _Choice(msgspec.Struct, gc=False):
    finish_reason: str | None = None


class _Whole(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: Usage | None = None


# In a string of JSON a quotation mark has a backslash, so this is a field and never text that an engine made.
_USAGE: Final = re.compile(r'"usage"\s*:\s*\{')
_FINISH: Final = re.compile(r'"finish_reason"\s*:\s*"(\w+)"')
_read_answer: Final = msgspec.json.Decoder(_Answer).decode
_read_whole: Final = msgspec.json.Decoder(_Whole).decode


class Reader:
    """Reads along in an answer that streams, and takes out the usage if its client did not ask for it.

    It looks for two names in each piece and reads no more than the event that has one of them.

    Args:
        keep_usage: the event with nothing but the usage is for the client.
    """

    __slots__ = ("_keep_usage", "done", "events", "finish_reason", "usage")

    def __init__(self, *, keep_usage: bool) -> None:
        self._keep_usage = keep_usage
        self.usage: Usage | None = None
        self.finish_reason = ""
        self.events = 0
        """Events so far; about one for each token."""
        self.done = False
        """The end mark was there: the answer is whole."""

    def take(self, text: str) -> str:
        """What the client gets of a piece, which consists of whole events; it may be nothing."""
        self.events += text.count("\n\n")
        if found := _FINISH.search(text):
            self.finish_reason = found[1]
        if text.endswith(DONE):
            self.done = True
        return self._with_usage(text) if _USAGE.search(text) else text

    def _with_usage(self, text: str) -> str:
        kept: list[str] = []
        for event in text.split("\n\n"):
            if _USAGE.search(event) and (answer := _answer_in(event)) is not None and answer.usage is not None:
                self.usage = answer.usage
                if not answer.choices and not self._keep_usage:
                    continue
            kept.append(event)
        return "\n\n".join(kept)


def _answer_in(event: str) -> _Answer | None:
    try:
        return _read_answer(event.partition("data:")[2])
    except (ValueError, RecursionError):
        return None


def usage_of(text: str) -> tuple[Usage | None, str]:
    """The usage and the first finish reason of an answer that came as one; what is not told is None, or empty."""
    try:
        whole = _read_whole(text)
    except (ValueError, RecursionError):
        return None, ""
    reasons = [choice.finish_reason or "" for choice in whole.choices or ()]
    return whole.usage, next(iter(reasons), "")
