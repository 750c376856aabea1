"""llama.cpp's server from the ``xllamacpp`` wheel, with the options of ``llama-server`` that we use.

Runs until SIGTERM: ``python -m computemesh_services.node_agent.engines.xllamacpp_server -m FILE --port PORT``.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from typing import Any, Final

_WARNINGS: Final = 2
"""llama.cpp's log level without a dozen lines a request, which would fill the disk."""

_FLASH_ATTN: Final = {
    "on": "LLAMA_FLASH_ATTN_TYPE_ENABLED",
    "off": "LLAMA_FLASH_ATTN_TYPE_DISABLED",
    "auto": "LLAMA_FLASH_ATTN_TYPE_AUTO",
}


def main() -> None:
    if "--list-devices" in sys.argv[1:]:
        _list_devices()
        return
    options = _parser().parse_args()
    # Both end this process at once, also while it loads a model. The server's own way to end waits for
    # requests in hand; the agent has waited for those it cares about.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    server = _serve(options)
    sys.stderr.write(f"listening on {server.listening_address}\n")
    while True:
        signal.pause()


def _list_devices() -> None:
    """Prints the GPUs as llama-server does."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    sys.stdout.write("Available devices:\n")
    for device in xllamacpp.get_device_info():
        if not device["type"].name.endswith("_CPU"):
            total, free = (device[key] // 2**20 for key in ("memory_total", "memory_free"))
            sys.stdout.write(f"  {device['name']}: {device['description']} ({total} MiB, {free} MiB free)\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xllamacpp_server", description=__doc__, allow_abbrev=False)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--alias", required=True)
    parser.add_argument("-c", "--ctx-size", type=int, default=0)
    parser.add_argument("-np", "--parallel", type=int, default=1)
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-tb", "--threads-batch", type=int)
    parser.add_argument("-b", "--batch-size", type=int, default=2048)
    parser.add_argument("-ub", "--ubatch-size", type=int, default=512)
    parser.add_argument("-ngl", "--n-gpu-layers", type=int, default=-1)
    parser.add_argument("-mg", "--main-gpu", type=int, default=0)
    parser.add_argument("-ts", "--tensor-split", type=_parts, default=[], metavar="N0,N1,...")
    parser.add_argument("-fa", "--flash-attn", choices=("on", "off", "auto"), default="auto")
    parser.add_argument("--embeddings", "--embedding", action="store_true")
    parser.add_argument("--pooling", choices=("none", "mean", "cls", "last", "rank"))
    parser.add_argument("--cache-ram", type=int, help="MiB of RAM for prompts that were computed before")
    parser.add_argument("--metrics", action="store_true")
    return parser


def _parts(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _serve(options: argparse.Namespace) -> Any:
    """Loads the model and serves it on the package's own threads. Exits with a reason when it cannot."""
    # The package has no types; imported here, --help does without it.
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.model_alias = {options.alias}
    params.hostnames = [options.host]
    params.port = options.port
    params.n_ctx = options.ctx_size
    params.n_parallel = options.parallel
    params.n_batch = options.batch_size
    params.n_ubatch = options.ubatch_size
    params.n_gpu_layers = options.n_gpu_layers
    params.main_gpu = options.main_gpu
    if options.tensor_split:
        params.tensor_split = [*options.tensor_split, *params.tensor_split[len(options.tensor_split) :]]
    params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, _FLASH_ATTN[options.flash_attn])
    params.cpuparams.n_threads = options.threads
    params.cpuparams_batch.n_threads = options.threads_batch or options.threads
    params.embedding = options.embeddings
    if options.pooling:
        params.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{options.pooling.upper()}")
    if options.cache_ram is not None:
        params.cache_ram_mib = options.cache_ram
    params.endpoint_metrics = options.metrics
    params.endpoint_slots = False
    params.ui = False
    params.cors_origins = f"http://{options.host}:{options.port}"
    params.verbosity = _WARNINGS
    try:
        return xllamacpp.Server(params)
    except Exception as error:
        sys.exit(f"xllamacpp cannot serve {options.model}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
