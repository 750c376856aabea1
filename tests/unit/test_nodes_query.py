"""Goal: a query gives exactly the nodes for which everything asked holds, in the order asked, in pages that add up.

Method: a fleet in memory; each filter alone on nodes that differ in the one thing it is about.
"""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from computemesh.contracts.base import Refused
from computemesh.contracts.nodes import NodeBrief, NodeRecord, NodeSort, NodesQuery, NodeState, NodeView
from computemesh.hardware import Cpu, Gpu, GpuProcess, GpuUse, Memory, Platform, Tier
from computemesh.testing.builders import a_beat, a_gpu, a_node
from computemesh_services.node_registry.fleet import VIEW_BYTES_MAX, Fleet, Known, capability

BIG = 1_000_000


def fleet(*records: NodeRecord) -> Fleet:
    made = Fleet()
    for record in records:
        made.take(record, 0.0, 0.0, fresh=False)
    return made


def page(of: Fleet, *, bytes_max: int = BIG, **query: Any) -> tuple[list[str], int, str]:
    """The ids on one page, how many match, and the cursor."""
    found = of.page(NodesQuery(**query))
    assert not isinstance(found, Refused), found
    while not found.fill(Known.brief, bytes_max=bytes_max, nodes_max=3):
        pass
    ids = [msgspec.json.decode(raw, type=NodeBrief).node_id for raw in found.taken]
    return ids, found.count, found.next


def ids(of: Fleet, **query: Any) -> list[str]:
    found, count, after = page(of, **query)
    assert (len(found), after) == (count, "")
    return found


def refusal(of: Fleet, **query: Any) -> Refused:
    answer = of.page(NodesQuery(**query))
    assert isinstance(answer, Refused)
    return answer


# --- filters -------------------------------------------------------------------------------------------------------


def test_without_conditions_all_nodes_match_by_id() -> None:
    """Whatever their state, in whatever order they came."""
    of = fleet(a_node("b"), a_node("c", state=NodeState.LOST), a_node("a", state=NodeState.SUSPECT))
    assert ids(of) == ["a", "b", "c"]
    assert ids(of, descending=True) == ["c", "b", "a"]
    assert ids(Fleet()) == []


