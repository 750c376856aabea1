"""What of a machine peers want to know before they connect to it."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from computemesh.peer.transport import Endpoint

NVIDIA: Final = Path("/proc/driver/nvidia/gpus")


def accelerators(root: Path = NVIDIA) -> list[dict[str, Any]]:
    """The machine's NVIDIA GPUs, as their driver lists them: device_index, name, uuid, pci_bus_id; no driver, none."""
    found: list[dict[str, Any]] = []
    try:
        folders = sorted(root.iterdir())
    except OSError:
        return []
    for folder in folders:
        try:
            text = (folder / "information").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
        found.append(
            {
                "device_index": len(found),
                "name": said.get("Model", ""),
                "uuid": said.get("GPU UUID", ""),
                "pci_bus_id": said.get("Bus Location", folder.name),
            }
        )
    return found


def resource_of(endpoints: Sequence[Endpoint], device: str | None, local_host: str | None) -> dict[str, Any]:
    """The record by which peers know this process: its machine, and its interfaces, `device` first if there is one."""
    nics: list[Any] = []
    backends: dict[str, Any] = {}
    for endpoint in endpoints:
        absent = endpoint.absent()
        backends[endpoint.name] = {"available": not absent, **({"reason": absent} if absent else {})}
        if not absent:
            nics.extend(endpoint.facts().get("nics", ()))
    nics.sort(key=lambda nic: nic.get("name") != device)  # The preferred one first, the others as they were.
    return {
        "schema_version": 1,
        "topology_epoch": 1,
        "host": {"hostname": socket.gethostname(), "address": local_host or "127.0.0.1"},
        "nics": nics,
        "accelerators": accelerators(),
        "topology_backends": backends,
    }


def first_port(resource: Mapping[str, Any], device: str | None) -> tuple[str, int, str]:
    """Interface, number and link type of the first port of a record, or of that of `device`."""
    for nic in resource.get("nics", ()):
        for port in nic.get("ports", ()):
            if device in (None, "", nic.get("name")):
                return str(nic.get("name", "")), int(port.get("port", 1)), str(port.get("link_type", ""))
    return device or "", 1, ""
