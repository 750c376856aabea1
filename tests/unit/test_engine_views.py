"""Engines as people see them: which are listed, how it is with them, and all of them in a line."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from computemesh.cli import engine_views
from computemesh.cli.engine_views import EngineList
from computemesh.contracts.nodes import EngineCard, EngineState, EngineUse, NodeState, NodeView


def node(node_id: str, *uses: EngineUse, engines: int = 1, **more: Any) -> NodeView:
    cards = [EngineCard(device=f"gpu:{number}", backend="cuda", slots=2) for number in range(engines)]
    return NodeView(node_id=node_id, engines=cards, engine_use=list(uses), models=more.pop("models", ["m"]), **more)


def use(number: int = 0, **more: Any) -> EngineUse:
    return EngineUse(device=f"gpu:{number}", **more)


def state(of: NodeView) -> str:
    (row,) = engine_views.engines_of([of])
    return engine_views.state(row).plain


def test_an_engine_is_what_its_node_announced_and_what_a_heartbeat_said_of_it() -> None:
    """Of a device that no heartbeat named nothing is claimed."""
    busy = use(1, state=EngineState.READY, model="m", pending=2, tokens_per_s=10.0, restarts=1)
    first, second = engine_views.engines_of([node("a", busy, engines=2)])
    assert (first.device, first.told, first.pending) == ("gpu:0", False, 0)
    assert (second.device, second.told, second.model, second.pending, second.restarts) == ("gpu:1", True, "m", 2, 1)
    assert engine_views.engines_of([node("plain", engines=0)]) == []


def test_engines_are_chosen_by_model_and_by_node() -> None:
    """The model is one that the node serves, loaded or not."""
    nodes = [node("a", models=["m", "n"]), node("b", models=["n"])]
    assert [row.node_id for row in engine_views.engines_of(nodes, model="m")] == ["a"]
    assert [row.node_id for row in engine_views.engines_of(nodes, node_id="b")] == ["b"]
    assert engine_views.engines_of(nodes, model="m", node_id="b") == []


def test_the_state_says_why_an_engine_gets_nothing() -> None:
    """Its own, unless its node is away; and that the node takes nothing new."""
    ready = use(state=EngineState.READY)
    assert state(node("a", ready)) == "ready"
    assert state(node("a")) == "?"
    assert state(node("a", ready, state=NodeState.LOST)) == "node lost"
    assert state(node("a", ready, drained=True)) == "ready node drained"
    assert state(node("a", ready, accepting=False)) == "ready node drained"


def test_all_engines_are_said_in_a_line() -> None:
    """Those of nodes that are away count as such, and their requests do not."""
    rows = engine_views.engines_of(
        [
            node("a", use(0, state=EngineState.READY, pending=2, tokens_per_s=10.5), use(1), engines=3),
            node("b", use(state=EngineState.READY, pending=5), state=NodeState.LOST),
        ]
    )
    assert engine_views.summary(rows) == "4 engines: 1 ready, 1 idle, 1 not heard of, 1 away; 2 requests, 10.5 tokens/s"
    assert engine_views.summary(rows[1:2]) == "1 engine: 1 idle"
    assert engine_views.summary([]) == "no engines"


def test_a_table_fits_the_terminal_and_says_what_it_left_out() -> None:
    """The least important columns go first; rows that have no room are counted."""
    rows = engine_views.engines_of([node(f"node-{number}", use(model="m" * 60)) for number in range(20)])
    console = Console(width=50, record=True)
    console.print(engine_views.table(EngineList(engines=rows, count=20), width=50, lines=10))
    lines = console.export_text().splitlines()
    assert all(len(line) <= 50 for line in lines)
    assert len(lines) <= 10
    assert "13 more" in lines[-1]
    assert "device" in lines[0]
    assert "backend" not in lines[0]
