"""Goal: a platform's tool is run to its end or ended, whatever it does, and its complaint is passed on.

Method: real processes. The tools are small shell scripts that misbehave.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import psutil
import pytest

from computemesh_services.node_agent.engines.backends import Found
from computemesh_services.node_agent.engines.backends.readings import Readings
from computemesh_services.node_agent.engines.backends.tool import ToolError, run
from computemesh_services.node_agent.engines.device import BackendName, DeviceMetrics


@pytest.fixture
def path(tmp_path: Path) -> dict[str, str]:
    """An environment with a folder of its own first on PATH."""
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}


def script(path: dict[str, str], name: str, body: str) -> None:
    file = Path(path["HOME"]) / name
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)


def test_what_a_tool_prints_comes_back_with_its_status(path: dict[str, str]) -> None:
    script(path, "tool", 'echo "$1"; echo why >&2; exit 3')
    said = run(["tool", "a b; c"], environ=path)
    assert (said.out, said.error, said.status) == ("a b; c\n", "why\n", 3)
    with pytest.raises(ToolError, match=r"^tool ended with status 3: why$"):
        said.checked()


def test_a_tool_speaks_english_and_sees_all_devices(path: dict[str, str]) -> None:
    script(path, "tool", 'echo "$LC_ALL ${CUDA_VISIBLE_DEVICES-all} ${ZE_AFFINITY_MASK-all} $LANG"')
    pinned = path | {"LC_ALL": "de_DE.UTF-8", "CUDA_VISIBLE_DEVICES": "1", "ZE_AFFINITY_MASK": "0", "LANG": "fr"}
    assert run(["tool"], environ=pinned).out == "C all all fr\n"


def test_a_tool_that_is_not_installed_says_so(path: dict[str, str]) -> None:
    with pytest.raises(ToolError, match=r"^no-such-tool is not installed$") as refused:
        run(["no-such-tool"], environ=path)
    assert refused.value.missing


def test_a_tool_that_cannot_be_started_says_why(path: dict[str, str]) -> None:
    (Path(path["HOME"]) / "tool").write_bytes(b"\x7fELF but no program")
    (Path(path["HOME"]) / "tool").chmod(0o755)
    with pytest.raises(ToolError, match=r"^tool cannot be started: exec format error$") as refused:
        run(["tool"], environ=path)
    assert not refused.value.missing


def test_a_tool_that_hangs_is_ended_with_all_that_it_started(path: dict[str, str]) -> None:
    """Its child holds the pipe: who only killed the tool would wait for the child."""
    script(path, "tool", 'trap "" TERM; sleep 1000 & echo $! >"$HOME/child"; wait')
    with pytest.raises(ToolError, match=r"^tool did not end within 0\.5 s$"):
        run(["tool"], timeout_s=0.5, environ=path)
    child = int((Path(path["HOME"]) / "child").read_text())
    deadline = time.monotonic() + 30
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_bytes_that_are_no_text_do_no_harm(path: dict[str, str]) -> None:
    script(path, "tool", r"printf 'GPU \377\n'")
    assert run(["tool"], environ=path).out == "GPU \N{REPLACEMENT CHARACTER}\n"


class Slow:
    """A backend whose tool takes as long as it is let."""

    name: BackendName = "cuda"

    def __init__(self) -> None:
        self.free_mb: int | None = 1000

    def discover(self) -> Found:
        return Found()

    def metrics(self) -> dict[str, DeviceMetrics]:
        return {} if self.free_mb is None else {"gpu:0": DeviceMetrics(memory_free_mb=self.free_mb)}


async def test_readings_are_there_without_waiting_and_outlive_a_tool_that_fails() -> None:
    backend = Slow()
    readings = Readings(backend)
    assert readings.latest() == {}
    await readings.read()
    backend.free_mb = None
    await readings.read()
    assert readings.latest() == {"gpu:0": DeviceMetrics(memory_free_mb=1000)}


async def test_what_was_read_long_ago_is_not_told() -> None:
    readings = Readings(Slow(), old_s=0.0)
    await readings.read()
    assert readings.latest() == {}


async def test_readings_are_renewed_until_nobody_wants_them() -> None:
    backend = Slow()
    readings = Readings(backend, interval_s=0.001)
    keeping = asyncio.create_task(readings.keep())
    while not readings.latest():
        await asyncio.sleep(0.001)
    backend.free_mb = 500
    while readings.latest()["gpu:0"].memory_free_mb != 500:
        await asyncio.sleep(0.001)
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping
