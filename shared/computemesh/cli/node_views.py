"""Nodes as people see them: rows, summaries and pages. Pure: time is a parameter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from computemesh.cli.common import STATE_COLOURS, lasting
from computemesh.cli.sizes import share, size
from computemesh.cli.tables import Cell, Column, clean, folded, grid
from computemesh.contracts.nodes import NodeList, NodesStats, NodeView
from computemesh.contracts.resources import Inventory, Nic, RdmaPort
from computemesh.hardware import Gpu, GpuLink, LinkKind

MADE_UP: Final = "scripted"
"""The provider of hardware that is made up."""

MARK: Final = "*"

NAMES_MAX: Final = 2
"""Of work types and models, so many are named in a row."""

COLUMNS: Final = (
    Column(title="node"),
    Column(title="state", least=24),
    Column(title="tier", rank=1),
    Column(title="GPUs", rank=2, least=20),
    Column(title="VRAM used", right=True, rank=3),
    Column(title="CPUs", right=True, rank=8),
    Column(title="CPU", right=True, rank=5),
    Column(title="RAM free", right=True, rank=5),
    Column(title="work", right=True, rank=4),
    Column(title="seen", right=True, rank=6),
    Column(title="delivery", rank=11),
    Column(title="takes", rank=9, least=16),
    Column(title="models", rank=10, least=24),
)


# --- a table of nodes --------------------------------------------------------------------------------------------


def table(found: NodeList, *, width: int, lines: int | None, now: float) -> RenderableType:
    """Nodes in a row each, with a line about all of them.

    Args:
        lines: how many lines there is room for; None when that does not matter.
    """
    shown = found.nodes if lines is None else found.nodes[: max(1, lines - 3)]
    parts: list[RenderableType] = [grid(COLUMNS, [row(node, now) for node in shown], width)]
    notes = [note for note in (folded(found.count, len(shown)), _counts(found), _made_up(shown)) if note]
    return Group(*parts, Text("; ".join(notes), "dim", no_wrap=True, overflow="ellipsis"))


def _counts(found: NodeList) -> str:
    """How many there are in which state, when all of them are here."""
    if len(found.nodes) < found.count:
        return f"{found.count:,} nodes"
    states = Counter(str(node.state) for node in found.nodes)
    drained = sum(node.drained for node in found.nodes)
    words = [f"{count:,} {state}" for state, count in states.items()] + ([f"{drained:,} drained"] if drained else [])
    return f"{found.count:,} node{'' if found.count == 1 else 's'}: {', '.join(words)}"


def _made_up(nodes: Sequence[NodeView]) -> str:
    return f"{MARK} made-up hardware" if any(node.provider == MADE_UP for node in nodes) else ""


def row(node: NodeView, now: float) -> tuple[Cell, ...]:
    """A node in the columns of :data:`COLUMNS`."""
    made_up = f" {MARK}" if node.provider == MADE_UP else ""
    total, used = vram(node.gpus)
    available = node.memory_available_mb
    if available is None and node.memory is not None:
        available = node.memory.available_mb
    running = "?" if node.running is None else str(node.running)
    return (
        node.node_id,
        state(node),
        node.tier.value,
        (gpus(node.gpus) or "-") + made_up,
        share(used, total) if total else "-",
        str(node.cpu.threads) if node.cpu and node.cpu.threads else "-",
        f"{node.cpu_percent:.0f} %" if node.cpu_percent is not None else "-",
        size(available) if available is not None and node.memory and node.memory.total_mb else "-",
        f"{running}/{node.slots}" if node.slots else "none",
        lasting(now - node.last_seen) if node.last_seen else "-",
        node.delivery,
        names(node.work_types),
        names(node.models),
    )


def state(node: NodeView) -> Text:
    """How it is with a node, and why."""
    said = Text("left", "dim") if node.left else Text(str(node.state), STATE_COLOURS.get(node.state, "default"))
    if not node.monitored:
        said.append(" (unmonitored)")
    if node.drained:
        reason = f": {node.drain_reason}" if node.drain_reason else ""
        said.append(" drained", "magenta").append(reason)
    elif node.accepting is False:
        said.append(" leaving", "magenta")
    return said


def names(given: Sequence[str]) -> str:
    """A few names of many; none means any."""
    more = f" +{len(given) - NAMES_MAX}" if len(given) > NAMES_MAX else ""
    return ", ".join(given[:NAMES_MAX]) + more if given else "any"


# --- GPUs --------------------------------------------------------------------------------------------------------

_MAKERS: Final = re.compile(
    r"^(?:NVIDIA|AMD|Advanced Micro Devices|Intel|GeForce|Radeon|Instinct|Tesla)\b[ ,]*", re.IGNORECASE
)
_SIZES: Final = re.compile(r"[ -]*\b(?:\d+\s?Gi?B|HBM\d\w*)\b", re.IGNORECASE)


def model(gpu: Gpu) -> str:
    """What a GPU is called, without its maker and its size: ``H100``, ``RTX 4090``."""
    name, before = gpu.name, ""
    while name != before:
        name, before = _MAKERS.sub("", name), name
    whole = _SIZES.sub("", name.partition(" MIG ")[0]).strip() or "GPU"
    return f"{whole} MIG {gpu.mig_profile}" if gpu.mig_profile else whole


def gpus(given: Sequence[Gpu]) -> str:
    """GPUs of one machine, equal ones together: ``8x H100 80 GiB, 1 broken``, with a multiplication sign."""
    kinds = Counter(
        model(gpu) if gpu.mig_profile else f"{model(gpu)} {gpu.vram_total_mb / 1024:.0f} GiB"
        for gpu in given
        if not gpu.error
    )
    broken = sum(bool(gpu.error) for gpu in given)
    said = [f"{count}× {kind}" if count > 1 else kind for kind, count in kinds.items()]
    return ", ".join([*said, f"{broken} broken"] if broken else said)


def vram(given: Sequence[Gpu]) -> tuple[int, int]:
    """MiB of VRAM there is, and in use."""
    working = [gpu for gpu in given if not gpu.error]
    return sum(gpu.vram_total_mb for gpu in working), sum(gpu.vram_used_mb for gpu in working)


_SHORT: Final = {LinkKind.NVLINK: "NV"}


def topology(given: Sequence[Gpu], links: Sequence[GpuLink]) -> list[list[str]]:
    """How each GPU reaches each other one, as ``nvidia-smi topo`` writes it: ``NV18``, ``PIX``, ``SYS``; ``?`` where
    nobody told. One row a GPU, in the order of *given*."""
    by_pair = {(link.a, link.b): link for link in links}

    def one(a: int, b: int) -> str:
        if a == b:
            return "X"
        link = by_pair.get((min(a, b), max(a, b)))
        if link is None:
            return "?"
        return f"{_SHORT.get(link.kind, link.kind.value)}{link.lanes or ''}"

    return [[one(a.index, b.index) for b in given] for a in given]


# --- one node ----------------------------------------------------------------------------------------------------


def page(node: NodeView, inventory: Inventory | None, *, width: int, now: float) -> RenderableType:
    """All about one node.

    Args:
        inventory: what its detector says; None when that does not answer.
    """
    head = Text(node.node_id, "bold").append("  ").append(state(node)).append(f"  {node.tier}", "default")
    parts: list[RenderableType] = [head, *_facts(node, inventory, now)]
    if node.gpus:
        parts += ["", _gpu_table(node.gpus, width)]
    if processes := _process_rows(node.gpus):
        parts += ["", grid(_PROCESS_COLUMNS, processes, width)]
    if len(node.gpus) > 1 and node.gpu_links:
        titles = [f"GPU{gpu.index}" for gpu in node.gpus]
        matrix = topology(node.gpus, node.gpu_links)
        columns = [Column(title=title) for title in ("", *titles)]
        parts += ["", grid(columns, [(t, *cells) for t, cells in zip(titles, matrix, strict=True)], width)]
    if inventory is not None and inventory.warnings:
        parts += ["", *(Text(f"warning: {warning}", "yellow") for warning in inventory.warnings)]
    return Group(*(clean(part) if isinstance(part, Text) else part for part in parts))


def _facts(node: NodeView, inventory: Inventory | None, now: float) -> Iterator[Text]:
    for name, value in _named(node, inventory, now):
        if value:
            yield Text(f"{name:10} ", "dim").append(value, "default")


def _named(node: NodeView, inventory: Inventory | None, now: float) -> Iterator[tuple[str, str]]:
    cpu, memory = node.cpu, node.memory
    if node.provider == MADE_UP:
        yield "hardware", "made up: its GPUs come from a file"
    yield "host", " ".join(part for part in (node.hostname, node.base_url, f"({node.platform})") if part != "(None)")
    if cpu is not None:
        busy = f", {node.cpu_percent:.0f} % busy" if node.cpu_percent is not None else ""
        yield "CPU", f"{cpu.model or 'unknown'}, {cpu.cores or '?'} cores, {cpu.threads or '?'} threads{busy}"
    if memory is not None and memory.total_mb:
        free = node.memory_available_mb if node.memory_available_mb is not None else memory.available_mb
        swap = f", swap {share(memory.swap_total_mb - memory.swap_free_mb, memory.swap_total_mb)}"
        yield "RAM", f"{size(free)} free of {size(memory.total_mb)}{swap if memory.swap_total_mb else ''}"
    if inventory is not None:
        yield "disks", ", ".join(f"{d.mount} {size(d.free_mb)} free of {size(d.total_mb)}" for d in inventory.disks)
        yield "network", ", ".join(_nic(nic) for nic in inventory.nics)
        yield "RDMA", ", ".join(_rdma(port) for port in inventory.rdma)
        yield "engines", ", ".join(f"{engine.name} {engine.version}".strip() for engine in inventory.engines)
    running = "" if node.running is None else f", {node.running} in use"
    yield "slots", f"{node.slots}{running}" if node.slots else "none: it takes no work"
    yield "work", f"{', '.join(node.work_types) or 'any'} ({node.delivery} delivery)"
    loaded = f"; in memory: {', '.join(node.loaded_models)}" if node.loaded_models else ""
    yield "models", f"{', '.join(node.models) or 'any'}{loaded}"
    if inventory is not None:
        yield "on disk", ", ".join(f"{found.name} ({size(found.size_mb)})" for found in inventory.models)
    yield "labels", ", ".join(f"{name}={value}" for name, value in node.labels.items())
    yield "roles", ", ".join(node.roles)
    seen = f"seen {lasting(now - node.last_seen)} ago, " if node.last_seen else ""
    since = lasting(now - node.registered_at)
    yield "life", f"{seen}registered {since} ago, epoch {node.epoch}, session {node.session or 'not told'}"
    if node.clock_skew_s is not None and abs(node.clock_skew_s) >= 1:
        yield "clock", f"{node.clock_skew_s:+.1f} s off the registry's"
    yield "version", node.version


def _nic(nic: Nic) -> str:
    speed = f" {nic.speed_mbps / 1000:g} Gbit/s" if nic.speed_mbps else ""
    return f"{nic.name}{speed}{'' if nic.up else ' (down)'}"


def _rdma(port: RdmaPort) -> str:
    speed = f" {port.rate_gbps:g} Gbit/s" if port.rate_gbps else ""
    over = f" {port.link_layer}" if port.link_layer else ""
    return f"{port.device}/{port.port}{over}{speed} ({port.state or 'state not told'})"


def _gpu_table(given: Sequence[Gpu], width: int) -> RenderableType:
    columns = (
        Column(title="GPU", right=True),
        Column(title="name", least=24),
        Column(title="VRAM used", right=True),
        Column(title="util", right=True, rank=1),
        Column(title="temp", right=True, rank=4),
        Column(title="power", right=True, rank=5),
        Column(title="CC", rank=3),
        Column(title="PCI", rank=6),
        Column(title="PCIe", rank=8),
        Column(title="NUMA", right=True, rank=7),
        Column(title="driver", rank=9),
        Column(title="uuid", rank=10),
    )
    rows = [
        (
            str(gpu.index),
            Text(gpu.name or "GPU").append(f" broken: {gpu.error}", "red") if gpu.error else gpu.name or "GPU",
            share(gpu.vram_used_mb, gpu.vram_total_mb) if gpu.vram_total_mb else "-",
            _measured(gpu.utilization_percent, " %"),
            _measured(gpu.temperature_c, " °C"),
            _measured(gpu.power_w, " W"),
            gpu.compute_capability or gpu.architecture or "-",
            gpu.pci_bus_id or "-",
            f"{gpu.pcie_generation}.0 x{gpu.pcie_lanes}" if gpu.pcie_generation else "-",
            "-" if gpu.numa_node is None else str(gpu.numa_node),
            gpu.driver or "-",
            gpu.uuid or "-",
        )
        for gpu in given
    ]
    return grid(columns, rows, width)


def _measured(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.0f}{unit}"


_PROCESS_COLUMNS: Final = (
    Column(title="GPU", right=True),
    Column(title="pid", right=True),
    Column(title="memory", right=True),
    Column(title="reservation", rank=2),
    Column(title="process", rank=1),
)


def _process_rows(given: Sequence[Gpu]) -> list[tuple[Cell, ...]]:
    return [
        (
            str(gpu.index),
            str(process.pid),
            "-" if process.memory_mb is None else size(process.memory_mb),
            process.reservation_id or "-",
            process.name or "-",
        )
        for gpu in given
        for process in gpu.processes or ()
    ]


# --- the mesh in numbers -----------------------------------------------------------------------------------------


def stats(found: NodesStats) -> RenderableType:
    """The mesh in numbers."""

    def some(counts: dict[str, int]) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "none"

    used = share(found.vram_used_mb, found.vram_total_mb)
    lines = [
        ("nodes", f"{found.nodes:,}: {some(found.states)}" + (f"; {found.drained:,} drained" if found.drained else "")),
        ("tiers", some(found.tiers)),
        ("platforms", some(found.platforms)),
        ("CPUs", f"{found.cpus:,}"),
        ("RAM", f"{size(found.memory_available_mb)} free of {size(found.memory_total_mb)}"),
        ("GPUs", f"{found.gpus:,}" + (f", VRAM used {used}" if found.gpus else "")),
        ("work", f"{found.running:,} running in {found.slots:,} slots"),
    ]
    return Group(*(Text(f"{name:10} ", "dim").append(value, "default") for name, value in lines))
