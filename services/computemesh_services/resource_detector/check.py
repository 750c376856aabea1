"""What the resource detector finds on this machine. Prints findings for ``computemesh doctor``."""

from __future__ import annotations

import sys
from collections import Counter

from computemesh import findings
from computemesh.config import ConfigError, load
from computemesh.findings import Finding
from computemesh_services.resource_detector.config import GpuConfig
from computemesh_services.resource_detector.probes import GpuReading
from computemesh_services.resource_detector.probes.choice import choose

REMEDIES = {
    "rocm": "see what `rocminfo` says, and whether this user is in the groups `render` and `video`",
    "metal": "see what `system_profiler SPDisplaysDataType` says",
    "scripted": "this hardware is made up: edit the file that COMPUTEMESH_SCRIPTED_HARDWARE names",
}
NVIDIA = "see what `nvidia-smi` says; pip install 'computemesh[cuda]' if it works"


def gpus(reading: GpuReading) -> list[Finding]:
    """Whether the GPUs can be read, if there are any."""
    todo = REMEDIES.get(reading.provider, NVIDIA)
    said = [findings.warning("gpus", text, todo) for text in reading.warnings]
    if reading.gpus:
        alike = Counter(f"{gpu.name or 'unnamed'} {gpu.vram_total_mb / 1024:.0f} GiB" for gpu in reading.gpus)
        named = ", ".join(f"{count} × {name}" if count > 1 else name for name, count in alike.items())
        return [*said, findings.ok("gpus", f"{reading.provider}: {named}")]
    return said or [findings.ok("gpus", "none on this machine")]


def check() -> list[Finding]:
    try:
        config = load(GpuConfig)
        return gpus(choose(config.gpu_provider, hardware=config.scripted_hardware).read())
    except ConfigError as error:
        return [findings.problem("gpus", str(error), "correct the setting, and start the resource-detector again")]


def main() -> None:
    sys.stdout.buffer.write(findings.encode(check()))


if __name__ == "__main__":
    main()
