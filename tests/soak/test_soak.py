"""The soak of `make soak-peers`, for a few thousand transfers."""

from __future__ import annotations

from pathlib import Path

from tests.soak.pattern import SIZE, Patterns, Tag, tag_in
from tests.soak.play import soak

TRANSFERS = 4000


async def test_random_transfers_between_processes_that_are_killed_bring_no_wrong_byte_and_leave_nothing_behind(
    tmp_path: Path,
) -> None:
    """Reads, writes, messages and numbers, by shared memory and TCP, of regions that are registered again meanwhile."""
    said: list[str] = []
    outcome = await soak(tmp_path, TRANSFERS, kills=3, seed=7, say=said.append)
    assert outcome.wrong == []
    assert outcome.leaks() == []
    assert outcome.transfers >= TRANSFERS
    assert outcome.kills == 3
    assert {"read", "write", "write_with_imm", "imm_recv", "send", "recv"} <= set(outcome.kinds)
    assert {"shm", "tcp"} <= set(outcome.transports)


def test_every_byte_of_a_region_that_is_not_as_it_ought_to_be_is_noticed() -> None:
    """One bit, another place, another generation, another owner; at the edges and in the midst."""
    patterns = Patterns()
    tag = Tag(owner=3, region=1, life=2, generation=5)
    right = patterns.whole(tag)
    for offset, length in ((0, 1), (0, 15), (1, 3000), (SIZE - 1, 1), (SIZE // 2 + 3, 70_000)):
        data = bytearray(right[offset : offset + length])
        assert patterns.matches(memoryview(data), tag, offset)
        for place in {0, length // 2, length - 1}:
            data[place] ^= 1
            assert not patterns.matches(memoryview(data), tag, offset)
            data[place] ^= 1
    data = bytearray(right[800:900])
    assert tag_in(memoryview(data), 800) == tag
    assert tag_in(memoryview(data), 808) is None
    assert tag_in(memoryview(data)[1:8], 801) is None
    for other in (tag._replace(generation=6), tag._replace(life=3), tag._replace(owner=2), tag._replace(region=0)):
        assert not patterns.matches(memoryview(data), other, 800)
        assert tag_in(memoryview(patterns.whole(other))[800:900], 800) == other
