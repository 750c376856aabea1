"""Following one item to its end: what is told late changes nothing."""

from __future__ import annotations

from typing import cast

from computemesh.bus import Bus
from computemesh.cli.waiting import Follower
from computemesh.contracts.work import WorkState
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
