"""Goal: the devices of a machine, what pins an engine to each, and how they are doing, as the platforms' tools tell it.

Method: their output in ``recorded``, with a program in place of the tools. The outputs follow what public repositories
and issues have of the real tools, shortened to what is read: nvidia-smi (telegraf's test data for an A100 in MIG mode,
DataDog/datadog-agent#33120, anderskm/gputil#55), rocm-smi (telegraf's test data for ROCm 4.3 to 6.0,
mudler/LocalAI#7761), amd-smi (henrygd/beszel#737 and ROCm's manual), xpu-smi (intel/xpumanager#127, #69 and #98),
sycl-ls (llama.cpp's manual for SYCL, intel/llvm#8433, intel/compute-runtime#764), vulkaninfo (Vulkan-Tools#801,
slowfetch#10; the one for llvmpipe is as Debian 12 printed it) and llama-server (ollama#16508, llama.cpp#16659).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from computemesh.macos import DISPLAYS, KERNEL
from computemesh_services.node_agent.engines.backends import Backend, Found, allowed, cuda, metal, rocm, sycl, vulkan
from computemesh_services.node_agent.engines.backends.choice import Choice, choose, parse_served, served_by
from computemesh_services.node_agent.engines.backends.cpu import CpuSets, LogicalCpu
from computemesh_services.node_agent.engines.backends.cuda import Cuda
from computemesh_services.node_agent.engines.backends.metal import Metal
from computemesh_services.node_agent.engines.backends.rocm import Rocm
from computemesh_services.node_agent.engines.backends.sycl import Sycl
from computemesh_services.node_agent.engines.backends.tool import Said, ToolError
from computemesh_services.node_agent.engines.backends.vulkan import Vulkan
from computemesh_services.node_agent.engines.device import BackendName, DeviceMetrics, DeviceRef

RECORDED: Final = Path(__file__).parent / "recorded"


def recorded(name: str) -> str:
    return (RECORDED / name).read_text()


class Tools:
    """Says for each command what was recorded; a command that it does not know is not installed."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, ...], Said | ToolError] = {}
        self.ran: list[tuple[str, ...]] = []

    def says(self, command: Sequence[str], out: str = "", *, status: int = 0, error: str = "") -> Tools:
        self.known[tuple(command)] = Said(tool=command[0], out=out, error=error, status=status)
        return self

    def fails(self, command: Sequence[str], why: str) -> Tools:
        self.known[tuple(command)] = ToolError(why)
        return self

    def __call__(self, command: Sequence[str]) -> Said:
        self.ran.append(tuple(command))
        said = self.known.get(tuple(command)) or ToolError(f"{command[0]} is not installed", missing=True)
        if isinstance(said, ToolError):
            raise said
        return said


@pytest.fixture
def tools() -> Tools:
    return Tools()


def pins(found: Found) -> dict[str, dict[str, str]]:
    return {device.id: dict(device.environment) for device in found.devices}


def without_hardware(backend: Backend) -> None:
    """A machine without such hardware, where the tool is not even installed."""
    assert backend.discover() == Found()
    assert backend.metrics() == {}


# --- NVIDIA


def test_nvidias_gpus_are_pinned_by_uuid_and_hidden_from_an_engine_by_other_ways(tools: Tools) -> None:
    """CUDA numbers GPUs by speed, nvidia-smi by their place on the bus: a uuid means the same to both."""
    backend = Cuda(run=tools.says(cuda.QUERY, recorded("nvidia-smi/query-2x4090.csv")), environ={})
    found = backend.discover()
    assert [(one.id, one.backend, one.index, one.name) for one in found.devices] == [
        ("gpu:0", "cuda", 0, "NVIDIA GeForce RTX 4090"),
        ("gpu:1", "cuda", 1, "NVIDIA GeForce RTX 4090"),
    ]
    assert found.warnings == ()
    assert pins(found)["gpu:1"] == {
        "CUDA_VISIBLE_DEVICES": "GPU-9c1d7a5e-77aa-3c41-2b9c-90aa11bb22cc",
        "HIP_VISIBLE_DEVICES": "-1",
        "GGML_VK_VISIBLE_DEVICES": "",
    }
    assert backend.metrics() == {
        "gpu:0": DeviceMetrics(
            memory_total_mb=24564, memory_free_mb=23994, utilisation_percent=12.0, temperature_c=41.0
        ),
        "gpu:1": DeviceMetrics(
            memory_total_mb=24564, memory_free_mb=1204, utilisation_percent=100.0, temperature_c=68.0
        ),
    }


