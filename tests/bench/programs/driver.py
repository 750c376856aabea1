"""The side of a flow that submits and waits, driven line by line through its standard input and output.

Standard library only: every peer's Python runs it. A line says ``each N`` (one item at a time) or ``all N``; the
answer is a line of JSON with seconds from submission to completion, one number for each item or one for all.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any


async def drive(each: Callable[[], Awaitable[Any]], many: Callable[[int], Awaitable[Any]]) -> None:
    """Serves commands until the input ends. Both functions return once what they submitted is known to be done."""
    # Libraries that print would speak between the answers: from here on their output goes to standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answers.write("ready\n")
    while line := await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
        kind, count = line.split()
        seconds: list[float] = []
        for _ in range(int(count) if kind == "each" else 1):
            began = time.perf_counter()
            await (each() if kind == "each" else many(int(count)))
            seconds.append(time.perf_counter() - began)
        answers.write(json.dumps(seconds) + "\n")
