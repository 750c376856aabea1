"""A peer as a program of its own, which a test orders about and kills.

``agent_process.py SOCKET SCOPE ALIAS [DEVICE]``: offers `kv`, 64 KiB of shared memory, and `private`, as much
of its own, both full of a pattern. Each line on standard input is one order in JSON; each gets a line in answer.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from computemesh.peer import PeerAgent, start_peer_agent

SIZE = 64 * 1024
PATTERN = bytes(number * 7 % 251 for number in range(SIZE))


def obey(agent: PeerAgent, memory: dict[str, Any], order: dict[str, Any]) -> Any:
    match order:
        case {"do": "peek", "name": name, "offset": offset, "length": length}:
            return bytes(memory[name][offset : offset + length]).hex()
        case {"do": "connect", "peer": peer, **options}:
            return agent.connect_to(peer, **options).wait(30).conn_id
        case {"do": "imm", "peer": peer}:
            return agent.imm_recv(peer).imm_data()
        case {"do": "send", "peer": peer, "length": length}:
            return agent.send(peer, PATTERN[:length]).wait(30)
        case {"do": "recv", "peer": peer, "length": length}:
            into = bytearray(length)
            agent.recv(peer, into).wait(30)
            return into.hex()
        case {"do": "connections", "peer": peer}:
            return sorted(conn.transport for conn in agent.get_connections()[peer].values())
        case {"do": "register", "name": name}:
            memory[name] = bytearray(PATTERN)
            return agent.register_memory_region(name, memory[name])
        case {"do": "list"}:
            return agent.list_agents()
        case {"do": "stats"}:
            return agent.stats()
        case {"do": "shutdown"}:
            agent.shutdown()
            return None
        case _:
            raise ValueError(f"order: {order}")


def main() -> None:
    path, scope, alias, device = [*sys.argv[1:], None][:4]
    agent = start_peer_agent(path, alias=alias, scope=scope, device=device)
    shared = agent.allocate_memory_region("kv", SIZE)
    shared.view[:] = PATTERN
    memory: dict[str, Any] = {"kv": shared.view, "private": bytearray(PATTERN)}
    agent.register_memory_region("private", memory["private"])
    say("ready")
    for line in sys.stdin:
        try:
            say(obey(agent, memory, json.loads(line)))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


def say(what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
