"""What the other tests of this folder take for granted; ``make test-rdma`` runs them where it is there."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.rdma


@pytest.mark.parametrize("device", ["rxe0", "rxe1"])
def test_there_are_two_devices_with_addresses(device: str) -> None:
    port = Path("/sys/class/infiniband") / device / "ports/1"
    assert (port / "state").read_text() == "4: ACTIVE\n"
    assert (port / "gids/1").read_text().startswith("0000:0000:0000:0000:0000:ffff:0a4d:000")
