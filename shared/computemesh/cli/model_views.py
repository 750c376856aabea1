"""Models as people see them: which node has what, and how far those are that are being fetched. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from computemesh.cli.sizes import size
from computemesh.cli.tables import Cell, Column, folded, grid
from computemesh.contracts.base import Message
from computemesh.contracts.nodes import ModelCard, ModelFetch, NodeState, NodeView
from computemesh.gguf import Gguf
from computemesh.hardware import Count, MegaBytes

COLUMNS: Final = (
    Column(title="model", least=20),
    Column(title="size", right=True, rank=2),
    Column(title="context", right=True, rank=3),
    Column(title="gives", rank=4),
    Column(title="on", least=12),
    Column(title="loaded on", rank=1, least=12),
    Column(title="to come", least=20),
)


class ModelPlace(Message, frozen=True, kw_only=True):
    """A model on a node."""

    node_id: str
    node_state: NodeState
    present: bool
    """Its file is on the node."""
    loaded: bool = False
    """An engine has it in memory."""
    fetch: ModelFetch | None = None
    """How far it is, while it is being fetched."""


class ModelRow(Message, frozen=True, kw_only=True):
    """A model of the mesh. Where nodes say different things of it, what the first one says."""

    name: str
    size_mb: MegaBytes | None = None
    context_tokens: Count | None = None
    embeddings: bool = False
    roles: list[str] = []
    places: list[ModelPlace] = []


class ModelList(Message, frozen=True, kw_only=True):
    """Models, by name."""

    models: list[ModelRow]
    count: int


class ModelFile(Message, frozen=True, kw_only=True):
    """What a GGUF file says of the model in it."""

    path: str
    served_as: str
    """The name under which a node serves it."""
    kind: str
    name: str
    architecture: str
    quantisation: str
    parameters: Count
    layers: Count | None
    context_tokens: Count | None
    embedding_length: Count | None
    vocabulary: Count | None
    embeddings: bool
    pooling: str
    chat_template: bool
    tensors: Count
    parts: Count
    size_bytes: Count


def models_of(nodes: Iterable[NodeView], *, node_id: str = "") -> list[ModelRow]:
    """Every model that these nodes serve, or will.

    Args:
        node_id: only those of this node.
    """
    cards: dict[str, ModelCard] = {}
    places: dict[str, list[ModelPlace]] = {}
    for node in nodes:
        if node_id and node.node_id != node_id:
            continue
        told = {card.name: card for card in node.model_cards}
        fetches = {fetch.model: fetch for fetch in node.fetches}
        for name in node.models:
            card = told.get(name, ModelCard(name=name))
            before = cards.setdefault(name, card)
            if before.size_mb is None and card.size_mb is not None:
                cards[name] = card
            places.setdefault(name, []).append(_place(node, card, fetches.get(name)))
    return [_model(cards[name], places[name]) for name in sorted(cards)]


def _place(node: NodeView, card: ModelCard, fetch: ModelFetch | None) -> ModelPlace:
    return ModelPlace(
        node_id=node.node_id,
        node_state=node.state,
        present=card.present,
        loaded=card.name in node.loaded_models,
        fetch=None if card.present else fetch,
    )


def _model(card: ModelCard, places: list[ModelPlace]) -> ModelRow:
    totals = [place.fetch.total_mb for place in places if place.fetch and place.fetch.total_mb]
    return ModelRow(
        name=card.name,
        size_mb=card.size_mb if card.size_mb is not None else next(iter(totals), None),
        context_tokens=card.context_tokens,
        embeddings=card.embeddings,
        roles=card.roles,
        places=places,
    )


def table(found: ModelList, *, width: int, lines: int | None) -> RenderableType:
    """A row for each model, and a line about all of them.

    Args:
        lines: how many lines there is room for; None when that does not matter.
    """
    shown = found.models if lines is None else found.models[: max(1, lines - 3)]
    notes = (folded(found.count, len(shown)), summary(found.models))
    foot = Text("; ".join(note for note in notes if note), "dim", no_wrap=True, overflow="ellipsis")
    return Group(grid(COLUMNS, [_row(model) for model in shown], width), foot)


def _row(model: ModelRow) -> tuple[Cell, ...]:
    here = [place for place in model.places if place.node_state is NodeState.ONLINE]
    return (
        model.name,
        size(model.size_mb) if model.size_mb is not None else "-",
        f"{model.context_tokens:,}" if model.context_tokens else "-",
        "embeddings" if model.embeddings else "texts",
        ", ".join(place.node_id for place in here if place.present) or Text("nobody", "yellow"),
        ", ".join(place.node_id for place in here if place.loaded) or "-",
        to_come(model),
    )


def to_come(model: ModelRow) -> Text:
    """On which nodes it is not yet, and how far it is there."""
    said: list[Text] = []
    for place in model.places:
        if place.present or place.node_state is not NodeState.ONLINE:
            continue
        fetch = place.fetch
        if fetch is None:
            said.append(Text(f"{place.node_id} when asked", "dim"))
        elif fetch.problem:
            said.append(Text(f"{place.node_id}: {fetch.problem}", "red"))
        else:
            percent = f" {100 * fetch.done_mb // fetch.total_mb} %" if fetch.total_mb else ""
            rate = f" {fetch.mb_per_s:g} MiB/s" if fetch.mb_per_s else ""
            said.append(Text(f"{place.node_id}{percent}{rate}", "cyan"))
    return Text(", ").join(said) if said else Text("-")


def summary(models: Iterable[ModelRow]) -> str:
    """All of them in a line: ``3 models: 1 in memory, 1 being fetched, 1 that cannot be fetched``."""
    models = list(models)
    if not models:
        return "no models"
    places = [[place for place in model.places if place.node_state is NodeState.ONLINE] for model in models]
    counts = {
        "in memory": sum(any(place.loaded for place in here) for here in places),
        "being fetched": sum(any(place.fetch and not place.fetch.problem for place in here) for here in places),
        "that cannot be fetched": sum(any(place.fetch and place.fetch.problem for place in here) for here in places),
        "on no node that is online": sum(not here for here in places),
    }
    words = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    return f"{len(models):,} model{'' if len(models) == 1 else 's'}" + (f": {words}" if words else "")


def model_file(path: str, served_as: str, head: Gguf) -> ModelFile:
    """What the file at *path* says."""
    return ModelFile(
        path=path,
        served_as=served_as,
        kind=head.kind,
        name=head.name,
        architecture=head.architecture,
        quantisation=head.quantisation,
        parameters=head.parameters,
        layers=head.layers,
        context_tokens=head.context_tokens,
        embedding_length=head.embedding_length,
        vocabulary=head.vocabulary,
        embeddings=head.embeddings,
        pooling=head.pooling.name.lower() if head.pooling is not None else "",
        chat_template=head.chat_template,
        tensors=head.tensors,
        parts=head.parts,
        size_bytes=head.size_bytes,
    )


def facts(file: ModelFile) -> Mapping[str, str]:
    """The same in words, a line each."""
    return {
        "file": file.path + (f" (and {file.parts - 1} more)" if file.parts > 1 else ""),
        "served as": file.served_as if file.kind == "model" else f"nothing: it is no model, but {file.kind}",
        "name": file.name or "-",
        "architecture": file.architecture or "-",
        "quantisation": file.quantisation or "-",
        "parameters": f"{file.parameters:,}",
        "layers": _number(file.layers),
        "context": f"{_number(file.context_tokens)} tokens",
        "embedding": f"{_number(file.embedding_length)} numbers",
        "vocabulary": f"{_number(file.vocabulary)} tokens",
        "gives": f"embeddings ({file.pooling or 'pooling not told'})" if file.embeddings else "texts",
        "chat template": "yes" if file.chat_template else "no",
        "tensors": f"{file.tensors:,}",
        "size": f"{file.size_bytes:,} bytes ({size(file.size_bytes // 2**20)})",
    }


def _number(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"
