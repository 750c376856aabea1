"""What it costs to reach an engine through the mesh, and how long it takes to reach another: ``make bench-infer``.

``python -m tests.bench.infer [--only fake,llama,failover] [--quick] [--reps N] [--peers FOLDER] [--json FILE]``

The same requests go to each door of :mod:`tests.bench.doors` in turns, all before one engine: a fast stand-in, whose
tokens cost almost nothing, and llama.cpp with the embedded model. Medians over the turns; what a door adds to the
engine alone is taken within each turn. Every answer is checked: it is whole, has the tokens that were asked for, and
where texts follow from the request, the text that the engine gives directly.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Final

import msgspec
import psutil
import uvloop

from computemesh.nats_server.process import find_binary
from tests.bench import failover
from tests.bench.doors import DIRECT, EDGE, LITELLM, MESH, MODEL, Door, Load, doors_of, inference_mesh, litellm, load
from tests.bench.programs.openai_load import Plan

DEFAULT_PLACE: Final = Path("~/.cache/computemesh-infer-peers").expanduser()
PARTS: Final = ("computemesh", "nats-py", "aiohttp", "starlette", "uvicorn", "uvloop", "xllamacpp")
OURS: Final = (DIRECT, EDGE, MESH)


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A way to ask."""

    workers: int
    each: int = 1
    for_s: float = 0.0
    spread_s: float = 0.0
    tokens: int
    rate: float = 0.0
    """Tokens per second and stream that the fast engine makes; 0: as fast as they are taken."""
    per: str = "token"
    """What CPU time is told for: each ``token`` or each ``request``."""
    same_texts: bool = True
    """Whether the engine's text follows from the request alone."""

    def plan(self, door: Door, *, fake: bool) -> Plan:
        number = "{worker}.{number}"
        return Plan(
            url=door.url,
            model=MODEL,
            workers=self.workers,
            each=self.each,
            for_s=self.for_s,
            spread_s=self.spread_s,
            tokens=self.tokens,
            prompt=f"id={number} rate={self.rate:g}" if fake else f"{number}: a long story of a mill by the river.",
            # llama.cpp's own: answers that do not end early, and prompts that earlier ones do not make cheaper.
            more={} if fake else {"ignore_eos": True, "cache_prompt": False, "temperature": 0.0, "seed": 1},
        )


FAKE_CASES: Final = {
    "1 stream, answers of 1 token": Case(workers=1, each=300, tokens=1, per="request"),
    "100 streams, 5,000 tokens/s": Case(workers=100, each=4, spread_s=1.0, tokens=50, rate=50),
    "100 streams, 20,000 tokens/s": Case(workers=100, each=4, spread_s=1.0, tokens=200, rate=200),
    "100 streams, as fast as it goes": Case(workers=100, for_s=2.0, tokens=200),
    "1,000 streams, 5,000 tokens/s": Case(workers=1000, each=2, spread_s=4.0, tokens=20, rate=5),
}
LLAMA_CASES: Final = {
    "1 request": Case(workers=1, each=6, tokens=48),
    "4 requests": Case(workers=4, each=3, tokens=48, same_texts=False),
    "16 requests": Case(workers=16, each=1, tokens=48, same_texts=False),
}
"""Requests that share a batch may differ in the last bit, and so in their texts."""

LLAMA_SLOTS: Final = 4


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One door in one case."""

    ttft_p50_ms: float
    """From the request to its first token."""
    ttft_p99_ms: float
    gap_p50_ms: float
    """From one token of an answer to the next; 0 when they come together."""
    gap_p99_ms: float
    tokens_per_s: float
    """From the first request to the end of the last."""
    cpu_us: dict[str, float]
    """Of each process."""
    rss_mb: dict[str, float]
    requests: int
    failed: int
    wrong: int
    """Answers that are not what the engine gives directly."""
    reasons: list[str] = []
    """Why requests failed, a few of them."""
    added_ttft_p50_ms: float = 0.0
    """To the engine alone, in the same turn."""
    added_ttft_p99_ms: float = 0.0
    tokens_to_direct: float = 1.0
    """Tokens per second, as a part of the engine's alone in the same turn."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured, and with what."""

    repetitions: int
    peer_repetitions: int
    cores: int
    load_before: float
    """Processes that ran or wanted to, of all the machine, over the last minute."""
    load_after: float
    versions: dict[str, str]
    fake: dict[str, dict[str, Row]]
    llama: dict[str, dict[str, Row]]
    failover: dict[str, failover.Row]


# --- one measurement -------------------------------------------------------------------------------------------


def cpu_s(parts: Mapping[str, int]) -> dict[str, float]:
    """CPU seconds of each process so far, without its children."""
    return {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in parts.items()}


