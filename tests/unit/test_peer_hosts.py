"""A peer-agent that cannot host a process says so, and goes on."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from computemesh.config import ConfigError
from computemesh.contracts.base import Refused
from computemesh.peer.signals import Hello
from computemesh_services.control_plane.peer_desk import ANSWER_S
from computemesh_services.peer_agent.calls import ACCEPT_S
from computemesh_services.peer_agent.config import PeerAgentConfig
from computemesh_services.peer_agent.hosted import Hosts


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "no-such-host.invalid"])
def test_an_address_that_no_peer_can_be_told_is_a_mistake_of_the_configuration(host: str) -> None:
    """It is found at the start, not by the first process that is to be hosted."""
    with pytest.raises(ConfigError, match="COMPUTEMESH_PEER_HOST"):
        PeerAgentConfig(node_id="node-1", peer_host=host).data_host()
    assert PeerAgentConfig(node_id="node-1", peer_host="localhost").data_host() == "localhost"
    assert PeerAgentConfig(node_id="node-1").data_host() == ""


async def test_a_process_that_there_is_no_room_for_is_refused(tmp_path: Path) -> None:
    """Here: no file can be opened any more."""
    hosts = Hosts(tmp_path / "peer-agent.sock", "", 8)
    assert isinstance(await hosts.enter(Hello(alias="a", hosted=True)), Refused), "nobody listens there"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        refused = await hosts.enter(Hello(alias="a", hosted=True))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        hosts.end()
    assert isinstance(refused, Refused)


def test_a_process_is_waited_for_shorter_than_its_peer_waits() -> None:
    """Else it may take a connection of which the other side was told that there is none."""
    assert ACCEPT_S <= ANSWER_S - 0.5
