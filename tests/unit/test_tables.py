"""Tables for people: sizes, what fits a terminal, and rows of nodes and GPUs."""

from __future__ import annotations

import io
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from computemesh.cli import gpu_views, node_views
from computemesh.cli.gpus import visible
from computemesh.cli.sizes import Size, share, size
from computemesh.cli.tables import GAP, Column, fit, grid
from computemesh.contracts.gpus import (
    GpuFit,
    GpuHolder,
    GpuNodeState,
    GpuReservation,
    GpuReservations,
    GpuShare,
    GpuState,
    GpuStates,
    GpuVerdict,
    RamState,
    WhyNot,
)
from computemesh.contracts.nodes import NodeList, NodesStats, NodeState, NodeView
from computemesh.contracts.resources import EngineFound, Inventory, ModelFound, Nic, RdmaPort
from computemesh.hardware import Cpu, Gpu, GpuLink, GpuProcess, LinkKind, Memory, Platform, Tier

NOW = 1_800_000_000.0

H100 = Gpu(
    name="NVIDIA H100 80GB HBM3", vram_total_mb=81559, vram_used_mb=20480, compute_capability="9.0", uuid="GPU-a"
)
RTX = Gpu(name="NVIDIA GeForce RTX 4090", vram_total_mb=24564)


