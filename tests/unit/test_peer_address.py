"""What programs give as an address, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from computemesh.peer.address import read_address

HERE = Path("/run/here.sock")


@pytest.mark.parametrize(
    ("text", "socket", "url"),
    [
        ("", HERE, ""),
        ("http://10.0.0.1:3000", HERE, "http://10.0.0.1:3000"),
        ("nats://bus:4222", HERE, "nats://bus:4222"),
        ("127.0.0.1:3000", HERE, "http://127.0.0.1:3000"),
        ("control-plane:3000/", HERE, "http://control-plane:3000/"),
        ("[::1]:3000", HERE, "http://[::1]:3000"),
        ("/run/a.sock", Path("/run/a.sock"), ""),
        ("unix:///run/a.sock", Path("/run/a.sock"), ""),
        ("unix:a.sock", Path("a.sock"), ""),
        ("./odd:1", Path("odd:1"), ""),
        ("run/odd:1", Path("run/odd:1"), ""),
    ],
)
def test_a_path_is_a_socket_and_a_host_with_a_port_is_a_control_plane(
    monkeypatch: pytest.MonkeyPatch, text: str, socket: Path, url: str
) -> None:
    monkeypatch.setenv("COMPUTEMESH_PEER_SOCKET", str(HERE))
    assert read_address(text) == (socket, url)
