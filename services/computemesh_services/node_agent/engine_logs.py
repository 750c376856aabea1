"""What the engines print: read while they run, and after they have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

from computemesh.contracts.base import Refused
from computemesh.contracts.infer import EngineLog, EngineLogGet
from computemesh_services.node_agent import logs

TAIL_BYTES: Final = 64 * 1024
"""Of a log that is read from no certain place, so much of its end is told."""

LOOK_S: Final = 0.1
"""How often it is seen whether an engine has printed more, while somebody waits for it."""


class EngineLogs:
    """Answers ``infer.LOG``.

    Args:
        path_of: where the engines of a device print; None when there is no such device.
    """

    def __init__(self, node_id: str, path_of: Callable[[str], Path | None]) -> None:
        self._node_id = node_id
        self._path_of = path_of

    async def on_log(self, asked: EngineLogGet) -> EngineLog | Refused:
        """What stands in the log from where it is asked for on, as soon as there is something."""
        path = self._path_of(asked.device)
        if path is None:
            return _none(f"node {self._node_id} has no device '{asked.device}'")
        loop = asyncio.get_running_loop()
        until_s = loop.time() + asked.wait_s
        while True:
            found = logs.tail(path, TAIL_BYTES) if asked.offset is None else asked.offset
            part = logs.read(path, found, asked.limit, ended=False)
            if part is not None and not part.text and (size := logs.size(path)) < found:
                found, part = 0, logs.read(path, 0, min(asked.limit, max(1, size)), ended=False)  # It was begun anew.
            if (part is not None and part.text) or loop.time() >= until_s:
                break
            await asyncio.sleep(LOOK_S)
        if part is None:
            return _none(f"the engine of '{asked.device}' has printed nothing yet")
        return EngineLog(
            node_id=self._node_id, device=asked.device, text=part.text, offset=found, next=found + part.used
        )


def _none(reason: str) -> Refused:
    return Refused(code="not_found", reason=reason, field="device", status=404)
