"""What the other tests of this folder take for granted; ``make test-rdma`` runs them where it is there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from computemesh.testing.server import bare_server

pytestmark = pytest.mark.rdma


@pytest.mark.parametrize("device", ["rxe0", "rxe1"])
def test_there_are_two_devices_with_addresses(device: str) -> None:
    port = Path("/sys/class/infiniband") / device / "ports/1"
    assert (port / "state").read_text() == "4: ACTIVE\n"
    assert (port / "gids/1").read_text().startswith("0000:0000:0000:0000:0000:ffff:0a4d:000")


async def test_a_nats_server_runs_here(tmp_path: Path) -> None:
    async with bare_server(tmp_path) as url:
        address = url.rpartition("/")[2]
        reader, writer = await asyncio.open_connection(*address.split(":"))
        assert (await reader.readline()).startswith(b"INFO ")
        writer.close()
