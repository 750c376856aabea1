"""Goal: whatever fails, every accepted item ends in one recorded outcome, and soon.

Method: see :mod:`tests.simulation.mesh`. ``make sim SEED=123`` shows what happens in a seed, message by message.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEEDS = int(os.environ.get("SIM_SEEDS", "200"))


def simulate(*arguments: str, hash_seed: str = "random") -> subprocess.CompletedProcess[str]:
    """Runs in a process of its own: time and chance are replaced there."""
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_every_promise_holds_in_every_seed() -> None:
    """None of the invariants of `tests/simulation/checks.py` is broken, and everything ends once faults stop."""
    done = simulate("--seeds", str(SEEDS), "--stop")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_seed_is_the_same_story_each_time() -> None:
    """All that was sent, stored and lost, to the byte, and in the order in which it happened."""
    told = {hash_seed: simulate("--seeds", "8", "--jobs", "1", "--digests", hash_seed=hash_seed).stdout.splitlines()
            for hash_seed in ("1", "2")}  # fmt: skip
    stories = [sorted(line for line in lines if len(line.split()) == 2) for lines in told.values()]
    assert len(stories[0]) == 8
    assert stories[0] == stories[1]
