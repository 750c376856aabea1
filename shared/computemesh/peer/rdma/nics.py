"""Network interfaces with RDMA: what the kernel says of them, and which one is best for what.

The facts are read from a tree like ``/sys``; what is decided from them are plain functions.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

SYS: Final = Path("/sys")

MTUS: Final = {1: 256, 2: 512, 3: 1024, 4: 2048, 5: 4096}
"""Bytes, by the numbers of libibverbs."""


@dataclass(frozen=True, slots=True)
class Gid:
    """An address of a port."""

    index: int
    address: str
    kind: str
    """``RoCE v2``, ``IB/RoCE v1``."""
    interface: str
    """The network interface that it belongs to, as `eth0`."""


@dataclass(frozen=True, slots=True)
class NicPort:
    number: int
    state: str
    """As `ACTIVE` or `DOWN`."""
    link_type: str
    """`RoCE` or `InfiniBand`."""
    gbps: float
    gids: tuple[Gid, ...]


@dataclass(frozen=True, slots=True)
class Nic:
    name: str
    numa_node: int
    """-1 where the machine has one node only, or does not say."""
    pci_path: tuple[str, ...]
    """Addresses of the bridges on the way from the root of the bus, and of the interface itself; empty if it is none
    of PCI, as soft-RoCE."""
    ports: tuple[NicPort, ...]

    @property
    def pci_bus_id(self) -> str:
        return self.pci_path[-1] if self.pci_path else ""


@dataclass(frozen=True, slots=True)
class Near:
    """What an interface should be near to."""

    numa_node: int = -1
    pci_path: tuple[str, ...] = ()
    """Of a GPU."""


def read(sys: Path = SYS) -> list[Nic]:
    """All interfaces, by name. One that vanishes meanwhile is left out."""
    found: list[Nic] = []
    for folder in sorted((sys / "class/infiniband").glob("*")):
        try:
            found.append(_nic(folder))
        except (OSError, ValueError):
            continue
    return found


def _nic(folder: Path) -> Nic:
    device = folder / "device"
    here = device.resolve() if device.exists() else folder.resolve()
    numa = _text(device / "numa_node")
    ports = [_port(port) for port in sorted((folder / "ports").iterdir(), key=lambda port: int(port.name))]
    return Nic(folder.name, int(numa) if numa else -1, pci_path(here), tuple(ports))


def _port(folder: Path) -> NicPort:
    gids: list[Gid] = []
    for entry in sorted((folder / "gids").iterdir(), key=lambda entry: int(entry.name)):
        address = _text(entry)
        if address and address.strip("0:"):
            kind = _text(folder / "gid_attrs/types" / entry.name)
            interface = _text(folder / "gid_attrs/ndevs" / entry.name)
            gids.append(Gid(int(entry.name), address, kind, interface))
    rate = re.match(r"[0-9.]+", _text(folder / "rate"))
    return NicPort(
        number=int(folder.name),
        state=_text(folder / "state").rpartition(": ")[2],
        link_type="RoCE" if (kind := _text(folder / "link_layer")) == "Ethernet" else kind,
        gbps=float(rate[0]) if rate else 0.0,
        gids=tuple(gids),
    )


def _text(path: Path) -> str:
    """Empty where there is none: the kernel refuses to show the attributes of an address that is not set."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def pci_path(device: Path) -> tuple[str, ...]:
    """The addresses in the resolved path of a device, from the root of the bus on."""
    return tuple(part for part in device.parts if re.fullmatch(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f]", part))


def distance(nic: Nic, near: Near) -> tuple[int, int]:
    """How far away it is: less is nearer. First whether bytes cross between processors, then bridges on the way."""
    crossing = int(-1 not in (nic.numa_node, near.numa_node) and nic.numa_node != near.numa_node)
    if not near.pci_path:
        return crossing, 0
    shared = 0
    for ours, theirs in zip(nic.pci_path, near.pci_path, strict=False):
        if ours != theirs:
            break
        shared += 1
    if not shared:  # over the processor's own bus, or nobody knows
        return crossing, 100
    return crossing, len(nic.pci_path) + len(near.pci_path) - 2 * shared


def rank(nics: Iterable[Nic], near: Near, preferred: str | None = None) -> list[Nic]:
    """The best first: the preferred one, then those with an active port, the nearest, the fastest."""

    def badness(nic: Nic) -> tuple[bool, bool, tuple[int, int], float, str]:
        active = [port.gbps for port in nic.ports if port.state == "ACTIVE"]
        return nic.name != preferred, not active, distance(nic, near), -max(active, default=0.0), nic.name

    return sorted(nics, key=badness)


def choose(
    nics: Sequence[Nic], *, device: str | None, port: int, link_type: str | None = None, min_gbps: float = 0.0
) -> tuple[Nic, NicPort, Gid]:
    """The first that will do, of `nics` in the order of their rank.

    Args:
        device: the only one that will do.
        link_type: the peer's.

    Raises:
        LookupError: there is none; the text names what each one lacks.
    """
    why: list[str] = []
    for nic in nics:
        if device is not None and nic.name != device:
            continue
        found = next((one for one in nic.ports if one.number == port), None)
        if found is None:
            why.append(f"{nic.name} has no port {port}")
        elif found.state != "ACTIVE":
            why.append(f"port {port} of {nic.name} is {found.state or 'in no state'}")
        elif link_type is not None and found.link_type != link_type:
            why.append(f"{nic.name} is {found.link_type}, the peer's is {link_type}")
        elif found.gbps < min_gbps:
            why.append(f"{nic.name} has {found.gbps:g} Gbit/s, {min_gbps:g} are wanted")
        elif (gid := best_gid(found)) is None:
            why.append(f"port {port} of {nic.name} has no address")
        else:
            return nic, found, gid
    if device is not None and not why:
        why.append(f"there is no network interface {device!r}")
    raise LookupError("; ".join(why) or "there is no network interface with RDMA")


def best_gid(port: NicPort) -> Gid | None:
    """The address to be reached at: on Ethernet one of RoCE v2, which routers pass on, and rather IPv4."""

    def badness(gid: Gid) -> tuple[bool, bool, bool, int]:
        address = ipaddress.IPv6Address(gid.address)
        return "v2" not in gid.kind, address.is_link_local, address.ipv4_mapped is None, gid.index

    if port.link_type == "InfiniBand":
        return next(iter(port.gids), None)
    return min(port.gids, key=badness, default=None)


def gbps(bandwidth: str) -> float:
    """What `min_bw` says, as ``100Gbps``, ``100 Gb/s``, ``400G`` or ``100``: Gbit/s.

    Raises:
        ValueError: it says no bandwidth.
    """
    said = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKmMgGtT]?)(?:b(?:it)?(?:ps|/s))?\s*", bandwidth)
    if said is None:
        raise ValueError(f"min_bw: {bandwidth!r} is no bandwidth; write it as 100Gbps")
    return float(said[1]) * {"K": 1e-6, "M": 1e-3, "": 1.0, "G": 1.0, "T": 1e3}[said[2].upper()]


