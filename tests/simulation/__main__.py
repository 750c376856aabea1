"""Runs seeds of the simulation: ``python -m tests.simulation --seeds 10000``, and shows one: ``--seed 123``.

Seeds are shared out to worker processes, some to each, since what was killed in a simulation is never torn down.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Final

import msgspec
import structlog

from tests.simulation.mesh import Outcome, Simulation

SHARE: Final = 25
"""Seeds of one worker process."""

SHOWN_MAX: Final = 20

ENVIRONMENT: Final = {"PYTHONHASHSEED": "0", "COMPUTEMESH_STRICT": "true"}
"""Of every process that simulates: the order of a set of strings is part of the story."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, metavar="N", help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="where they begin")
    parser.add_argument("--seed", type=int, help="run this one, and print all that happens")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="worker processes at a time")
    parser.add_argument("--stop", action="store_true", help="stop at the first seed that fails")
    parser.add_argument("--digests", action="store_true", help="print the digest of each seed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        return _work(range(asked.first, asked.first + asked.seeds))
    if asked.seed is not None:
        return _show(asked.seed)
    return _run(asked)


def _run(asked: argparse.Namespace) -> int:
    began_s = time.monotonic()
    failed: list[Outcome] = []
    done = messages = 0
    virtual_s = 0.0
    for outcome in _outcomes(asked):
        done += 1
        messages += outcome.messages
        virtual_s += outcome.virtual_s
        if asked.digests:
            _say(f"{outcome.seed} {outcome.digest}")
        if outcome.wrong:
            failed.append(outcome)
            _say(f"seed {outcome.seed}: {outcome.wrong[:400]}")
            if asked.stop:
                break
        if done % 100 == 0:
            _say(f"{done} seeds, {len(failed)} failed, {time.monotonic() - began_s:.0f} s")
    took_s = time.monotonic() - began_s
    _say(f"{done} seeds: {virtual_s / 3600:.1f} hours of a mesh, {messages} messages, in {took_s:.0f} s")
    if failed:
        seeds = sorted(outcome.seed for outcome in failed)
        _say(f"{len(failed)} failed: {' '.join(map(str, seeds[:SHOWN_MAX]))}\nmake sim SEED={seeds[0]} shows one.")
    os._exit(1 if failed else 0)  # Not waiting for workers that go on.


def _outcomes(asked: argparse.Namespace) -> Iterator[Outcome]:
    seeds = range(asked.first, asked.first + asked.seeds)
    shares = [seeds[at : at + SHARE] for at in range(0, len(seeds), SHARE)]
    with ThreadPoolExecutor(asked.jobs) as pool:
        for share in as_completed([pool.submit(_worker, share) for share in shares]):
            yield from share.result()


def _worker(share: range) -> list[Outcome]:
    command = [
        sys.executable,
        "-m",
        "tests.simulation",
        "--worker",
        "--first",
        str(share[0]),
        "--seeds",
        str(len(share)),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, **ENVIRONMENT}, check=False)
    found = [msgspec.json.decode(line, type=Outcome) for line in done.stdout.splitlines()]
    if len(found) < len(share):
        missing = share[len(found)]
        found.append(Outcome(missing, wrong=f"the simulation itself ended with status {done.returncode}"))
    return found


def _work(seeds: range) -> int:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    for seed in seeds:
        _say(msgspec.json.encode(Simulation(seed).run()).decode())
    os._exit(0)  # Nothing of a dead process may run, not even at the end.


def _show(seed: int) -> int:
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.environ |= ENVIRONMENT
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", "--seed", str(seed)])
    simulation = Simulation(seed, say=_say)
    structlog.configure(
        processors=[structlog.processors.add_log_level, simulation.log_line], cache_logger_on_first_use=False,
        logger_factory=lambda *_: _Silent(),
    )  # fmt: skip
    outcome = simulation.run()
    _say(f"\nseed {seed}: {outcome.wrong or 'all is well'}")
    _say(f"digest {outcome.digest}; {outcome.virtual_s:.1f} s, {outcome.messages} messages, {outcome.items} items")
    _say("\n  ".join(["faults:", *outcome.faults]))
    os._exit(1 if outcome.wrong else 0)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _nothing(*_: object, **__: object) -> None:
    """The line was said already."""


class _Silent:
    def __getattr__(self, _: str) -> Any:
        return _nothing


if __name__ == "__main__":
    sys.exit(main())
