"""Following one item to its end: what is told late changes nothing."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from computemesh.bus import Bus
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
    waiting = asyncio.create_task(follower.wait(NO_BUS, 5.0, live=True))
    await asyncio.sleep(0)
    for name in reversed(names):
        await follower.on_progress(
            WorkProgress(work_id=name, attempt=1, node_id="n1", fraction=0.5, message="half [x]")
        )
        for state in (WorkState.RETRYING, WorkState.RUNNING, WorkState.COMPLETED, WorkState.COMPLETED):
            follower.on_record(a_record(name, state, node_id="n1"))
    assert [record.work_id for record in await waiting] == names


async def test_who_does_not_end_in_time_is_counted() -> None:
    follower = Follower(["w1", "w2", "w3"])
    follower.on_record(a_record("w2", WorkState.COMPLETED))
    with pytest.raises(WorkFailure, match="2 of 3 items are not finished"):
        await follower.wait(NO_BUS, 0.001, live=False)
