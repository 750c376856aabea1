"""OpenAI's interface without a server: what is checked, what passes through, and what is read of answers.

Goal: a client is told the field that is wrong, and an engine gets all that it alone understands. Method: bodies and
streams as clients and llama.cpp's server send them.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from computemesh import openai
from computemesh.contracts.base import Refused
from computemesh.contracts.infer import Path
from computemesh.openai import DONE, Question, Reader, Usage

CHAT: Path = "/v1/chat/completions"
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "Hello?"}]


def read(path: Path = CHAT, **fields: Any) -> Question | Refused:
    return openai.read(path, json.dumps(fields).encode())


def question(path: Path = CHAT, **fields: Any) -> Question:
    found = read(path, **fields)
    assert isinstance(found, Question), found
    return found


# --- requests ----------------------------------------------------------------------------------------------------


def test_a_request_is_passed_on_to_the_letter() -> None:
    """Fields that we do not know are the engine's business, inside of messages too."""
    body: dict[str, Any] = {
        "model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}], "name": "n", "new": {}}],
        "tomorrow": {"a": [1]},
        "temperature": 0,
        "stream": None,
    }
    found = question(**body)
    assert found.body == body
    assert (found.model, found.stream, found.include_usage, found.tokens_max) == ("m", False, False, None)


@pytest.mark.parametrize(
    ("path", "fields", "field"),
    [
        (CHAT, {"messages": MESSAGES}, "model"),
        (CHAT, {"model": "", "messages": MESSAGES}, "model"),
        (CHAT, {"model": 7, "messages": MESSAGES}, "model"),
        (CHAT, {"model": "m" * 201, "messages": MESSAGES}, "model"),
        (CHAT, {"model": "m"}, "messages"),
        (CHAT, {"model": "m", "messages": []}, "messages"),
        (CHAT, {"model": "m", "messages": "Hello?"}, "messages"),
        (CHAT, {"model": "m", "messages": [{"content": "x"}]}, "messages[0].role"),
        (CHAT, {"model": "m", "messages": [*MESSAGES, {"role": "user", "content": 1}]}, "messages[1].content"),
        (CHAT, {"model": "m", "messages": MESSAGES, "stream": "yes"}, "stream"),
        (CHAT, {"model": "m", "messages": MESSAGES, "max_tokens": -2}, "max_tokens"),
        (CHAT, {"model": "m", "messages": MESSAGES, "max_tokens": 1.5}, "max_tokens"),
        (CHAT, {"model": "m", "messages": MESSAGES, "max_completion_tokens": 2**31}, "max_completion_tokens"),
        (CHAT, {"model": "m", "messages": MESSAGES, "n": 0}, "n"),
        (CHAT, {"model": "m", "messages": MESSAGES, "n": 129}, "n"),
        (CHAT, {"model": "m", "messages": MESSAGES, "stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, {"model": "m", "messages": MESSAGES, "stream": True, "stream_options": 1}, "stream_options"),
        ("/v1/completions", {"model": "m"}, "prompt"),
        ("/v1/completions", {"model": "m", "prompt": {"text": "x"}}, "prompt"),
        ("/v1/embeddings", {"model": "m"}, "input"),
        ("/v1/embeddings", {"model": "m", "input": ""}, "input"),
        ("/v1/embeddings", {"model": "m", "input": []}, "input"),
        ("/v1/embeddings", {"model": "m", "input": "x", "stream": True}, "stream"),
    ],
)
def test_a_wrong_field_is_named(path: Path, fields: dict[str, Any], field: str) -> None:
    """As OpenAI's ``param``."""
    found = read(path, **fields)
    assert isinstance(found, Refused)
    assert (found.code, found.field, found.status) == ("bad_message", field, 400)
    assert openai.error_of(found).error.param == field


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'"x"', b'{"model": "\xff"}', b"[" * 100, b'{"a": NaN}'])
def test_what_is_no_object_is_refused(data: bytes) -> None:
    """And never raised."""
    assert isinstance(openai.read(CHAT, data), Refused)


def test_the_bound_on_tokens_has_two_names_and_the_newer_one_counts() -> None:
    """-1, which some clients send, is none."""
    assert question(model="m", messages=MESSAGES, max_tokens=5).tokens_max == 5
    assert question(model="m", messages=MESSAGES, max_tokens=5, max_completion_tokens=7).tokens_max == 7
    assert question(model="m", messages=MESSAGES, max_tokens=-1).tokens_max is None
    assert question("/v1/completions", model="m", prompt="x", max_tokens=0).tokens_max == 0


