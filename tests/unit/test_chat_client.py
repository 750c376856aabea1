"""A conversation in the terminal: what is asked, what is heard of an answer, and what is said of a refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from computemesh.cli.chat import Conversation
from computemesh.cli.chat_client import Answer, Listener, Piece, Usage, listed, refusal


def event(text: str | None = None, **more: Any) -> str:
    delta = {} if text is None else {"content": text}
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}], **more})}\n\n"


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
LAST = f"data: {json.dumps({'choices': [], 'usage': USAGE})}\n\ndata: [DONE]\n\n"
STREAM = ": waiting\n\n" + event("Grün ") + event("und\nblau") + event() + LAST


@given(st.lists(st.integers(0, len(STREAM.encode())), max_size=20))
def test_an_answer_is_heard_whole_wherever_its_bytes_are_cut(cuts: list[int]) -> None:
    """In the middle of a line, of an event or of a character; comments and events without text say nothing."""
    data, listener = STREAM.encode(), Listener()
    heard: list[Piece] = []
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)], strict=True):
        heard += listener.feed(data[begin:end])
    assert heard == [Piece("Grün "), Piece("und\nblau")]
    assert (listener.done, listener.error) == (True, None)
    assert listener.usage == Usage(prompt_tokens=3, completion_tokens=2)


def test_why_it_ended_and_what_went_wrong_is_heard() -> None:
    """And that the end mark was missing."""
    listener = Listener()
    listener.feed(b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\r\n\r\n')
    listener.feed(b'data: {"error": {"message": "the engine ended", "code": "engine_lost"}}\n\n')
    assert listener.finish_reason == "length"
    assert listener.error is not None
    assert (listener.error.message, listener.error.code) == ("the engine ended", "engine_lost")
    assert not listener.done


@pytest.mark.parametrize(
    "line", ["data: ", "data: {", "data: []", "data: 5", 'data: {"choices": 5}', "event: x", "x" * 999]
)
def test_what_is_no_event_of_an_answer_is_passed_over(line: str) -> None:
    """The answer goes on behind it."""
    listener = Listener()
    assert listener.feed(f"{line}\n\n{event('on')}".encode()) == [Piece("on")]


def test_thoughts_are_no_part_of_the_answer() -> None:
    """They come in a field of their own."""
    listener = Listener()
    thought = 'data: {"choices": [{"delta": {"reasoning_content": "hm"}}]}\n\n'
    assert listener.feed(f"{thought}{event('yes')}".encode()) == [Piece("", "hm"), Piece("yes")]


def test_speed_is_that_of_the_tokens_after_the_first() -> None:
    """Nothing is claimed where nothing can be measured."""
    answer = Answer("m", text="x", usage=Usage(3, 11), asked_s=10.0, first_s=10.5, last_s=11.5, node="n1")
    assert answer.summary() == "11 tokens, 10.0 tokens/s, first after 500 ms, on n1"
    told = answer.document()
    assert (told["ttft_ms"], told["tokens_per_s"], told["duration_ms"]) == (500.0, 10.0, 1500.0)
    assert Answer("m", usage=Usage(3, 1), asked_s=1.0, first_s=2.0, last_s=2.0).tokens_per_s is None
    assert Answer("m").summary() == ""
    assert Answer("m").document()["ttft_ms"] is None
    assert "cut off" in Answer("m", finish_reason="length").summary()


@pytest.mark.parametrize(
    ("status", "said", "hint"),
    [
        (401, {"message": "no key", "code": "invalid_api_key", "param": None}, "--key"),
        (429, {"message": "too fast", "code": "rate_limit_exceeded", "param": None}, "in 7 s"),
        (404, {"message": "no model", "code": "model_not_found", "param": "model"}, ""),
    ],
)
def test_a_refusal_keeps_its_words_and_says_what_to_do(status: int, said: dict[str, Any], hint: str) -> None:
    """Its code and its field are for programs."""
    failure = refusal(status, json.dumps({"error": said}).encode(), "7")
    assert (failure.message, failure.code, failure.field) == (said["message"], said["code"], said["param"] or "")
    assert hint in failure.hint


@pytest.mark.parametrize("body", [b"", b"<html>gone</html>", b"[]", b'{"error": "x"}', b"\xff"])
def test_a_refusal_in_any_other_shape_is_one_too(body: bytes) -> None:
    """Whatever stands between us and the gateway may say so in its own way."""
    failure = refusal(502, body, "")
    assert failure.message
    assert failure.code == "http_502"


def test_models_are_offered_by_name() -> None:
    """However many there are."""
    assert [listed(models) for models in ([], ["a"], ["a", "b"])] == ["there is none", "there is a", "there are a, b"]


# --- a conversation ----------------------------------------------------------------------------------------------


def test_what_was_said_goes_along_with_the_next_question() -> None:
    """The system prompt first. A question without an answer was never asked."""
    talk = Conversation("m", system="Be brief.")
    talk.took("Hello?", "Hi.")
    talk.took("Nothing?", "")
    assert [f"{said['role']}: {said['content']}" for said in talk.messages("And?")] == [
        "system: Be brief.", "user: Hello?", "assistant: Hi.", "user: And?",
    ]  # fmt: skip
    assert talk.command("/clear") == "Forgotten."
    assert [said["role"] for said in talk.messages("And?")] == ["system", "user"]


def test_commands_change_the_conversation_or_say_how_it_is() -> None:
    """One that there is not says which there are."""
    talk = Conversation("m")
    assert talk.command("/system") == "System prompt: none"
    assert talk.command("/system  Be  brief. ") == "System prompt: Be  brief."
    assert talk.command("/system") == "System prompt: Be  brief."
    assert talk.command("/model other") == "Model: other"
    assert talk.model == "other"
    assert "/clear" in talk.command("/help")
    assert "/system" in talk.command("/nothing")
    for words in ("/exit", "/quit"):
        with pytest.raises(EOFError):
            talk.command(words)
