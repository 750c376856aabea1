"""From models that somebody named to how their servers are started."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from computemesh.contracts.base import Refused
from computemesh.gguf import Gguf
from computemesh.models import Found
from computemesh.modelsource import ModelSource, SourceError, checksum, parse
from computemesh_services.node_agent.engines.options import ModelOptions
from computemesh_services.node_agent.models.store import ModelStore

NOTHING: Final = ModelOptions(name="")


def named(model: str, *, path: Path | None = None, source: str = "", sha256: str = "") -> Found:
    """A model of the configuration file: at *path* if it is there, else from *source*.

    Raises:
        SourceError: *source* names none, or *sha256* is no checksum.
    """
    sha256 = checksum(sha256) if sha256 else ""
    if path is not None and not (source and not path.exists()):
        if path.exists() and not sha256:
            return Found({model: path})
        # One that is not there yet may lie on a share that is mounted later.
        at = ModelSource(kind="path", location=str(path), path=path, name=model, sha256=sha256)
        return Found({}, wanted=(at,))
    # A path has a field of its own, so `org/repo` is nothing else.
    found = parse(f"{source}#sha256={sha256}" if sha256 and "#" not in source else source, exists=lambda _: False)
    if sha256 and found.sha256 != sha256:
        raise SourceError(f"{model}: its source names another checksum than sha256")
    return Found({}, wanted=(replace(found, name=model),))


def options(store: ModelStore, told: Mapping[str, ModelOptions], *, context_tokens: int) -> list[ModelOptions]:
    """All models of the store: as they are told to be started, and with what their heads say.

    Args:
        told: by name; models that are not among them are started like any other.
        context_tokens: of a model that names none.
    """
    return [_with_head(_of(store, name, told), store.head(name), context_tokens) for name in store.names()]


def _of(store: ModelStore, name: str, told: Mapping[str, ModelOptions]) -> ModelOptions:
    found = store.path(name)
    return replace(told.get(name, NOTHING), name=name, path=None if isinstance(found, Refused) else found)


def _with_head(model: ModelOptions, head: Gguf | None, context_tokens: int) -> ModelOptions:
    if head is None:
        return model
    trained = head.context_tokens
    context = model.ctx_size
    if context is None and trained is not None and 0 < trained < context_tokens:
        context = trained
    return replace(model, embeddings=model.embeddings or head.embeddings, ctx_size=context)


def joined(found: Iterable[Found]) -> Found:
    """All of them together. Their names are different ones."""
    parts = list(found)
    return Found(
        models={name: path for part in parts for name, path in part.models.items()},
        warnings=tuple(text for part in parts for text in part.warnings),
        wanted=tuple(source for part in parts for source in part.wanted),
    )