@pytest.mark.parametrize(
    ("yes", "no", "query"),
    [
        ({"gpus": [a_gpu()]}, {}, {"requires_gpu": True}),
        ({"tier": Tier.GPU_INFRA}, {}, {"min_tier": Tier.GPU_INFRA}),
        ({"tier": Tier.AI_FACTORY}, {"tier": Tier.GPU_INFRA}, {"min_tier": Tier.GPU_PEER}),
        ({}, {"state": NodeState.SUSPECT}, {"online_only": True}),
        ({"state": NodeState.LOST}, {}, {"states": [NodeState.LOST]}),
        ({"state": NodeState.SUSPECT}, {}, {"states": [NodeState.LOST, NodeState.SUSPECT]}),
        ({}, {"state": NodeState.LOST}, {"states": [NodeState.ONLINE, NodeState.LOST], "online_only": True}),
        ({"drained": True}, {}, {"drained": True}),
        ({}, {"drained": True}, {"drained": False}),
        ({"platform": Platform.ROCM}, {"platform": Platform.CUDA}, {"platform": Platform.ROCM}),
        ({"platform": Platform.CPU}, {}, {"platform": Platform.CPU}),
        ({"labels": {"zone": "a", "rack": "1"}}, {"labels": {"zone": "a"}}, {"labels": {"zone": "a", "rack": "1"}}),
        ({"labels": {"zone": "a"}}, {"labels": {"zone": "b"}}, {"labels": {"zone": "a"}}),
        ({"work_types": ["ppo"]}, {"work_types": ["inference"]}, {"work_type": "ppo"}),
        ({"work_types": []}, {"work_types": ["inference"]}, {"work_type": "ppo"}),
        ({"models": ["llama"]}, {"models": ["qwen"]}, {"model_name": "llama"}),
        ({"models": []}, {"models": ["qwen"]}, {"model_name": "llama"}),
        ({"memory": Memory(total_mb=64)}, {"memory": Memory(total_mb=63)}, {"min_memory_mb": 64}),
        ({"memory": Memory(total_mb=64)}, {}, {"min_memory_mb": 64}),
        ({"memory": Memory(available_mb=9)}, {"memory": Memory(available_mb=8)}, {"min_memory_available_mb": 9}),
        ({"gpus": [a_gpu(), a_gpu()]}, {"gpus": [a_gpu()]}, {"min_gpus": 2}),
        ({"gpus": [a_gpu(8), a_gpu(24)]}, {"gpus": [a_gpu(23)]}, {"min_vram_mb": 24}),
        ({"gpus": [a_gpu(24), a_gpu(24)]}, {"gpus": [a_gpu(8), a_gpu(24)]}, {"min_vram_mb": 24, "min_gpus": 2}),
        (
            {"gpus": [replace(a_gpu(24), vram_used_mb=4)]},
            {"gpus": [replace(a_gpu(24), vram_used_mb=5), a_gpu(8)]},
            {"min_vram_free_mb": 20},
        ),
        (
            {"gpus": [replace(a_gpu(), compute_capability="12.0")]},
            {"gpus": [replace(a_gpu(), compute_capability="8.9")]},
            {"min_compute_capability": "9.0"},
        ),
        ({"gpus": [a_gpu()]}, {"gpus": [replace(a_gpu(), compute_capability="")]}, {"min_compute_capability": "5"}),
        ({"gpus": [a_gpu(24)]}, {"gpus": [replace(a_gpu(24), error="lost")]}, {"min_vram_mb": 1}),
    ],
)
def test_each_filter_gives_the_node_that_has_it_and_not_the_one_that_lacks_it(
    yes: dict[str, Any], no: dict[str, Any], query: dict[str, Any]
) -> None:
    """One thing at a time, just met and just missed."""
    assert ids(fleet(a_node("yes", **yes), a_node("no", **no)), **query) == ["yes"]


def test_what_is_asked_of_a_gpu_must_hold_of_one_and_the_same() -> None:
    """A large old one and a small new one are no large new one."""
    large_old = replace(a_gpu(48), compute_capability="7.5")
    of = fleet(a_node("two", gpus=[large_old, a_gpu(8)]), a_node("one", gpus=[a_gpu(48)]))
    assert ids(of, min_vram_mb=24, min_compute_capability="8.0") == ["one"]


def test_a_query_that_is_repeated_is_answered_from_what_is_there_now() -> None:
    """Nodes that came, changed and went since; and another query is not taken for it."""
    of = fleet(a_node("a"), a_node("b", drained=True))
    assert (ids(of, drained=False), ids(of, drained=True), ids(of, labels={"x": "1"})) == (["a"], ["b"], [])
    of.take(a_node("b"), 0.0, 0.0, fresh=True)
    assert (ids(of, drained=False), ids(of, drained=True)) == (["a", "b"], [])
    of.take(a_node("c", labels={"x": "1"}), 0.0, 0.0, fresh=True)
    assert (ids(of, drained=False), ids(of, labels={"x": "1"})) == (["a", "b", "c"], ["c"])
    of.drop("a")
    assert ids(of, drained=False) == ["b", "c"]


def test_filters_add_up() -> None:
    """All of them hold of every node that is given."""
    of = fleet(a_node("a", drained=True, labels={"x": "1"}), a_node("b", labels={"x": "1"}), a_node("c"))
    assert ids(of, drained=False, labels={"x": "1"}) == ["b"]