def text(view: RenderableType, width: int = 400) -> str:
    """What a person sees, with no more columns than that."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def many(gpu: Gpu, count: int) -> list[Gpu]:
    fields = {name: getattr(gpu, name) for name in ("name", "vram_total_mb", "vram_used_mb", "compute_capability")}
    return [Gpu(index=number, uuid=f"GPU-{number}", **fields) for number in range(count)]


# --- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "mib"),
    [("24576", 24576), ("24GiB", 24576), ("24 gb", 24576), ("1.5T", 1572864), ("0.5g", 512), ("12M", 12), ("0", 0)],
)
def test_a_size_is_read_with_and_without_its_unit(written: str, mib: int) -> None:
    """Without one it is MiB, as in the contracts."""
    assert Size().convert(written, None, None) == mib


@pytest.mark.parametrize("written", ["", "x", "-1", "24KiB", "1e9", "nan", "inf", "9999999T", "1,5G"])
def test_what_is_no_size_is_refused(written: str) -> None:
    """With what to write instead, or why it cannot be."""
    with pytest.raises(click.BadParameter, match=r"is no size|more than any machine"):
        Size().convert(written, None, None)


def test_sizes_are_shown_in_the_unit_that_says_most() -> None:
    """One decimal where it means something."""
    assert [size(mib) for mib in (0, 512, 1024, 1536, 81559, 1024 * 1024 * 3)] == [
        "0 MiB", "512 MiB", "1 GiB", "1.5 GiB", "79.6 GiB", "3 TiB",
    ]  # fmt: skip
    assert share(0, 24564) == "0/24 GiB"
    assert share(12_595, 81559) == "12.3/79.6 GiB"
    assert share(1, 512) == "1/512 MiB"
    assert share(2280, 1_572_864) == "2.2 GiB/1.5 TiB"


# --- what fits ---------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5), st.none() | st.integers(1, 20)), min_size=1, max_size=8),
    st.integers(1, 120),
)
def test_columns_are_cut_then_left_out_from_the_highest_rank_until_the_rest_fits(
    given_: list[tuple[int, int, int | None]], width: int
) -> None:
    """Rank 0 stays whatever happens, nothing is left out that had room, and no room is left unused."""
    columns = [Column(title="x", rank=rank, least=least) for _, rank, least in given_]
    needs = [need for need, _, _ in given_]
    kept = fit(columns, needs, width)
    left = [number for number in range(len(columns)) if number not in kept]
    assert all(columns[number].rank for number in left)
    assert all(columns[a].rank <= columns[b].rank for a in kept for b in left)
    total = sum(kept.values()) + GAP * (len(kept) - 1)
    assert total <= width or not any(columns[number].rank for number in kept)
    least = {n: min(needs[n], columns[n].least or needs[n]) for n in range(len(columns))}
    assert all(least[n] <= wide <= needs[n] for n, wide in kept.items())
    if any(wide < needs[n] for n, wide in kept.items()):
        assert total >= width
    if left:
        first = min(left, key=lambda n: (columns[n].rank, n))
        assert sum(least[n] for n in (*kept, first)) + GAP * len(kept) > width


def test_a_table_is_never_wider_than_the_terminal_and_never_folds() -> None:
    """What is still too long is cut."""
    rows = [("x" * 30, "y" * 30), ("short", "z" * 90)]
    shown = text(grid([Column(title="a"), Column(title="b")], rows, 40), width=40)
    assert len(shown.splitlines()) == 3
    assert all(len(line) <= 40 for line in shown.splitlines())
    assert "…" in shown


def test_what_others_call_their_nodes_cannot_steer_the_terminal() -> None:
    """Control characters and markup are shown as they are."""
    node = NodeView(node_id="n1", hostname="h", drained=True, drain_reason="[red]\x1b[2J\nnew line")
    shown = text(node_views.table(NodeList(nodes=[node], count=1), width=400, lines=None, now=NOW))
    assert "\x1b" not in shown
    assert "[red]" in shown
    assert len(shown.splitlines()) == 3


# --- nodes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4"),
        ("NVIDIA L4", "L4"),
        ("AMD Instinct MI300X", "MI300X"),
        ("Apple M2 Ultra", "Apple M2 Ultra"),
        ("80GB", "GPU"),
        ("", "GPU"),
    ],
)
def test_a_gpu_is_called_by_its_model(name: str, called: str) -> None:
    """Who made it and how large it is stand elsewhere, or go without saying."""
    assert node_views.model(Gpu(name=name)) == called


def test_equal_gpus_stand_together_and_broken_ones_apart() -> None:
    """Slices are named by their profile."""
    broken = Gpu(index=8, name="NVIDIA H100 80GB HBM3", vram_total_mb=81559, error="GPU is lost")
    assert node_views.gpus(many(H100, 8)) == "8× H100 80 GiB"
    assert node_views.gpus([*many(H100, 7), broken]) == "7× H100 80 GiB, 1 broken"
    assert node_views.gpus([H100, RTX, RTX]) == "H100 80 GiB, 2× RTX 4090 24 GiB"
    slice_ = Gpu(name="NVIDIA A100-SXM4-80GB MIG 1g.10gb", vram_total_mb=9984, mig_profile="1g.10gb")
    assert node_views.gpus([slice_]) == "A100-SXM4 MIG 1g.10gb"
    assert node_views.gpus([]) == ""
    assert node_views.vram([*many(H100, 2), broken]) == (2 * 81559, 2 * 20480)


def a_node(**changes: Any) -> NodeView:
    fields: dict[str, Any] = {
        "node_id": "gpu-7",
        "tier": Tier.AI_FACTORY,
        "platform": Platform.CUDA,
        "hostname": "rack-3",
        "session": "s-1",
        "monitored": True,
        "cpu": Cpu(model="EPYC", cores=64, threads=128),
        "memory": Memory(total_mb=1024 * 1024, available_mb=900 * 1024),
        "gpus": many(H100, 8),
        "provider": "nvml",
        "slots": 4,
        "running": 3,
        "cpu_percent": 12.4,
        "memory_available_mb": 800 * 1024,
        "last_seen": NOW - 2,
        "registered_at": NOW - 7200,
        "work_types": ["inference"],
        "models": ["a", "b", "c", "d"],
    }
    return NodeView(**{**fields, **changes})


def test_a_row_says_what_a_node_has_and_how_busy_it_is() -> None:
    """What heartbeats said goes before what was announced."""
    shown = text(node_views.table(NodeList(nodes=[a_node()], count=1), width=400, lines=None, now=NOW))
    assert [" ".join(part.split()) for part in shown.splitlines()[1].split("  ") if part.strip()] == [
        "gpu-7", "online", "AI_FACTORY", "8× H100 80 GiB", "160/637 GiB", "128", "12 %", "800 GiB", "3/4", "2s",
        "plain", "inference", "a, b +2",
    ]  # fmt: skip
    assert shown.splitlines()[2] == "1 node: 1 online"


def test_a_row_of_a_node_that_told_nothing_claims_nothing() -> None:
    """A third party's announcement may be as small as its name."""
    shown = text(node_views.table(NodeList(nodes=[NodeView(node_id="n1")], count=1), width=400, lines=None, now=NOW))
    assert shown.splitlines()[1].split() == [
        "n1", "online", "(unmonitored)", "CPU_ONLY", "-", "-", "-", "-", "-", "?/1", "-", "plain", "any", "any",
    ]  # fmt: skip


