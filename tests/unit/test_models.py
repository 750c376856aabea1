"""Finding GGUF models: names are pure text work, the rest is tried on small files in a temporary folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from computemesh import models
from computemesh.gguf import MAGIC
from computemesh.modelsource import model_name


def gguf(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(MAGIC + b"\x03\x00\x00\x00")
    return path


@pytest.mark.parametrize(
    ("file_name", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct"),
        ("Qwen2.5-0.5B-Instruct-q4_k_m.gguf", "qwen2.5-0.5b-instruct"),
        ("model.f16.gguf", "model"),
        ("phi-4-BF16.gguf", "phi-4"),
        ("llama-3-8b.i1-IQ3_XXS.gguf", "llama-3-8b"),
        ("gpt-oss-20b-mxfp4.GGUF", "gpt-oss-20b"),
        ("Big-UD-Q4_K_XL-00001-of-00003.gguf", "big"),
        ("plain-7b.gguf", "plain-7b"),
        ("q8_0.gguf", "q8_0"),
    ],
)
def test_a_model_is_named_like_its_file_without_the_quantisation(file_name: str, name: str) -> None:
    """The name a submitter writes does not change with the file's precision."""
    assert model_name(file_name) == name


def test_sources_are_separated_by_commas_and_paths_may_start_at_home(tmp_path: Path) -> None:
    """Blanks and empty parts mean nothing."""
    gguf(tmp_path / "a.gguf")
    found = models.find_models(f" {tmp_path}/a.gguf, ,~/no such folder ")
    assert found.models == {"a": tmp_path / "a.gguf"}
    assert found.warnings == (f"{Path.home()}/no such folder: no such file or directory",)


def test_a_folder_gives_its_models_but_no_later_parts_and_no_projectors(tmp_path: Path) -> None:
    """Only files that a server can be pointed at are models."""
    whole = gguf(tmp_path / "deep" / "one.Q8_0.gguf")
    first = gguf(tmp_path / "two-Q4_0-00001-of-00002.gguf")
    gguf(tmp_path / "two-Q4_0-00002-of-00002.gguf")
    gguf(tmp_path / "mmproj-one.gguf")
    (tmp_path / "readme.txt").write_text("no model")
    found = models.find_models(str(tmp_path))
    assert found.models == {"one": whole, "two": first}
    assert found.warnings == ()


def test_of_two_files_with_one_name_the_first_counts_and_the_other_is_told(tmp_path: Path) -> None:
    """The order of the configuration decides."""
    first, second = gguf(tmp_path / "b" / "m.Q8_0.gguf"), gguf(tmp_path / "a" / "m.Q4_0.gguf")
    found = models.find_models(f"{first},{second}")
    assert found.models == {"m": first}
    assert found.warnings == (f"{second}: not used, 'm' is already {first}",)


def test_what_cannot_be_used_is_told_and_does_not_hide_the_rest(tmp_path: Path) -> None:
    """A missing file, a file of another kind and an empty folder each give a sentence."""
    good = gguf(tmp_path / "good.gguf")
    (tmp_path / "zip.gguf").write_bytes(b"PK\x03\x04")
    (tmp_path / "empty").mkdir()
    names = ("missing.gguf", "zip.gguf", "empty", "good.gguf")
    found = models.find_models(",".join(str(tmp_path / name) for name in names))
    assert found.models == {"good": good}
    told = " | ".join(found.warnings)
    assert "missing.gguf: no such file or directory" in told
    assert "zip.gguf: not a GGUF file" in told
    assert "empty: no .gguf file in this folder" in told


def test_without_configuration_the_embedded_package_gives_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is looked up, not imported: its own dependencies are absent."""
    (tmp_path / models.EMBEDDED_PACKAGE).mkdir()
    (tmp_path / models.EMBEDDED_PACKAGE / "__init__.py").write_text("raise ImportError('must not be imported')")
    model = gguf(tmp_path / models.EMBEDDED_PACKAGE / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert models.find_models(None).models == {"smollm2-135m-instruct": model}
    assert models.find_models(" ").models == {"smollm2-135m-instruct": model}
