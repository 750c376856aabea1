"""One address, or those of a whole cluster with commas between them."""

from __future__ import annotations

import pytest

from computemesh.addresses import login_of, servers_of, with_login, without_login
from computemesh.bus import Where
from computemesh.config import node_of
from computemesh.contracts.base import Role


@pytest.mark.parametrize(
    ("url", "servers"),
    [
        ("nats://a:1", ["nats://a:1"]),
        ("nats://u:p@a:1,nats://u:p@b:2", ["nats://u:p@a:1", "nats://u:p@b:2"]),
        ("nats://u:p@a:1, b:2 ,", ["nats://u:p@a:1", "nats://u:p@b:2"]),
        ("u:p@a:1,tls://v:q@b:2", ["nats://u:p@a:1", "tls://v:q@b:2"]),
        ("nats://u:p@[::1]:1,[::2]:2", ["nats://u:p@[::1]:1", "nats://u:p@[::2]:2"]),
        ("", []),
    ],
)
def test_servers_without_a_login_have_that_of_the_first(url: str, servers: list[str]) -> None:
    """And those without a scheme the usual one."""
    assert servers_of(url) == servers


def test_a_login_can_be_read_replaced_and_hidden() -> None:
    """For every server of the address."""
    url = "nats://u:p@a:1,tls://b:2"
    assert login_of(url) == "u:p"
    assert login_of("nats://a:1,nats://u:p@b:2") == ""
    assert with_login(url, "v:q") == "nats://v:q@a:1,tls://v:q@b:2"
    assert without_login(url) == "nats://a:1,tls://b:2"
    assert Where(url=url, role=Role.CLIENT, name="x").shown == "nats://a:1,tls://b:2"


def test_the_node_of_an_address_is_that_of_its_first_server() -> None:
    """Its user says which."""
    assert node_of("nats://node-gpu-7:secret@a:1,nats://node-gpu-7:secret@b:2", "") == "gpu-7"