def test_a_row_says_why_a_node_gets_no_work() -> None:
    """Drained by an operator and for which reason; leaving by itself; taking none at all."""
    assert node_views.state(a_node(drained=True, drain_reason="new power supply")).plain == (
        "online drained: new power supply"
    )
    assert node_views.state(a_node(drained=True)).plain == "online drained"
    assert node_views.state(a_node(accepting=False)).plain == "online leaving"
    assert node_views.state(a_node(state=NodeState.LOST)).plain == "lost"
    assert node_views.row(a_node(slots=0), NOW)[8] == "none"


def test_made_up_hardware_is_marked_and_explained() -> None:
    """Also of a node without a GPU."""
    found = NodeList(nodes=[a_node(provider="scripted"), a_node(node_id="n2", provider="scripted", gpus=[])], count=2)
    lines = text(node_views.table(found, width=400, lines=None, now=NOW)).splitlines()
    assert "8× H100 80 GiB *" in lines[1]
    assert " - * " in lines[2]
    assert lines[3].endswith("* made-up hardware")


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
def test_nodes_fit_every_terminal(width: int) -> None:
    """The name and the state stay."""
    found = NodeList(nodes=[a_node(), a_node(node_id="n2", state=NodeState.SUSPECT)], count=2)
    shown = text(node_views.table(found, width=width, lines=None, now=NOW), width=width)
    assert all(len(line) <= width for line in shown.splitlines())
    assert len(shown.splitlines()) == 4
    assert "gpu-7" in shown
    assert "suspect" in shown


def test_as_many_nodes_are_shown_as_there_are_lines_and_the_rest_is_counted() -> None:
    """A screen with 10,000 nodes still has its last line."""
    found = NodeList(nodes=[a_node(node_id=f"n{number}") for number in range(20)], count=10_000)
    shown = text(node_views.table(found, width=100, lines=10, now=NOW)).splitlines()
    assert len(shown) <= 10
    assert shown[-1].startswith("… 9,993 more; 10,000 nodes")


def test_links_are_written_as_nvidia_smi_topo_does() -> None:
    """From either side the same; what nobody told is a question mark."""
    links = [
        GpuLink(a=0, b=1, kind=LinkKind.NVLINK, lanes=18),
        GpuLink(a=1, b=2, kind=LinkKind.SYS),
        GpuLink(a=0, b=3, kind=LinkKind.XGMI, lanes=1),
    ]
    assert node_views.topology(many(RTX, 4), links) == [
        ["X", "NV18", "?", "XGMI1"],
        ["NV18", "X", "SYS", "?"],
        ["?", "SYS", "X", "?"],
        ["XGMI1", "?", "?", "X"],
    ]


def test_the_page_of_a_node_has_everything_that_is_known_of_it() -> None:
    """And what its detector warns of."""
    gpus = [
        Gpu(
            index=0, name="NVIDIA H100 80GB HBM3", vram_total_mb=81559, vram_used_mb=4096, utilization_percent=37,
            temperature_c=54, power_w=310, pci_bus_id="0000:1b:00.0", pcie_generation=5, pcie_lanes=16, numa_node=1,
            processes=[GpuProcess(pid=4242, name="python", memory_mb=4000, reservation_id="g-1")],
        ),
        Gpu(index=1, name="NVIDIA H100 80GB HBM3", vram_total_mb=81559, error="GPU is lost"),
    ]  # fmt: skip
    node = a_node(gpus=gpus, gpu_links=[GpuLink(a=0, b=1, kind=LinkKind.NVLINK, lanes=18)], labels={"zone": "a"},
                  provider="scripted", clock_skew_s=-4.2, loaded_models=["a"])  # fmt: skip
    inventory = Inventory(
        node_id="gpu-7", hostname="rack-3", tier=Tier.AI_FACTORY, platform=Platform.CUDA, cpu=Cpu(), memory=Memory(),
        provider="scripted", warnings=["GPU 1 cannot be read"], engines=[EngineFound(name="vllm", version="0.11")],
        nics=[Nic(name="eth0", up=True, speed_mbps=25_000), Nic(name="eth1")],
        rdma=[RdmaPort(device="mlx5_0", port=1, state="ACTIVE", rate_gbps=400, link_layer="InfiniBand")],
        models=[ModelFound(name="llama", form="gguf", size_mb=4096)],
    )  # fmt: skip
    shown = text(node_views.page(node, inventory, width=200, now=NOW), width=200)
    for words in ("made up", "rack-3", "(CUDA)", "64 cores", "12 % busy", "800 GiB free of 1 TiB", "4, 3 in use",
                  "in memory: a", "zone=a", "-4.2 s", "4/79.6 GiB", "37 %", "54 °C", "310 W", "5.0 x16", "0000:1b:00.0",
                  "eth0 25 Gbit/s, eth1 (down)", "mlx5_0/1 InfiniBand 400 Gbit/s (ACTIVE)", "vllm 0.11",
                  "llama (4 GiB)", "broken: GPU is lost", "4242", "g-1", "NV18",
                  "warning: GPU 1 cannot be read"):  # fmt: skip
        assert words in shown, f"{words}\n{shown}"
    narrow = text(node_views.page(node, inventory, width=40, now=NOW), width=40)
    assert "H100" in narrow


