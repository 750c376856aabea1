"""Goal: a Mac's GPU is told from what macOS's own tools print.

Method: their output as recorded on Apple silicon and on an Intel Mac, with a program in place of the tools.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Final

import pytest

from computemesh import macos
from computemesh.hardware import Gpu, Memory, Platform, Tier, tier_of
from computemesh.macos import parse, usable_mb
from computemesh_services.resource_detector.probes.metal import MetalProvider

APPLE: Final = """{
  "SPDisplaysDataType" : [
    {
      "_name" : "Apple M2 Ultra",
      "spdisplays_mtlgpufamilysupport" : "spdisplays_metal3",
      "spdisplays_ndrvs" : [ { "_name" : "Studio Display", "_spdisplays_pixels" : "5120 x 2880" } ],
      "spdisplays_vendor" : "sppci_vendor_Apple",
      "sppci_bus" : "spdisplays_builtin",
      "sppci_cores" : "76",
      "sppci_device_type" : "spdisplays_gpu",
      "sppci_model" : "Apple M2 Ultra"
    }
  ]
}"""
INTEL: Final = """{
  "SPDisplaysDataType" : [
    {
      "_name" : "kHW_IntelUHDGraphics630Item",
      "spdisplays_mtlgpufamilysupport" : "spdisplays_metal3",
      "spdisplays_vram_shared" : "1536 MB",
      "sppci_model" : "Intel UHD Graphics 630"
    },
    {
      "_name" : "kHW_AMDRadeonPro5500MItem",
      "spdisplays_mtlgpufamilysupport" : "spdisplays_metal3",
      "spdisplays_vram" : "8 GB",
      "sppci_model" : "AMD Radeon Pro 5500M"
    },
    { "_name" : "Display without Metal" }
  ]
}"""
KERNEL: Final = "hw.memsize: 206158430208\nkern.osproductversion: 15.1\niogpu.wired_limit_mb: 0\n"


class Tools:
    def __init__(self, displays: str = APPLE, kernel: str = KERNEL) -> None:
        self.said: dict[tuple[str, ...], str] = {macos.DISPLAYS: displays, macos.KERNEL: kernel}
        self.runs = 0
        self.error: Exception | None = None

    def run(self, command: Sequence[str]) -> str:
        self.runs += 1
        if self.error:
            raise self.error
        return self.said[tuple(command)]


def provider(tools: Tools, *, mac: bool = True, expected: bool = True) -> MetalProvider:
    memory = Memory(total_mb=196_608, available_mb=150_000)
    return MetalProvider(run=tools.run, memory=lambda: memory, mac=mac, expected=expected)


def test_the_gpu_of_apple_silicon_has_the_part_of_memory_that_it_may_use() -> None:
    """Three quarters of 192 GiB; what is in use of the machine's memory is in use of the GPU's."""
    reading = provider(Tools()).read()
    assert reading.gpus == [
        Gpu(
            name="Apple M2 Ultra",
            vram_total_mb=147_456,
            vram_used_mb=46_608,
            architecture="apple8",
            driver="macOS 15.1",
            unified_memory=True,
        )
    ]
    assert (reading.provider, reading.platform, reading.warnings) == ("metal", Platform.METAL, [])
    assert tier_of(reading.gpus) is Tier.GPU_PEER


@pytest.mark.parametrize(
    ("memory_mb", "usable"), [(8192, 5461), (36 * 1024, 24 * 1024), (64 * 1024, 48 * 1024), (0, 0)]
)
def test_how_much_of_the_memory_is_the_gpus_depends_on_how_much_there_is(memory_mb: int, usable: int) -> None:
    """As macOS decides it where nobody set a limit."""
    assert usable_mb(memory_mb) == usable


def test_a_limit_that_was_set_counts() -> None:
    """``sudo sysctl iogpu.wired_limit_mb=180000``"""
    assert parse(APPLE, KERNEL.replace("mb: 0", "mb: 180000"))[0].vram_total_mb == 180_000


def test_an_intel_mac_has_gpus_with_memory_of_their_own() -> None:
    """What Metal does not run on is no GPU."""
    shared, own = parse(INTEL, KERNEL)
    assert (shared.name, shared.unified_memory) == ("Intel UHD Graphics 630", True)
    assert (own.index, own.vram_total_mb, own.unified_memory, own.architecture) == (1, 8192, False, "")


def test_the_tools_are_asked_once() -> None:
    """system_profiler takes about a second."""
    tools = Tools()
    mine = provider(tools)
    assert mine.read() == mine.read()
    assert tools.runs == 2


@pytest.mark.parametrize("displays", ["", "[]", "not JSON", '"text"'])
def test_output_that_is_something_else_is_a_warning_and_is_asked_for_again(displays: str) -> None:
    """Never a reading that raises."""
    tools = Tools(displays)
    mine = provider(tools)
    assert (mine.read().gpus, len(mine.read().warnings)) == ([], 1)
    tools.said[macos.DISPLAYS] = APPLE
    assert len(mine.read().gpus) == 1


@pytest.mark.parametrize("error", [FileNotFoundError("no such tool"), subprocess.TimeoutExpired("tool", 30)])
def test_a_tool_that_cannot_be_run_is_a_warning(error: Exception) -> None:
    """It is said what went wrong."""
    tools = Tools()
    tools.error = error
    reading = provider(tools).read()
    assert (reading.gpus, reading.platform) == ([], Platform.CPU)
    assert reading.warnings == [f"Metal GPUs cannot be read: {error}"]


@pytest.mark.parametrize("expected", [False, True])
def test_elsewhere_than_on_a_mac_no_tool_is_run(expected: bool) -> None:
    """And nothing is said unless Metal was asked for."""
    tools = Tools()
    reading = provider(tools, mac=False, expected=expected).read()
    assert (reading.gpus, bool(reading.warnings), tools.runs) == ([], expected, 0)


def test_recorded_output_is_json() -> None:
    """A slip in the recording would make the tests above prove nothing."""
    assert all(json.loads(text) for text in (APPLE, INTEL))
