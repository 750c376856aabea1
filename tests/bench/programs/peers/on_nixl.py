"""NIXL with its UCX backend: ``python -m tests.bench.programs.peers.on_nixl target|initiator default|tcp|shared``.

A request for each transfer is made before the clock starts, with ``initialize_xfer``; what is timed is to post it and
to ask until it is done, which is the fastest that NIXL has. ``shared`` is UCX's shared memory, which NIXL takes only
with UCX's error handling switched off: nothing would then tell that the other side died.
"""

from __future__ import annotations

import base64
import os
import sys
from typing import Any

from tests.bench.programs.transfer import REGION, address_of, drive, fill, private, serve, target

os.environ["NIXL_LOG_LEVEL"] = "WARN"
ENVIRONMENT = {"default": {}, "tcp": {"UCX_TLS": "tcp"}, "shared": {"UCX_TLS": "posix,sysv,cma,self"}}


def agent(name: str, kind: str) -> Any:
    os.environ.update(ENVIRONMENT[kind])  # which UCX reads when it is loaded
    from nixl._api import nixl_agent, nixl_agent_config

    made = nixl_agent(name, nixl_agent_config(backends=[]))
    made.create_backend("UCX", {"ucx_error_handling_mode": "none"} if kind == "shared" else {})
    return made


def lend(kind: str) -> None:
    memory = private()
    fill(memory)
    lender = agent("target", kind)
    lender.register_memory([(address_of(memory), REGION, 0, "")], "DRAM")
    serve({"address": address_of(memory), "metadata": base64.b64encode(lender.get_agent_metadata()).decode()})


def take(kind: str) -> None:
    memory = private()
    local, remote = address_of(memory), target()["address"]
    taker = agent("initiator", kind)
    taker.register_memory([(local, REGION, 0, "")], "DRAM")
    name = taker.add_remote_agent(base64.b64decode(target()["metadata"]))
    name = name.decode() if isinstance(name, bytes) else name

    def prepare(offset: int, length: int) -> Any:
        into = taker.get_xfer_descs([(local + offset, length, 0)], "DRAM")
        source = taker.get_xfer_descs([(remote + offset, length, 0)], "DRAM")
        return taker.initialize_xfer("READ", into, source, name)

    def read(request: Any) -> None:
        state = taker.transfer(request)
        while state == "PROC":
            state = taker.check_xfer_state(request)
        if state != "DONE":
            raise RuntimeError(f"NIXL says {state}")

    drive(memory, prepare, read)


if __name__ == "__main__":
    {"target": lend, "initiator": take}[sys.argv[1]](sys.argv[2])
