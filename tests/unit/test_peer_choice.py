"""Which transport two peers use: shared memory within a machine, else RDMA where both have it, else TCP."""

from __future__ import annotations

from typing import Any

import pytest

from computemesh.contracts.peers import Transport
from computemesh.peer.choice import Choice, Port, choose, ports, takes
from computemesh.peer.errors import NO_WAY, PeerError

ROCE = [Port("mlx5_0", 1, "RoCE"), Port("mlx5_1", 1, "RoCE")]
IB = [Port("ib0", 1, "IB")]


def chosen(demand: Any = "auto", **said: Any) -> Choice:
    terms: dict[str, Any] = {"same_host": False, "absent": {}, "mine": ROCE, "theirs": ROCE, **said}
    return choose(demand, **terms)


def refused(demand: Any = "auto", **said: Any) -> str:
    with pytest.raises(PeerError) as caught:
        chosen(demand, **said)
    assert caught.value.code == NO_WAY
    return caught.value.reason


def test_peers_of_one_machine_share_memory_and_have_tcp_beside_it() -> None:
    assert chosen(same_host=True).wants == ("shm", "tcp")
    assert chosen(same_host=True).local.nic == "shm"


def test_peers_of_two_machines_with_ports_of_one_kind_use_rdma_or_else_tcp() -> None:
    choice = chosen(mine=[*IB, *ROCE])
    assert choice.wants == ("rdma", "tcp")
    assert (choice.local.nic, choice.remote.nic) == ("mlx5_0", "mlx5_0")
    assert "RoCE" in choice.reason


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"mine": []}, "no usable network interface with port 1 here"),
        ({"theirs": []}, "no usable network interface with port 1 at the peer"),
        ({"mine": IB}, "of different types"),
        ({"absent": {"rdma": "no libibverbs"}}, "no libibverbs"),
        ({"ib_port": 2}, "with port 2 here"),
    ],
)
def test_others_use_tcp_and_the_reason_says_why_not_rdma(said: Any, why: str) -> None:
    assert chosen(**said).wants == ("tcp",)
    assert why in chosen(**said).reason
    assert why in refused("rdma", **said)


def test_a_transport_that_is_asked_for_is_the_only_one() -> None:
    assert chosen("tcp", same_host=True).wants == ("tcp",)
    assert chosen("rdma", same_host=True).wants == ("rdma",)
    assert chosen("shm", same_host=True).wants == ("shm", "tcp")
    assert "not on this machine" in refused("shm")
    assert "no memfd" in refused("shm", same_host=True, absent={"shm": "no memfd"})
    assert "closed" in refused("tcp", absent={"tcp": "closed"})


def test_a_network_interface_that_is_named_is_taken_and_means_rdma_even_within_a_machine() -> None:
    choice = chosen(same_host=True, local_device="mlx5_1", peer_device="mlx5_0")
    assert choice.wants == ("rdma",)
    assert (choice.local.nic, choice.remote.nic) == ("mlx5_1", "mlx5_0")
    assert "'mlx5_7'" in refused(local_device="mlx5_7")
    assert "'mlx5_7'" in refused(peer_device="mlx5_7")


def test_without_any_transport_it_is_said_why() -> None:
    absent: dict[Transport, str] = {"shm": "s", "tcp": "closed", "rdma": "no libibverbs"}
    assert refused(absent=absent) == "no transport is left: no libibverbs, and tcp cannot be used here: closed"


def test_shared_memory_without_tcp_beside_it_is_not_chosen() -> None:
    assert chosen(same_host=True, absent={"tcp": "closed"}).wants == ("rdma",)
    assert "needs tcp" in refused("shm", same_host=True, absent={"tcp": "closed"})


def test_of_a_peers_record_only_ports_that_are_up_and_whole_count() -> None:
    port = {"port": 1, "state": "ACTIVE", "link_type": "RoCE"}
    resource = {
        "nics": [
            {"name": "up", "ports": [port, {**port, "port": 2, "state": "DOWN"}]},
            {"name": "ill", "health": "UNAVAILABLE", "ports": [port]},
            {"name": "", "ports": [port]},
            {"name": "odd", "ports": [{"port": "1"}, None, 3]},
            "none",
        ]
    }
    assert ports(resource) == [Port("up", 1, "RoCE")]
    assert ports({"nics": "none"}) == ports({}) == []


def test_who_is_asked_tries_what_was_offered_and_it_has_in_the_order_of_wishes() -> None:
    offers: dict[Transport, Any] = {"shm": {}, "tcp": {}, "rdma": {}}
    assert takes(["rdma", "shm", "tcp"], offers, ["tcp", "shm"], same_host=True) == ["shm", "tcp"]
    assert takes(["rdma", "shm", "tcp"], offers, ["tcp", "shm"], same_host=False) == ["tcp"]
    assert takes(["shm", "tcp"], {"shm": {}}, ["tcp", "shm"], same_host=True) == ["shm"]
