"""Runs a platform's tool: an argument list, an untranslated environment, an end in any case."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

TOOL_S: Final = 10.0
"""How long a tool may take. Drivers that wake a sleeping GPU need seconds."""

REAP_S: Final = 1.0
"""How long the end of a tool that was killed is waited for. One that is stuck in its driver does not end."""

OUTPUT_MAX: Final = 8 * 1024 * 1024
"""Characters of output that are read; no tool prints as much about real hardware."""

REASON_MAX: Final = 300
"""Characters of a tool's complaint that are passed on."""

PINS: Final = (
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "ZE_AFFINITY_MASK",
    "ONEAPI_DEVICE_SELECTOR",
    "GGML_VK_VISIBLE_DEVICES",
)
"""Left out of a tool's environment: some tools count only what these show, others count all."""


class ToolError(Exception):
    """A tool says nothing that could be used; the message says why.

    Args:
        missing: it is not installed.
    """

    def __init__(self, reason: str, *, missing: bool = False) -> None:
        super().__init__(reason)
        self.missing = missing


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a tool printed."""

    tool: str
    out: str
    error: str = ""
    status: int = 0

    @property
    def complaint(self) -> str:
        """Its exit status and what it said last, in a line."""
        complaints, lines = (_lines(text) for text in (self.error, self.out))
        said = " ".join(complaints[-1:] or lines[:2])[:REASON_MAX]
        return f"{self.tool} ended with status {self.status}" + (f": {said}" if said else "")

    def checked(self) -> str:
        """Its output.

        Raises:
            ToolError: its exit status is not 0.
        """
        if self.status != 0:
            raise ToolError(self.complaint)
        return self.out


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


Run = Callable[[Sequence[str]], Said]


def run(
    command: Sequence[str],
    *,
    timeout_s: float = TOOL_S,
    environ: Mapping[str, str] | None = None,
) -> Said:
    """Runs *command* to its end, or ends it and all that it started. Blocks.

    Raises:
        ToolError: it is not installed, cannot be started, or takes longer than *timeout_s*.
    """
    values = os.environ if environ is None else environ
    name = os.path.basename(command[0])  # noqa: PTH119 - a command, not always a path.
    program = shutil.which(command[0], path=values.get("PATH"))
    if program is None:
        raise ToolError(f"{name} is not installed", missing=True)
    try:
        process = subprocess.Popen(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={key: value for key, value in values.items() if key not in PINS} | {"LC_ALL": "C"},
            start_new_session=True,
        )
    except OSError as error:
        raise ToolError(f"{name} cannot be started: {(error.strerror or str(error)).lower()}") from None
    try:
        out, complaint = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _abandon(process)
        raise ToolError(f"{name} did not end within {timeout_s:g} s") from None
    return Said(tool=name, out=out[:OUTPUT_MAX], error=complaint[:OUTPUT_MAX], status=process.returncode)


def _abandon(process: subprocess.Popen[str]) -> None:
    """Kills the tool and its children, and does not wait for what cannot be killed."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(REAP_S)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
