"""The parts of both clients that need no server."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from computemesh.nanoctrl import AsyncNanoCtrlClient, NanoCtrlClient, NanoCtrlError
from computemesh.nanoctrl.calls import Operations


@pytest.mark.parametrize("address", ["", "http://", "http://:3000", "127.0.0.1:port", "127.0.0.1:0", "127.0.0.1:99999"])
def test_what_is_no_address_is_refused_at_once(address: str) -> None:
    """By both clients."""
    for kind in (NanoCtrlClient, AsyncNanoCtrlClient):
        with pytest.raises(ValueError, match="address"):
            kind(address)


def test_a_token_that_no_header_can_have_is_refused_at_once() -> None:
    """It would be another header."""
    with pytest.raises(ValueError, match="token"):
        NanoCtrlClient("127.0.0.1:1", token="a\r\nHost: b")


def test_the_token_of_a_mesh_is_nowhere_in_what_a_client_says_of_itself() -> None:
    """Objects end in logs."""
    client = NanoCtrlClient("127.0.0.1:1", token="secret")
    assert "secret" not in repr(client._place)  # pyright: ignore[reportPrivateUsage]


# --- the two, and NanoCtrl's own ---------------------------------------------------------------------------------


def public(kind: type) -> Iterator[tuple[str, Any]]:
    for name, value in inspect.getmembers(kind):
        if not name.startswith("_") and callable(value):
            yield name, value


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    """Names and defaults."""
    theirs = {name: parameters(value) for name, value in public(AsyncNanoCtrlClient)}
    assert {name: parameters(value) for name, value in public(NanoCtrlClient)} == theirs


def test_the_methods_of_nanoctrls_own_client_are_all_there() -> None:
    """With its parameters, in its order."""
    theirs = pytest.importorskip("nanoctrl").NanoCtrlClient
    ours = dict(public(NanoCtrlClient))
    for name, value in public(theirs):
        assert parameters(ours[name]) == parameters(value), name


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in found]


def test_the_synchronous_client_needs_no_event_loops_library() -> None:
    """It is loaded in inference engines, at whose start every second is felt."""
    program = "import sys, computemesh.nanoctrl as n; n.NanoCtrlClient('127.0.0.1:1'); print('aiohttp' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_a_call_says_in_json_what_it_was_given() -> None:
    """As NanoCtrl's client does: the scope of the client, and no field that was left out."""
    call = next(Operations("s").set_desired_topology("a/b", target_peers=["c"], min_bw=None, symmetric=False))
    assert call.path == "v1/desired_topology/a%2Fb"
    assert msgspec.json.decode(call.content) == {"target_peers": ["c"], "scope": "s"}
    assert "scope" not in msgspec.json.decode(next(Operations(None).query_peers()).content)


def test_what_is_no_json_is_an_error_as_any_other() -> None:
    """Logged and False for engines; raised for peers."""
    cycle: dict[str, object] = {}
    cycle["itself"] = cycle
    for value in (object(), "\ud800", cycle):
        client = NanoCtrlClient("127.0.0.1:1")
        assert client.register("e", {"host": value}) is False
        with pytest.raises(NanoCtrlError, match="JSON"):
            client.set_desired_topology("a", target_peers=["b"], min_bw=value)  # type: ignore[arg-type]
