"""Where there is no RDMA, nothing of it is loaded, and what is asked for it says so."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from computemesh.peer.rdma import RdmaEndpoint, nics
from computemesh.peer.rdma.verbs import load
from computemesh.peer.transport import NO_WAY, LocalRegion, Parties, TransportError


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> RdmaEndpoint:
    monkeypatch.setattr(nics, "read", lambda sys=Path("/sys"): list[nics.Nic]())
    return RdmaEndpoint("mlx5_0")


def test_why_it_is_absent_is_said(endpoint: RdmaEndpoint) -> None:
    assert endpoint.absent() == "there is no network interface with RDMA"
    assert endpoint.facts() == {"nics": []}


def test_what_is_asked_for_all_the_same_is_refused(endpoint: RdmaEndpoint) -> None:
    parties = Parties("link", bytes(32), "a", "b", time.monotonic() + 1, {"qp_num": 1}, same_host=False)
    with pytest.raises(TransportError) as error:
        endpoint.offer(parties)
    assert error.value.code == NO_WAY
    with pytest.raises(TransportError, match="offer"):
        endpoint.accept(parties, {"device": "mlx5_0"})
    with pytest.raises(TransportError, match="not offered"):
        endpoint.establish(parties, {})
    region = LocalRegion("kv", 1, 1, 4096, 8, True, None)
    endpoint.conceal(region)
    endpoint.abandon(parties)
    endpoint.close()


def test_which_library_is_missing_is_said() -> None:
    with pytest.raises(ImportError, match=r"pip install computemesh\[rdma\]"):
        load([])


def test_no_library_of_verbs_is_loaded_with_peers() -> None:
    program = "import sys, computemesh.peer.agent; print([name for name in sys.modules if 'verbs' in name])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['computemesh.peer.rdma.verbs']"
