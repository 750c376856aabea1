"""Every process gets the part that each of the others has: ``python several_agents.py [HOW MANY]``."""

import multiprocessing
import sys
import time

from computemesh.peer import PeerAgent, start_peer_agent

PART = 1024 * 1024


def meet(agent: PeerAgent, others: list[str]) -> None:
    """Returns when all others are here, too: each tells every other one so."""
    told = [agent.recv(other, (bytearray(4), 0, 4)) for other in others]
    for other in others:
        agent.send(other, (bytearray(b"here"), 0, 4)).wait()
    for message in told:
        message.wait()


def worker(number: int, count: int) -> None:
    with start_peer_agent(alias=f"worker-{number}", scope="several-agents") as agent:
        # One piece of shared memory for all parts. This process fills in its own; the others read that.
        everything = agent.allocate_memory_region("parts", count * PART).view
        mine = number * PART
        everything[mine : mine + PART] = bytes([number]) * PART

        others = [f"worker-{other}" for other in range(count) if other != number]
        while not set(others) <= set(agent.list_agents()):
            time.sleep(0.05)
        for connection in [agent.connect_to(other) for other in others]:
            connection.wait()

        # Others find the memory as soon as it is there, so nobody reads before all have filled in their parts.
        meet(agent, others)
        # All reads are under way at once.
        places = {other: int(other.removeprefix("worker-")) * PART for other in others}
        for read in [agent.read(other, ("parts", place, place, PART)) for other, place in places.items()]:
            read.wait()
        print(f"{agent.alias} has {[everything[part * PART] for part in range(count)]}", flush=True)

        # Nobody leaves before all others have read.
        meet(agent, others)


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    start = multiprocessing.get_context("spawn").Process
    processes = [start(target=worker, args=(number, count)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
