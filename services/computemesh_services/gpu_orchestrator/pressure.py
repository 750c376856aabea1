"""Whether memory runs short, and when. Pure: samples and rooms in, levels and reasons out.

**RAM.** The trend of what is available is the median slope over all pairs of samples of a window (Theil-Sen), so
single readings do not move it. It counts as a trend only if it is none by chance (Mann-Kendall), is large beside
what the readings scatter, and goes the same way in both halves of the window: one step down is no trend. From it
follows when nothing would be left.

**VRAM.** A GPU that is full of what was reserved is as it should be. Short is one on which others take what was
promised (``over``), or which others alone fill up.

A level is left only when things are clearly better than what it took to reach it, so it does not flap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Final

import msgspec

from computemesh.contracts.gpus import PressureLevel, RamState
from computemesh_services.gpu_orchestrator.room import Spot

SAMPLES_MIN: Final = 8
SAMPLES_MAX: Final = 40
"""Of a window; at one heartbeat in ten seconds more than six minutes."""

CHANCE_Z: Final = 3.29
"""How far from chance a trend must be, in standard deviations: one in two thousand."""

FALL_MIN: Final = 0.01
"""A fall over the window below this share of the memory is none."""

HALVES_MIN: Final = 0.25
"""Each half of the window must fall at least at this share of the whole slope."""

WARNING_S: Final = 900.0
CRITICAL_S: Final = 180.0
"""Nothing left in so long."""

WARNING_LEFT: Final = 0.08
CRITICAL_LEFT: Final = 0.04
"""Shares of the memory that are left, whatever the trend."""

LEAVE: Final = 1.25
"""Times better than what a level takes, to leave it."""

_RANKS: Final = {level: rank for rank, level in enumerate(PressureLevel)}


class Trend(msgspec.Struct, frozen=True, gc=False):
    slope_mb_per_s: float
    falls: bool
    """Whether it clearly falls."""
    confidence: float
    """From 0 to 1: share of the pairs of samples that agree with the direction, beyond what chance gives."""


def trend_of(samples: Sequence[tuple[float, float]], total_mb: int) -> Trend | None:
    """Where memory is going; None with too few samples to say.

    Args:
        samples: (seconds, MiB available), oldest first.
    """
    if len(samples) < SAMPLES_MIN:
        return None
    slopes, agreement, z = _pairs(samples)
    if not slopes:
        return None
    slope = median(slopes)
    span = samples[-1][0] - samples[0][0]
    half = len(samples) // 2
    first, second = _slope(samples[:half]), _slope(samples[half:])
    falls = (
        slope < 0
        and z <= -CHANCE_Z
        and -slope * span >= FALL_MIN * total_mb
        and -slope * span >= 2.0 * _scatter(samples, slope)
        and first <= slope * HALVES_MIN
        and second <= slope * HALVES_MIN
    )
    return Trend(slope_mb_per_s=slope, falls=falls, confidence=round(agreement, 3))


def _pairs(samples: Sequence[tuple[float, float]]) -> tuple[list[float], float, float]:
    """Slopes of all pairs, how much they agree, and how far that is from chance."""
    slopes: list[float] = []
    sign = 0
    for at, (second_s, second_mb) in enumerate(samples):
        for first_s, first_mb in samples[:at]:
            if second_s > first_s:
                slopes.append((second_mb - first_mb) / (second_s - first_s))
                sign += (second_mb > first_mb) - (second_mb < first_mb)
    count = len(samples)
    deviation = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    return slopes, abs(sign) / max(1, len(slopes)), sign / deviation


def _slope(samples: Sequence[tuple[float, float]]) -> float:
    slopes, _, _ = _pairs(samples)
    return median(slopes) if slopes else 0.0


def _scatter(samples: Sequence[tuple[float, float]], slope: float) -> float:
    """How far samples lie from the line, as a robust standard deviation."""
    rests = [mb - slope * s for s, mb in samples]
    middle = median(rests)
    return 1.4826 * median(abs(rest - middle) for rest in rests)


def ram_of(samples: Sequence[tuple[float, float]], total_mb: int, available_mb: int) -> RamState:
    """Memory of a machine, and when it would be out."""
    trend = trend_of(samples, total_mb)
    if trend is None:
        return RamState(total_mb=total_mb, available_mb=available_mb)
    out_s = round(available_mb / -trend.slope_mb_per_s, 1) if trend.falls else None
    return RamState(
        total_mb=total_mb,
        available_mb=available_mb,
        slope_mb_per_s=round(trend.slope_mb_per_s, 3),
        oom_in_s=out_s,
        confidence=trend.confidence,
    )


def may_fall(samples: Sequence[tuple[float, float]], total_mb: int) -> bool:
    """Whether :func:`trend_of` could say so: a cheap look that spares it the many that do not."""
    return len(samples) >= SAMPLES_MIN and samples[0][1] - min(mb for _, mb in samples) >= FALL_MIN * total_mb / 2


def ram_level(ram: RamState, was: PressureLevel) -> PressureLevel:
    """How short RAM is, given how short it was."""
    return _held(was, lambda ease: _ram_at(ram, ease))


def _ram_at(ram: RamState, ease: float) -> PressureLevel:
    left = ram.available_mb / ram.total_mb if ram.total_mb else 1.0
    out_s = ram.oom_in_s if ram.oom_in_s is not None else math.inf
    if left < CRITICAL_LEFT * ease or out_s < CRITICAL_S * ease:
        return PressureLevel.CRITICAL
    if left < WARNING_LEFT * ease or out_s < WARNING_S * ease:
        return PressureLevel.WARNING
    return PressureLevel.OK


def vram_level(spot: Spot, was: PressureLevel) -> PressureLevel:
    """How short the memory of a GPU is, given how short it was."""
    return _held(was, lambda ease: _vram_at(spot, ease))


def _vram_at(spot: Spot, ease: float) -> PressureLevel:
    if not spot.total_mb:
        return PressureLevel.OK
    # Some MiB of a driver must not make a GPU that is reserved to the last one flap.
    if spot.over_mb > (0.0 if ease > 1.0 else 0.005 * spot.total_mb):
        return PressureLevel.OVER
    left = (spot.total_mb - spot.reserved_mb - spot.external_mb) / spot.total_mb
    mostly_others = spot.external_mb >= 0.2 * spot.total_mb
    if mostly_others and left < CRITICAL_LEFT / 2 * ease:
        return PressureLevel.CRITICAL
    if mostly_others and left < WARNING_LEFT / 2 * ease:
        return PressureLevel.WARNING
    return PressureLevel.OK


def _held(was: PressureLevel, at: Callable[[float], PressureLevel]) -> PressureLevel:
    """The level now, or the one before when that is not clearly left."""
    now, eased = at(1.0), at(LEAVE)
    if _RANKS[now] >= _RANKS[was]:
        return now
    return min((was, eased), key=_RANKS.__getitem__)
