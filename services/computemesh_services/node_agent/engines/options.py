"""How engines are started and watched."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import psutil

_KEYS: Final = {
    **dict.fromkeys(("model", "m"), "path"),
    **dict.fromkeys(("model-url", "mu", "docker-repo", "dr"), "source"),
    **dict.fromkeys(("hf-repo", "hf", "hfr", "hf-file", "hff"), "source"),
    **dict.fromkeys(("alias", "a"), "alias"),
    **dict.fromkeys(("ctx-size", "c"), "ctx_size"),
    **dict.fromkeys(("threads", "t"), "threads"),
    **dict.fromkeys(("threads-batch", "tb"), "threads_batch"),
    **dict.fromkeys(("batch-size", "b"), "batch_size"),
    **dict.fromkeys(("ubatch-size", "ub"), "ubatch_size"),
    **dict.fromkeys(("gpu-layers", "n-gpu-layers", "ngl"), "gpu_layers"),
    **dict.fromkeys(("main-gpu", "mg"), "main_gpu"),
    **dict.fromkeys(("tensor-split", "ts"), "tensor_split"),
    **dict.fromkeys(("flash-attn", "fa"), "flash_attn"),
    **dict.fromkeys(("embeddings", "embedding"), "embeddings"),
}
"""Arguments of llama-server for which a model has a key, by all their names."""

_AGENTS: Final = frozenset(
    {
        # Where it listens, and what the agent asks it for.
        *("host", "port", "reuse-port", "api-prefix", "parallel", "np", "metrics"),
        # Who may ask it.
        *("api-key", "api-key-file", "ssl-key-file", "ssl-cert-file"),
        *("cors-origins", "cors-methods", "cors-headers", "cors-credentials"),
        # Files, programs and other machines, for whoever asks it.
        *("path", "media-path", "slot-save-path", "slots", "props", "agent", "ag", "tools", "tools-runtime"),
        *("ui-mcp-proxy", "webui-mcp-proxy", "mcp-servers-config", "mcp-servers-json"),
        *("ui-config-file", "webui-config-file"),
        # Other models than the one it is there for.
        *("models-dir", "models-preset", "models-max", "models-autoload", "hf-token", "hft"),
        # What it prints is kept, and shown, by the agent.
        *("log-file", "log-prompts-dir"),
    }
)
"""Arguments that are the agent's alone: they lead around it, or open what it keeps shut."""

_PRESET: Final = re.compile(r"(gpt-oss|embd|fim|vision|tts)-.*-(default|spec)")
"""Arguments that stand for a model, and some for a port."""

_ARGUMENT: Final = re.compile(r"-[^0-9.]")


def why_refused(name: str, value: object) -> str:
    """Why an argument may not be one of :attr:`ModelOptions.server_args`, or nothing.

    Args:
        name: short or long, with or without dashes in front; llama-server takes ``_`` for ``-``.
    """
    plain = name.lstrip("-_").replace("_", "-").partition("=")[0]
    if plain in _KEYS:
        return f"server_args do not take {plain}; a model has the key {_KEYS[plain]} for it"
    if plain in _AGENTS or _PRESET.fullmatch(plain):
        return f"server_args do not take {plain}, which is up to the agent"
    if isinstance(value, str) and _ARGUMENT.match(value):
        return f"{value!r} would be an argument of its own"
    return ""


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
    hung_s: float = 30.0
    """A server that serves, and has not answered for so long, hangs: it is killed and started again; 0 = never."""
    restarts_max: int = 5
    """Crashes in a row, each within :attr:`stable_s` of serving, before a server counts as failed."""
    restart_delay_s: float = 0.5
    """Before the first restart; doubles each time."""
    restart_delay_s_max: float = 30.0
    stable_s: float = 60.0
    stop_grace_s: float = 5.0
