"""Mooncake's transfer engine over TCP: ``python -m tests.bench.programs.peers.on_mooncake target|initiator``."""

from __future__ import annotations

import os
import sys

os.environ["MC_LOG_LEVEL"] = "ERROR"

from mooncake.engine import TransferEngine

from tests.bench.programs.transfer import REGION, address_of, drive, fill, private, serve, target


def engine() -> TransferEngine:
    made = TransferEngine()
    if status := made.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        raise RuntimeError(f"Mooncake says {status}")
    return made


def lend() -> None:
    memory = private()
    fill(memory)
    lender = engine()
    lender.register_memory(address_of(memory), REGION)
    serve({"name": f"127.0.0.1:{lender.get_rpc_port()}", "address": address_of(memory)})


def take() -> None:
    memory = private()
    taker = engine()
    local, remote, name = address_of(memory), target()["address"], target()["name"]
    taker.register_memory(local, REGION)

    def read(places: tuple[int, int, int]) -> None:
        if status := taker.transfer_sync_read(name, *places):
            raise RuntimeError(f"Mooncake says {status}")

    drive(memory, lambda offset, length: (local + offset, remote + offset, length), read)


if __name__ == "__main__":
    {"target": lend, "initiator": take}[sys.argv[1]]()
