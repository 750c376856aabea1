"""A million random transfers between processes that are killed: ``python -m tests.soak --transfers 1000000``."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from tests.soak.play import soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--transfers", type=int, default=1_000_000, metavar="N", help="how many; 1,000,000")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="how many processes are killed; 50")
    parser.add_argument("--seed", type=int, default=1, help="decides what is moved; 1")
    asked = parser.parse_args()
    began_s = time.monotonic()

    def say(line: str) -> None:
        sys.stderr.write(f"{time.monotonic() - began_s:7.1f} s  {line}\n")

    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        outcome = asyncio.run(soak(Path(folder), asked.transfers, asked.kills, seed=asked.seed, say=say))
    took_s = time.monotonic() - began_s
    print(f"{outcome.transfers:,} transfers of {outcome.bytes / 2**30:.1f} GiB, {outcome.kills} kills, {took_s:.0f} s")  # noqa: T201
    for name, counted in (("kinds", outcome.kinds), ("transports", outcome.transports), ("refused", outcome.refused)):
        print(f"{name}: " + ", ".join(f"{what} {count:,}" for what, count in sorted(counted.items())))  # noqa: T201
    for name, (before, after) in outcome.held.items():
        held = ", ".join(f"{what} {before[what]} → {after[what]}" for what in after)
        print(f"{name}: {held}")  # noqa: T201
    for wrong in (*outcome.wrong[:20], *outcome.leaks()):
        print(f"wrong: {wrong}")  # noqa: T201
    return 1 if outcome.wrong or outcome.leaks() else 0


if __name__ == "__main__":
    sys.exit(main())
