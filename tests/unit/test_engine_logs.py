"""What an engine has printed: from its end, from any place, as it comes, and through a log that is begun anew."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from computemesh.contracts.base import Refused
from computemesh.contracts.infer import EngineLog, EngineLogGet
from computemesh_services.node_agent.engine_logs import TAIL_BYTES, EngineLogs


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engine-cpu_0.log"


@pytest.fixture
def logs(path: Path) -> EngineLogs:
    return EngineLogs("n1", {"cpu:0": path}.get)


def prints(path: Path, text: str, mode: str = "w") -> None:
    with path.open(mode) as file:
        file.write(text)


def size(path: Path) -> int:
    return path.stat().st_size


async def read(logs: EngineLogs, **asked: float | None) -> EngineLog:
    found = await logs.on_log(EngineLogGet(device="cpu:0", **asked))  # type: ignore[arg-type]
    assert isinstance(found, EngineLog), found
    return found


async def test_left_out_the_offset_means_the_last_lines(logs: EngineLogs, path: Path) -> None:
    """The first of them is whole."""
    prints(path, "".join(f"line {n:06}\n" for n in range(20_000)))
    found = await read(logs)
    assert found.text.startswith("line ")
    assert found.text.endswith("line 019999\n")
    assert TAIL_BYTES - 12 <= len(found.text) <= TAIL_BYTES
    assert (found.offset, found.next) == (size(path) - len(found.text), size(path))


async def test_a_short_log_is_told_whole(logs: EngineLogs, path: Path) -> None:
    prints(path, "one\ntwo\n")
    assert (await read(logs)).text == "one\ntwo\n"


async def test_parts_follow_one_another_without_a_gap(logs: EngineLogs, path: Path) -> None:
    text = "".join(f"zeile {n}: größer\n" for n in range(500))
    prints(path, text)
    found, offset = "", 0
    while (part := await read(logs, offset=offset, limit=101)).text:
        assert part.offset == offset
        found, offset = found + part.text, part.next
    assert (found, offset) == (text, size(path))


async def test_it_waits_for_what_is_printed_next(logs: EngineLogs, path: Path) -> None:
    prints(path, "one\n")
    waiting = asyncio.create_task(read(logs, offset=4, wait_s=20))
    await asyncio.sleep(0.15)
    assert not waiting.done()
    prints(path, "two\n", "a")
    part = await asyncio.wait_for(waiting, 10)
    assert (part.text, part.offset, part.next) == ("two\n", 4, 8)


async def test_a_log_that_was_begun_anew_is_told_from_its_beginning(logs: EngineLogs, path: Path) -> None:
    prints(path, "new\n")
    part = await read(logs, offset=1_000)
    assert (part.text, part.offset, part.next) == ("new\n", 0, 4)


async def test_nothing_new_is_told_as_nothing(logs: EngineLogs, path: Path) -> None:
    prints(path, "one\n")
    part = await read(logs, offset=4)
    assert (part.text, part.offset, part.next) == ("", 4, 4)


@pytest.mark.parametrize("device", ["cpu:0", "gpu:7", "../secret"])
async def test_without_a_log_or_a_device_the_refusal_names_the_field(logs: EngineLogs, device: str) -> None:
    refused = await logs.on_log(EngineLogGet(device=device))
    assert isinstance(refused, Refused)
    assert (refused.code, refused.status, refused.field) == ("not_found", 404, "device")
    assert device in refused.reason