def describe(nic: Nic, mtu: Callable[[str, int], int]) -> dict[str, Any]:
    """An interface as `get_resource()` tells of it.

    Args:
        mtu: of a device and a port, in bytes; 0 where it cannot be asked.
    """
    usable = any(port.state == "ACTIVE" for port in nic.ports)
    return {
        "name": nic.name,
        "health": "AVAILABLE" if usable else "UNAVAILABLE",
        "numa_node": nic.numa_node,
        "pci_bus_id": nic.pci_bus_id,
        "ports": [
            {
                "port": port.number,
                "state": port.state,
                "link_type": port.link_type,
                "active_mtu": mtu(nic.name, port.number),
                "gbps": port.gbps,
            }
            for port in nic.ports
        ],
    }


def here(sys: Path = SYS, processors: Iterable[int] = ()) -> Near:
    """The NUMA node of this process, if it is bound to one.

    Args:
        processors: those that it may run on.
    """
    bound: set[int] = set()
    mine = set(processors)
    for folder in (sys / "devices/system/node").glob("node[0-9]*"):
        if mine & processor_list(_text(folder / "cpulist")):
            bound.add(int(folder.name.removeprefix("node")))
    return Near(numa_node=bound.pop() if len(bound) == 1 else -1)


def processor_list(text: str) -> set[int]:
    """As the kernel writes it: ``0-3,8``."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return found
