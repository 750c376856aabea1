"""Following one item to its end: what is told late changes nothing."""

from __future__ import annotations

import asyncio
import io
from typing import cast

import pytest
from rich.console import Console
from rich.text import Text

from computemesh.bus import Bus
from computemesh.cli import waiting
from computemesh.cli.common import WorkFailure
from computemesh.cli.waiting import Follower
from computemesh.contracts.work import WorkProgress, WorkState
from computemesh.testing.builders import a_record

NO_BUS = cast("Bus", None)
"""An item that has ended is asked for no more."""


async def test_an_answer_to_the_submission_that_comes_after_the_outcome_does_not_replace_it() -> None:
    """A quick item is completed before the submitter hears that it was taken."""
    follower = Follower(["w1"])
    await follower.on_state(a_record("w1", WorkState.COMPLETED, result="done"))
    follower.on_record(a_record("w1", WorkState.ASSIGNED))
    (record,) = await follower.wait(NO_BUS, 1.0, live=False)
    assert (record.state, record.result) == (WorkState.COMPLETED, "done")


async def test_many_items_are_followed_with_bars_that_come_and_go() -> None:
    """Whatever is told before the bars are shown, while they are, and twice."""
    names = [f"w{n}" for n in range(20)]
    follower = Follower(names)
    for name in names:
        follower.on_record(a_record(name, WorkState.RUNNING, node_id="n1"))
    ending = asyncio.create_task(follower.wait(NO_BUS, 5.0, live=True))
    await asyncio.sleep(0)
    for name in reversed(names):
        await follower.on_progress(
            WorkProgress(work_id=name, attempt=1, node_id="n1", fraction=0.5, message="half [x]")
        )
        for state in (WorkState.RETRYING, WorkState.RUNNING, WorkState.COMPLETED, WorkState.COMPLETED):
            follower.on_record(a_record(name, state, node_id="n1"))
    assert [record.work_id for record in await ending] == names


async def test_who_does_not_end_in_time_is_counted() -> None:
    follower = Follower(["w1", "w2", "w3"])
    follower.on_record(a_record("w2", WorkState.COMPLETED))
    with pytest.raises(WorkFailure, match="2 of 3 items are not finished"):
        await follower.wait(NO_BUS, 0.001, live=False)


def test_the_terminal_shows_a_bar_for_what_runs_and_a_reason_for_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason whole, in as many lines as it takes, and gone once the item runs."""
    screen = Console(file=io.StringIO(), width=60, force_terminal=True, color_system="truecolor")
    monkeypatch.setattr(waiting, "err", screen)
    why = "waits: no node fits now, 1 of 2 could later; the nearest is n1: busy: 2 of 2 slots taken"
    for names in (["w1"], ["w1", "w2"]):
        bars = waiting.Bars(names)
        bars.moved(a_record("w1"))
        bars.waits("w1", why)
        shown = drawn(bars, screen)
        assert why in " ".join(shown.replace("━", " ").replace("0:00:00", " ").replace("-:--:--", " ").split())
        assert ("━" in shown) == (len(names) > 1), "the bar is for all"
        bars.moved(a_record("w1", WorkState.RUNNING, node_id="n1"))
        shown = drawn(bars, screen)
        assert "slots taken" not in shown
        assert "w1 running on n1" in shown
        assert shown.count("━" * 24) == len(names)


def drawn(bars: waiting.Bars, screen: Console) -> str:
    with screen.capture() as shown:
        screen.print(bars.progress.get_renderable(), soft_wrap=False)
    return Text.from_ansi(shown.get()).plain