def test_the_mesh_in_numbers() -> None:
    """What there is none of is not listed."""
    found = NodesStats(
        nodes=12, states={"online": 11, "lost": 1}, tiers={"AI_FACTORY": 2, "CPU_ONLY": 10}, platforms={"CUDA": 2},
        drained=1, cpus=512, memory_total_mb=4 * 1024**2, memory_available_mb=2 * 1024**2, gpus=16,
        vram_total_mb=16 * 81559, vram_used_mb=81559, slots=24, running=7,
    )  # fmt: skip
    shown = text(node_views.stats(found))
    for words in ("12: 11 online, 1 lost; 1 drained", "2 AI_FACTORY, 10 CPU_ONLY", "2 TiB free of 4 TiB",
                  "16, VRAM used 0.1/1.2 TiB", "7 running in 24 slots"):  # fmt: skip
        assert words in shown, f"{words}\n{shown}"


# --- GPUs --------------------------------------------------------------------------------------------------------


def states() -> GpuStates:
    holder = GpuHolder(reservation_id="g-1", owner="alice", mb=24576, expires_at=NOW + 180)
    first = GpuState(
        index=0, name="NVIDIA H100 80GB HBM3", total_mb=81559, used_mb=30000, reserved_mb=24576, external_mb=2048,
        free_mb=54935, utilization_percent=40, reservations=[holder],
    )  # fmt: skip
    over = GpuState(index=1, name="NVIDIA H100 80GB HBM3", total_mb=81559, over_mb=3072, reservations=[holder] * 4)
    ram = RamState(total_mb=65536, available_mb=2048, slope_mb_per_s=-20, oom_in_s=102, confidence=0.9)
    away = GpuNodeState(
        node_id="b", state=NodeState.LOST, gpus=[GpuState(index=0, name="NVIDIA L4", total_mb=23034, free_mb=23034)]
    )
    here = GpuNodeState(node_id="a", state=NodeState.ONLINE, provider="scripted", gpus=[first, over], ram=ram)
    return GpuStates(nodes=[here, away], count=2, total_mb=186152, reserved_mb=49152, free_mb=54935)


def test_a_row_of_a_gpu_says_who_has_it_and_for_how_long() -> None:
    """Use without a reservation is named too, and memory that was promised twice stands out."""
    lines = text(gpu_views.table(states(), width=400, lines=None, now=NOW)).splitlines()
    assert [" ".join(part.split()) for part in lines[1].split("  ") if part.strip()] == [
        "a *", "0", "H100", "79.6 GiB", "29.3 GiB", "24 GiB", "53.6 GiB", "40 %", "free",
        "alice 24 GiB for 3m, others 2 GiB", "2 GiB of 64 GiB, none in 2m",
    ]  # fmt: skip
    assert "over by 3 GiB" in lines[2]
    assert "2 more" in lines[2]
    assert "lost" in lines[3]
    assert lines[4] == "53.6 GiB free, 48 GiB reserved, of 182 GiB; * made-up hardware"


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_gpus_fit_every_terminal(width: int) -> None:
    """Which GPU and what is free stay."""
    shown = text(gpu_views.table(states(), width=width, lines=3, now=NOW), width=width).splitlines()
    assert all(len(line) <= width for line in shown)
    assert shown[0].split()[:2] == ["node", "GPU"]