def test_what_heartbeats_tell_counts_more_than_what_was_announced() -> None:
    """Memory, VRAM, models and slots as they are now; a node that sent none has not told its free slots."""
    of = fleet(*(a_node(name, slots=2, memory=Memory(available_mb=50), gpus=[a_gpu(24)]) for name in ("full", "free")))
    wanted = {
        "loaded_model": ["free"], "min_memory_available_mb": ["free"], "min_vram_free_mb": ["free"],
        "min_free_slots": ["free"],
    }  # fmt: skip
    asked: dict[str, Any] = {
        "loaded_model": "llama", "min_memory_available_mb": 40, "min_vram_free_mb": 20, "min_free_slots": 1
    }  # fmt: skip
    assert ids(of, min_free_slots=1) == []
    full, free = of.nodes["full"], of.nodes["free"]
    full.says(
        a_beat("full", ("w1", 1), ("w2", 1), memory_available_mb=30, gpus=[GpuUse(index=0, vram_used_mb=5)]), 1.0, 1.0
    )
    free.says(
        a_beat("free", ("w3", 1), loaded_models=["llama"], memory_available_mb=40, gpus=[GpuUse(index=0)]), 1.0, 1.0
    )
    for name, value in asked.items():
        assert ids(of, **{name: value}) == wanted[name], name


@pytest.mark.parametrize("wrong", ["x", "8.", ".9", "8.9.1", "-1", "eight", "8,9", "٣"])
def test_what_is_no_compute_capability_is_refused_by_name(wrong: str) -> None:
    """Not taken for one that any GPU has."""
    answer = refusal(fleet(), min_compute_capability=wrong)
    assert (answer.code, answer.field) == ("bad_message", "min_compute_capability")


def test_compute_capabilities_are_numbers_and_not_text() -> None:
    """12.0 is more than 8.9; 8 is 8.0."""
    assert capability("12.0") > capability("8.9") > capability("8") == capability("8.0")


# --- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sort", "lesser", "greater"),
    [
        ("state", {"state": NodeState.ONLINE}, {"state": NodeState.LOST}),
        ("tier", {"tier": Tier.GPU_INFRA}, {"tier": Tier.AI_FACTORY}),
        ("vram_total", {"gpus": [a_gpu(8)]}, {"gpus": [a_gpu(5), a_gpu(5)]}),
        ("vram_free", {"gpus": [replace(a_gpu(90), vram_used_mb=80)]}, {"gpus": [a_gpu(20)]}),
        ("memory_available", {"memory": Memory(available_mb=1)}, {"memory": Memory(available_mb=2)}),
        ("last_seen", {"last_seen": 1.0}, {"last_seen": 2.0}),
        ("changed_at", {"changed_at": 1.0}, {"changed_at": 2.0}),
        ("registered_at", {"registered_at": 1.0}, {"registered_at": 2.0}),
    ],
)
def test_nodes_are_ordered_by_what_is_asked_and_equals_by_id(
    sort: str, lesser: dict[str, Any], greater: dict[str, Any]
) -> None:
    """In both directions, page by page."""
    of = fleet(a_node("c", **greater), a_node("d", **lesser), a_node("a", **lesser), a_node("b", **greater))
    assert ids(of, sort=NodeSort(sort)) == ["a", "d", "b", "c"]
    assert ids(of, sort=NodeSort(sort), descending=True) == ["b", "c", "a", "d"]
    assert all_pages(of, limit=1, sort=NodeSort(sort), descending=True) == ["b", "c", "a", "d"]


@pytest.mark.parametrize("descending", [False, True])
def test_nodes_that_do_not_tell_come_last_in_any_direction(descending: bool) -> None:
    """By id among themselves; pages go on behind them."""
    of = fleet(a_node("mute-b"), a_node("mute-a"), a_node("idle"), a_node("busy"))
    of.nodes["idle"].says(a_beat("idle", cpu_percent=1.0), 1.0, 1.0)
    of.nodes["busy"].says(a_beat("busy", ("w", 1), cpu_percent=99.0), 1.0, 1.0)
    told = ["busy", "idle"] if descending else ["idle", "busy"]
    for sort in (NodeSort.CPU_PERCENT, NodeSort.RUNNING):
        assert ids(of, sort=sort, descending=descending) == [*told, "mute-a", "mute-b"]
        assert all_pages(of, limit=1, sort=sort, descending=descending) == [*told, "mute-a", "mute-b"]


