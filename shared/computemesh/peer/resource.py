"""What of a machine peers want to know before they connect to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

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
