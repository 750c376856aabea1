"""Where NanoCtrl's command line keeps what it knows, and what the environment tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from computemesh.cli.common import Failure
from computemesh.nanoctrl import runtime
from computemesh.nanoctrl.__main__ import reached_at


def test_the_folder_is_the_first_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By NanoCtrl's variable, by that of the session, and else it lies among the temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    named = {"NANOCTRL_RUNTIME_DIR": str(tmp_path / "named" / "here"), "XDG_RUNTIME_DIR": str(tmp_path / "session")}
    assert runtime.folder(named).path == tmp_path / "named" / "here"
    assert runtime.folder({"XDG_RUNTIME_DIR": named["XDG_RUNTIME_DIR"]}).path == tmp_path / "session" / "nanoctrl"
    assert runtime.folder({}).path == tmp_path / "temporary" / "nanoctrl"


def test_a_link_among_the_temporary_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user may have put it there."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "nanoctrl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Failure, match="is no folder"):
        runtime.folder({})


def test_what_was_noted_of_another_process_is_nothing(tmp_path: Path) -> None:
    """Nor is a file that is broken."""
    folder = runtime.folder({"NANOCTRL_RUNTIME_DIR": str(tmp_path)})
    assert folder.noted(1) is None
    meta = runtime.Meta(pid=1, address="a", cmd=[], log="l", started_at=2)
    folder.note(meta)
    assert folder.noted(1) == meta
    assert folder.noted(2) is None
    (tmp_path / "nanoctrl.meta.json").write_text("{")
    assert folder.noted(1) is None


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("", ""),
        ("info", "info"),
        ("WARN", "warning"),
        ("trace", "debug"),
        ("off", "critical"),
        ("nanoctrl=debug,tower=warn", "debug"),
        ("warn,nanoctrl=error", "error"),
        ("warn,tower=debug", "warning"),
        ("tower=debug", "info"),
    ],
)
def test_a_log_level_is_read_as_nanoctrls_server_reads_it(text: str, level: str) -> None:
    """By target, of which one is ours."""
    assert runtime.log_level({"NANOCTRL_RUST_LOG": text}) == level


@pytest.mark.parametrize("url", ["nats://h", "tls://h:4222", "nats://u:p@h:1,nats://u:p@h:2"])
def test_an_address_of_nats_is_taken(url: str) -> None:
    """From the environment, or where that says nothing from the command line."""
    assert runtime.bus_url("", {"NANOCTRL_REDIS_URL": url}) == url
    assert runtime.bus_url(url, {}) == url
    assert runtime.bus_url("redis://h", {"NANOCTRL_REDIS_URL": url}) == url


@pytest.mark.parametrize("url", ["redis://h", "rediss://h", "h", "http://h:4222", "nats://", "nats://h,redis://h"])
def test_another_address_is_refused(url: str) -> None:
    """One of Redis with the reason."""
    with pytest.raises(Failure) as caught:
        runtime.bus_url(url, {})
    assert caught.value.field == "--nats-url"
    assert ("Redis" in caught.value.message) == ("redis" in url)


def test_a_server_that_listens_everywhere_is_asked_on_loopback() -> None:
    """Others are asked where they are."""
    assert reached_at("http://0.0.0.0:3000") == "http://127.0.0.1:3000"
    assert reached_at("http://[::]:3000") == "http://[::1]:3000"
    assert reached_at("http://10.0.0.2:3000") == "http://10.0.0.2:3000"
