"""Which transport two peers use, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, cast

from computemesh.contracts.peers import Transport
from computemesh.peer.errors import NO_WAY, PeerError

Demand = Literal["auto", "rdma", "shm", "tcp"]
DEMANDS: Final[tuple[Demand, ...]] = ("auto", "rdma", "shm", "tcp")


class Port(NamedTuple):
    """A port of a network interface over which bytes can go."""

    nic: str
    port: int
    link_type: str


@dataclass(frozen=True, slots=True)
class Choice:
    """What a connection is to be."""

    wants: tuple[Transport, ...]
    """In the order of wishes. After `shm` there is always `tcp`, for messages and for memory that is not shared."""
    local: Port
    remote: Port
    """Where there is no network interface, its name is that of the transport."""
    reason: str
    """For people."""


def ports(resource: Mapping[str, Any]) -> list[Port]:
    """The usable ports that a peer's resource record tells of, in its order.

    Peers write these records, so whatever does not fit is left out.
    """
    found: list[Port] = []
    for nic in _records(resource.get("nics")):
        name = nic.get("name")
        if not isinstance(name, str) or not name or nic.get("health", "AVAILABLE") != "AVAILABLE":
            continue
        for port in _records(nic.get("ports")):
            number, link_type = port.get("port"), port.get("link_type")
            if isinstance(number, int) and isinstance(link_type, str) and port.get("state") == "ACTIVE":
                found.append(Port(name, number, link_type))
    return found


def _records(value: object) -> list[Mapping[str, Any]]:
    if not isinstance(value, list):
        return []
    return [cast(Mapping[str, Any], item) for item in cast(list[object], value) if isinstance(item, dict)]


def choose(
    demand: Demand,
    *,
    same_host: bool,
    absent: Mapping[Transport, str],
    mine: Sequence[Port],
    theirs: Sequence[Port],
    local_device: str | None = None,
    peer_device: str | None = None,
    ib_port: int = 1,
) -> Choice:
    """Shared memory within a machine, else RDMA where both have a port of one kind, else TCP.

    Args:
        demand: a transport, which is then the only one that will do.
        same_host: both are of one peer-agent.
        absent: why transports cannot be used here.
        mine, theirs: usable ports, the best first.
        local_device, peer_device: take only these network interfaces; a program that names one wants RDMA.

    Raises:
        PeerError: `no_way`; there is none.
    """
    if demand == "shm" and not same_host:
        raise PeerError(NO_WAY, "transport 'shm': the peer is not on this machine")
    if demand != "auto" and (why := absent.get(demand)):
        raise PeerError(NO_WAY, f"transport '{demand}' cannot be used here: {why}")
    named = local_device is not None or peer_device is not None
    shm = demand in ("auto", "shm") and same_host and "shm" not in absent and not (named and demand == "auto")
    if shm and "tcp" not in absent:
        reason = "both peers are on this machine" if demand == "auto" else "asked for"
        return Choice(("shm", "tcp"), Port("shm", ib_port, ""), Port("shm", ib_port, ""), reason)
    if demand == "shm":
        raise PeerError(NO_WAY, f"transport 'shm' needs tcp for messages, which cannot be used here: {absent['tcp']}")
    why_not = "tcp was asked for"
    if demand in ("auto", "rdma"):
        pair = None if "rdma" in absent else _pair(mine, theirs, local_device, peer_device, ib_port)
        why_not = absent.get("rdma") or _why_no_pair(mine, theirs, local_device, peer_device, ib_port)
        if pair is not None:
            local, remote = pair
            kind = f"both peers have a port of type {local.link_type}"
            wants: tuple[Transport, ...] = (
                ("rdma",) if demand == "rdma" or named or "tcp" in absent else ("rdma", "tcp")
            )
            return Choice(wants, local, remote, kind if demand == "auto" else "asked for")
        if demand == "rdma" or named:
            raise PeerError(NO_WAY, f"transport 'rdma': {why_not}")
    if "tcp" in absent:
        raise PeerError(NO_WAY, f"no transport is left: {why_not}, and tcp cannot be used here: {absent['tcp']}")
    reason = "asked for" if demand == "tcp" else f"no other transport: {why_not}"
    return Choice(("tcp",), Port("tcp", ib_port, ""), Port("tcp", ib_port, ""), reason)


def _pair(
    mine: Sequence[Port], theirs: Sequence[Port], local_device: str | None, peer_device: str | None, ib_port: int
) -> tuple[Port, Port] | None:
    for local in _fitting(mine, local_device, ib_port):
        for remote in _fitting(theirs, peer_device, ib_port):
            if local.link_type == remote.link_type:
                return local, remote
    return None


def _why_no_pair(
    mine: Sequence[Port], theirs: Sequence[Port], local_device: str | None, peer_device: str | None, ib_port: int
) -> str:
    for whose, ours, device in (("here", mine, local_device), ("at the peer", theirs, peer_device)):
        if not _fitting(ours, device, ib_port):
            what = f"network interface {device!r}" if device else "usable network interface"
            return f"no {what} with port {ib_port} {whose}"
    return "the network interfaces here and at the peer are of different types"


def _fitting(found: Sequence[Port], device: str | None, ib_port: int) -> list[Port]:
    return [port for port in found if port.port == ib_port and device in (None, port.nic)]


def takes(
    wants: Sequence[Transport], offers: Mapping[Transport, Any], have: Sequence[Transport], same_host: bool
) -> list[Transport]:
    """What a peer that is asked for a connection tries, in this order: what was offered and it has, as it is wished."""
    return [one for one in wants if one in offers and one in have and (one != "shm" or same_host)]
