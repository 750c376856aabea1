"""Answers prompts with the inference engine of this node, over its OpenAI interface.

The result is what MLOC expects of a task: ``items`` in the order of the prompts, and ``usage`` over them all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import msgspec
import urllib3

from computemesh import inference
from computemesh.contracts.base import Refused
from computemesh.executors import EngineAddress, ExecutionError, Executor, Progress, Task
from computemesh.inference import InferencePayload, chats

CONCURRENT_REQUESTS: Final = 4
"""Requests under way at a time; the engine batches them as far as it has slots."""

CONNECT_TIMEOUT_S: Final = 5.0

_PASSING: Final = frozenset({408, 425, 429})
"""Client errors that say nothing about the request."""

_PASSED_ON: Final = ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "seed", "stop")
"""Fields that the engine knows by the same names."""


class Ask(msgspec.Struct, frozen=True):
    """One request to the engine."""

    path: str
    body: dict[str, Any]


class Answer(msgspec.Struct):
    """What the engine has said so far."""

    output: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    pieces: int = 0
    """Parts that arrived with text in them: tokens, but for those that show none."""


def parse_payload(payload: dict[str, Any]) -> InferencePayload:
    """The payload, checked.

    Raises:
        ExecutionError: with code ``bad_payload``, naming the field.
    """
    parsed = inference.parse(payload)
    if isinstance(parsed, Refused):
        place = f"payload.{parsed.field}" if parsed.field else "payload"
        raise ExecutionError(f"{place}: {parsed.reason}", code=parsed.code)
    return parsed


def asks(payload: InferencePayload, model: str) -> list[Ask]:
    """The requests that answer *payload*, one a prompt."""
    settings: dict[str, Any] = {"model": model, "max_tokens": payload.max_tokens, "stream": True}
    settings["stream_options"] = {"include_usage": True}
    for name in _PASSED_ON:
        if (value := getattr(payload, name)) is not None:
            settings[name] = value
    if payload.messages is not None:
        return [_chat(settings, msgspec.to_builtins(messages)) for messages in chats(payload.messages)]
    prompts = [payload.prompt] if isinstance(payload.prompt, str) else payload.prompt or payload.prompts or []
    if payload.raw:
        return [Ask("/v1/completions", {**settings, "prompt": prompt}) for prompt in prompts]
    return [_chat(settings, [{"role": "user", "content": prompt}]) for prompt in prompts]


def share_of(count: int, replica: int, replicas: int) -> range:
    """Which of *count* prompts a replica answers: as many as the others, or one more."""
    return range(count * replica // replicas, count * (replica + 1) // replicas)


def result_of(model: str, answers: list[Answer], latency_s: float, *, first: int = 0) -> dict[str, Any]:
    """The result to report.

    Args:
        first: index of the first answer among those of all replicas.
    """
    prompt_tokens = sum(answer.prompt_tokens for answer in answers)
    completion_tokens = sum(answer.completion_tokens for answer in answers)
    return {
        "ok": True,
        "model": model,
        "items": [
            {"index": index, "output": answer.output, "finish_reason": answer.finish_reason}
            for index, answer in enumerate(answers, first)
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "latency_sec": round(latency_s, 3),
            "num_requests": len(answers),
        },
    }


class InferenceExecutor(Executor):
    """Runs ``inference`` items."""

    needs_engine: ClassVar[bool] = True

    def prepare(self) -> None:
        self._http = urllib3.PoolManager(maxsize=CONCURRENT_REQUESTS, retries=False)

    def run(self, task: Task, out_dir: Path, progress: Progress) -> dict[str, Any]:
        payload = parse_payload(task.payload)
        engine = task.engine
        if engine is None:
            raise ExecutionError("the node gave no inference engine", code="no_engine", fault="node")
        started_at = time.monotonic()
        every = asks(payload, engine.model)
        mine = share_of(len(every), task.replica, task.replicas)
        requests = every[mine.start : mine.stop]
        count = TokenCount(len(requests), payload.max_tokens, progress)
        answers = self._answers(engine, requests, count, task.timeout_s)
        return result_of(engine.model, answers, time.monotonic() - started_at, first=mine.start)

    def _answers(self, engine: EngineAddress, requests: list[Ask], count: TokenCount, timeout_s: float) -> list[Answer]:
        """Answers in the order of the requests; the first failure ends them all."""
        pool = ThreadPoolExecutor(CONCURRENT_REQUESTS)
        try:
            runs = [pool.submit(self._answer, engine, ask, count, timeout_s) for ask in requests]
            for done in as_completed(runs):
                done.result()
            return [run.result() for run in runs]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, engine: EngineAddress, ask: Ask, count: TokenCount, timeout_s: float) -> Answer:
        try:
            response = self._http.request(
                "POST",
                engine.base_url + ask.path,
                json=ask.body,
                preload_content=False,
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=timeout_s),
            )
            try:
                if response.status != 200:
                    raise engine_refusal(response.status, response.data)
                answer = read_answer(response, count.add)
            finally:
                response.close()
        except urllib3.exceptions.HTTPError as error:
            raise _engine_lost(f"{type(error).__name__}: {error}") from error
        count.finished(answer.pieces)
        return answer


class TokenCount:
    """Adds up tokens over concurrent requests, and reports them."""

    def __init__(self, requests: int, tokens_max_each: int, progress: Progress) -> None:
        self._lock = threading.Lock()
        self._each = tokens_max_each
        self._open = requests
        self._streamed = 0
        self._finished = 0
        self._progress = progress

    def add(self) -> None:
        """A token arrived."""
        with self._lock:
            self._streamed += 1
            self._report()

    def finished(self, tokens: int) -> None:
        """A request is complete, with that many added; what it left unused is no longer expected."""
        with self._lock:
            self._open -= 1
            self._finished += tokens
            self._report()

    def _report(self) -> None:
        total = max(1, self._streamed, self._finished + self._open * self._each)
        self._progress(f"{self._streamed} of {total} tokens", fraction=self._streamed / total)


class _Error(msgspec.Struct):
    message: str = ""
    code: int | str | None = None


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str = ""
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


_chunks: Final = msgspec.json.Decoder(_Chunk | None)


def read_answer(lines: Iterator[bytes], on_token: Callable[[], None]) -> Answer:
    """Follows a stream of server-sent events to its end.

    Raises:
        ExecutionError: the engine reported an error, or the stream broke off.
    """
    answer = Answer()
    for data in _events(lines):
        if data == b"[DONE]":
            break
        _add(answer, _decoded(data), on_token)
    if not answer.finish_reason:
        raise _engine_lost("it broke off in the middle of an answer")
    answer.completion_tokens = answer.completion_tokens or answer.pieces
    return answer


def _events(lines: Iterator[bytes]) -> Iterator[bytes]:
    for line in lines:
        name, _, data = line.strip().partition(b":")
        if name == b"data":
            yield data.strip()
        elif name == b"error":
            # Older llama.cpp reports an error in the stream like this.
            yield b'{"error":' + data + b"}"


def _decoded(data: bytes) -> _Chunk:
    try:
        return _chunks.decode(data) or _Chunk()
    except (ValueError, RecursionError) as error:
        raise _engine_lost(f"it sent something that is no completion: {error}") from error


def _add(answer: Answer, chunk: _Chunk, on_token: Callable[[], None]) -> None:
    if chunk.error is not None:
        status = chunk.error.code if isinstance(chunk.error.code, int) else 500
        raise _refusal(status, chunk.error.message)
    for choice in chunk.choices:
        text = choice.text or (choice.delta.content if choice.delta else None) or ""
        answer.output += text
        answer.finish_reason = choice.finish_reason or answer.finish_reason
        if text:
            answer.pieces += 1
            on_token()
    if chunk.usage is not None:
        answer.prompt_tokens = chunk.usage.prompt_tokens
        answer.completion_tokens = chunk.usage.completion_tokens


def engine_refusal(status: int, body: bytes) -> ExecutionError:
    """The failure that an engine's answer with a status other than 200 means."""
    try:
        error = msgspec.json.decode(body, type=_Chunk).error
    except (ValueError, RecursionError):
        error = None
    return _refusal(status, error.message if error else body[:300].decode("utf-8", "replace"))


def _refusal(status: int, message: str) -> ExecutionError:
    fault: Literal["work", "node"] = "work" if 400 <= status < 500 and status not in _PASSING else "node"
    return ExecutionError(f"the engine refused ({status}): {message}", code="engine_refused", fault=fault)


def _engine_lost(what: str) -> ExecutionError:
    return ExecutionError(f"the engine did not answer: {what}", code="engine_lost", fault="node")


def _chat(settings: dict[str, Any], messages: list[dict[str, Any]]) -> Ask:
    return Ask("/v1/chat/completions", {**settings, "messages": messages})
