"""Goal: replicas start together or not at all, items wait for those they name, and refused GPUs are tried elsewhere.

Method: the scheduler is fed what happened, and the records it wants stored are looked at. No clock: every time is a
number.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
from msgspec.structs import replace

from computemesh.contracts.base import Refused
from computemesh.contracts.nodes import NodeHeartbeat, NodeRecord, NodeState, RunningWork
from computemesh.contracts.work import (
    HANDED_BACK,
    Requirements,
    WorkCompleted,
    WorkFailed,
    WorkRecord,
    WorkState,
)
from computemesh.hardware import Memory
from computemesh.testing.builders import a_gpu, a_node, a_plain_node, a_record, an_item
from computemesh_services.work_marshaller import workitem
from computemesh_services.work_marshaller.effects import Deliver, Stop, consequences
from computemesh_services.work_marshaller.gangs import PATIENCE_S
from computemesh_services.work_marshaller.grants import REST_S, REST_S_MAX, reservation_id, terms
from computemesh_services.work_marshaller.scheduler import MISSED_S, WRITE_LATE_S, Limits, Scheduler
from computemesh_services.work_marshaller.workitem import RESULTS_BYTES_MAX, RetryPolicy

NOW = 1_000_000.0


def with_nodes(*nodes: NodeRecord) -> Scheduler:
    scheduler = Scheduler(Limits(retry=RetryPolicy(retries_max=1, delay_s=4.0)), jitter=lambda: 1.0)
    for node in nodes:
        scheduler.node_changed(node, NOW)
    return scheduler


def submit(scheduler: Scheduler, work_id: str, seq: int = 1, now: float = NOW, **item: Any) -> WorkRecord:
    record = scheduler.submitted(an_item(**item), work_id, seq, now)
    assert record is not None
    return record


def advance(scheduler: Scheduler, now: float = NOW) -> dict[str, WorkRecord]:
    """What is to be stored by now, by id."""
    scheduler.tick(now)
    scheduler.place(now)
    records = {record.work_id: record for record in scheduler.outbox}
    scheduler.outbox.clear()
    return records


def state(scheduler: Scheduler, work_id: str) -> str:
    return str(scheduler.records[work_id].state)


def a_pair(**item: Any) -> Scheduler:
    """Two nodes, on which an item with a replica each was just assigned."""
    scheduler = with_nodes(a_node("n1"), a_node("n2"))
    submit(scheduler, "w1", replicas=2, **item)
    placed = advance(scheduler)["w1"]
    assert workitem.places(placed) == [(0, "n1"), (1, "n2")]
    return scheduler


def taken(scheduler: Scheduler) -> dict[str, int]:
    return {node_id: len(seat.taken) for node_id, seat in scheduler.seats.items()}


# --- replicas ------------------------------------------------------------------------------------------------------


def test_replicas_are_placed_all_at_once_on_any_free_slots() -> None:
    """Several on a node that has the slots."""
    scheduler = with_nodes(a_node("n1", slots=3), a_node("n2"))
    submit(scheduler, "w1", replicas=4)
    placed = advance(scheduler)["w1"]
    assert (placed.state, placed.attempt, placed.replicas) == (WorkState.ASSIGNED, 1, 4)
    assert sorted(node for _, node in workitem.places(placed)) == ["n1", "n1", "n1", "n2"]
    assert (taken(scheduler), scheduler.out) == ({"n1": 3, "n2": 1}, 1)


def test_replicas_that_do_not_all_fit_take_nothing() -> None:
    """So two such items cannot each hold half of what the other needs: whichever is whole goes first."""
    scheduler = with_nodes(a_node("n1", slots=2), a_node("n2"))
    submit(scheduler, "big", 1, replicas=4)
    submit(scheduler, "small", 2, replicas=3)
    assert list(advance(scheduler)) == ["small"]
    for replica in range(3):
        scheduler.completed(WorkCompleted(work_id="small", attempt=1, replica=replica), NOW)
    submit(scheduler, "twin", 3, replicas=2)
    submit(scheduler, "other", 4, replicas=2)
    assert [work_id for work_id, record in advance(scheduler).items() if record.state is WorkState.ASSIGNED] == ["twin"]
    assert taken(scheduler) in ({"n1": 2, "n2": 0}, {"n1": 1, "n2": 1})
    assert (state(scheduler, "big"), state(scheduler, "other")) == ("pending", "pending")


def test_spread_puts_each_replica_on_a_node_of_its_own() -> None:
    """And waits for as many nodes as there are replicas."""
    scheduler = with_nodes(a_node("n1", slots=9), a_node("n2", slots=9))
    submit(scheduler, "w1", 1, replicas=2, requirements=Requirements(spread=True))
    submit(scheduler, "w2", 2, replicas=3, requirements=Requirements(spread=True))
    assert sorted(node for _, node in workitem.places(advance(scheduler)["w1"])) == ["n1", "n2"]
    assert state(scheduler, "w2") == "pending"


def test_a_node_without_direct_delivery_gets_no_replica() -> None:
    """Its reports need not say which one they are about."""
    scheduler = with_nodes(a_plain_node("p1", slots=9), a_node("n1"))
    submit(scheduler, "w1", replicas=2)
    assert advance(scheduler) == {}
    told = {node.node_id: node for node in scheduler.explain(scheduler.records["w1"], NOW).nodes}
    assert (told["p1"].fits, told["p1"].may_change) == (False, False)


def test_items_with_and_without_replicas_do_not_wait_for_each_other() -> None:
    """Though they ask for the same otherwise."""
    scheduler = with_nodes(a_node("n1"))
    submit(scheduler, "w1", 1, replicas=2)
    submit(scheduler, "w2", 2)
    assert list(advance(scheduler)) == ["w2"]


def test_an_item_is_completed_with_its_last_replica_and_has_all_results_in_order() -> None:
    """Until then those that are done are kept, and their slots are free."""
    scheduler = a_pair()
    part = scheduler.completed(WorkCompleted(work_id="w1", attempt=1, replica=1, result="second"), NOW, seq=7)
    assert part is not None
    assert (part.state, part.report_seq, part.members[1].result) == (WorkState.ASSIGNED, 7, "second")
    assert advance(scheduler)["w1"] is part, "it is stored, or a crash would lose it"
    assert taken(scheduler) == {"n1": 1, "n2": 0}
    assert scheduler.completed(WorkCompleted(work_id="w1", attempt=1, replica=1, result="again"), NOW, seq=8) is None
    done = scheduler.completed(WorkCompleted(work_id="w1", attempt=1, result="first"), NOW, seq=9)
    assert done is not None
    assert (done.state, done.result) == (WorkState.COMPLETED, ["first", "second"])
    assert (taken(scheduler), scheduler.out) == ({"n1": 0, "n2": 0}, 0)


@pytest.mark.parametrize(
    "report",
    [
        WorkCompleted(work_id="w1", attempt=2),
        WorkCompleted(work_id="w1", attempt=1, replica=2),
        WorkCompleted(work_id="w1"),
    ],
)
def test_a_report_that_is_about_no_replica_of_the_present_attempt_is_stale(report: WorkCompleted) -> None:
    """Another attempt, a replica that is none, or no attempt named."""
    scheduler = a_pair()
    assert scheduler.completed(report, NOW) is None


def test_a_report_about_a_replica_of_an_item_that_has_none_is_stale() -> None:
    """It cannot be about what runs."""
    scheduler = with_nodes(a_node("n1"))
    submit(scheduler, "w1")
    advance(scheduler)
    assert scheduler.completed(WorkCompleted(work_id="w1", attempt=1, replica=1), NOW) is None


def test_results_that_are_too_large_together_fail_the_item_with_the_sizes() -> None:
    """One record must hold them."""
    scheduler = a_pair()
    half = "x" * (RESULTS_BYTES_MAX // 2)
    scheduler.completed(WorkCompleted(work_id="w1", attempt=1, result=half), NOW)
    failed = scheduler.completed(WorkCompleted(work_id="w1", attempt=1, replica=1, result=half), NOW)
    assert failed is not None
    assert failed.error is not None
    assert (failed.state, failed.error.code, failed.error.fault) == (WorkState.FAILED, "result_too_large", "work")


def test_the_first_failure_of_a_replica_fails_the_attempt_by_the_usual_rules() -> None:
    """Tried again as a whole, what was completed included; dead after the last."""
    scheduler = a_pair()
    scheduler.completed(WorkCompleted(work_id="w1", attempt=1, result=1), NOW)
    scheduler.failed(WorkFailed(work_id="w1", attempt=1, replica=1), NOW)
    assert (state(scheduler, "w1"), taken(scheduler)) == ("retrying", {"n1": 0, "n2": 0})
    again = advance(scheduler, NOW + 4.0)["w1"]
    assert [(member.completed, member.result) for member in again.members] == [(False, None)] * 2
    scheduler.failed(WorkFailed(work_id="w1", attempt=2), NOW + 5)
    assert state(scheduler, "w1") == "dead"


def test_a_node_that_hands_one_replica_back_hands_back_all() -> None:
    """It is no failure."""
    scheduler = a_pair()
    scheduler.failed(WorkFailed(work_id="w1", attempt=1, replica=1, code=HANDED_BACK), NOW)
    record = scheduler.records["w1"]
    assert (record.state, record.failures, record.losses) == (WorkState.RETRYING, 0, 1)


def test_a_replica_that_is_declined_takes_all_back_to_the_queue() -> None:
    """Also those that were accepted; the node that declined rests."""
    scheduler = a_pair()
    scheduler.accepted("w1", 1, "s1", NOW)
    scheduler.declined("w1", 1, "busy", NOW, replica=1)
    record = scheduler.records["w1"]
    assert (record.state, record.attempt) == (WorkState.PENDING, 1)
    told = {node.node_id: node for node in scheduler.explain(record, NOW).nodes}
    assert told["n1"].fits
    assert "busy" in told["n2"].reasons


def test_an_item_runs_once_all_its_replicas_are_accepted() -> None:
    """One that is done already counts."""
    for second in ("accepted", "completed"):
        scheduler = a_pair()
        scheduler.accepted("w1", 1, "s1", NOW)
        assert advance(scheduler, NOW + WRITE_LATE_S) == {}
        if second == "accepted":
            scheduler.accepted("w1", 1, "s1", NOW + 1, replica=1)
        else:
            scheduler.completed(WorkCompleted(work_id="w1", attempt=1, replica=1), NOW + 1)
            scheduler.accepted("w1", 1, "s1", NOW + 1)
        assert advance(scheduler, NOW + 1 + WRITE_LATE_S)["w1"].state is WorkState.RUNNING


@pytest.mark.parametrize("how", ["lost", "removed", "restarted", "no longer listed"])
def test_an_attempt_is_lost_with_any_node_that_still_runs_a_replica(how: str) -> None:
    """A node on which all replicas are done may go."""
    scheduler = a_pair()
    for replica in (0, 1):
        scheduler.accepted("w1", 1, "s1", NOW, replica=replica)
    scheduler.completed(WorkCompleted(work_id="w1", attempt=1), NOW)
    for node_id, after in (("n1", "assigned"), ("n2", "retrying")):
        if how == "lost":
            scheduler.node_changed(a_node(node_id, state=NodeState.LOST, changed_at=1.0), NOW)
        elif how == "removed":
            scheduler.node_gone(node_id, NOW)
        elif how == "restarted":
            scheduler.node_changed(a_node(node_id, session="s2", changed_at=1.0), NOW)
        else:
            for now in (NOW, NOW + MISSED_S):
                scheduler.heartbeat(NodeHeartbeat(node_id=node_id, session="s1"), now)
        assert state(scheduler, "w1") == after


def test_two_replicas_on_a_node_that_is_lost_are_one_loss() -> None:
    """The item is assigned anew once."""
    scheduler = with_nodes(a_node("n1", slots=2))
    submit(scheduler, "w1", replicas=2)
    advance(scheduler)
    scheduler.node_changed(a_node("n1", slots=2, state=NodeState.LOST), NOW)
    record = scheduler.records["w1"]
    assert (record.state, record.losses, taken(scheduler)) == (WorkState.RETRYING, 1, {"n1": 0})


def test_a_heartbeat_renews_each_replica_by_its_number_and_stops_what_does_not_count() -> None:
    """A replica that the node should not have is stopped by number too."""
    scheduler = a_pair()
    listed = [RunningWork(work_id="w1", attempt=1, replica=replica) for replica in (0, 1)]
    beat = NodeHeartbeat(node_id="n1", session="s1", running=listed)
    assert scheduler.heartbeat(beat, NOW) == [Stop("w1", 1, "n1", "this attempt no longer counts", 1)]


def test_what_is_restored_holds_the_places_of_its_replicas_that_are_not_done() -> None:
    """And is lost when one of their nodes is gone meanwhile."""
    scheduler = a_pair()
    part = scheduler.completed(WorkCompleted(work_id="w1", attempt=1), NOW)
    assert part is not None
    after = with_nodes(a_node("n2"))
    after.restore(part, NOW)
    after.recovered(NOW)
    assert (state(after, "w1"), taken(after)) == ("assigned", {"n2": 1})
    after = with_nodes(a_node("n1"))
    after.restore(part, NOW)
    after.recovered(NOW)
    assert state(after, "w1") == "retrying"


def test_the_end_of_an_attempt_ends_its_replicas_that_are_not_done() -> None:
    """Those of a failed item too: only one of them reported."""
    before = workitem.assigned_together(a_record(replicas=3), ["n1", "n2", "n3"], NOW)
    assert consequences(None, before) == [Deliver(before)]
    part = workitem.completed(before, WorkCompleted(work_id="w1", attempt=1, replica=1), NOW)
    assert consequences(before, part) == []
    cancelled = workitem.cancelled(part, "not wanted", NOW)
    assert consequences(part, cancelled) == [
        Stop("w1", 1, "n1", "not wanted", 0),
        Stop("w1", 1, "n3", "not wanted", 2),
    ]
    failed = replace(cancelled, state=WorkState.FAILED)
    assert [effect.node_id for effect in consequences(part, failed) if isinstance(effect, Stop)] == ["n1", "n3"]
    assert consequences(part, replace(cancelled, state=WorkState.COMPLETED)) == []


def test_an_assignment_says_which_replica_it_is_and_where_the_others_are() -> None:
    """For an item without replicas it says nothing."""
    record = workitem.assigned_together(a_record(replicas=2), ["n1", "n2"], NOW)
    given = workitem.assignment(record, 1)
    assert (given.node_id, given.replica, given.replicas, given.peers) == ("n2", 1, 2, ["n1", "n2"])
    alone = workitem.assignment(workitem.assigned(a_record(), "n1", NOW, plain=False))
    assert (alone.node_id, alone.replica, alone.replicas, alone.peers) == ("n1", 0, 1, [])


# --- items that wait for others --------------------------------------------------------------------------------------


def test_an_item_starts_once_all_that_it_waits_for_have_completed() -> None:
    """And not before, however much room there is; the record says what is left."""
    scheduler = with_nodes(a_node("n1", slots=9))
    submit(scheduler, "w1", 1)
    submit(scheduler, "w2", 2)
    third = submit(scheduler, "w3", 3, after=["w1", "w2", "w1"])
    assert (third.after, third.awaits) == (["w1", "w2", "w1"], ["w1", "w2"])
    assert set(advance(scheduler)) == {"w1", "w2"}
    assert scheduler.explain(third, NOW).summary == "waits until completed: w1 (assigned), w2 (assigned)"
    scheduler.completed(WorkCompleted(work_id="w1", attempt=1), NOW)
    assert advance(scheduler)["w3"].awaits == ["w2"]
    scheduler.completed(WorkCompleted(work_id="w2", attempt=1), NOW)
    started = advance(scheduler)["w3"]
    assert (started.state, started.awaits) == (WorkState.ASSIGNED, [])
    assert submit(scheduler, "w4", 4, after=["w1"]).awaits == []


@pytest.mark.parametrize("end", ["failed", "dead", "cancelled"])
def test_an_item_fails_with_one_that_it_waits_for_and_so_does_all_that_waits_for_it(end: str) -> None:
    """A whole chain at once, without an attempt; each names the one before."""
    scheduler = with_nodes(a_node("n1"))
    submit(scheduler, "w0", 1, retries_max=0)
    for number in range(1, 1200):
        submit(scheduler, f"w{number}", 1 + number, after=[f"w{number - 1}"])
    advance(scheduler)
    if end == "cancelled":
        scheduler.cancel("w0", "not wanted", NOW)
    else:
        fault: Literal["work", "node"] = "work" if end == "failed" else "node"
        scheduler.failed(WorkFailed(work_id="w0", attempt=1, error="broke", fault=fault), NOW)
    advance(scheduler)
    last = scheduler.records["w1199"]
    assert last.error is not None
    assert (last.state, last.attempt, last.error.code, last.error.fault) == (WorkState.FAILED, 0, "dependency", "work")
    assert last.error.reason.startswith("w1198, which must complete first, is failed")
    assert (scheduler.waiting, state(scheduler, "w0")) == (0, end)


def test_an_item_that_waits_for_what_is_not_in_memory_has_it_looked_up() -> None:
    """Once; what was found decides, and what does not exist fails it by name."""
    scheduler = with_nodes(a_node("n1", slots=9))
    for number, other in enumerate(("done", "gone", "nobody"), start=5):
        submit(scheduler, f"after-{other}", number, after=[other])
    assert scheduler.take_unknown() == ["done", "gone", "nobody"]
    assert scheduler.take_unknown() == []
    assert [record for record in advance(scheduler).values() if record.state is WorkState.ASSIGNED] == []
    scheduler.looked_up("done", a_record("done", WorkState.COMPLETED), NOW)
    scheduler.looked_up("gone", a_record("gone", WorkState.CANCELLED), NOW)
    scheduler.looked_up("nobody", None, NOW)
    advance(scheduler)
    assert {work_id: str(record.state) for work_id, record in scheduler.records.items()} == {
        "after-done": "assigned",
        "after-gone": "failed",
        "after-nobody": "failed",
    }
    error = scheduler.records["after-nobody"].error
    assert error is not None
    assert "nobody" in error.reason


def test_an_item_can_only_wait_for_one_that_was_submitted_before_it() -> None:
    """Neither for itself, nor for one that waits for it: nothing waits for ever."""
    scheduler = with_nodes(a_node("n1"))
    submit(scheduler, "w1", 5, after=["w1"])
    assert state(scheduler, "w1") == "failed"
    after = with_nodes(a_node("n1"))
    after.restore(a_record("w2", after=["w3"], awaits=["w3"], inbox_seq=5), NOW)
    after.restore(a_record("w3", after=["w2"], awaits=["w2"], inbox_seq=6), NOW)
    after.recovered(NOW)
    advance(after)
    assert (state(after, "w2"), state(after, "w3")) == ("failed", "failed")


def test_what_waits_for_others_is_restored_whichever_is_read_first() -> None:
    """Those that were read from the bucket later, and those that must be looked up."""
    scheduler = with_nodes(a_node("n1", slots=9))
    scheduler.restore(a_record("w3", after=["w1", "w2"], awaits=["w1", "w2"], inbox_seq=3), NOW)
    scheduler.restore(a_record("w1", inbox_seq=1, state=WorkState.COMPLETED), NOW)
    scheduler.recovered(NOW)
    assert scheduler.records["w3"].awaits == ["w2"]
    assert scheduler.take_unknown() == ["w2"]
    scheduler.looked_up("w2", a_record("w2", WorkState.COMPLETED), NOW)
    assert advance(scheduler)["w3"].state is WorkState.ASSIGNED


def test_an_item_that_is_cancelled_waits_for_nothing_any_more() -> None:
    """The end of what it waited for does not touch it."""
    scheduler = with_nodes(a_node("n1"))
    submit(scheduler, "w1", 1)
    submit(scheduler, "w2", 2, after=["w1"])
    scheduler.cancel("w2", "not wanted", NOW)
    scheduler.cancel("w1", "not wanted", NOW)
    advance(scheduler)
    assert (state(scheduler, "w2"), scheduler.waiting) == ("cancelled", 0)


def test_an_awaited_item_that_turns_out_to_be_recorded_elsewhere_is_looked_up() -> None:
    """It was submitted twice, and finished long ago."""
    scheduler = with_nodes()
    submit(scheduler, "w1", 1)
    submit(scheduler, "w2", 2, after=["w1"])
    assert scheduler.take_unknown() == []
    scheduler.forget("w1")
    assert scheduler.take_unknown() == ["w1"]


# --- GPUs ------------------------------------------------------------------------------------------------------------

NO_ROOM = Refused(code="no_room", reason="n1/0: 0 of 24000 MiB free", status=409)
QUOTA = Refused(code="quota_exceeded", reason="ann has too much", status=429)
ONE_GPU = Requirements(gpus=1)


def a_gpu_node(node_id: str, **changes: Any) -> NodeRecord:
    return a_node(node_id, gpus=[a_gpu()], slots=2, **changes)


def refused(refusal: Refused, *nodes: NodeRecord, owner: str = "ann") -> Scheduler:
    """A scheduler whose first item, w1, was refused its GPU on n1."""
    scheduler = with_nodes(*nodes)
    submit(scheduler, "w1", requirements=ONE_GPU, owner=owner)
    placed = advance(scheduler)["w1"]
    assert placed.node_id == "n1"
    scheduler.refused_gpus("w1", 1, refusal, NOW)
    return scheduler


def test_an_item_that_is_refused_its_gpus_tries_another_node_at_once() -> None:
    """It has not failed, and the record says why it moved."""
    scheduler = refused(NO_ROOM, a_gpu_node("n1"), a_gpu_node("n2"))
    again = advance(scheduler)["w1"]
    assert (again.state, again.node_id, again.attempt, again.failures) == (WorkState.ASSIGNED, "n2", 2, 0)
    assert NO_ROOM.reason in [move.reason for move in again.story]


def test_a_node_that_has_no_gpu_memory_is_left_alone_for_longer_each_time() -> None:
    """By that demand only; the reason is told meanwhile."""
    scheduler = refused(NO_ROOM, a_gpu_node("n1"))
    now, pause_s = NOW, REST_S
    for attempt in (2, 3, 4):
        assert not scheduler.explain(scheduler.records["w1"], now).nodes[0].fits
        assert NO_ROOM.reason in scheduler.explain(scheduler.records["w1"], now).nodes[0].reasons
        assert "w1" not in {key for key, r in advance(scheduler, now + pause_s - 0.01).items() if r.attempt == attempt}
        now += pause_s
        assert advance(scheduler, now)["w1"].attempt == attempt
        scheduler.refused_gpus("w1", attempt, NO_ROOM, now)
        pause_s = min(REST_S_MAX, pause_s * 2)
    submit(scheduler, "w2", 2, now=now)
    assert advance(scheduler, now)["w2"].state is WorkState.ASSIGNED
    submit(scheduler, "w3", 3, now=now, requirements=Requirements(vram_mb=100))
    assert advance(scheduler, now)["w3"].state is WorkState.ASSIGNED


def test_gpu_memory_that_is_given_back_is_asked_for_at_once() -> None:
    """On that node, and no other."""
    scheduler = refused(NO_ROOM, a_gpu_node("n1"))
    advance(scheduler)
    scheduler.gpus_given_back("n2", "bob")
    assert advance(scheduler) == {}
    scheduler.gpus_given_back("n1", "bob")
    assert advance(scheduler)["w1"].attempt == 2


def test_an_owner_over_its_quota_waits_on_all_nodes_and_others_do_not() -> None:
    """Until something of its own is given back, wherever."""
    scheduler = refused(QUOTA, a_gpu_node("n1"), a_gpu_node("n2"))
    assert [record.state for record in advance(scheduler).values()] == [WorkState.PENDING]
    submit(scheduler, "w2", 2, requirements=ONE_GPU, owner="bob")
    assert advance(scheduler)["w2"].state is WorkState.ASSIGNED
    scheduler.gpus_given_back("n7", "ann")
    assert advance(scheduler)["w1"].state is WorkState.ASSIGNED


def test_without_a_ledger_items_that_need_gpus_wait_and_say_so() -> None:
    """Others do not notice."""
    scheduler = with_nodes(a_gpu_node("n1"))
    scheduler.gpus_away("nobody reserves")
    submit(scheduler, "w1", 1, requirements=ONE_GPU)
    submit(scheduler, "w2", 2)
    assert list(advance(scheduler)) == ["w2"]
    assert "nobody reserves" in scheduler.explain(scheduler.records["w1"], NOW).nodes[0].reasons
    scheduler.gpus_away("")
    assert advance(scheduler)["w1"].state is WorkState.ASSIGNED


def test_a_refusal_for_an_attempt_that_has_moved_on_changes_nothing() -> None:
    """It was accepted, overtaken or cancelled while the ledger was asked."""
    scheduler = with_nodes(a_gpu_node("n1"))
    submit(scheduler, "w1", requirements=ONE_GPU)
    placed = advance(scheduler)["w1"]
    scheduler.refused_gpus("w1", 7, NO_ROOM, NOW)
    scheduler.accepted("w1", 1, "s1", NOW)
    scheduler.refused_gpus("w1", 1, NO_ROOM, NOW)
    assert scheduler.records["w1"] is placed


def test_a_reservation_names_the_attempt_and_asks_for_what_the_item_asks() -> None:
    """The same terms whoever asks; without an amount, the whole of each GPU."""
    node = a_node("n1", session="s7", gpus=[a_gpu(80_000), a_gpu(24_000)])
    record = a_record(attempt=3, owner="ann", requirements=Requirements(gpus=2, vram_mb=9_000, gpu_model="card"))
    ask = terms(record, 1, node)
    assert (ask.gpu_count, ask.required_mb, ask.gpu_model, ask.prefer_nvlink) == (2, 9_000, "card", True)
    assert (ask.node_id, ask.session, ask.work_id, ask.owner) == ("n1", "s7", "w1", "ann")
    whole = terms(replace(record, requirements=ONE_GPU), 1, node)
    assert (whole.gpu_count, whole.required_mb) == (1, 21_600)
    some = terms(replace(record, requirements=Requirements(vram_mb=500)), 1, node)
    assert (some.gpu_count, some.required_mb) == (1, 500)
    ids = {reservation_id("w1", attempt, replica) for attempt in (1, 2, 3) for replica in (0, 1)}
    assert len(ids) == 6
    assert ask.reservation_id == reservation_id("w1", 3, 1)
    assert len(reservation_id("w" * 63, 10**9, 63)) <= 63


# --- nodes that are kept ---------------------------------------------------------------------------------------------


def a_stream(*nodes: NodeRecord, replicas: int = 2, **item: Any) -> Scheduler:
    """Nodes on which single items run, of which more wait than there are places, and one item with replicas."""
    scheduler = with_nodes(*nodes)
    slots = sum(node.slots for node in nodes)
    for number in range(slots):
        submit(scheduler, f"s{number}", number)
    advance(scheduler)
    submit(scheduler, "gang", 50, replicas=replicas, priority=0, **item)
    for number in range(100, 110):
        submit(scheduler, f"s{number}", number, priority=9)
    return scheduler


def finish(scheduler: Scheduler, node_id: str, now: float) -> set[str]:
    """Completes what runs on a node, and gives what starts there next."""
    for work_id, replica in list(scheduler.seats[node_id].taken):
        attempt = scheduler.records[work_id].attempt
        scheduler.completed(WorkCompleted(work_id=work_id, attempt=attempt, replica=replica), now)
    advance(scheduler, now)
    return {work_id for work_id, _ in scheduler.seats[node_id].taken}


LATE = NOW + PATIENCE_S


def test_smaller_items_hold_up_one_with_replicas_only_so_long() -> None:
    """Then its nodes are kept, and it starts when what runs on them has ended, however many others wait."""
    scheduler = a_stream(a_node("n1"), a_node("n2"))
    assert finish(scheduler, "n1", LATE - 1) == {"s100"}
    assert finish(scheduler, "n2", LATE - 1) == {"s101"}
    assert finish(scheduler, "n1", LATE) == set()
    told = {node.node_id: node for node in scheduler.explain(scheduler.records["s105"], LATE).nodes}
    assert told["n1"].reasons == ["kept for gang, which waits to start 2 replicas together"]
    assert finish(scheduler, "n2", LATE + 1) == {"gang"}
    assert finish(scheduler, "n1", LATE + 2) == {"s102"}, "the node is free for others again"


def test_no_more_nodes_are_kept_than_are_needed() -> None:
    """Those where the fewest others must end first."""
    scheduler = a_stream(a_node("n1"), a_node("n2", slots=2), a_node("n3"))
    advance(scheduler, LATE)
    kept = [node_id for node_id in ("n1", "n2", "n3") if not finish(scheduler, node_id, LATE + 1)]
    assert kept == ["n1"], "n1 and n3 were kept, and when n3 fell free the item started"
    assert state(scheduler, "gang") == "assigned"
    assert {node for _, node in workitem.places(scheduler.records["gang"])} == {"n1", "n3"}


@pytest.mark.parametrize("replicas", [3, 64])
def test_nothing_is_kept_for_an_item_that_would_not_fit_even_then(replicas: int) -> None:
    """Others go on."""
    scheduler = a_stream(a_node("n1"), a_node("n2"), replicas=replicas)
    assert finish(scheduler, "n1", LATE) == {"s100"}


def test_nothing_is_kept_when_it_is_not_work_that_is_in_the_way() -> None:
    """Nodes would stand idle for nothing: here, somebody else uses the memory."""
    memory = Memory(total_mb=64_000)
    scheduler = with_nodes(a_node("n1", memory=memory), a_node("n2", memory=memory))
    for node_id in ("n1", "n2"):
        scheduler.heartbeat(NodeHeartbeat(node_id=node_id, session="s1", memory_available_mb=1_000), NOW)
    submit(scheduler, "gang", replicas=2, requirements=Requirements(ram_mb=32_000))
    advance(scheduler)
    submit(scheduler, "w2", 2, now=LATE)
    assert advance(scheduler, LATE)["w2"].state is WorkState.ASSIGNED


@pytest.mark.parametrize("how", ["cancelled", "a node is lost"])
def test_nodes_are_kept_no_longer_than_they_are_of_use(how: str) -> None:
    """Not for an item that is gone, nor when the others would not be enough."""
    scheduler = a_stream(a_node("n1"), a_node("n2"))
    assert finish(scheduler, "n1", LATE) == set()
    if how == "cancelled":
        scheduler.cancel("gang", "not wanted", LATE)
    else:
        scheduler.node_changed(a_node("n2", state=NodeState.LOST), LATE)
        advance(scheduler, LATE)
    advance(scheduler, LATE)
    assert len(scheduler.seats["n1"].taken) == 1
    assert state(scheduler, "gang") != "assigned"


def test_of_two_items_with_replicas_the_second_has_nodes_kept_after_the_first() -> None:
    """Never half of them for each."""
    scheduler = a_stream(a_node("n1"), a_node("n2"))
    submit(scheduler, "twin", 51, replicas=2, work_type="ppo", priority=0)
    assert finish(scheduler, "n1", LATE) == set()
    told = scheduler.explain(scheduler.records["twin"], LATE).nodes
    assert all(any(reason.startswith("kept for gang") for reason in node.reasons) for node in told)
    assert finish(scheduler, "n2", LATE) == {"gang"}
    assert finish(scheduler, "n1", LATE + 1) == set()
    assert finish(scheduler, "n2", LATE + 2) == {"twin"}


def test_an_item_that_has_nodes_kept_keeps_its_turn_when_one_of_them_is_lost() -> None:
    """It gets others in its place, though one that came later is looked at before it."""
    scheduler = a_stream(a_node("n1"), a_node("n2"), a_node("n3"))
    submit(scheduler, "twin", 50, replicas=2, work_type="ppo", priority=9, now=NOW + 5)
    assert finish(scheduler, "n1", LATE) == set()
    advance(scheduler, LATE + 5)
    scheduler.node_changed(a_node("n2", state=NodeState.LOST), LATE + 6)
    scheduler.node_changed(a_node("n4", slots=1), LATE + 6)
    advance(scheduler, LATE + 6)
    told = scheduler.explain(scheduler.records["twin"], LATE + 6).nodes
    assert any(reason.startswith("kept for gang") for node in told for reason in node.reasons)


# --- what an item with replicas is told ----------------------------------------------------------------------------


def summary(scheduler: Scheduler, work_id: str) -> str:
    return scheduler.explain(scheduler.records[work_id], NOW).summary


def test_replicas_are_told_how_many_of_them_have_a_place() -> None:
    """Not on how many nodes, of which one may have room for several; asking changes nothing."""
    scheduler = with_nodes(a_node("n1", slots=4, gpus=[a_gpu()] * 8), a_node("n2", slots=4, gpus=[a_gpu()] * 8))
    submit(scheduler, "other", 1, requirements=Requirements(gpus=6))
    advance(scheduler)
    submit(scheduler, "w1", 2, replicas=4, requirements=Requirements(gpus=3))
    advance(scheduler)
    for _ in range(2):
        assert summary(scheduler, "w1") == "waits until all 4 replicas have a place: room for 2 now"
    scheduler.completed(WorkCompleted(work_id="other", attempt=1), NOW)
    assert summary(scheduler, "w1") == "waits its turn: 2 of 2 nodes fit"
    advance(scheduler)
    assert state(scheduler, "w1") == "assigned"


@pytest.mark.parametrize(
    ("node", "requirements", "room"),
    [
        (a_node("n1", slots=2, gpus=[a_gpu()] * 8), Requirements(gpus=3), 2),
        (a_node("n1", slots=9, gpus=[a_gpu()] * 8), Requirements(gpus=3), 2),
        (a_node("n1", slots=3), Requirements(), 3),
        (a_node("n1", slots=9), Requirements(spread=True), 1),
        (a_node("n1", slots=2, state=NodeState.LOST), Requirements(), 2),
    ],
)
def test_replicas_that_all_nodes_together_could_not_hold_are_told_so(
    node: NodeRecord, requirements: Requirements, room: int
) -> None:
    """For slots, resources or nodes of their own: waiting is of no use unless the mesh changes."""
    scheduler = with_nodes(node, a_node("other", work_types=["ppo"], slots=9))
    submit(scheduler, "w1", replicas=4, requirements=requirements)
    advance(scheduler)
    assert summary(scheduler, "w1") == (
        "waits: as the mesh is now it can never start: its 4 replicas start together, and all nodes, with nothing else "
        f"on them, have room for {room}"
    )
    scheduler.node_changed(a_node("n2", slots=9, gpus=[a_gpu()] * 12), NOW)
    if requirements.spread:
        assert "have room for 2" in summary(scheduler, "w1")
    else:
        assert summary(scheduler, "w1").startswith("waits its turn")
