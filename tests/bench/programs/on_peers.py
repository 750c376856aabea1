"""Peers of the mesh: ``python -m tests.bench.programs.on_peers target|initiator shm|tcp SOCKET``.

As a program would use them: the region is found by its name for each transfer, and a future is waited for. With ``shm``
the target's memory is the library's own, which it can share; with ``tcp`` it is private, as all destinations are.
"""

from __future__ import annotations

import sys

from computemesh.peer import start_peer_agent
from tests.bench.programs.transfer import REGION, drive, fill, private, serve, target

SCOPE = "bench"


def lend(transport: str, socket: str) -> None:
    with start_peer_agent(socket, scope=SCOPE) as agent:
        if transport == "shm":
            fill(agent.allocate_memory_region("kv", REGION).view)
        else:
            memory = private()
            fill(memory)
            agent.register_memory_region("kv", memory, 0, REGION)
        serve({"alias": agent.alias})


def take(transport: str, socket: str) -> None:
    peer = target()["alias"]
    memory = private()
    with start_peer_agent(socket, scope=SCOPE) as agent:
        agent.register_memory_region("kv", memory, 0, REGION)
        connection = agent.connect_to(peer, transport=transport).wait()
        if connection.transport != transport:
            raise RuntimeError(f"it goes by {connection.transport}, not {transport}")

        def read(assignment: tuple[str, int, int, int]) -> None:
            agent.read(peer, assignment).wait()

        drive(memory, lambda offset, length: ("kv", offset, offset, length), read)


if __name__ == "__main__":
    {"target": lend, "initiator": take}[sys.argv[1]](*sys.argv[2:])