def test_a_driver_that_knows_no_mig_is_asked_without_it(tools: Tools) -> None:
    tools.says(cuda.QUERY, recorded("nvidia-smi/old-driver.txt"), status=2)
    tools.says(cuda.OLD_QUERY, recorded("nvidia-smi/query-old-driver.csv"))
    backend = Cuda(run=tools, environ={})
    assert [one.name for one in backend.discover().devices] == ["Quadro P2000"]
    assert backend.metrics()["gpu:0"].memory_free_mb == 5052


def test_an_nvidia_gpu_without_memory_of_its_own_works_in_the_machines(tools: Tools) -> None:
    tools.says(cuda.QUERY, recorded("nvidia-smi/query-gb10.csv"))
    backend = Cuda(run=tools, environ={}, memory=lambda: (124_545, 98_304))
    assert [one.name for one in backend.discover().devices] == ["NVIDIA GB10"]
    assert backend.metrics() == {
        "gpu:0": DeviceMetrics(
            memory_total_mb=124_545, memory_free_mb=98_304, utilisation_percent=12.0, temperature_c=41.0
        )
    }


def test_an_nvidia_gpu_that_is_lost_costs_itself_alone(tools: Tools) -> None:
    tools.says(cuda.QUERY, recorded("nvidia-smi/query-lost.csv"), status=15)
    backend = Cuda(run=tools, environ={})
    found = backend.discover()
    assert [one.id for one in found.devices] == ["gpu:0"]
    assert found.warnings == (
        "nvidia-smi: Unable to determine the device handle for GPU0000:CB:00.0: Unknown Error",
        "GPU 1 (NVIDIA GeForce RTX 3090) cannot be used: GPU is lost",
    )
    assert set(backend.metrics()) == {"gpu:0"}


def test_a_gpu_in_mig_mode_is_its_instances(tools: Tools) -> None:
    tools.says(cuda.QUERY, recorded("nvidia-smi/query-a100-mig.csv"))
    tools.says(cuda.LIST, recorded("nvidia-smi/list-a100-mig.txt"))
    tools.says(cuda.DETAILS, recorded("nvidia-smi/details-a100-mig.xml"))
    backend = Cuda(run=tools, environ={})
    found = backend.discover()
    assert [(one.id, one.name) for one in found.devices] == [
        ("gpu:0.0", "NVIDIA A100-SXM4-80GB MIG 1g.20gb"),
        ("gpu:0.1", "NVIDIA A100-SXM4-80GB MIG 1g.20gb"),
        ("gpu:2", "NVIDIA A100-SXM4-80GB"),
    ]
    assert pins(found)["gpu:0.1"]["CUDA_VISIBLE_DEVICES"] == "MIG-a25704ba-3a06-5299-a795-fd7cf4d13973"
    assert found.warnings == ("GPU 1 (NVIDIA A100-SXM4-80GB) is in MIG mode and has no instances",)
    told = backend.metrics()
    assert told["gpu:0.1"] == DeviceMetrics(memory_total_mb=19968, memory_free_mb=10141, temperature_c=27.0)
    assert told["gpu:2"].utilisation_percent == 35.0


