"""From models that somebody named to how their servers are started."""

from __future__ import annotations

from pathlib import Path

import pytest

from computemesh.modelsource import SourceError
from computemesh.testing.ggufs import a_gguf
from computemesh_services.node_agent.engines.options import ModelOptions
from computemesh_services.node_agent.models.serving import joined, named, options
from computemesh_services.node_agent.models.store import ModelStore

SUM = "ab" * 32


def test_a_model_of_the_file_is_served_from_its_path_or_else_fetched_from_its_source(tmp_path: Path) -> None:
    """A path that is there counts; one that is not is waited for, unless there is a source."""
    here, nowhere = tmp_path / "m.gguf", tmp_path / "n.gguf"
    here.write_bytes(a_gguf())
    assert named("big", path=here, source="hf:org/repo").models == {"big": here}
    assert [source.path for source in named("big", path=nowhere).wanted] == [nowhere]
    (source,) = named("big", path=nowhere, source="hf:org/repo:Q8_0").wanted
    assert (source.model, source.location) == ("big", "hf:org/repo:Q8_0")


def test_a_checksum_of_the_file_is_that_of_the_source(tmp_path: Path) -> None:
    """Two that differ are a mistake; a file that is here is checked too."""
    (source,) = named("big", source="https://h/m.gguf", sha256=SUM.upper()).wanted
    assert (source.sha256, source.model) == (SUM, "big")
    (source,) = named("big", path=tmp_path / "m.gguf", sha256=SUM).wanted
    assert (source.kind, source.sha256, source.model) == ("path", SUM, "big")
    with pytest.raises(SourceError, match="another checksum"):
        named("big", source=f"https://h/m.gguf#sha256={'cd' * 32}", sha256=SUM)
    with pytest.raises(SourceError, match="no SHA-256 checksum"):
        named("big", source="hf:org/repo", sha256="12")


async def test_what_the_head_of_a_file_says_decides_what_nobody_told(tmp_path: Path) -> None:
    """Never more context than it was trained for, and embeddings from a model for them. Whoever says more counts."""
    heads = {
        "chat": a_gguf({"llama.context_length": 2048}),
        "told": a_gguf({"llama.context_length": 2048}),
        "embeds": a_gguf({"general.architecture": "bert", "bert.context_length": 512}),
        "long": a_gguf({"llama.context_length": 131_072}),
    }
    for name, data in heads.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
    found = joined([named(name, path=tmp_path / f"{name}.gguf") for name in heads])
    away = named("away", source="hf:org/repo")
    store = ModelStore(tmp_path / "store", here=found.models, wanted=away.wanted, fetch_at="first_use")
    await store.start()
    told = {"told": ModelOptions(name="told", ctx_size=9000, roles=("chat",))}
    by_name = {model.name: model for model in options(store, told, context_tokens=4096)}
    assert (by_name["chat"].ctx_size, by_name["chat"].embeddings) == (2048, False)
    assert (by_name["told"].ctx_size, by_name["told"].roles) == (9000, ("chat",))
    assert (by_name["embeds"].ctx_size, by_name["embeds"].embeddings) == (512, True)
    assert by_name["long"].ctx_size is None
    assert by_name["away"].path is None
    assert by_name["chat"].path == tmp_path / "chat.gguf"
    await store.close()
