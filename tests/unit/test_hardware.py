"""Goal: a machine lands in the tier that its facts call for, however the tier is spelled on the wire.

Method: a table of real cards with the memory their drivers report, and properties over arbitrary cards.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from computemesh.contracts.base import Message, Refused, decode
from computemesh.hardware import Gpu, Platform, Tier, tier_of

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


gpus = st.builds(
    Gpu,
    vram_total_mb=st.integers(0, 200_000),
    compute_capability=st.sampled_from(["", "6.1", "7.5", "8.0", "8.9", "9.0", "12.0", "gfx942"]),
)


@pytest.mark.parametrize(("vram_mb", "capability", "tier"), CARDS.values(), ids=CARDS.keys())
def test_a_card_gives_its_machine_the_tier_of_its_facts(vram_mb: int, capability: str, tier: Tier) -> None:
    """The name plays no part: every card of the table is nameless."""
    assert tier_of([Gpu(vram_total_mb=vram_mb, compute_capability=capability)]) is tier


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