def test_when_the_long_report_of_nvidia_fails_the_other_gpus_are_told_of(tools: Tools) -> None:
    tools.says(cuda.QUERY, recorded("nvidia-smi/query-a100-mig.csv"))
    tools.says(cuda.LIST, recorded("nvidia-smi/list-a100-mig.txt"))
    backend = Cuda(run=tools.says(cuda.DETAILS, "<nvidia_smi_log><gpu>"), environ={})
    backend.discover()
    assert "gpu:2" in backend.metrics()
    assert "gpu:0.0" not in backend.metrics()


@pytest.mark.parametrize(
    ("said", "status", "warning"),
    [
        (
            "mismatch.txt",
            18,
            (
                "no NVIDIA GPUs: nvidia-smi ended with status 18: "
                "Failed to initialize NVML: Driver/library version mismatch NVML library version: 535.161"
            ),
        ),
        (
            "no-driver.txt",
            9,
            (
                "no NVIDIA GPUs: nvidia-smi ended with status 9: NVIDIA-SMI has failed because it couldn't communicate "
                "with the NVIDIA driver. Make sure that the latest NVIDIA driver is installed and running."
            ),
        ),
        ("no-devices.txt", 6, "no NVIDIA GPUs: nvidia-smi ended with status 6: No devices were found"),
    ],
)
def test_what_nvidias_driver_complains_of_is_passed_on(tools: Tools, said: str, status: int, warning: str) -> None:
    backend = Cuda(run=tools.says(cuda.QUERY, recorded(f"nvidia-smi/{said}"), status=status), environ={})
    assert backend.discover() == Found(warnings=(warning,))
    assert backend.metrics() == {}


def test_an_nvidia_gpu_without_a_uuid_is_pinned_by_its_place_on_the_bus(tools: Tools) -> None:
    backend = Cuda(run=tools.says(cuda.QUERY, "3, [N/A], Tesla M60, 8129, 8120, 0, 30, [N/A]\n"), environ={})
    assert pins(backend.discover())["gpu:3"] == {
        "CUDA_VISIBLE_DEVICES": "3",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "HIP_VISIBLE_DEVICES": "-1",
        "GGML_VK_VISIBLE_DEVICES": "",
    }


# --- AMD


def test_amds_gpus_are_pinned_by_their_unique_id(tools: Tools) -> None:
    """rocm-smi leaves out leading zeros, ROCm's runtime does not."""
    backend = Rocm(run=tools.says(rocm.ROCM, recorded("rocm-smi/mi100-rocm602.json")), environ={})
    found = backend.discover()
    assert [(one.id, one.name) for one in found.devices] == [
        ("gpu:0", "Arcturus GL-XL [Instinct MI100]"),
        ("gpu:1", "Arcturus GL-XL [Instinct MI100]"),
    ]
    assert pins(found)["gpu:1"] == {
        "ROCR_VISIBLE_DEVICES": "GPU-04edfb117a17a07d",
        "HIP_VISIBLE_DEVICES": "0",
        "GGML_VK_VISIBLE_DEVICES": "",
    }
    assert backend.metrics()["gpu:1"] == DeviceMetrics(
        memory_total_mb=32752, memory_free_mb=4080, utilisation_percent=97.0, temperature_c=58.0
    )


def test_an_old_rocm_that_knows_no_names_and_no_ids_is_enough(tools: Tools) -> None:
    backend = Rocm(run=tools.says(rocm.ROCM, recorded("rocm-smi/rx6700xt-rocm430.json"), status=2), environ={})
    found = backend.discover()
    assert [one.name for one in found.devices] == ["AMD GPU"]
    assert pins(found)["gpu:0"]["ROCR_VISIBLE_DEVICES"] == "0"
    assert backend.metrics()["gpu:0"].memory_free_mb == 12272 - 1547