def test_why_memory_cannot_be_had_is_listed_gpu_by_gpu() -> None:
    """With the numbers, and whether waiting helps."""
    verdict = GpuVerdict(
        node_id="a", index=0, name="NVIDIA L4", code=WhyNot.RESERVED, reason="alice has 20 GiB of it",
        total_mb=23034, reserved_mb=20480, free_mb=2554, short_mb=5638,
    )  # fmt: skip
    no = GpuFit(
        can_fit=False, required_mb=8192, total_mb=8192, reason="no GPU has 8 GiB free", why_not=[verdict],
        counts={"reserved": 1, "too_small": 3},
    )  # fmt: skip
    shown = text(gpu_views.fit(no, width=200))
    for words in ("no: no GPU has 8 GiB free", "alice has 20 GiB of it", "5.5 GiB", "4 GPUs: 1 reserved, 3 too_small"):
        assert words in shown, f"{words}\n{shown}"
    yes = GpuFit(
        can_fit=True, required_mb=8192, total_mb=16384, node_id="a",
        gpus=[GpuShare(index=0, mb=8192), GpuShare(index=2, mb=8192)],
    )  # fmt: skip
    assert text(gpu_views.fit(yes, width=200)) == "yes: 8 GiB on GPUs 0, 2 of a"


def test_gpus_of_which_the_same_is_said_stand_in_one_row() -> None:
    """And those that were not asked for are left out, where others come closer."""
    small = [
        GpuVerdict(node_id="a", index=index, uuid=f"GPU-{index}", code=WhyNot.TOO_SMALL, reason="24 GiB in all")
        for index in (0, 1, 2, 5)
    ]
    other = GpuVerdict(node_id="b", index=0, code=WhyNot.FILTER, reason="only a is asked for")
    no = GpuFit(can_fit=False, required_mb=1, total_mb=1, reason="it cannot. a/0: small", why_not=[*small, other])
    lines = text(gpu_views.fit(no, width=200)).splitlines()
    assert lines[0] == "no: it cannot"
    assert [line.split()[:2] for line in lines[3:]] == [["a", "0-2,5"]]
    only = GpuFit(can_fit=False, required_mb=1, total_mb=1, reason="it cannot", why_not=[other])
    assert "only a is asked for" in text(gpu_views.fit(only, width=200))


def granted(**changes: Any) -> GpuReservation:
    fields: dict[str, Any] = {
        "reservation_id": "g-1", "node_id": "a", "owner": "alice", "required_mb": 8192, "total_mb": 16384,
        "gpus": [GpuShare(index=2, uuid="GPU-c", mb=8192), GpuShare(index=0, uuid="GPU-a", mb=8192)],
        "granted_at": NOW - 60, "expires_at": NOW + 240, "timeout_seconds": 300,
    }  # fmt: skip
    return GpuReservation(**{**fields, **changes})


def test_reservations_say_with_what_they_end() -> None:
    """The clock, the work, the node's life."""
    found = GpuReservations(reservations=[granted(work_id="w-1", session="s-1")], count=1)
    line = text(gpu_views.reservations(found, width=200, lines=None, now=NOW)).splitlines()[1]
    assert line.split()[:8] == ["g-1", "alice", "a", "2,0", "8", "GiB", "16", "GiB"]
    assert line.endswith("1m  4m  work w-1, this life of a") or "work w-1, this life of a" in line
    assert text(gpu_views.granted(granted(), NOW)) == "g-1  8 GiB of GPUs 2,0 on a, for 4m unless renewed"


@pytest.mark.parametrize(
    ("changes", "platform", "here", "told"),
    [
        ({}, Platform.CUDA, True, {"CUDA_VISIBLE_DEVICES": "GPU-c,GPU-a", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}),
        ({}, None, True, {"CUDA_VISIBLE_DEVICES": "GPU-c,GPU-a", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}),
        (
            {"gpus": [GpuShare(index=1, mb=1), GpuShare(index=0, mb=1)]}, Platform.CUDA, True,
            {"CUDA_VISIBLE_DEVICES": "1,0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
        ),
        ({}, Platform.ROCM, True, {"HIP_VISIBLE_DEVICES": "2,0"}),
        ({}, Platform.METAL, True, {}),
        ({}, Platform.CUDA, False, {}),
    ],
    ids=["cuda", "unknown", "no uuid", "rocm", "metal", "elsewhere"],
)  # fmt: skip
def test_a_command_is_told_its_gpus_in_the_words_of_its_platform(
    changes: dict[str, Any], platform: Platform | None, here: bool, told: dict[str, str]
) -> None:
    """And only when they are in this machine."""
    assert visible(granted(**changes), platform, here=here) == {"COMPUTEMESH_RESERVATION_ID": "g-1", **told}
