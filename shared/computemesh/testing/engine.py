"""A fake engine as a process of its own, for one test."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from asyncio.subprocess import PIPE
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import urllib3

from computemesh.process import dies_with_parent, end
from computemesh.testing.fake_engine import install

_http = urllib3.PoolManager(retries=False, timeout=10.0)


class FakeEngine:
    """What a test sees of its engine."""

    def __init__(self, url: str, pid: int = 0) -> None:
        self.url = url
        self.pid = pid

    async def state(self) -> dict[str, Any]:
        """What it has and had; see :mod:`computemesh.testing.fake_engine`."""
        answer = await asyncio.to_thread(_http.request, "GET", f"{self.url}/fake/state")
        state: dict[str, Any] = msgspec.json.decode(answer.data)
        return state

    async def until(self, within_s: float = 30.0, **wanted: Any) -> dict[str, Any]:
        """Its state, once it is as wanted.

        Raises:
            AssertionError: it does not get there in time.
        """
        deadline_s = asyncio.get_running_loop().time() + within_s
        while True:
            state = await self.state()
            if all(state[name] == value for name, value in wanted.items()):
                return state
            assert asyncio.get_running_loop().time() < deadline_s, f"not within {within_s:g} s: {wanted}, but {state}"
            await asyncio.sleep(0.02)

    def kill(self, sig: signal.Signals = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, sig)


@asynccontextmanager
async def running_fake_engine(
    folder: Path, *, slots: int = 10_000, environment: Mapping[str, str] | None = None
) -> AsyncGenerator[FakeEngine]:
    """A fake engine that listens, ended with the block."""
    process = await asyncio.create_subprocess_exec(
        *(install(folder), "--port", "0", "-np", str(slots)),
        stderr=PIPE,
        start_new_session=True,
        preexec_fn=dies_with_parent(signal.SIGKILL),
        env={**os.environ, **(environment or {})},
    )
    try:
        assert process.stderr is not None
        line = (await process.stderr.readline()).decode()
        found = re.search(r"http://\S+", line)
        assert found is not None, f"the fake engine did not start: {line}"
        yield FakeEngine(found.group(), process.pid)
    finally:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)
        await end(process, grace_s=5.0)
