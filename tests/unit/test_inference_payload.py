"""The inference executor without an engine: payloads in, requests out, streams in, answers out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from computemesh.executors import EngineAddress, ExecutionError, Task
from computemesh_services.node_agent import inference
from computemesh_services.node_agent.inference import Answer, parse_payload


def refused(payload: dict[str, Any]) -> str:
    with pytest.raises(ExecutionError) as caught:
        parse_payload(payload)
    assert (caught.value.code, caught.value.fault) == ("bad_payload", "work")
    return caught.value.reason


def stream(*events: bytes) -> Any:
    return iter([line for event in events for line in (event + b"\n", b"\n")])


def nothing() -> None:
    pass


def unwatched(message: str = "", *, fraction: float | None = None) -> None:
    pass


BAD_PAYLOADS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a", "max_tokens": 0}, "payload.max_tokens:"),
    ({"prompt": "a", "max_tokens": 40_000}, "payload.max_tokens:"),
    ({"prompt": "a", "max_tokens": "12"}, "payload.max_tokens:"),
    ({"prompt": "a", "temperature": -1}, "payload.temperature:"),
    ({"prompt": "a", "seed": 2**70}, "payload.seed:"),
    ({"prompt": 3}, "payload.prompt:"),
    ({"prompts": []}, "payload.prompts:"),
    ({"prompts": ["a", 1]}, "payload.prompts[1]:"),
    ({"messages": [{"role": "user"}]}, "payload.messages[0].content:"),
    ({"messages": [{"role": "user", "content": "a", "nane": "b"}]}, "payload.messages[0].nane:"),
    ({"messages": [[{"role": "user"}]]}, "payload.messages[0][0].content:"),
    ({"messages": [[]]}, "payload.messages[0]:"),
    ({"messages": [{"role": "user", "content": "a"}, [{"role": "user", "content": "a"}]]}, "payload.messages: is"),
    ({"prompt": "a", "top_k": -2}, "payload.top_k:"),
    ({}, "payload.prompt: give exactly one of"),
    ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "payload.messages: give exactly one of"),
    ({"raw": True, "messages": [{"role": "user", "content": "a"}]}, "payload.raw:"),
]


@pytest.mark.parametrize(("payload", "field"), BAD_PAYLOADS)
def test_a_bad_payload_is_the_works_fault_and_names_the_field(payload: dict[str, Any], field: str) -> None:
    """The submitter can find what to change without reading our code."""
    assert refused(payload).startswith(field)


def test_a_misspelt_field_is_refused_with_the_one_that_was_meant() -> None:
    """An ignored `max_token` would cost a puzzled hour."""
    assert refused({"prompt": "a", "max_token": 5}) == "payload.max_token: no such field; did you mean max_tokens?"


def test_each_prompt_becomes_a_chat_of_one_user_message() -> None:
    """Settings that were not given are left to the engine."""
    asks = inference.asks(parse_payload({"prompt": ["a", "b"], "seed": 7, "stop": "x"}), "m")
    assert [ask.path for ask in asks] == ["/v1/chat/completions"] * 2
    assert asks[1].body == {
        "model": "m",
        "max_tokens": 256,
        "stream": True,
        "stream_options": {"include_usage": True},
        "seed": 7,
        "stop": "x",
        "messages": [{"role": "user", "content": "b"}],
    }


def test_messages_are_one_chat_or_a_list_of_chats() -> None:
    """Each chat is one request, and what MLOC knows of sampling reaches the engine."""
    user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "b"}
    (ask,) = inference.asks(parse_payload({"messages": [system, user]}), "m")
    assert ask.body["messages"] == [system, user]
    sampling = {"top_k": 40, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": -0.5, "temperature": 0}
    asks = inference.asks(parse_payload({"messages": [[system, user], [user]], **sampling}), "m")
    assert [ask.body["messages"] for ask in asks] == [[system, user], [user]]
    assert asks[1].body | sampling == asks[1].body


def test_raw_prompts_are_continued_without_a_template() -> None:
    """They go to the plain completions path."""
    (ask,) = inference.asks(parse_payload({"prompts": ["Once"], "raw": True}), "m")
    assert (ask.path, ask.body["prompt"]) == ("/v1/completions", "Once")


def test_messages_are_one_request_and_reach_the_engine_as_given() -> None:
    """Fields that were left out stay left out."""
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "t"}]}]
    (ask,) = inference.asks(parse_payload({"messages": messages}), "m")
    assert ask.body["messages"] == messages


def test_a_stream_gives_text_usage_and_a_call_for_each_piece() -> None:
    """Chat and plain pieces, comments, empty events and the usage event are all understood."""
    pieces: list[int] = []
    answer = inference.read_answer(
        stream(
            b'data: {"choices":[{"delta":{"role":"assistant","content":null}}]}',
            b": ping",
            b"data: null",
            b'data: {"choices":[{"delta":{"content":"Hel"}}]}',
            b'data: {"choices":[{"text":"lo","finish_reason":null}]}',
            b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}',
            b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}',
            b"data: [DONE]",
        ),
        lambda: pieces.append(1),
    )
    assert (answer.output, answer.finish_reason, len(pieces)) == ("Hello", "stop", 2)
    assert (answer.prompt_tokens, answer.completion_tokens) == (5, 3)


def test_without_usage_from_the_engine_the_pieces_are_counted() -> None:
    """An engine that ignores stream_options still gets numbers."""
    events = (b'data: {"choices":[{"text":"a"}]}', b'data: {"choices":[{"text":"b","finish_reason":"length"}]}')
    assert inference.read_answer(stream(*events), nothing).completion_tokens == 2


@pytest.mark.parametrize(
    ("events", "fault"),
    [
        ((b'data: {"choices":[{"text":"a"}]}',), "node"),
        ((b"data: <html>",), "node"),
        ((b'data: {"error":{"code":500,"message":"boom"}}',), "node"),
        ((b'error: {"code":400,"message":"too long"}',), "work"),
    ],
)
def test_a_stream_that_breaks_off_or_reports_an_error_is_a_failure(events: tuple[bytes, ...], fault: str) -> None:
    """Half an answer is never taken for a whole one."""
    with pytest.raises(ExecutionError) as caught:
        inference.read_answer(stream(*events), nothing)
    assert caught.value.fault == fault


@pytest.mark.parametrize(
    ("status", "fault"), [(400, "work"), (404, "work"), (429, "node"), (500, "node"), (503, "node")]
)
def test_an_engines_refusal_is_the_works_fault_only_when_it_is_about_the_request(status: int, fault: str) -> None:
    """A busy engine is no reason to give up on the item."""
    error = inference.engine_refusal(status, b'{"error":{"message":"context too small"}}')
    assert (error.fault, error.reason) == (fault, f"the engine refused ({status}): context too small")
    assert "oops" in inference.engine_refusal(status, b"oops").reason


def test_progress_expects_less_once_a_request_ends_early_and_ends_at_one() -> None:
    """The share never falls, and the last report says that all is done."""
    shares: list[float] = []
    texts: list[str] = []

    def progress(message: str = "", *, fraction: float | None = None) -> None:
        assert fraction is not None
        shares.append(fraction)
        texts.append(message)

    count = inference.TokenCount(2, 10, progress)
    for _ in range(4):
        count.add()
    count.finished(4)
    for _ in range(10):
        count.add()
    count.finished(10)
    assert (texts[0], texts[-1], shares[-1]) == ("1 of 20 tokens", "14 of 14 tokens", 1.0)
    assert shares == sorted(shares)


def test_the_result_keeps_the_order_of_the_prompts_and_adds_up_usage() -> None:
    """It has the shape that MLOC reads."""
    answers = [Answer("a", "stop", 3, 1), Answer("b", "length", 4, 2)]
    assert inference.result_of("m", answers, 1.23456) == {
        "ok": True,
        "model": "m",
        "items": [
            {"index": 0, "output": "a", "finish_reason": "stop"},
            {"index": 1, "output": "b", "finish_reason": "length"},
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "total_tokens": 10,
            "latency_sec": 1.235,
            "num_requests": 2,
        },
    }


@pytest.mark.parametrize(("base_url", "code"), [(None, "no_engine"), ("http://127.0.0.1:1", "engine_lost")])
def test_a_missing_engine_is_the_nodes_fault(base_url: str | None, code: str, tmp_path: Path) -> None:
    """Another node may have one, so the item is tried again."""
    engine = EngineAddress(base_url=base_url, model="m") if base_url else None
    task = Task(work_id="w", attempt=1, work_type="inference", payload={"prompt": "a"}, engine=engine)
    executor = inference.InferenceExecutor()
    executor.prepare()
    with pytest.raises(ExecutionError) as caught:
        executor.run(task, tmp_path, unwatched)
    assert (caught.value.code, caught.value.fault) == (code, "node")


@pytest.mark.parametrize(("count", "replicas"), [(10, 3), (2, 4), (1, 1), (64, 64), (0, 2)])
def test_replicas_share_the_prompts_evenly_in_order_and_leave_none_out(count: int, replicas: int) -> None:
    """No share is more than one larger than another."""
    shares = [inference.share_of(count, replica, replicas) for replica in range(replicas)]
    assert [index for share in shares for index in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_answers_of_a_replica_are_numbered_as_all_of_them() -> None:
    """So that the lists of all replicas, one after the other, are in the order of the prompts."""
    items = inference.result_of("m", [Answer(output="a"), Answer(output="b")], 1.0, first=5)["items"]
    assert [item["index"] for item in items] == [5, 6]
