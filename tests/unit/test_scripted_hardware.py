"""Goal: hardware that is made up is played as it is written, a file that cannot be is refused with the field named,
and it is never there unless it was asked for by name.

Method: the example files of the documentation, and files of the test's own that are edited while they are played.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from msgspec.structs import replace

from computemesh.config import ConfigError, load
from computemesh.findings import Level
from computemesh.hardware import Cpu, Gpu, LinkKind, Platform, Tier, tier_of
from computemesh_services.resource_detector import check
from computemesh_services.resource_detector.config import GpuConfig
from computemesh_services.resource_detector.probes import GpuReading, NoGpus, scripted
from computemesh_services.resource_detector.probes.choice import Auto, choose
from computemesh_services.resource_detector.probes.scripted import ScriptedProvider, parse

EXAMPLES: Final = Path(__file__).parents[2] / "docs/examples/hardware"

EXPECTED: Final = {
    "h100x8.json": (Platform.CUDA, Tier.AI_FACTORY, 8, 28),
    "rtx4090x2.json": (Platform.CUDA, Tier.GPU_PEER, 2, 1),
    "rtx4070.json": (Platform.CUDA, Tier.GPU_INFRA, 1, 0),
    "mi300x.json": (Platform.ROCM, Tier.AI_FACTORY, 8, 28),
    "a100-mig.json": (Platform.CUDA, Tier.AI_FACTORY, 3, 0),
    "broken.json": (Platform.CUDA, Tier.AI_FACTORY, 4, 0),
}


def written(folder: Path, **hardware: Any) -> Path:
    path = folder / "hardware.json"
    path.write_text(json.dumps({"platform": "CUDA", **hardware}))
    return path


def test_every_example_is_expected_here() -> None:
    """One that is added is tested."""
    assert {path.name for path in EXAMPLES.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_is_played_as_it_is_written(name: str) -> None:
    """Each GPU has a uuid of its own, and everything says that it is scripted."""
    provider = ScriptedProvider(EXAMPLES / name, seed="n1")
    provider.read()
    reading = provider.read()
    assert (reading.platform, tier_of(reading.gpus), len(reading.gpus), len(reading.links)) == EXPECTED[name]
    assert reading.provider == provider.name == "scripted"
    assert [gpu.index for gpu in reading.gpus] == list(range(len(reading.gpus)))
    assert len({gpu.uuid for gpu in reading.gpus}) == len(reading.gpus)


@pytest.mark.parametrize("name", sorted({*EXPECTED} - {"broken.json"}))
def test_what_the_providers_read_is_what_the_file_says(name: str) -> None:
    """Through NVML or not, no fact is lost on the way, but for what slices do not tell."""
    told = json.loads((EXAMPLES / name).read_text())
    cards = [{k: v for k, v in gpu.items() if k != "count"} for gpu in told["gpus"] for _ in range(gpu.get("count", 1))]
    found = ScriptedProvider(EXAMPLES / name).read().gpus
    for card, gpu in zip(cards, found, strict=True):
        suffix = f" MIG {card['mig_profile']}" if "mig_profile" in card else ""
        wanted = msgspec.convert({**card, "name": card["name"] + suffix}, Gpu)
        assert {key: getattr(gpu, key) for key in card} == {key: getattr(wanted, key) for key in card}


def test_what_is_broken_in_the_example_is_broken() -> None:
    """One GPU from the start, one later; one fact; and the driver in the first reading."""
    provider = ScriptedProvider(EXAMPLES / "broken.json")
    first, second, third = (provider.read() for _ in range(3))
    assert (first.gpus, first.warnings) == ([], ["the NVIDIA driver does not answer: Driver Not Loaded"])
    assert [gpu.error for gpu in second.gpus] == ["", "memory: GPU is lost", "", ""]
    assert [gpu.error for gpu in third.gpus] == ["", "memory: GPU is lost", "handle: GPU is lost", ""]
    assert third.gpus[2].uuid == second.gpus[2].uuid != ""
    assert third.gpus[3].temperature_c is None


def test_the_same_file_gives_other_uuids_on_another_node() -> None:
    """And the same ones each time on the same node."""
    data = (EXAMPLES / "h100x8.json").read_bytes()
    assert parse(data, seed="n1") == parse(data, seed="n1")
    mine, theirs = ({gpu.uuid for gpu in parse(data, seed=node).gpus} for node in ("n1", "n2"))
    assert not mine & theirs


def test_hardware_that_is_edited_changes_while_it_is_played(tmp_path: Path) -> None:
    """And what cannot be used changes nothing but the warnings."""
    provider = ScriptedProvider(written(tmp_path, gpus=[{"name": "a", "count": 2}]))
    assert len(provider.read().gpus) == 2
    written(tmp_path, gpus=[{"name": "a", "count": 3}])
    assert len(provider.read().gpus) == 3
    path = written(tmp_path, gpus=[{"vram_total_mb": -1}])
    wrong = provider.read()
    assert len(wrong.gpus) == 3
    assert wrong.warnings == [
        f"{path}: gpus[0].vram_total_mb: Expected 'int' >= 0; what was read before it still counts"
    ]
    path.unlink()
    assert provider.read().warnings == [f"{path}: no such file or directory; what was read before it still counts"]
    written(tmp_path, gpus=[])
    assert (provider.read().gpus, provider.read().platform, provider.read().warnings) == ([], Platform.CPU, [])


def test_readings_are_counted_from_the_last_edit(tmp_path: Path) -> None:
    """A fault that is written into a running file begins when it says."""
    fault = {"call": "nvmlInit", "error": "DRIVER_NOT_LOADED", "from_read": 2, "until_read": 3}
    later = {**fault, "call": "nvmlDeviceGetCount"}
    provider = ScriptedProvider(written(tmp_path, gpus=[{"name": "a"}]))
    provider.read()
    written(tmp_path, gpus=[{"name": "a"}], faults=[later])
    assert [len(provider.read().gpus) for _ in range(4)] == [1, 0, 1, 1]


def test_a_call_that_hangs_takes_as_long_as_it_says(tmp_path: Path) -> None:
    """And is answered after all."""
    provider = ScriptedProvider(
        written(tmp_path, gpus=[{"name": "a"}], faults=[{"call": "nvmlDeviceGetName", "hang_s": 0.2, "until_read": 2}])
    )
    before = time.monotonic()
    assert provider.read().gpus[0].name == "a"
    assert time.monotonic() - before >= 0.2


def test_what_the_file_says_of_the_machine_takes_the_place_of_the_real_one(tmp_path: Path) -> None:
    """Sizes in GiB as well."""
    path = written(tmp_path, cpu={"cores": 64}, memory={"total_gb": 512}, nics=[{"name": "ib0", "speed_mbps": 400000}])
    machine = ScriptedProvider(path).read().machine
    assert machine.cpu == Cpu(cores=64)
    assert machine.memory is not None
    assert machine.memory.total_mb == 512 * 1024
    assert [nic.name for nic in machine.nics or ()] == ["ib0"]


def test_another_spelling_of_vram_is_understood(tmp_path: Path) -> None:
    """As in announcements."""
    assert ScriptedProvider(written(tmp_path, gpus=[{"vram_gb": 24}])).read().gpus[0].vram_total_mb == 24_576


WRONG: Final = {
    '{"gpus": []}': "platform: Object missing required field 'platform'",
    '{"platform": "CUDA", "gpu": []}': "gpu: Object contains unknown field 'gpu'",
    '{"platform": "CUDA", "gpus": [{"vram": 1}]}': "gpus[0].vram: Object contains unknown field 'vram'",
    '{"platform": "CUDA", "gpus": [{"vram_total_mb": -1}]}': "gpus[0].vram_total_mb: Expected 'int' >= 0",
    '{"platform": "CUDA", "gpus": [{"count": 300}]}': "gpus[0].count: Expected 'int' <= 256",
    '{"platform": "CUDA", "gpus": [{"count": 200}, {"count": 57}]}': "gpus: 257, more than 256",
    '{"platform": "CUDA", "gpus": [{"uuid": "a"}, {"uuid": "a"}]}': "gpus: a uuid belongs to one GPU",
    '{"platform": "CUDA", "gpus": [{"uuid": "a", "count": 2}]}': "gpus: a uuid belongs to one GPU",
    '{"platform": "CUDA", "gpus": [{"compute_capability": "gfx942"}]}': "gpus[0].compute_capability: 'gfx942'",
    '{"platform": "CPU", "gpus": [{}]}': "platform: CPU has no gpus",
    '{"platform": "CUDA", "gpus": [{}], "links": [{"a": 0, "b": 1, "kind": "PIX"}]}': "links[0]: a must be below b",
    '{"platform": "CUDA", "gpus": [{"count": 2}], "links": [{"a": 1, "b": 0, "kind": "PIX"}]}': "links[0]: a must be",
    '{"platform": "CUDA", "gpus": [{"count": 2}], "links": [{"a": 0, "b": 1, "kind": "XGMI"}]}': "links[0].kind: XGMI",
    '{"platform": "CUDA", "nvlink": "some"}': "nvlink: 'some' is none of all",
    '{"platform": "CUDA", "xgmi": "all"}': "xgmi: goes with the platform ROCM",
    '{"platform": "ROCM", "nvlink": "all"}': "nvlink: goes with the platform CUDA",
    '{"platform": "CUDA", "faults": [{"call": "nvmlFoo", "error": "UNKNOWN"}]}': "faults[0].call: 'nvmlFoo' is none of",
    '{"platform": "CUDA", "faults": [{"call": "nvmlInit", "error": "BAD"}]}': "faults[0].error: 'BAD' is none of",
    '{"platform": "CUDA", "faults": [{"call": "nvmlInit"}]}': "faults[0]: says neither error nor hang_s",
    '{"platform": "CUDA", "faults": [{"call": "nvmlInit", "error": "UNKNOWN", "gpu": 0}]}': "faults[0].gpu: 0, but",
    '{"platform": "ROCM", "faults": [{"call": "nvmlInit", "error": "UNKNOWN"}]}': "faults[0]: only calls to NVML",
    '{"platform": "CUDA", "faults": [{"call": "nvmlInit", "hang_s": -1}]}': "faults[0].hang_s: Expected 'float' >= 0",
    "[]": "Expected 'object', got 'array'",
    "{": "Input data was truncated",
    "": "Input data was truncated",
    "\xff": "",
    "[" * 100_000: "",
}


@pytest.mark.parametrize(("data", "reason"), WRONG.items(), ids=[reason[:40] for reason in WRONG.values()])
def test_a_file_that_cannot_be_used_is_refused_with_the_field_named(data: str, reason: str, tmp_path: Path) -> None:
    """Before the service starts, not with a traceback while it runs."""
    path = tmp_path / "hardware.json"
    path.write_bytes(data.encode("latin-1"))
    with pytest.raises(ConfigError) as refusal:
        choose("scripted", hardware=str(path))
    assert str(refusal.value).startswith(f"COMPUTEMESH_SCRIPTED_HARDWARE: {path}: {reason}")


# --- the choice -------------------------------------------------------------------------------------------------


def test_scripted_hardware_must_be_asked_for_by_name_and_with_a_file(tmp_path: Path) -> None:
    """A file alone makes nothing up, and neither does a name alone."""
    path = written(tmp_path, gpus=[{}])
    assert len(choose("scripted", hardware=str(path)).read().gpus) == 1
    with pytest.raises(ConfigError, match="must be asked for with COMPUTEMESH_GPU_PROVIDER=scripted"):
        choose("auto", hardware=str(path))
    with pytest.raises(ConfigError, match="COMPUTEMESH_SCRIPTED_HARDWARE names no file"):
        choose("scripted")
    with pytest.raises(ConfigError, match="no such file"):
        choose("scripted", hardware=str(tmp_path / "missing.json"))


def test_an_unknown_provider_is_a_wrong_setting() -> None:
    """The message names those that there are."""
    with pytest.raises(ConfigError, match="COMPUTEMESH_GPU_PROVIDER='cuda'"):
        load(GpuConfig, {"COMPUTEMESH_GPU_PROVIDER": "cuda"})


@pytest.mark.parametrize("name", ["nvml", "rocm", "metal"])
def test_a_provider_that_was_asked_for_and_does_not_work_says_why_in_every_reading(name: Any) -> None:
    """The service runs without GPUs, as when a driver goes away."""
    provider = choose(name)
    assert provider.name == name
    reading = provider.read()
    if not reading.gpus:
        assert (reading.platform, len(reading.warnings)) == (Platform.CPU, 1)
        assert provider.read() == reading


def test_none_reads_nothing_and_warns_of_nothing() -> None:
    """For machines whose GPUs are not for the mesh."""
    provider = choose("none")
    assert isinstance(provider, NoGpus)
    assert provider.read() == GpuReading(provider="none")


class Told:
    """A provider that reads what the test says."""

    def __init__(self, name: str, gpus: int = 0, warnings: list[str] | None = None) -> None:
        self.name = name
        self.gpus = gpus
        self.warnings = warnings or []

    def read(self, *, links: bool = True) -> GpuReading:
        platform = Platform.CUDA if self.gpus else Platform.CPU
        gpus = [Gpu(index=place, name=self.name) for place in range(self.gpus)]
        return GpuReading(provider=self.name, platform=platform, gpus=gpus, warnings=list(self.warnings))


def test_auto_takes_the_first_that_finds_a_gpu_and_names_the_others() -> None:
    """Two kinds in one machine are rare, and somebody must choose."""
    reading = Auto([Told("nvml"), Told("rocm", 2), Told("metal", 1)]).read()
    assert (reading.provider, len(reading.gpus)) == ("rocm", 2)
    assert len(reading.warnings) == 1
    assert "COMPUTEMESH_GPU_PROVIDER=metal" in reading.warnings[0]


def test_auto_finds_nothing_without_a_word_where_there_is_nothing() -> None:
    """But passes on what went wrong."""
    assert Auto([Told("nvml"), Told("rocm")]).read() == GpuReading(provider="none")
    broken = Auto([Told("nvml", warnings=["the driver does not answer"]), Told("rocm")]).read()
    assert (broken.provider, broken.warnings) == ("none", ["the driver does not answer"])


def test_auto_finds_a_driver_that_comes_later_and_stays_with_it() -> None:
    """A node whose driver is renewed does not turn into one of another kind meanwhile."""
    nvidia, amd = Told("nvml"), Told("rocm")
    auto = Auto([nvidia, amd])
    assert auto.read().gpus == []
    nvidia.gpus = 1
    assert auto.read().provider == "nvml"
    nvidia.gpus, amd.gpus = 0, 1
    gone = auto.read()
    assert (gone.provider, gone.gpus) == ("nvml", [])
    nvidia.gpus, amd.gpus = 1, 0
    assert auto.read().warnings == []


def test_the_doctor_says_what_is_scripted_and_what_is_wrong_with_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the service itself would."""
    monkeypatch.setenv("COMPUTEMESH_GPU_PROVIDER", "scripted")
    monkeypatch.setenv("COMPUTEMESH_SCRIPTED_HARDWARE", str(EXAMPLES / "rtx4070.json"))
    (finding,) = check.check()
    assert (finding.level, finding.text) == (Level.OK, "scripted: NVIDIA GeForce RTX 4070 12 GiB")
    monkeypatch.setenv("COMPUTEMESH_SCRIPTED_HARDWARE", str(EXAMPLES / "h100x8.json"))
    assert check.check()[0].text == "scripted: 8 × NVIDIA H100 80GB HBM3 80 GiB"
    monkeypatch.setenv("COMPUTEMESH_GPU_PROVIDER", "cuda")
    (finding,) = check.check()
    assert finding.level is Level.PROBLEM
    assert "COMPUTEMESH_GPU_PROVIDER='cuda'" in finding.text
    assert finding.todo


def test_slices_of_two_gpus_are_two_cards() -> None:
    """Slices that follow each other and have one parent are one card."""
    half = {"vram_total_mb": 20_000, "mig_profile": "3g.20gb"}
    gpus = [{**half, "mig_parent": parent, "count": 2} for parent in ("GPU-a", "GPU-b")]
    hardware = parse(json.dumps({"platform": "CUDA", "gpus": gpus}).encode())
    fake = scripted.ScriptedNvml(replace(hardware, faults=[]))
    fake.nvmlInit()
    assert fake.nvmlDeviceGetCount() == 2


def test_links_of_scripted_gpus_have_the_kinds_that_are_written() -> None:
    """NVLink bridges and PCIe switches in one machine."""
    told = [
        {"a": 0, "b": 1, "kind": "NVLINK", "lanes": 4},
        {"a": 0, "b": 2, "kind": "SYS"},
        {"a": 1, "b": 2, "kind": "NODE"},
    ]
    data = json.dumps({"platform": "CUDA", "gpus": [{"count": 3}], "links": told}).encode()
    assert [link.kind for link in parse(data).links] == [LinkKind.NVLINK, LinkKind.SYS, LinkKind.NODE]
