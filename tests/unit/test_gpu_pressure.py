"""When memory runs short: a leak is told before it is too late, and noise, steps and sawteeth are not taken for one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from computemesh.contracts.gpus import PressureLevel, RamState
from computemesh.hardware import Gpu
from computemesh_services.gpu_orchestrator.pressure import (
    SAMPLES_MAX,
    may_fall,
    ram_level,
    ram_of,
    trend_of,
    vram_level,
)
from computemesh_services.gpu_orchestrator.room import Spot

TOTAL = 64_000
OK, WARNING, CRITICAL, OVER = PressureLevel

Sample = tuple[float, float]


def heard(
    shape: Callable[[float], float], seed: int = 0, noise_mb: float = 0.0, count: int = SAMPLES_MAX
) -> list[Sample]:
    """Readings of *shape*, about every ten seconds."""
    chance = random.Random(seed)
    times = [10 * n + chance.uniform(-2, 2) for n in range(count)]
    return [(at, min(TOTAL, max(0.0, shape(at) + chance.gauss(0, noise_mb)))) for at in times]


def falls(samples: list[Sample]) -> bool:
    trend = trend_of(samples, TOTAL)
    assert trend is not None
    assert may_fall(samples, TOTAL) or not trend.falls, "the cheap look would have missed it"
    return trend.falls


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("slope", "noise_mb"), [(5, 0), (5, 50), (20, 50), (20, 300), (100, 0), (100, 1000)])
def test_a_leak_is_told_with_about_the_time_that_is_left(slope: float, noise_mb: float, seed: int) -> None:
    """Readings that scatter do not move the answer much."""
    start = 60_000.0
    samples = heard(lambda at: start - slope * at, seed, noise_mb)
    ram = ram_of(samples, TOTAL, int(samples[-1][1]))
    left_s = max(0.0, start / slope - samples[-1][0])
    assert may_fall(samples, TOTAL)
    assert ram.oom_in_s is not None
    assert ram.oom_in_s == pytest.approx(left_s, rel=0.15, abs=20)
    assert ram.confidence > 0.5


def test_one_wild_reading_in_eight_changes_nothing() -> None:
    """The median of slopes is what it is for."""
    samples = heard(lambda at: 60_000 - 20 * at)
    wild = [(at, 1_000.0 if n % 8 == 3 else mb) for n, (at, mb) in enumerate(samples)]
    trend = trend_of(wild, TOTAL)
    assert trend is not None
    assert trend.slope_mb_per_s == pytest.approx(-20, rel=0.2)


@pytest.mark.parametrize("seed", range(200))
def test_noise_is_no_leak(seed: int) -> None:
    """However wide it is."""
    chance = random.Random(seed)
    noise_mb = math.exp(chance.uniform(0, 9))
    assert not falls(heard(lambda _: 30_000, seed, noise_mb, count=chance.randrange(8, SAMPLES_MAX + 1)))


@pytest.mark.parametrize("at_sample", range(1, SAMPLES_MAX))
@pytest.mark.parametrize("noise_mb", [0, 100])
def test_a_step_down_is_no_leak(at_sample: int, noise_mb: float) -> None:
    """A model was loaded; wherever in the window that was."""
    samples = heard(lambda at: 50_000 if at < at_sample * 10 - 5 else 20_000, at_sample, noise_mb)
    assert not falls(samples)


@pytest.mark.parametrize("seed", range(100))
def test_a_sawtooth_is_no_leak(seed: int) -> None:
    """Memory that fills and is freed again, several times in the window."""
    chance = random.Random(seed)
    period, height, phase = chance.uniform(30, 130), chance.uniform(1_000, 30_000), chance.random()
    assert not falls(heard(lambda at: 50_000 - height * ((at / period + phase) % 1.0), seed, 50))


def test_too_few_readings_say_nothing() -> None:
    """And readings of one moment neither."""
    assert trend_of(heard(lambda at: 60_000 - 100 * at, count=7), TOTAL) is None
    assert trend_of([(1.0, 5.0)] * 20, TOTAL) is None


def ram(available_mb: int, oom_in_s: float | None = None) -> RamState:
    return RamState(total_mb=TOTAL, available_mb=available_mb, slope_mb_per_s=-1.0, oom_in_s=oom_in_s)


def test_ram_is_short_when_little_is_left_or_soon_will_be() -> None:
    """Either alone is enough."""
    assert ram_level(ram(30_000), OK) is OK
    assert ram_level(ram(30_000, 800), OK) is WARNING
    assert ram_level(ram(30_000, 100), OK) is CRITICAL
    assert ram_level(ram(5_000), OK) is WARNING
    assert ram_level(ram(2_000), OK) is CRITICAL


@pytest.mark.parametrize("seed", range(20))
def test_a_level_does_not_flap_at_its_threshold(seed: int) -> None:
    """Readings around it change the level once."""
    chance = random.Random(seed)
    level, changes = OK, 0
    for _ in range(200):
        now = ram_level(ram(int(0.08 * TOTAL * chance.uniform(0.9, 1.1))), level)
        level, changes = now, changes + (now is not level)
    assert (level, changes) == (WARNING, 1)
    assert ram_level(ram(int(0.08 * TOTAL * 1.3)), level) is OK


def spot(reserved_mb: int, external_mb: int) -> Spot:
    return Spot(
        gpu=Gpu(),
        key="k",
        total_mb=24_000,
        most_mb=24_000,
        used_mb=0,
        reserved_mb=reserved_mb,
        external_mb=external_mb,
        free_mb=max(0, 24_000 - reserved_mb - external_mb),
        over_mb=max(0, reserved_mb + external_mb - 24_000),
        against=None,
        because="",
        holders=(),
        use=None,
    )


def test_vram_is_short_when_others_take_what_was_promised_or_fill_the_gpu() -> None:
    """A GPU that is full of reservations is as it should be."""
    assert vram_level(spot(24_000, 0), OK) is OK
    assert vram_level(spot(23_800, 200), OK) is OK
    assert vram_level(spot(20_000, 5_000), OK) is OVER
    assert vram_level(spot(0, 23_800), OK) is CRITICAL
    assert vram_level(spot(0, 23_200), OK) is WARNING
    assert vram_level(spot(0, 20_000), OK) is OK


def test_a_gpu_is_over_until_nothing_promised_is_missing() -> None:
    """Some MiB of a driver do not make it so."""
    assert vram_level(spot(20_000, 4_050), OK) is OK
    assert vram_level(spot(20_000, 4_050), OVER) is OVER
    assert vram_level(spot(18_000, 3_000), OVER) is OK
