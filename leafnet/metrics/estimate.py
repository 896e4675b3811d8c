"""How right a night was: expected from its confidences, and counted from what people looked at.

The first costs nobody anything and holds as long as confidences mean on this night what they meant
on the test split; the second holds whatever the night was like, because chance alone chose what
was looked at.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

_Z = 1.959964
_TAIL = 0.025


class Estimate(NamedTuple):
    """A share and its 95 % interval."""

    value: float
    low: float
    high: float


def expected(
    count: int, confidence: float, squares: float, calibration: Sequence[Mapping[str, Any]]
) -> Estimate | None:
    """The accuracy that confidences let expect; None of no photographs, or without a test split.

    The mean confidence (confidence-based performance estimation: Guillory et al. 2021,
    arXiv:2107.03315, section 3, without their correction). The interval holds the chance of this
    night's answers and that of the test split's, of which the calibration is known no better; a
    gap that the test split showed beyond its chance widens it on that side.

    Args:
        count: photographs.
        confidence: the sum of their confidences.
        squares: the sum of their squares.
        calibration: as `scores.scores` tells it of the test split.
    """
    tested = sum(entry["count"] for entry in calibration)
    if not count or not tested:
        return None
    mean = confidence / count
    right = sum(entry["count"] * entry["accuracy"] for entry in calibration) / tested
    sure = sum(entry["count"] * entry["confidence"] for entry in calibration) / tested
    known = right * (1 - right) / tested
    half = _Z * math.sqrt(max(confidence - squares, 0.0) / count**2 + known)
    gap = right - sure
    beyond = math.copysign(max(abs(gap) - _Z * math.sqrt(known), 0.0), gap)
    low, high = mean - half + min(beyond, 0.0), mean + half + max(beyond, 0.0)
    return Estimate(mean, max(low, 0.0), min(high, 1.0))


def audited(
    right: int, looked: int, total: int, *, chosen_right: int = 0, chosen: int = 0
) -> Estimate | None:
    """The accuracy of `total` photographs of which people looked at some.

    Those that were chosen for what they are stand for themselves alone; those that chance chose
    stand for all others (post-stratification: Cochran 1977, "Sampling Techniques", 5A.9), which is
    the Horvitz-Thompson estimator with the weights 1 and (total - chosen) / looked. The interval is
    exact, of the hypergeometric distribution: it covers in at least 95 % of all draws. None where
    nobody looked at any that chance chose.

    Args:
        right: of `looked`, those with the right label.
        looked: photographs that chance chose and a person answered, but for those of `chosen`.
        total: photographs in all.
        chosen_right: of `chosen`, those with the right label.
        chosen: photographs that were chosen for what they are, and answered.

    >>> [round(part, 3) for part in audited(9, 10, 110, chosen_right=4, chosen=10)]
    [0.855, 0.564, 0.936]
    """
    rest = total - chosen
    if not 0 <= right <= looked <= rest or not 0 <= chosen_right <= chosen:
        raise ValueError(
            f"{right} right of {looked} looked at, and {chosen_right} of {chosen} chosen, are no "
            f"part of {total}"
        )
    if rest and not looked:
        return None
    if not rest:
        return Estimate(*[chosen_right / chosen] * 3) if chosen else None
    # Half a second of the start of every job that may need it.
    from scipy.stats import hypergeom

    wrong = looked - right
    low = _first(right, rest - wrong, lambda r: hypergeom.sf(right - 1, rest, r, looked) > _TAIL)
    fewest = _first(wrong, rest - right, lambda w: hypergeom.sf(wrong - 1, rest, w, looked) > _TAIL)
    return Estimate(
        (chosen_right + rest * right / looked) / total,
        (chosen_right + low) / total,
        (chosen_right + rest - fewest) / total,
    )


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The first of low … high from which on `holds` is true; it is at `high`."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
