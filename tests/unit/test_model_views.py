"""Models as people see them: where each is, how far those are that are being fetched, and all of them in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from computemesh.cli import model_views
from computemesh.cli.model_views import ModelList
from computemesh.contracts.nodes import ModelCard, ModelFetch, NodeState, NodeView
from computemesh.gguf import read
from computemesh.testing.ggufs import a_gguf


def node(node_id: str, *cards: ModelCard, **more: Any) -> NodeView:
    return NodeView(node_id=node_id, models=[card.name for card in cards], model_cards=list(cards), **more)


HERE = ModelCard(name="m", size_mb=100, context_tokens=4096)
AWAY = ModelCard(name="m", present=False)


def test_a_model_is_listed_once_with_all_nodes_that_serve_it() -> None:
    """What it is, the node says that has it."""
    rows = model_views.models_of([node("a", AWAY), node("b", HERE, loaded_models=["m"])])
    assert [row.name for row in rows] == ["m"]
    (row,) = rows
    assert (row.size_mb, row.context_tokens) == (100, 4096)
    assert [(place.node_id, place.present, place.loaded) for place in row.places] == [
        ("a", False, False),
        ("b", True, True),
    ]
    assert model_views.models_of([node("a", HERE)], node_id="b") == []


def test_a_node_that_tells_no_cards_has_what_it_names() -> None:
    """A program that announces names only has their files, for all anybody knows."""
    (row,) = model_views.models_of([NodeView(node_id="a", models=["m"])])
    assert row.places[0].present


def test_how_far_a_model_is_on_each_node_is_said() -> None:
    """In percent and speed, with the reason where it cannot be had; of nodes that are away nothing."""
    nodes = [
        node("a", AWAY, fetches=[ModelFetch(model="m", done_mb=512, total_mb=2048, mb_per_s=35.5)]),
        node("b", AWAY, fetches=[ModelFetch(model="m", problem="no repository")]),
        node("c", AWAY),
        node("d", HERE),
        node("e", AWAY, state=NodeState.LOST),
        node("f", AWAY, fetches=[ModelFetch(model="m")]),
    ]
    (row,) = model_views.models_of(nodes)
    assert model_views.to_come(row).plain == "a 25 % 35.5 MiB/s, b: no repository, c when asked, f"
    (row,) = model_views.models_of(nodes[:1])
    assert row.size_mb == 2048


def test_all_models_are_said_in_a_line() -> None:
    rows = model_views.models_of(
        [
            node("a", HERE, ModelCard(name="n", present=False), loaded_models=["m"], fetches=[ModelFetch(model="n")]),
            node("b", ModelCard(name="o"), state=NodeState.LOST),
            node("c", ModelCard(name="p", present=False), fetches=[ModelFetch(model="p", problem="no")]),
        ]
    )
    said = "1 in memory, 1 being fetched, 1 that cannot be fetched, 1 on no node that is online"
    assert model_views.summary(rows) == f"4 models: {said}"
    assert model_views.summary([]) == "no models"


def test_a_table_fits_the_terminal() -> None:
    rows = model_views.models_of([node("a" * 30, ModelCard(name=f"model-{n}" * 5, size_mb=n)) for n in range(20)])
    console = Console(width=60, record=True)
    console.print(model_views.table(ModelList(models=rows, count=20), width=60, lines=10))
    lines = console.export_text().splitlines()
    assert all(len(line) <= 60 for line in lines)
    assert len(lines) <= 10
    assert "13 more" in lines[-1]


def test_what_a_file_says_is_said_in_words(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(a_gguf({"general.architecture": "bert", "bert.context_length": 512, "bert.pooling_type": 2}))
    found = model_views.facts(model_views.model_file("m.gguf", "m", read(path)))
    assert found["context"] == "512 tokens"
    assert found["gives"] == "embeddings (cls)"
    assert found["parameters"] == "1,024"
    assert found["embedding"] == "- numbers"
