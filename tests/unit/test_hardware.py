"""Goal: a machine lands in the tier that its facts call for, however the tier is spelled on the wire.

Method: a table of real cards with the memory their drivers report, and properties over arbitrary cards.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from computemesh.contracts.base import Message, Refused, convert, decode
from computemesh.hardware import Gpu, Memory, Platform, Tier, canonical, tier_of

WEAKEST_FIRST = [Tier.CPU_ONLY, Tier.GPU_INFRA, Tier.GPU_PEER, Tier.AI_FACTORY]

CARDS = {
    "H100 80GB": (81559, "9.0", Tier.AI_FACTORY),
    "H200": (143771, "9.0", Tier.AI_FACTORY),
    "A100 40GB": (40960, "8.0", Tier.AI_FACTORY),
    "RTX 5090": (32607, "12.0", Tier.AI_FACTORY),
    "RTX 4090": (24564, "8.9", Tier.GPU_PEER),
    "RTX 3090": (24576, "8.6", Tier.GPU_PEER),
    "L4": (23034, "8.9", Tier.GPU_PEER),
    "V100 32GB": (32768, "7.0", Tier.GPU_PEER),
    "RTX 4070": (12282, "8.9", Tier.GPU_INFRA),
    "RTX 3060": (12288, "8.6", Tier.GPU_INFRA),
    "a card that reports nothing": (0, "", Tier.GPU_INFRA),
}


class Wanted(Message, frozen=True, kw_only=True):
    tier: Tier
    platform: Platform = Platform.CPU


class Told(Message, frozen=True, kw_only=True):
    gpus: list[Gpu] = []
    memory: Memory = Memory()


gpus = st.builds(
    Gpu,
    vram_total_mb=st.integers(0, 200_000),
    compute_capability=st.sampled_from(["", "6.1", "7.5", "8.0", "8.9", "9.0", "12.0", "gfx942"]),
)


@pytest.mark.parametrize(("vram_mb", "capability", "tier"), CARDS.values(), ids=CARDS.keys())
def test_a_card_gives_its_machine_the_tier_of_its_facts(vram_mb: int, capability: str, tier: Tier) -> None:
    """The name plays no part: every card of the table is nameless."""
    assert tier_of([Gpu(vram_total_mb=vram_mb, compute_capability=capability)]) is tier


def test_a_gpu_that_cannot_be_read_counts_for_no_tier() -> None:
    """Nothing can run on it."""
    broken = Gpu(vram_total_mb=81559, compute_capability="9.0", error="GPU is lost")
    assert tier_of([broken]) is Tier.CPU_ONLY
    assert tier_of([broken, Gpu(vram_total_mb=24564)]) is Tier.GPU_PEER


def test_a_machine_without_a_gpu_is_cpu_only() -> None:
    """No card, the lowest tier."""
    assert tier_of([]) is Tier.CPU_ONLY


@pytest.mark.parametrize("capability", ["gfx942", "9.x", ".", "-9.0", "9.0.1", "²"])
def test_a_capability_that_is_no_version_never_lifts_a_card_into_the_top_tier(capability: str) -> None:
    """Other vendors, and damaged values, keep the tier that the memory alone gives."""
    assert tier_of([Gpu(vram_total_mb=81559, compute_capability=capability)]) is Tier.GPU_PEER


@given(gpus=st.lists(gpus, min_size=1, max_size=8))
def test_a_machine_has_the_tier_of_its_strongest_gpu_in_any_order(gpus: list[Gpu]) -> None:
    """Weaker cards beside a strong one change nothing."""
    strongest = max((tier_of([gpu]) for gpu in gpus), key=WEAKEST_FIRST.index)
    assert tier_of(gpus) is tier_of(gpus[::-1]) is strongest


@given(vrams_mb=st.lists(st.integers(0, 200_000), min_size=2, unique=True))
def test_more_memory_never_lowers_the_tier(vrams_mb: list[int]) -> None:
    """Between two cards of one generation, the larger is at least as high."""
    tiers = [tier_of([Gpu(vram_total_mb=vram_mb, compute_capability="9.0")]) for vram_mb in sorted(vrams_mb)]
    assert all(larger.at_least(smaller) for smaller, larger in pairwise(tiers))


@pytest.mark.parametrize("tier", WEAKEST_FIRST)
@pytest.mark.parametrize("least", WEAKEST_FIRST)
def test_at_least_orders_all_pairs_of_tiers(tier: Tier, least: Tier) -> None:
    """A tier satisfies itself and every weaker one, and nothing above it."""
    assert tier.at_least(least) is (WEAKEST_FIRST.index(tier) >= WEAKEST_FIRST.index(least))


@given(tier=st.sampled_from(Tier), upper=st.lists(st.booleans(), min_size=10, max_size=10))
def test_a_tier_is_decoded_in_any_mix_of_cases(tier: Tier, upper: list[bool]) -> None:
    """``gpu_peer``, ``GPU_PEER`` and ``Gpu_Peer`` are one tier."""
    text = "".join(c.upper() if up else c.lower() for c, up in zip(tier, upper, strict=False))
    text += tier[len(text) :]
    assert decode(b'{"tier": "%s"}' % text.encode(), Wanted) == Wanted(tier=tier)


@pytest.mark.parametrize("platform", Platform)
def test_a_platform_is_decoded_in_lower_case(platform: Platform) -> None:
    """``cuda`` is ``CUDA``."""
    told = decode(b'{"tier": "CPU_ONLY", "platform": "%s"}' % platform.lower().encode(), Wanted)
    assert told == Wanted(tier=Tier.CPU_ONLY, platform=platform)


@pytest.mark.parametrize("text", ["", "GPU", "gpu-peer", " GPU_PEER", "GPU_PEER2"])
def test_a_word_that_is_no_tier_is_refused_and_the_field_is_named(text: str) -> None:
    """Leniency ends at the case of the letters."""
    told = decode(b'{"tier": "%s"}' % text.encode(), Wanted)
    assert isinstance(told, Refused)
    assert told.field == "tier"


HEARD: list[tuple[dict[str, float], int]] = [
    ({"vram_gb": 24}, 24_576),
    ({"vram_gb": 23.5}, 24_064),
    ({"vram_mb": 24_564.0}, 24_564),
    ({"total_vram_mb": 24_564}, 24_564),
    ({"vram_gb": 24, "vram_mb": 24_564}, 24_564),
    ({"vram_total_mb": 12_282, "vram_gb": 24, "vram_mb": 1, "total_vram_mb": 2}, 12_282),
    ({"vram_total_mb": 12_282}, 12_282),
    ({"vram_gb": 0}, 0),
    ({}, 0),
]


@given(told=st.lists(st.sampled_from(HEARD), max_size=4))
def test_other_spellings_of_vram_become_the_declared_one_and_leave_the_wire(told: list[tuple[Any, int]]) -> None:
    """The declared field counts where they contradict each other."""
    heard = [msgspec.convert(fields, Gpu) for fields, _ in told]
    _, known = canonical(None, heard)
    assert [gpu.vram_total_mb for gpu in known] == [vram_mb for _, vram_mb in told]
    assert b"vram_gb" not in encode_all(known)
    assert b'"vram_mb"' not in encode_all(known)
    assert b"total_vram_mb" not in encode_all(known)
    assert canonical(None, known) == (None, known)


@pytest.mark.parametrize(
    ("told", "total_mb", "available_mb"),
    [
        ({"total_gb": 64}, 65_536, 0),
        ({"total_gb": 63.5, "available_gb": 0.5}, 65_024, 512),
        ({"total_mb": 64_000, "total_gb": 64, "available_gb": 1}, 64_000, 1024),
        ({"total_mb": 64_000, "available_mb": 5}, 64_000, 5),
    ],
)
def test_memory_in_gib_becomes_mib_where_the_declared_field_is_not_told(
    told: dict[str, float], total_mb: int, available_mb: int
) -> None:
    """Other programs know no MiB."""
    known, _ = canonical(msgspec.convert(told, Memory), [])
    assert known == Memory(total_mb=total_mb, available_mb=available_mb)
    assert b"_gb" not in msgspec.json.encode(known)


@pytest.mark.parametrize("name", ["vram_gb", "vram_mb", "total_vram_mb"])
@pytest.mark.parametrize("value", ["-1", "1e300", "1e999", '"24"', "null"])
def test_an_impossible_size_of_a_gpu_is_refused_and_the_field_named(name: str, value: str) -> None:
    """Whatever it is called."""
    told = decode(b'{"gpus": [{"%s": %s}]}' % (name.encode(), value.encode()), Told)
    assert isinstance(told, Refused)
    assert told.field == f"gpus[0].{name}"


@pytest.mark.parametrize("name", ["total_gb", "available_gb"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_an_impossible_size_of_memory_is_refused_and_the_field_named(name: str, value: float) -> None:
    """YAML knows infinity and NaN."""
    told = convert({"memory": {name: value}}, Told)
    assert isinstance(told, Refused)
    assert told.field == f"memory.{name}"


def test_gpus_without_an_index_are_numbered_by_their_place() -> None:
    """Else a reservation could not name the second of them."""
    cards = [Gpu(name="L4"), Gpu(name="L4"), Gpu(name="T4")]
    assert [gpu.index for gpu in canonical(None, cards)[1]] == [0, 1, 2]
    numbered = [Gpu(index=3), Gpu(index=0)]
    assert canonical(None, numbered)[1] == numbered


def encode_all(gpus: list[Gpu]) -> bytes:
    return msgspec.json.encode(gpus)
