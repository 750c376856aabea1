"""Network interfaces and RDMA ports, from the kernel's files."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import psutil

from computemesh.contracts.resources import Nic, RdmaPort
from computemesh_services.resource_detector.probes import system

NET: Final = Path("sys/class/net")
INFINIBAND: Final = Path("sys/class/infiniband")


def read_nics(*, root: Path = Path("/")) -> list[Nic]:
    """The interfaces with a device behind them: no loopback, bridge or tunnel."""
    if not (root / NET).is_dir():
        return _nics_of_other_systems()
    return [
        Nic(
            name=folder.name,
            up=system.read_text(folder / "operstate") == "up",
            speed_mbps=_speed_mbps(folder),
            pci_bus_id=system.pci_address(folder / "device"),
            numa_node=system.numa_node(folder / "device"),
        )
        for folder in sorted((root / NET).iterdir())
        if (folder / "device").exists()
    ]


def _speed_mbps(folder: Path) -> int:
    text = system.read_text(folder / "speed")  # An interface that is down has -1, or cannot be read.
    return int(text) if text.isdecimal() else 0


def _nics_of_other_systems() -> list[Nic]:
    return [
        Nic(name=name, up=stats.isup, speed_mbps=stats.speed)
        for name, stats in sorted(psutil.net_if_stats().items())
        if stats.speed > 0
    ]


def read_rdma(*, root: Path = Path("/")) -> list[RdmaPort]:
    """The ports of all InfiniBand and RoCE adapters."""
    return [_port(folder) for folder in sorted((root / INFINIBAND).glob("*/ports/[0-9]*"))]


def _port(folder: Path) -> RdmaPort:
    device = folder.parents[1]
    _, _, state = system.read_text(folder / "state").partition(": ")
    rate = system.read_text(folder / "rate").partition(" ")[0]
    return RdmaPort(
        device=device.name,
        port=int(folder.name),
        state=state,
        rate_gbps=float(rate) if rate.replace(".", "", 1).isdecimal() else 0.0,
        link_layer=system.read_text(folder / "link_layer"),
        netdev=_netdev(device, folder),
        pci_bus_id=system.pci_address(device / "device"),
        numa_node=system.numa_node(device / "device"),
    )


def _netdev(device: Path, port: Path) -> str:
    """Its interface: what the port's first address belongs to, else the device's only one."""
    if name := system.read_text(port / "gid_attrs" / "ndevs" / "0"):
        return name
    names = [folder.name for folder in (device / "device" / "net").glob("*")]
    return names[0] if len(names) == 1 else ""
