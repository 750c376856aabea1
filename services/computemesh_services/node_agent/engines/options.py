"""How engines are started and watched."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model, and how a llama.cpp server for it is started. None leaves the choice to the node or to llama.cpp."""

    name: str
    """What requests call it; ``model_id`` in a configuration file."""
    path: Path | None = None
    """Its GGUF file, the first one of a model in parts; None when it has to be fetched."""
    alias: str = ""
    """Another name that requests may use."""
    roles: tuple[str, ...] = ()
    """What it is there for, such as ``chat``."""
    embeddings: bool = False
    """It gives embeddings, not texts."""
    ctx_size: int | None = None
    """Longest prompt and answer of one request together, in tokens."""
    batch_size: int | None = None
    """Tokens of prompts taken at once."""
    ubatch_size: int | None = None
    """Tokens computed at once; at most :attr:`batch_size`."""
    threads: int | None = None
    """CPU threads while it generates."""
    threads_batch: int | None = None
    """CPU threads while it reads prompts; left out, :attr:`threads`."""
    gpu_layers: int | None = None
    """Layers kept in the memory of the GPU."""
    main_gpu: int | None = None
    """The first GPU, of several that the device shows."""
    tensor_split: tuple[float, ...] = ()
    """How much of the model each of several GPUs gets, in proportion."""
    flash_attn: Literal["on", "off", "auto"] | None = None
    server_args: Mapping[str, str | int | float | bool] = field(default_factory=dict[str, str | int | float | bool])
    """Further arguments by name, without dashes: ``{"mlock": true, "cache-type-k": "q8_0"}``. True is an argument
    without a value, false leaves it out."""


def default_threads() -> int:
    """Physical cores, but never all the logical CPUs of a machine that has several: the agent needs one."""
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or usable
    return max(1, min(physical, usable - 1))


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How servers are started and watched, whatever the model."""

    program: str = ""
    """The llama.cpp server, as a path or a name on PATH; left out, whatever is installed."""
    context_tokens: int = 4096
    """Of one request, prompt and answer together, where the model's own options name none."""
    parallel: int = 2
    """Requests that a server works on at a time."""
    threads: int = field(default_factory=default_threads)
    """Where neither the model's options nor the device name any."""
    startup_timeout_s: float = 30.0
    """How long a request waits for a server that starts."""
    start_max_s: float = 600.0
    """After so long without an answer a start is given up. Large models load for minutes."""
    probe_interval_s: float = 0.5
    """Between two looks at a server that starts, at most."""
    restarts_max: int = 5
    """Crashes in a row, each within :attr:`stable_s` of serving, before a server counts as failed."""
    restart_delay_s: float = 0.5
    """Before the first restart; doubles each time."""
    restart_delay_s_max: float = 30.0
    stable_s: float = 60.0
    stop_grace_s: float = 5.0
