"""Peers as the command line shows them."""

from __future__ import annotations

import pytest

from computemesh.cli.peers import row
from computemesh.contracts.peers import Peer


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([], "-"),
        (["kv"], "kv"),
        (["a", "b", "c"], "a, b, c"),
        ([f"layer-{number}" for number in range(120)], "120: layer-0, layer-1, …"),
    ],
)
def test_a_peer_of_many_regions_takes_no_more_room_than_one_of_three(names: list[str], shown: str) -> None:
    peer = Peer(alias="a", registered_at=1.0, seen_at=1.0, revision=1, memory_keys=names)
    assert shown in row(peer, 2.0)