# --- pages ---------------------------------------------------------------------------------------------------------


def all_pages(of: Fleet, **query: Any) -> list[str]:
    """Every page, one after the other."""
    found, count, after = page(of, **query)
    while after:
        following: dict[str, Any] = {**query, "after": after}
        more, still, after = page(of, **following)
        assert still == count, "all that match are counted on every page"
        assert more, "a page with a cursor to it is empty"
        found += more
    return found


def test_an_answer_is_cut_where_it_is_full_and_says_where_to_go_on() -> None:
    """Whatever limit was asked. Even a node that is larger alone is given."""
    of = fleet(*(a_node(f"n{n}") for n in range(10)))
    size = len(of.nodes["n0"].brief())
    first, count, after = page(of, bytes_max=3 * size + 3)
    assert (first, count, bool(after)) == (["n0", "n1", "n2"], 10, True)
    assert all_pages(of, bytes_max=3 * size + 3) == [f"n{n}" for n in range(10)]
    assert all_pages(of, bytes_max=1) == [f"n{n}" for n in range(10)]


def test_the_last_page_has_no_cursor_also_when_it_is_full() -> None:
    """So that nobody asks for a page that is empty."""
    of = fleet(a_node("a"), a_node("b"))
    assert page(of, limit=2) == (["a", "b"], 2, "")
    assert page(of, limit=1)[2]


IDS = st.text(alphabet="abc", min_size=1, max_size=3)
VALUES = st.integers(0, 3)


@given(
    nodes=st.dictionaries(IDS, VALUES, max_size=20),
    limit=st.integers(1, 5),
    descending=st.booleans(),
    by_value=st.booleans(),
    filtered=st.booleans(),
    data=st.data(),
)
def test_all_pages_together_have_every_match_once_whoever_comes_and_goes_meanwhile(
    nodes: dict[str, int], limit: int, descending: bool, by_value: bool, filtered: bool, data: st.DataObject
) -> None:
    """Those that are there from the first page to the last; in order; and none twice."""
    of = fleet(*(a_node(name, registered_at=float(value)) for name, value in nodes.items()))
    query: dict[str, Any] = {"limit": limit, "descending": descending}
    query |= {"sort": NodeSort.REGISTERED_AT} if by_value else {}
    query |= {"online_only": True} if filtered else {}
    stay, all_values = set(nodes), dict(nodes)
    found: list[str] = []
    after = ""
    while True:
        ids_, _, after = page(of, **query, after=after)
        found += ids_
        assert len(found) == len(set(found))
        if not after:
            break
        gone = data.draw(st.sets(st.sampled_from(sorted(of.nodes)), max_size=2))
        come = data.draw(st.dictionaries(IDS, VALUES, max_size=2))
        for name in gone:
            of.drop(name)
        for name, value in come.items():
            if name not in of.nodes and name not in all_values:
                of.take(a_node(name, registered_at=float(value)), 0.0, 0.0, fresh=True)
                all_values[name] = value
        stay -= gone
    assert stay <= set(found)
    sign = -1 if descending else 1

    def place(name: str) -> Any:
        return (sign * all_values[name], name) if by_value else name

    assert found == sorted(found, key=place, reverse=descending and not by_value)


@pytest.mark.parametrize(
    "after",
    [
        "x", "!", "é", "a" * 1000, "bm90IEpTT04",
        base64.urlsafe_b64encode(b'["node_id",false,null]').decode(),
        base64.urlsafe_b64encode(b'["node_id",false,null,"a",1]').decode(),
        base64.urlsafe_b64encode(b'["nothing",false,null,"a"]').decode(),
        base64.urlsafe_b64encode(b'["node_id",false,"1","a"]').decode(),
        base64.urlsafe_b64encode(b'["tier",false,NaN,"a"]').decode(),
        base64.urlsafe_b64encode(b"[" * 700).decode(),
    ],
)  # fmt: skip
def test_a_cursor_that_is_none_is_refused_by_name(after: str) -> None:
    """Nothing raises, and nobody starts over unnoticed."""
    answer = refusal(fleet(a_node()), after=after)
    assert (answer.code, answer.field, answer.status) == ("bad_message", "after", 400)


