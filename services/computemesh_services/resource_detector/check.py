"""What the resource detector finds on this machine. Prints findings for ``computemesh doctor``."""

from __future__ import annotations

import sys

from computemesh import findings
from computemesh.findings import Finding
from computemesh_services.resource_detector.probes import GpuReading, choose_provider


def gpus(reading: GpuReading) -> list[Finding]:
    """Whether the GPUs can be read, if there are any."""
    todo = "see what `nvidia-smi` says; pip install 'computemesh[cuda]' if it works"
    said = [findings.warning("gpus", text, todo) for text in reading.warnings]
    if reading.gpus:
        named = ", ".join(f"{gpu.name or 'unnamed'} {gpu.vram_total_mb // 1024} GiB" for gpu in reading.gpus)
        return [*said, findings.ok("gpus", f"{reading.provider}: {named}")]
    return said or [findings.ok("gpus", "none on this machine")]


def main() -> None:
    sys.stdout.buffer.write(findings.encode(gpus(choose_provider().read())))


if __name__ == "__main__":
    main()
