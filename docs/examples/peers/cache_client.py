"""A cache that one process keeps and others read: ``python cache_client.py keep``, and the same without ``keep``.

Where a block is, is asked for with a call; its bytes are read straight from the memory of the process that keeps them.
A block may be replaced at any time. What a reader knows of it then is refused, by its epoch or its checksum, so that it
never takes old bytes for new ones.
"""

import sys
import zlib

from rpc import Caller, serve

from computemesh.peer import PeerAgent, PeerError, start_peer_agent

SCOPE = "cache"
BLOCK = 64 * 1024
BLOCKS = 256


class Keeper:
    """Blocks by key, in one region of shared memory; the oldest make room for new ones."""

    def __init__(self, agent: PeerAgent) -> None:
        self.agent = agent
        self.memory = agent.allocate_memory_region("blocks", BLOCKS * BLOCK).view
        self.places: dict[str, dict[str, int]] = {}
        self.next = 0

    def put(self, key: str, block: bytes) -> None:
        """Keeps a block, in the place of the one that has been there longest."""
        number, self.next = self.next % BLOCKS, self.next + 1
        for old in [old for old, place in self.places.items() if place["offset"] == number * BLOCK]:
            del self.places[old]
        self.memory[number * BLOCK : number * BLOCK + len(block)] = block
        self.places[key] = {"offset": number * BLOCK, "length": len(block), "checksum": zlib.crc32(block)}

    def find(self, key: str) -> dict[str, int] | None:
        """Where a block is, for readers."""
        place = self.places.get(key)
        region = self.agent.get_mr_info("blocks")
        return {**place, "epoch": region["epoch"]} if place and region else None

    def clear(self) -> None:
        """Forgets all blocks. What readers still know of them belongs to an earlier epoch, and is refused."""
        self.places.clear()
        self.agent.register_memory_region("blocks", self.memory)

    def make(self, key: str, byte: int, length: int) -> None:
        """Stands for the model that computes a block."""
        self.put(key, bytes([byte]) * length)


class Cache:
    """Reads blocks of a keeper; remembers where they are."""

    def __init__(self, agent: PeerAgent, keeper: str) -> None:
        self.agent, self.keeper = agent, keeper
        self.ask = Caller(agent, keeper)
        self.memory = agent.allocate_memory_region("block", BLOCK).view
        self.places: dict[str, dict[str, int]] = {}

    def get(self, key: str) -> bytes | None:
        """The block of this key; None when there is none."""
        for _ in range(3):
            place = self.places.get(key) or self.ask.call("find", key)
            if place is None:
                return None
            try:
                wanted = ("block", "blocks", 0, place["offset"], place["length"])
                self.agent.read(self.keeper, wanted, epoch=place["epoch"], checksum=place["checksum"]).wait(timeout=10)
            except PeerError as error:
                if error.code not in ("stale_epoch", "bad_checksum"):
                    raise
                print(f"{key}: what was known of it is {error.code}")
                self.places.pop(key, None)
                continue
            self.places[key] = place
            return bytes(self.memory[: place["length"]])
        return None


def main() -> None:
    with start_peer_agent(scope=SCOPE) as agent:
        cache = Cache(agent, "keeper")
        cache.ask.call("make", "prompt-1", 1, BLOCK)
        for key in ("prompt-1", "prompt-2"):
            block = cache.get(key)
            print(f"{key}: {len(block)} bytes of {block[0]}" if block else f"{key}: not there")

        for _ in range(BLOCKS):  # Others take its place, and then it is made anew, elsewhere.
            cache.ask.call("make", "other", 9, BLOCK)
        cache.ask.call("make", "prompt-1", 2, BLOCK)
        print(f"prompt-1: bytes of {(cache.get('prompt-1') or b'?')[0]}")

        cache.ask.call("clear")
        print("prompt-1:", cache.get("prompt-1"))


if __name__ == "__main__":
    if sys.argv[1:] == ["keep"]:
        with start_peer_agent(alias="keeper", scope=SCOPE) as agent:
            keeper = Keeper(agent)
            print("keeping", flush=True)
            serve(agent, {"find": keeper.find, "clear": keeper.clear, "make": keeper.make})
    else:
        main()
