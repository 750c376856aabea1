"""DLSlime's TCP endpoint: ``python -m tests.bench.programs.peers.on_dlslime target|initiator``.

The endpoint by itself: DLSlime's PeerAgent needs a NIC with RDMA for named regions.
"""

from __future__ import annotations

import sys

from dlslime import TcpEndpoint

from tests.bench.programs.transfer import REGION, address_of, drive, fill, private, serve, target


def lend() -> None:
    memory = private()
    fill(memory)
    lender = TcpEndpoint("127.0.0.1", 0)
    lender.register_memory_region("kv", address_of(memory), 0, REGION)
    serve({"endpoint": lender.endpoint_info(), "regions": lender.mr_info()})


def take() -> None:
    memory = private()
    taker = TcpEndpoint("127.0.0.1", 0)
    local = taker.register_memory_region("kv", address_of(memory), 0, REGION)
    taker.connect(target()["endpoint"])
    remote = taker.register_remote_memory_region("kv", target()["regions"]["kv"])

    def read(assignments: list[tuple[int, int, int, int, int]]) -> None:
        if status := taker.read(assignments).wait():
            raise RuntimeError(f"DLSlime says {status}")

    drive(memory, lambda offset, length: [(local, remote, offset, offset, length)], read)


if __name__ == "__main__":
    {"target": lend, "initiator": take}[sys.argv[1]]()