def test_a_cursor_of_another_order_is_refused_and_says_which_one() -> None:
    """It would lead to another place."""
    of = fleet(a_node("a"), a_node("b"))
    _, _, after = page(of, limit=1)
    assert "sort=node_id, descending=false" in refusal(of, after=after, descending=True).reason
    assert refusal(of, after=after, sort=NodeSort.TIER).field == "after"


# --- what is told of a node ----------------------------------------------------------------------------------------


def test_a_view_has_the_record_and_what_the_last_heartbeat_said() -> None:
    """VRAM in use stands with the GPU that it is of, found by UUID wherever it is in the list."""
    gpus = [replace(a_gpu(), index=0, uuid="A"), replace(a_gpu(), index=1, uuid="B"), replace(a_gpu(), index=2)]
    known = fleet(a_node("n1", gpus=gpus, last_seen=50.0)).nodes["n1"]
    assert (known.view().cpu_percent, known.view().running, known.view().accepting) == (None, None, None)
    process = GpuProcess(pid=7, memory_mb=3)
    known.says(
        a_beat(
            "n1", ("w1", 1), cpu_percent=12.5, memory_available_mb=7, loaded_models=["llama"], accepting=False,
            sent_at=103.0,
            gpus=[
                GpuUse(index=9, uuid="B", vram_used_mb=5, utilization_percent=50.0, processes=[process]),
                GpuUse(index=2, vram_used_mb=6),
                GpuUse(index=0, uuid="Z", vram_used_mb=99),
            ],
        ),
        1.0, 100.0,
    )  # fmt: skip
    view = msgspec.json.decode(known.full(), type=NodeView)
    assert [gpu.vram_used_mb for gpu in view.gpus] == [0, 5, 6]
    assert (view.gpus[1].utilization_percent, view.gpus[1].processes) == (50.0, [process])
    assert (view.cpu_percent, view.memory_available_mb, view.loaded_models) == (12.5, 7, ["llama"])
    assert (view.running, view.accepting, view.clock_skew_s, view.last_seen) == (1, False, 3.0, 100.0)
    brief = msgspec.json.decode(known.brief(), type=NodeBrief)
    assert (brief.gpus, brief.vram_used_mb, brief.running, brief.last_seen) == (3, 11, 1, 100.0)


def test_what_a_node_says_next_replaces_what_was_told_before() -> None:
    """Nothing old is answered from what was encoded once."""
    of = fleet(a_node("n1"))
    known = of.nodes["n1"]
    assert known.full() is known.full()
    for cpu in (1.0, 2.0):
        known.says(a_beat(cpu_percent=cpu), cpu, cpu)
        assert msgspec.json.decode(known.full(), type=NodeView).cpu_percent == cpu
        assert msgspec.json.decode(known.brief(), type=NodeBrief).cpu_percent == cpu
    of.take(a_node("n1", drained=True), 3.0, 3.0, fresh=True)
    assert msgspec.json.decode(known.brief(), type=NodeBrief).drained
    assert msgspec.json.decode(known.full(), type=NodeView).drained


@pytest.mark.parametrize("change", [{"state": NodeState.LOST}, {"session": "s2"}])
def test_what_a_life_said_that_is_over_is_not_told_any_more(change: dict[str, Any]) -> None:
    """A lost node runs at no percent, and a new one has not said anything yet."""
    of = fleet(a_node("n1"))
    of.nodes["n1"].says(a_beat(cpu_percent=1.0, sent_at=0.0), 1.0, 1.0)
    of.take(replace(a_node("n1"), **change), 2.0, 2.0, fresh=True)
    view = of.nodes["n1"].view()
    assert (view.cpu_percent, view.running, view.clock_skew_s) == (None, None, None)