def test_the_gpu_in_an_amd_processor_is_none_beside_a_card(tools: Tools) -> None:
    backend = Rocm(run=tools.says(rocm.ROCM, recorded("rocm-smi/rx6800-and-raphael-rocm63.json")), environ={})
    found = backend.discover()
    assert [one.name for one in found.devices] == ["Navi 21 [Radeon RX 6800/6800 XT / 6900 XT]"]
    assert pins(found)["gpu:0"]["ROCR_VISIBLE_DEVICES"] == "GPU-9246be8d6f3c1a52"


def test_amd_smi_goes_before_rocm_smi_and_a_gpu_without_an_id_is_pinned_by_the_order_of_the_kernel(
    tools: Tools,
) -> None:
    """GPU 1 of amd-smi is the first of the kernel's nodes."""
    tools.says(rocm.AMD_LIST, recorded("amd-smi/list-rocm64.json"))
    tools.says(rocm.AMD_STATIC, recorded("amd-smi/static-rocm64.json"))
    tools.says(rocm.AMD_METRIC, recorded("amd-smi/metric-mi300x-rocm7.json"))
    tools.says(rocm.ROCM, recorded("rocm-smi/mi100-rocm602.json"))
    backend = Rocm(run=tools, environ={})
    found = backend.discover()
    assert [one.name for one in found.devices] == ["AMD Radeon PRO W7900", "AMD Radeon PRO W7900"]
    assert pins(found)["gpu:0"]["ROCR_VISIBLE_DEVICES"] == "GPU-de8287300da37c72"
    assert pins(found)["gpu:1"]["ROCR_VISIBLE_DEVICES"] == "0"
    assert backend.metrics() == {
        "gpu:0": DeviceMetrics(
            memory_total_mb=196_592, memory_free_mb=179_439, utilisation_percent=94.0, temperature_c=61.0
        ),
        "gpu:1": DeviceMetrics(memory_total_mb=196_592),
    }


