"""What a process has that could leak."""

from __future__ import annotations

from pathlib import Path


def holdings(pid: int) -> dict[str, int]:
    """Descriptors, threads, mappings of memory objects, and resident memory."""
    folder = Path(f"/proc/{pid}")
    status = (folder / "status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return {
        "fds": len(list((folder / "fd").iterdir())),
        "threads": len(list((folder / "task").iterdir())),
        "maps": (folder / "maps").read_text().count("memfd:"),
        "rss_mb": int(resident.split()[1]) // 1024,
    }