def test_a_node_with_more_processes_than_fit_is_told_without_them() -> None:
    """All nodes must fit into some answer."""
    processes = [GpuProcess(pid=n, name="x" * 200, memory_mb=1) for n in range(1000)]
    known = fleet(a_node("n1", gpus=[replace(a_gpu(), index=n) for n in range(16)])).nodes["n1"]
    known.says(a_beat(gpus=[GpuUse(index=n, vram_used_mb=3, processes=processes) for n in range(16)]), 1.0, 1.0)
    assert len(known.full()) < VIEW_BYTES_MAX
    view = msgspec.json.decode(known.full(), type=NodeView)
    assert [(gpu.vram_used_mb, gpu.processes) for gpu in view.gpus] == [(3, None)] * 16


def test_a_record_that_was_written_just_now_is_a_sign_of_life_and_one_that_was_read_is_none() -> None:
    """After a start the registry has heard of nobody."""
    of = fleet(a_node("old", last_seen=5.0))
    assert of.nodes["old"].heard_s is None
    of.take(a_node("new"), 7.0, 70.0, fresh=True)
    assert of.nodes["new"].heard_s == 7.0
    of.take(a_node("old", last_seen=5.0, drained=True), 8.0, 80.0, fresh=True)
    assert of.nodes["old"].heard_s is None, "an operator's word is none of the node's"
    of.take(a_node("old", last_seen=9.0), 9.0, 90.0, fresh=True)
    assert of.nodes["old"].heard_s == 9.0


# --- the mesh in numbers -------------------------------------------------------------------------------------------


def test_the_mesh_is_told_in_numbers() -> None:
    """Lost nodes count as nodes, not as what could be used."""
    of = fleet(
        a_node("gpu", tier=Tier.GPU_PEER, platform=Platform.CUDA, gpus=[replace(a_gpu(24), vram_used_mb=4)] * 2,
               slots=4, cpu=Cpu(threads=8), memory=Memory(total_mb=64, available_mb=32)),
        a_node("dim", state=NodeState.SUSPECT, platform=Platform.CPU, drained=True),
        a_node("gone", state=NodeState.LOST, slots=50, gpus=[Gpu(vram_total_mb=99)], memory=Memory(total_mb=9)),
    )  # fmt: skip
    of.nodes["gpu"].says(a_beat("gpu", ("w1", 1), memory_available_mb=30), 1.0, 1.0)
    told = of.stats()
    assert (told.nodes, told.drained) == (3, 1)
    assert told.states == {"online": 1, "suspect": 1, "lost": 1}
    assert told.tiers == {"AI_FACTORY": 0, "GPU_PEER": 1, "GPU_INFRA": 0, "CPU_ONLY": 2}
    assert told.platforms == {"CPU": 1, "CUDA": 1}
    assert (told.cpus, told.memory_total_mb, told.memory_available_mb) == (8, 64, 30)
    assert (told.gpus, told.vram_total_mb, told.vram_used_mb) == (2, 48, 8)
    assert (told.slots, told.running) == (5, 1)


@given(st.lists(st.tuples(IDS, st.sampled_from(["take", "drop", *NodeState])), max_size=40))
def test_the_states_are_counted_right_after_any_history(history: list[tuple[str, str]]) -> None:
    """Counting goes along, and must never drift."""
    of = Fleet()
    for name, what in history:
        if what == "drop":
            of.drop(name)
        else:
            of.take(a_node(name, state=NodeState.ONLINE if what == "take" else NodeState(what)), 0.0, 0.0, fresh=True)
    for state in NodeState:
        assert of.states[state] == sum(known.record.state is state for known in of.nodes.values())
    assert ids(of) == sorted(of.nodes)
