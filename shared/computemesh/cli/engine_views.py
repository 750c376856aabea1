"""Inference engines as people see them: rows, and sentences about all of them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from computemesh.cli.common import STATE_COLOURS
from computemesh.cli.sizes import number
from computemesh.cli.tables import Cell, Column, folded, grid
from computemesh.contracts.base import Message
from computemesh.contracts.nodes import EngineCard, EngineState, EngineUse, NodeState, NodeView

COLUMNS: Final = (
    Column(title="node"),
    Column(title="device"),
    Column(title="backend", rank=4),
    Column(title="state"),
    Column(title="model", least=24),
    Column(title="pending", right=True, rank=1),
    Column(title="slots", right=True, rank=5),
    Column(title="tokens/s", right=True, rank=2),
    Column(title="restarts", right=True, rank=3),
    Column(title="name", rank=6, least=16),
)


class EngineRow(EngineCard, frozen=True, kw_only=True):
    """An engine of the mesh, and how busy it is."""

    node_id: str
    node_state: NodeState
    accepting: bool
    """Whether its node takes requests: it is online, not drained, and does not end."""
    told: bool
    """Whether a heartbeat told of it; else what follows is not known."""
    state: EngineState = EngineState.IDLE
    model: str = ""
    """In memory, or about to be."""
    pending: int = 0
    tokens_per_s: float | None = None
    restarts: int = 0
    models: list[str] = []
    """What its node serves."""


class EngineList(Message, frozen=True, kw_only=True):
    """Engines, by node and device."""

    engines: list[EngineRow]
    count: int


def engines_of(nodes: Iterable[NodeView], *, model: str = "", node_id: str = "") -> list[EngineRow]:
    """Every engine of these nodes.

    Args:
        model: only those whose node serves it.
        node_id: only those of this node.
    """
    return [
        row
        for node in nodes
        if (not node_id or node.node_id == node_id) and (not model or model in node.models)
        for row in _of_node(node)
    ]


def _of_node(node: NodeView) -> Iterator[EngineRow]:
    uses = {use.device: use for use in node.engine_use}
    for card in node.engines:
        use = uses.get(card.device, EngineUse(device=card.device))
        yield EngineRow(
            device=card.device,
            backend=card.backend,
            kind=card.kind,
            name=card.name,
            slots=card.slots,
            pending_max=card.pending_max,
            node_id=node.node_id,
            node_state=node.state,
            accepting=node.state is NodeState.ONLINE and not node.drained and node.accepting is not False,
            told=card.device in uses,
            state=use.state,
            model=use.model,
            pending=use.pending,
            tokens_per_s=use.tokens_per_s,
            restarts=use.restarts,
            models=node.models,
        )


def table(found: EngineList, *, width: int, lines: int | None) -> RenderableType:
    """A row for each engine, and a line about all of them.

    Args:
        lines: how many lines there is room for; None when that does not matter.
    """
    shown = found.engines if lines is None else found.engines[: max(1, lines - 3)]
    notes = (folded(found.count, len(shown)), summary(found.engines))
    foot = Text("; ".join(note for note in notes if note), "dim", no_wrap=True, overflow="ellipsis")
    return Group(grid(COLUMNS, [_row(engine) for engine in shown], width), foot)


def _row(engine: EngineRow) -> tuple[Cell, ...]:
    told = engine.told
    return (
        engine.node_id,
        engine.device,
        engine.backend,
        state(engine),
        engine.model or "-",
        f"{engine.pending if told else '?'}/{engine.pending_max}",
        str(engine.slots),
        number(engine.tokens_per_s) if engine.tokens_per_s is not None else "-",
        str(engine.restarts) if told else "?",
        engine.name or "-",
    )


def state(engine: EngineRow) -> Text:
    """How it is with an engine; of one whose node is away, that."""
    if engine.node_state is not NodeState.ONLINE:
        return Text(f"node {engine.node_state}", STATE_COLOURS.get(engine.node_state, "default"))
    said = Text(str(engine.state), STATE_COLOURS.get(engine.state, "default")) if engine.told else Text("?")
    return said if engine.accepting else said.append(" node drained", "magenta")


def summary(engines: Sequence[EngineRow]) -> str:
    """All of them in a line: ``3 engines: 2 ready, 1 idle; 5 requests, 42 tokens/s``."""
    if not engines:
        return "no engines"
    here = [engine for engine in engines if engine.node_state is NodeState.ONLINE]
    states = Counter(str(engine.state) if engine.told else "not heard of" for engine in here)
    if away := len(engines) - len(here):
        states["away"] = away
    words = ", ".join(f"{count:,} {name}" for name, count in states.items())
    pending = sum(engine.pending for engine in here)
    speed = sum(engine.tokens_per_s or 0.0 for engine in here)
    said = f"{len(engines):,} engine{'' if len(engines) == 1 else 's'}" + (f": {words}" if words else "")
    said += f"; {pending:,} request{'' if pending == 1 else 's'}" if pending else ""
    return said + (f", {number(speed)} tokens/s" if pending and speed else "")