async def measure(case: Case, door: Door, asker: Load, texts: dict[tuple[int, int], str], *, fake: bool) -> Row:
    """Asks at one door. *texts* has the engine's own, by worker and number; those that it lacks are put there."""
    parts = {"client": asker.pid, **door.parts}
    plan = case.plan(door, fake=fake)
    # Connections are there before the clock starts.
    await asker.carry_out(msgspec.structs.replace(plan, each=1, for_s=0.0, spread_s=case.spread_s / 4, tokens=1))
    before = cpu_s(parts)
    result = await asker.carry_out(plan)
    after = cpu_s(parts)
    good = [asked for asked in result.asked if not asked.error]
    if not good:
        raise RuntimeError(f"no request was answered; the first: {result.asked[0].error}")
    wrong = sum(asked.tokens != case.tokens for asked in good)
    if case.same_texts:
        wrong += sum(texts.setdefault((asked.worker, asked.number), asked.digest) != asked.digest for asked in good)
    tokens = sum(asked.tokens for asked in good)
    waits = sorted((asked.first - asked.sent) * 1e3 for asked in good)
    gaps = result.gap_us or [0.0] * 4
    return Row(
        ttft_p50_ms=waits[len(waits) // 2],
        ttft_p99_ms=waits[int(len(waits) * 0.99)],
        gap_p50_ms=gaps[0] / 1e3,
        gap_p99_ms=gaps[2] / 1e3,
        tokens_per_s=tokens / (max(asked.ended for asked in good) - min(asked.sent for asked in good)),
        cpu_us={
            name: (after[name] - before[name]) * 1e6 / (tokens if case.per == "token" else len(good)) for name in parts
        },
        rss_mb={name: psutil.Process(pid).memory_info().rss / 2**20 for name, pid in parts.items()},
        requests=len(result.asked),
        failed=len(result.asked) - len(good),
        wrong=wrong,
        reasons=sorted({asked.error for asked in result.asked if asked.error})[:3],
    )


def beside(row: Row, direct: Row) -> Row:
    """The row of a door with what it adds to the engine alone."""
    return msgspec.structs.replace(
        row,
        added_ttft_p50_ms=row.ttft_p50_ms - direct.ttft_p50_ms,
        added_ttft_p99_ms=row.ttft_p99_ms - direct.ttft_p99_ms,
        tokens_to_direct=row.tokens_per_s / direct.tokens_per_s,
    )


def median(rows: Sequence[Row]) -> Row:
    """Each figure's median by itself; what went wrong is added up."""
    figures: dict[str, float] = {
        name: statistics.median(getattr(row, name) for row in rows)
        for name, kind in Row.__annotations__.items()
        if kind == "float"
    }
    return msgspec.structs.replace(
        rows[0],
        cpu_us={part: statistics.median(row.cpu_us[part] for row in rows) for part in rows[0].cpu_us},
        rss_mb={part: max(row.rss_mb[part] for row in rows) for part in rows[0].rss_mb},
        requests=sum(row.requests for row in rows),
        failed=sum(row.failed for row in rows),
        wrong=sum(row.wrong for row in rows),
        reasons=sorted({reason for row in rows for reason in row.reasons})[:3],
        **figures,
    )


async def compare(
    cases: Mapping[str, Case], *, fake: bool, reps: int, peer: Path | None, peer_reps: int = 1
) -> dict[str, dict[str, Row]]:
    """All cases at all doors, in turns; tells on standard error where it is.

    Args:
        peer: the Python that has LiteLLM.
        peer_reps: turns in which it takes part.
    """
    found: dict[str, dict[str, Row]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        async with AsyncExitStack() as stack:
            slots, pending = (1000, 1000) if fake else (LLAMA_SLOTS, 16)
            mesh = await stack.enter_async_context(inference_mesh(folder, fake=fake, slots=slots, pending=pending))
            doors = doors_of(mesh)
            if peer:
                doors[LITELLM] = await stack.enter_async_context(litellm(folder, doors[DIRECT], peer))
            asker = await stack.enter_async_context(load())
            for case_name, case in cases.items():
                turns: dict[str, list[Row]] = {door: [] for door in doors}
                texts: dict[tuple[int, int], str] = {}
                for rep in range(reps):
                    rows: dict[str, Row] = {}
                    # The engine alone comes first in the first turn, because its texts are the measure.
                    here = [door for door in doors if door in OURS or rep < peer_reps]
                    order = here[rep % len(here) :] + here[: rep % len(here)]
                    for door in order:
                        tell(f"{case_name}, {rep + 1}/{reps}, {door}")
                        rows[door] = await measure(case, doors[door], asker, texts, fake=fake)
                    for door, row in rows.items():
                        turns[door].append(beside(row, rows[DIRECT]))
                found[case_name] = {door: median(rows) for door, rows in turns.items()}
    tell("")
    return found


def tell(what: str) -> None:
    sys.stderr.write(f"\r{what:60}" if what else f"\r{'':60}\r")
    sys.stderr.flush()


# --- the report ------------------------------------------------------------------------------------------------


def tables(cases: Mapping[str, Mapping[str, Row]], *, per: Mapping[str, str]) -> list[str]:
    """For people, in Markdown."""
    text: list[str] = []
    for name, rows in cases.items():
        text += [
            "",
            f"**{name}**",
            "",
            f"| door | TTFT p50 | p99 | added p50 | p99 | gap p50 | p99 | tokens/s | ratio | bad | µs/{per[name]} |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
        ]
        for door, row in rows.items():
            parts = ", ".join(f"{part} {cpu:,.0f}" for part, cpu in row.cpu_us.items())
            added = f"{row.added_ttft_p50_ms:.2f} | {row.added_ttft_p99_ms:.2f}" if door != DIRECT else "| "
            bad = f"{row.failed + row.wrong} of {row.requests}" if row.failed + row.wrong else "0"
            text.append(
                f"| {door} | {row.ttft_p50_ms:.2f} | {row.ttft_p99_ms:.2f} | {added} | {row.gap_p50_ms:.2f} "
                f"| {row.gap_p99_ms:.2f} | {row.tokens_per_s:,.0f} | {row.tokens_to_direct:.3f} | {bad} | {parts} |"
            )
        memory = rows[MESH].rss_mb
        text += ["", "Memory: " + ", ".join(f"{part} {size:.0f} MB" for part, size in memory.items())]
        text += [f"{door}: {reason}" for door, row in rows.items() for reason in row.reasons]
    return text


def versions(peer: Path | None) -> dict[str, str]:
    """What took part."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), **{name: version(name) for name in PARTS}}
    said = subprocess.run([find_binary(), "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout
    found["nats-server"] = said.rsplit("v", 1)[-1].strip()
    if peer:
        ask = "import importlib.metadata as m; print(m.version('litellm'))"
        found["litellm"] = subprocess.run(
            [peer, "-c", ask], check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip()
    return found


async def bench(options: argparse.Namespace, peer: Path | None) -> Report:
    reps = 1 if options.quick else options.reps
    before = os.getloadavg()[0]
    wanted: set[str] = set(options.only.split(","))
    turns = {"reps": reps, "peer_reps": min(reps, options.peer_reps)}
    fake = await compare(FAKE_CASES, fake=True, peer=peer, **turns) if "fake" in wanted else {}
    llama = await compare(LLAMA_CASES, fake=False, peer=peer, **turns) if "llama" in wanted else {}
    over = await failover.bench(reps=2 if options.quick else 5, tell=tell) if "failover" in wanted else {}
    return Report(
        repetitions=reps,
        peer_repetitions=turns["peer_reps"],
        cores=os.cpu_count() or 0,
        load_before=before,
        load_after=os.getloadavg()[0],
        versions=versions(peer),
        fake=fake,
        llama=llama,
        failover=over,
    )


def show(report: Report) -> list[str]:
    text: list[str] = []
    if report.fake:
        text += [
            "",
            "## A fast engine",
            *tables(report.fake, per={name: case.per for name, case in FAKE_CASES.items()}),
        ]
    if report.llama:
        text += ["", "## llama.cpp", *tables(report.llama, per={name: case.per for name, case in LLAMA_CASES.items()})]
    if report.failover:
        text += ["", "## Failover", *failover.table(report.failover)]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return [
        *text,
        "",
        versions,
        f"{report.cores} cores; load {report.load_before:.1f} before, {report.load_after:.1f} after",
    ]


def faults(report: Report) -> list[str]:
    """What our own doors got wrong."""
    return [
        f"{case}, {door}: {row.failed} failed, {row.wrong} wrong"
        for cases in (report.fake, report.llama)
        for case, rows in cases.items()
        for door, row in rows.items()
        if door in OURS and row.failed + row.wrong
    ] + [f"{name}: {row.lost} requests lost" for name, row in report.failover.items() if row.lost]


def main() -> None:
    parser = argparse.ArgumentParser(description="What it costs to reach an engine through the mesh.")
    parser.add_argument("--only", default="fake,llama,failover", help="parts of it, separated by commas")
    parser.add_argument("--reps", type=int, default=3, help="turns; the medians count")
    parser.add_argument("--peer-reps", type=int, default=1, help="turns of LiteLLM, which take minutes each")
    parser.add_argument("--quick", action="store_true", help="one turn")
    parser.add_argument("--peers", type=Path, default=DEFAULT_PLACE, help=f"LiteLLM's environment; {DEFAULT_PLACE}")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    python: Path | None = options.peers.absolute() / "bin" / "python"
    assert python is not None
    if not (python.parent / "litellm").is_file():
        sys.stderr.write(
            f"LiteLLM left out: not in {options.peers}. To get it:\n"
            f"  python3 -m venv {options.peers} && {options.peers}/bin/pip install -r tests/bench/infer-peers.txt\n"
        )
        python = None
    report = uvloop.run(bench(options, python))
    print("\n".join(show(report)))  # noqa: T201
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    if bad := faults(report):
        sys.exit("\n".join(bad))


if __name__ == "__main__":
    main()