def test_the_length_of_a_prompt_is_told_whatever_its_form() -> None:
    """Texts, parts of texts and tokens; four characters stand for a token."""
    assert openai.prompt_chars(question(model="m", messages=[*MESSAGES, *MESSAGES])) == 12
    parts: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "abc"}, {"type": "image_url", "image_url": {}}]}
    ]
    assert openai.prompt_chars(question(model="m", messages=parts)) == 3
    assert openai.prompt_chars(question("/v1/completions", model="m", prompt=["ab", "c"])) == 3
    assert openai.prompt_chars(question("/v1/completions", model="m", prompt=[1, 2])) == 8
    assert openai.prompt_chars(question("/v1/embeddings", model="m", input="abcd")) == 4


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "status", "kind", "code"),
    [
        (Refused(code="bad_message", reason="x", field="n"), 400, "invalid_request_error", "bad_message"),
        (Refused(code="no_token", reason="x", status=401), 401, "authentication_error", "invalid_api_key"),
        (Refused(code="bad_token", reason="x", status=403), 401, "authentication_error", "invalid_api_key"),
        (Refused(code="bad_origin", reason="x", status=403), 403, "permission_error", "bad_origin"),
        (Refused(code="unknown_model", reason="x", status=404), 404, "invalid_request_error", "model_not_found"),
        (Refused(code="too_many_requests", reason="x", status=429), 429, "rate_limit_error", "too_many_requests"),
        (Refused(code="unavailable", reason="x", status=503), 503, "server_error", "unavailable"),
    ],
)
def test_a_refusal_has_the_words_that_clients_know(told: Refused, status: int, kind: str, code: str) -> None:
    """Its status, type and code."""
    error = openai.error_of(told).error
    assert (openai.in_its_words(told).status, error.type, error.code) == (status, kind, code)
    assert error.message == (f"{told.field}: {told.reason}" if told.field else told.reason)


@pytest.mark.parametrize(
    ("field", "reason", "message"),
    [
        ("stream", "Expected `bool | null`, got `int`", "stream: Expected `bool | null`, got `int`"),
        ("n", "Expected `int <= 128`", "n: Expected `int <= 128`"),
        ("messages[0].role", "Object missing required field", "messages[0].role: Object missing required field"),
        ("model", "no node serves model 'x'", "no node serves model 'x'"),
        ("", "nested too deep", "nested too deep"),
    ],
)
def test_a_refusal_names_its_field_in_the_message_too(field: str, reason: str, message: str) -> None:
    """Once: clients print the message, and nothing else."""
    error = openai.error_of(Refused(code="bad_message", reason=reason, field=field)).error
    assert (error.message, error.param) == (message, field or None)


@pytest.mark.parametrize(
    ("text", "reason", "code", "field"),
    [
        ('{"error": {"code": 400, "message": "too long", "type": "exceed_context_size_error"}}', "too long",
         "exceed_context_size_error", ""),
        ('{"error": {"message": "m", "code": "c", "param": "p", "type": "t"}}', "m", "c", "p"),
        ('{"error": "no"}', "no", "bad_message", ""),
        ("<html>", "<html>", "bad_message", ""),
        ("", "the engine answered with status 400", "bad_message", ""),
        ("[1]", "[1]", "bad_message", ""),
    ],
)  # fmt: skip
def test_what_an_engine_complains_of_is_passed_on(text: str, reason: str, code: str, field: str) -> None:
    """In whatever shape it came."""
    told = openai.complaint(400, text)
    assert (told.status, told.reason, told.code, told.field) == (400, reason, code, field)


# --- answers -----------------------------------------------------------------------------------------------------


def event(content: str = "", *, finish: str | None = None, **fields: Any) -> str:
    choices = [{"index": 0, "delta": {"content": content}, "finish_reason": finish}]
    return f"data: {json.dumps({'choices': choices, **fields})}\n\n"


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
LAST = event(choices=[], usage=USAGE)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_usage_nobody_asked_for_is_taken_out_and_known_all_the_same(keep: bool, at_once: bool) -> None:
    """However the events come together, everything else passes to the letter."""
    text = [event("a"), event("b"), event(finish="stop"), LAST, DONE]
    reader = Reader(keep_usage=keep)
    passed = "".join(map(reader.take, ["".join(text)] if at_once else text))
    assert passed == "".join(text if keep else [one for one in text if one is not LAST])
    assert reader.usage == Usage(prompt_tokens=3, completion_tokens=2)
    assert (reader.finish_reason, reader.done, reader.events) == ("stop", True, 5)


def test_a_usage_that_comes_with_text_is_left_where_it_is() -> None:
    """Some engines tell it along with the last choice."""
    reader = Reader(keep_usage=False)
    last = event("b", finish="length", usage=USAGE)
    assert reader.take(last) == last
    assert reader.usage is not None
    assert reader.finish_reason == "length"


def test_text_about_usage_is_text() -> None:
    """What an engine makes cannot pass for what it counts."""
    reader = Reader(keep_usage=False)
    told = event(json.dumps({"usage": USAGE, "choices": [], "finish_reason": "x"})) + event("usage", usage=None)
    assert reader.take(told) == told
    assert (reader.usage, reader.finish_reason, reader.done) == (None, "", False)


def test_an_answer_that_is_whole_tells_its_usage() -> None:
    """And nothing is made up where it does not."""
    choices = [{"finish_reason": "stop", "message": {"content": "x"}}]
    assert openai.usage_of(json.dumps({"choices": choices, "usage": USAGE})) == (Usage(3, 2), "stop")
    assert openai.usage_of(json.dumps({"data": [], "usage": {"prompt_tokens": 4}})) == (Usage(4, 0), "")
    assert openai.usage_of("{}") == (None, "")
    assert openai.usage_of("x") == (None, "")