@pytest.mark.parametrize(
    ("environ", "ids"),
    [
        ({"ROCR_VISIBLE_DEVICES": "0"}, ["gpu:1"]),
        ({"HIP_VISIBLE_DEVICES": "1"}, ["gpu:0"]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-de8287300da37c72", "HIP_VISIBLE_DEVICES": "0"}, ["gpu:0"]),
        ({"ROCR_VISIBLE_DEVICES": "1,0", "HIP_VISIBLE_DEVICES": "0"}, ["gpu:0"]),
        ({"ROCR_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "1"}, []),
    ],
)
def test_rocms_variables_count_in_the_order_of_its_runtime_and_the_second_what_the_first_leaves(
    tools: Tools, environ: dict[str, str], ids: list[str]
) -> None:
    """GPU 1 of amd-smi is GPU 0 of the runtime, as in the test above."""
    tools.says(rocm.AMD_LIST, recorded("amd-smi/list-rocm64.json"))
    tools.says(rocm.AMD_STATIC, recorded("amd-smi/static-rocm64.json"))
    assert [one.id for one in Rocm(run=tools, environ=environ).discover().devices] == ids


@pytest.mark.parametrize(
    ("out", "error", "warning"),
    [
        ("rocm-smi/no-data.txt", "", "rocm-smi: it printed no JSON but 'WARNING: No JSON data to report'"),
        (
            "",
            "rocm-smi/no-driver.txt",
            "rocm-smi ended with status 0: ERROR:root:Driver not initialized (amdgpu not found in modules)",
        ),
    ],
)
def test_what_amds_driver_complains_of_is_passed_on(tools: Tools, out: str, error: str, warning: str) -> None:
    """Both end with status 0; the second as Debian 12's rocm-smi does on a machine without the driver."""
    tools.says(rocm.ROCM, recorded(out) if out else "", error=recorded(error) if error else "")
    assert Rocm(run=tools, environ={}).discover() == Found(warnings=(f"no AMD GPUs: {warning}",))


@pytest.mark.parametrize("text", ["", "{", "[", "null", "[1, 2]", '{"gpu_data": 3}', '{"card0": 3, "cardx": {}}'])
def test_what_amds_tools_should_not_print_costs_the_devices_and_no_more(text: str) -> None:
    tools = Tools().says(rocm.ROCM, text).says(rocm.AMD_METRIC, text)
    tools.says(rocm.AMD_LIST, text).says(rocm.AMD_STATIC, text)
    backend = Rocm(run=tools, environ={})
    assert backend.discover().devices == ()
    assert backend.metrics() == {}


# --- Apple


def test_the_gpu_of_a_mac_works_in_the_machines_memory(tools: Tools) -> None:
    tools.says(DISPLAYS, recorded("macos/displays-m2-ultra.json"))
    tools.says(KERNEL, recorded("macos/kernel-m2-ultra.txt"), status=1, error="unknown oid 'iogpu'")
    tools.says(metal.ACCELERATORS, recorded("macos/accelerator-m4-max.txt"))
    backend = Metal(run=tools, mac=True, memory=lambda: (196_608, 160_000))
    found = backend.discover()
    assert found.devices == (DeviceRef(id="gpu:0", backend="metal", name="Apple M2 Ultra"),)
    assert backend.metrics() == {
        "gpu:0": DeviceMetrics(memory_total_mb=147_456, memory_free_mb=147_456, utilisation_percent=16.0)
    }


def test_a_mac_with_two_gpus_has_the_one_with_memory_of_its_own(tools: Tools) -> None:
    tools.says(DISPLAYS, recorded("macos/displays-intel.json"))
    tools.says(KERNEL, recorded("macos/kernel-m2-ultra.txt"))
    tools.says(metal.ACCELERATORS, recorded("macos/accelerator-intel.txt"))
    backend = Metal(run=tools, mac=True)
    assert [one.name for one in backend.discover().devices] == ["AMD Radeon Pro 5500M"]
    assert backend.metrics() == {
        "gpu:0": DeviceMetrics(memory_total_mb=8192, memory_free_mb=6144, utilisation_percent=41.0)
    }


def test_a_machine_that_is_no_mac_is_not_asked_for_apples_gpu(tools: Tools) -> None:
    without_hardware(Metal(run=tools, mac=False))
    assert tools.ran == []


def test_a_mac_whose_report_is_no_json_says_so(tools: Tools) -> None:
    tools.says(DISPLAYS, "2026-01-01 system_profiler: timed out").says(KERNEL)
    (warning,) = Metal(run=tools, mac=True).discover().warnings
    assert warning.startswith("no Apple GPU: ")


# --- Intel


def test_intels_cards_are_numbered_as_the_engine_is_told_to_and_the_gpu_in_the_processor_is_left_out(
    tools: Tools,
) -> None:
    tools.says(sycl.DISCOVERY, recorded("xpu-smi/discovery-arc-b70.json"))
    tools.says(sycl.details(1), recorded("xpu-smi/details-arc-b70.json"))
    tools.says(sycl.dump([1, 2]), recorded("xpu-smi/dump.csv"))
    backend = Sycl(run=tools, environ={})
    found = backend.discover()
    assert [(one.id, one.name) for one in found.devices] == [
        ("gpu:1", "Intel(R) Arc(TM) Pro B70 Graphics"),
        ("gpu:2", "Intel(R) Arc(TM) Pro B70 Graphics"),
    ]
    assert pins(found)["gpu:2"] == {
        "ZE_AFFINITY_MASK": "2",
        "ZE_ENABLE_PCI_ID_DEVICE_ORDER": "1",
        "ZE_FLAT_DEVICE_HIERARCHY": "COMPOSITE",
        "ONEAPI_DEVICE_SELECTOR": "level_zero:0",
        "GGML_VK_VISIBLE_DEVICES": "",
    }
    assert backend.metrics() == {
        "gpu:1": DeviceMetrics(
            memory_total_mb=32656, memory_free_mb=32656 - 229, utilisation_percent=37.0, temperature_c=53.0
        ),
        "gpu:2": DeviceMetrics(),
    }


def test_the_memory_of_an_intel_gpu_is_told_in_bytes_or_in_words() -> None:
    assert sycl.parse_total_mb(recorded("xpu-smi/details-arc-b70.json")) == 32656
    assert sycl.parse_total_mb(recorded("xpu-smi/details-flex-170.json")) == 14248
    assert sycl.parse_total_mb("no JSON") is None


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("arc-a770-2025.txt", {"gpu:0": "Intel(R) Arc(TM) A770 Graphics", "gpu:1": "Intel(R) UHD Graphics 730"}),
        ("max-1550-2023.txt", {"gpu:0": "Intel(R) Data Center GPU Max 1550"}),
        ("no-level-zero.txt", {}),
    ],
)
def test_sycl_ls_will_do_where_xpu_smi_is_not_installed(tools: Tools, name: str, devices: dict[str, str]) -> None:
    """Only Level Zero's GPUs count: the mask that pins an engine is Level Zero's."""
    backend = Sycl(run=tools.says(sycl.SYCL_LS, recorded(f"sycl-ls/{name}")), environ={})
    found = backend.discover()
    assert {one.id: one.name for one in found.devices} == devices
    assert backend.metrics() == {}
    for device in found.devices:
        assert device.environment["ZE_AFFINITY_MASK"] == str(device.index)
        assert "ZE_ENABLE_PCI_ID_DEVICE_ORDER" not in device.environment


def test_an_error_of_xpu_smi_is_passed_on_and_sycl_ls_is_asked(tools: Tools) -> None:
    tools.says(sycl.DISCOVERY, recorded("xpu-smi/error.json"), status=0)
    tools.says(sycl.SYCL_LS, recorded("sycl-ls/arc-a770-2025.txt"))
    found = Sycl(run=tools, environ={}).discover()
    assert len(found.devices) == 2
    assert found.warnings == ("xpu-smi is of no use: xpu-smi: Level Zero Initialization Error",)


def test_an_xpu_smi_that_lists_nothing_finds_nothing(tools: Tools) -> None:
    without_hardware(Sycl(run=tools.says(sycl.DISCOVERY, recorded("xpu-smi/none.json")), environ={}))


# --- Vulkan


def test_of_a_laptops_vulkan_devices_the_card_counts(tools: Tools) -> None:
    backend = Vulkan(run=tools.says(vulkan.SUMMARY, recorded("vulkaninfo/summary-laptop.txt")), environ={})
    found = backend.discover()
    assert [(one.id, one.index, one.name) for one in found.devices] == [
        ("gpu:1", 1, "NVIDIA GeForce RTX 4070 Laptop GPU")
    ]
    assert pins(found)["gpu:1"] == {
        "GGML_VK_VISIBLE_DEVICES": "1",
        "CUDA_VISIBLE_DEVICES": "-1",
        "HIP_VISIBLE_DEVICES": "-1",
    }


def test_the_gpu_in_a_processor_counts_when_it_is_the_only_one() -> None:
    only, _ = vulkan.parse_summary(recorded("vulkaninfo/summary-laptop.txt"))[::2]
    assert [one.name for one in vulkan.devices_of([only])] == ["Intel(R) Graphics (RPL-S)"]


def test_a_card_with_two_drivers_is_one_device(tools: Tools) -> None:
    tools.says(vulkan.SUMMARY, recorded("vulkaninfo/summary-two-drivers.txt"))
    found = Vulkan(run=tools, environ={}).discover()
    assert [one.name for one in found.devices] == ["AMD Radeon RX 6650 XT (RADV NAVI23)"]


def test_a_renderer_in_software_is_no_device(tools: Tools) -> None:
    without_hardware(
        Vulkan(run=tools.says(vulkan.SUMMARY, recorded("vulkaninfo/summary-llvmpipe-1.3.239.txt")), environ={})
    )


def test_a_machine_without_a_vulkan_driver_is_nothing_to_warn_of(tools: Tools) -> None:
    tools.says(vulkan.SUMMARY, status=1, error=recorded("vulkaninfo/no-driver.txt"))
    without_hardware(Vulkan(run=tools, environ={}))


def test_of_a_vulkan_devices_heaps_the_largest_of_its_own_is_its_memory(tools: Tools) -> None:
    """The small one is the window through which the processor reaches the card; a budget of 0 tells nothing."""
    backend = Vulkan(run=tools.says(vulkan.FULL, recorded("vulkaninfo/full-rx7800xt.txt")), environ={})
    assert backend.metrics() == {
        "gpu:0": DeviceMetrics(memory_total_mb=16384, memory_free_mb=14745),
        "gpu:1": DeviceMetrics(memory_total_mb=31471),
    }
    assert vulkan.parse_memory(recorded("vulkaninfo/full-llvmpipe-1.3.239.txt")) == {
        0: DeviceMetrics(memory_total_mb=2048)
    }


# --- all of them


@pytest.mark.parametrize("kind", [Cuda, Rocm, Sycl, Vulkan])
def test_a_tool_that_is_not_installed_is_nothing_to_warn_of(
    tools: Tools, kind: type[Cuda | Rocm | Sycl | Vulkan]
) -> None:
    without_hardware(kind(run=tools, environ={}))


@pytest.mark.parametrize(
    ("kind", "command"),
    [(Cuda, cuda.QUERY), (Rocm, rocm.AMD_LIST), (Sycl, sycl.DISCOVERY), (Vulkan, vulkan.SUMMARY)],
)
def test_a_tool_that_hangs_costs_its_devices_and_says_so(
    tools: Tools, kind: type[Cuda | Rocm | Sycl | Vulkan], command: Sequence[str]
) -> None:
    backend = kind(run=tools.fails(command, f"{command[0]} did not end within 10 s"), environ={})
    found = backend.discover()
    assert found.devices == ()
    assert any("did not end within 10 s" in warning for warning in found.warnings)
    assert backend.metrics() == {}


def test_the_devices_that_the_agent_itself_was_started_with_are_the_ones_that_count(tools: Tools) -> None:
    tools.says(cuda.QUERY, recorded("nvidia-smi/query-2x4090.csv"))

    def ids(told: str) -> list[str]:
        return [one.id for one in Cuda(run=tools, environ={"CUDA_VISIBLE_DEVICES": told}).discover().devices]

    assert ids("1") == ["gpu:1"]
    assert ids("1,0") == ["gpu:1", "gpu:0"]
    assert ids("GPU-9c1d7a5e") == ["gpu:1"]
    assert ids("") == []
    assert ids("-1") == []
    assert ids("0,9,1") == ["gpu:0"]
    assert Cuda(run=tools, environ={"CUDA_VISIBLE_DEVICES": "7"}).discover().warnings == (
        "CUDA_VISIBLE_DEVICES=7 names none of the devices that there are",
    )


def test_a_device_is_not_allowed_twice() -> None:
    devices = [DeviceRef(id="gpu:0", index=0, uuid="GPU-a"), DeviceRef(id="gpu:1", index=1, uuid="GPU-b")]
    assert allowed(devices, "0,0,1") == [devices[0]]
    assert allowed(devices, None) == devices


# --- which of them serves


ALL: Final = {
    "cuda.txt": {"cuda"},
    "rocm.txt": {"rocm"},
    "vulkan.txt": {"vulkan"},
    "sycl.txt": {"sycl"},
    "metal.txt": {"metal"},
    "cpu.txt": set[str](),
}


@pytest.mark.parametrize(("name", "backends"), ALL.items())
def test_llama_server_tells_what_it_was_built_for(name: str, backends: set[str]) -> None:
    assert parse_served(recorded(f"llama-server/{name}")) == backends


def machine(tools: Tools) -> dict[BackendName, Backend]:
    """A machine with two NVIDIA GPUs, one of which Vulkan reaches as well."""
    tools.says(cuda.QUERY, recorded("nvidia-smi/query-2x4090.csv"))
    tools.says(vulkan.SUMMARY, recorded("vulkaninfo/summary-laptop.txt"))
    cpus = [LogicalCpu(number=number, core=(0, number)) for number in range(4)]
    return {
        "cuda": Cuda(run=tools, environ={}),
        "rocm": Rocm(run=tools, environ={}),
        "metal": Metal(run=tools, mac=False),
        "sycl": Sycl(run=tools, environ={}),
        "vulkan": Vulkan(run=tools, environ={}),
        "cpu": CpuSets(cpus=lambda: cpus),
    }


@pytest.mark.parametrize(
    ("listed", "wanted", "name", "ids"),
    [
        ("cuda.txt", "auto", "cuda", ["gpu:0", "gpu:1"]),
        ("vulkan.txt", "auto", "vulkan", ["gpu:1"]),
        ("cpu.txt", "auto", "cpu", ["cpu:0"]),
        ("cpu.txt", "cuda", "cuda", ["gpu:0", "gpu:1"]),
        ("cuda.txt", "cpu", "cpu", ["cpu:0"]),
    ],
)
def test_auto_takes_the_first_backend_that_finds_devices_and_that_llama_server_can_use(
    tools: Tools, listed: str, wanted: Choice, name: str, ids: list[str]
) -> None:
    tools.says(["llama-server", "--list-devices"], recorded(f"llama-server/{listed}"))
    chosen = choose(wanted, machine(tools), lambda: served_by(["llama-server"], tools))
    assert chosen.backend.name == name
    assert [one.id for one in chosen.found.devices] == ids


def test_gpus_that_llama_server_cannot_use_are_named(tools: Tools) -> None:
    tools.says(["llama-server", "--list-devices"], recorded("llama-server/cpu.txt"))
    assert choose("auto", machine(tools), lambda: served_by(["llama-server"], tools)).found.warnings == (
        (
            "NVIDIA GeForce RTX 4090, NVIDIA GeForce RTX 4090: found by cuda, but the llama.cpp that is installed here "
            "cannot use cuda"
        ),
        (
            "NVIDIA GeForce RTX 4070 Laptop GPU: found by vulkan, but the llama.cpp that is installed here cannot use "
            "vulkan"
        ),
    )


def test_a_llama_server_that_does_not_tell_gets_the_cpus(tools: Tools) -> None:
    chosen = choose("auto", machine(tools), lambda: served_by(["llama-server"], tools))
    assert [one.id for one in chosen.found.devices] == ["cpu:0"]
    assert chosen.found.warnings[0] == ("llama.cpp does not tell which GPUs it can use: llama-server is not installed")


def test_llama_server_is_not_asked_where_there_is_no_gpu(tools: Tools) -> None:
    backends = machine(Tools())
    backends["cuda"], backends["vulkan"] = Cuda(run=tools, environ={}), Vulkan(run=tools, environ={})
    chosen = choose("auto", backends, lambda: served_by(["llama-server"], tools))
    assert chosen.backend.name == "cpu"
    assert ("llama-server", "--list-devices") not in tools.ran
    assert chosen.found.warnings == ()


def test_a_backend_that_was_asked_for_and_finds_nothing_is_not_replaced(tools: Tools) -> None:
    """Who asks for GPUs does not mean to serve from the CPU, slowly and without a word."""
    chosen = choose("rocm", machine(tools), set)
    assert chosen.found == Found(
        warnings=("backend rocm has no devices: its tool is not installed here, or finds none",)
    )
