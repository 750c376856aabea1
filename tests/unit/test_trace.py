"""Trace context: what is read from foreign headers, what is sent on, and what is derived."""

from __future__ import annotations

import asyncio

import pytest

from computemesh import trace
from computemesh.trace import Trace

SENDER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_a_sender_is_understood_and_answered_in_its_trace() -> None:
    """The trace id and the flags stay, the span is ours."""
    sender = trace.parse(SENDER)
    assert sender is not None
    assert sender == Trace("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", "01")
    assert sender.header == SENDER
    child = sender.child()
    assert (child.trace_id, child.flags) == (sender.trace_id, "01")
    assert child.span_id != sender.span_id
    assert trace.parse(child.header) == child


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        SENDER.upper(),
        SENDER[:-1],
        SENDER + "-more",
        "ff" + SENDER[2:],
        "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01",
        SENDER + "\n",
    ],
)
def test_what_is_no_trace_context_is_ignored(header: str) -> None:
    """The standard asks for it: a wrong header never fails a request."""
    assert trace.parse(header) is None


def test_a_later_version_of_the_standard_may_say_more() -> None:
    """Its first four fields are those of version 00."""
    later = trace.parse("cc" + SENDER[2:] + "-what-the-future-will-be-like")
    assert later is not None
    assert later.header == SENDER


def test_an_item_without_a_trace_has_the_one_of_its_id() -> None:
    """Every process derives the same, and other items other ones; it need not be sent."""
    assert trace.of_work("w1") == trace.of_work("w1")
    assert trace.of_work("w1").trace_id != trace.of_work("w2").trace_id
    assert trace.parse(trace.of_work("w1").header) == trace.of_work("w1")
    with trace.within(work_id="w1"):
        assert trace.current() == trace.of_work("w1")
        assert trace.to_send() == ""


def test_a_block_runs_in_the_trace_of_its_message_and_leaves_it_behind() -> None:
    """Blocks nest, a wrong header changes nothing, and outside there is no trace."""
    assert trace.current() is None
    with trace.within(SENDER, "w1"):
        here = trace.current()
        assert here is not None
        assert here.trace_id == "4bf92f3577b34da6a3ce929d0e0e4736"
        assert trace.to_send() == here.header
        with trace.within("nonsense"):
            assert trace.current() is here
        with pytest.raises(RuntimeError), trace.within(work_id="w2"):
            raise RuntimeError
        assert trace.current() is here
    assert trace.current() is None


async def test_what_a_task_enters_stays_in_it_and_in_what_it_starts() -> None:
    """A handler's trace reaches its subtasks and nobody else."""

    async def handler() -> str:
        trace.enter(trace.begin())
        trace.at_work("w1")  # The message brought a trace, so it stays.
        return await asyncio.create_task(child())

    async def child() -> str:
        return trace.to_send()

    first, second = await asyncio.gather(asyncio.create_task(handler()), asyncio.create_task(handler()))
    assert trace.parse(first)
    assert trace.parse(second)
    assert first[:35] != second[:35]
    assert trace.current() is None
