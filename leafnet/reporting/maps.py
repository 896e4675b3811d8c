"""The map of a report: where photographs were taken, as SVG inside the page."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from leafnet.reporting.charts import mark, svg

_EARTH_KM = 6371.0
_MAP_WIDTH, _MAP_HEIGHT = 560, 400
_MARGIN = 24


class Placed(NamedTuple):
    """Positions of some photographs: degrees, and which of the classes each is of."""

    latitude: NDArray[np.float64]  # [N]
    longitude: NDArray[np.float64]  # [N]
    group: NDArray[np.int64]  # [N]


class Map(NamedTuple):
    """A drawn map."""

    svg: Markup
    outside: int  # positions too far away to be on it
    extent: str  # of the map, in words


def scatter_map(placed: Placed, classes: Sequence[str], *, description: str) -> Map | None:
    """Positions on a plane, true to scale around their middle, north up; None: there are none.

    A position far away from nearly all others, such as one of a phone that was wrong, is left out
    and counted, since with it all others would lie on one spot. Photographs of a class on the same
    place are one mark.
    """
    if not len(placed.latitude):
        return None
    # Around the mean direction, so that a field on the 180th meridian is one field.
    turned = np.exp(1j * np.radians(placed.longitude)).mean()
    middle = float(np.degrees(np.angle(turned)))
    longitude = (placed.longitude - middle + 180) % 360 - 180
    latitude = placed.latitude
    centre = float(np.median(longitude)), float(np.median(latitude))
    per_degree = math.pi * _EARTH_KM / 180
    x = (longitude - centre[0]) * per_degree * max(math.cos(math.radians(centre[1])), 0.01)
    y = (latitude - centre[1]) * per_degree
    inside = _near(x) & _near(y)
    low_x, high_x = float(x[inside].min()), float(x[inside].max())
    low_y, high_y = float(y[inside].min()), float(y[inside].max())
    # At least 50 m wide: what is less is the positions' own error.
    scale = min(
        (_MAP_WIDTH - 2 * _MARGIN) / max(high_x - low_x, 0.05),
        (_MAP_HEIGHT - 2 * _MARGIN - 30) / max(high_y - low_y, 0.05),
    )
    left = _MAP_WIDTH / 2 - scale * (low_x + high_x) / 2
    top = (_MAP_HEIGHT - 30) / 2 + scale * (low_y + high_y) / 2
    parts = [f'<rect class="ground" width="{_MAP_WIDTH}" height="{_MAP_HEIGHT}" rx="6"/>']
    for group, name in enumerate(classes):
        mine = inside & (placed.group == group)
        at = np.unique(
            np.stack([np.round(left + scale * x[mine]), np.round(top - scale * y[mine])]), axis=1
        )
        marks = "".join(mark(group, int(px), int(py)) for px, py in at.T)
        parts.append(f'<path class="{name} place" d="{marks}"/>')
    kilometres = _round_below(0.3 * _MAP_WIDTH / scale)
    bar = kilometres * scale
    distance = f"{kilometres:g} km" if kilometres >= 1 else f"{round(kilometres * 1000):g} m"
    base = _MAP_HEIGHT - 14
    parts.append(f'<path class="scale" d="M16 {base - 6}v6h{bar:.1f}v-6"/>')
    parts.append(f'<text x="{22 + bar:.1f}" y="{base}">{distance}</text>')
    parts.append(
        f'<path class="scale" d="M{_MAP_WIDTH - 22} {base}v-18m-4 6l4 -6l4 6"/>'
        f'<text x="{_MAP_WIDTH - 22}" y="{base - 23}" text-anchor="middle">N</text>'
    )
    wide, high = high_x - low_x, high_y - low_y
    return Map(
        svg(parts, description, width=_MAP_WIDTH, height=_MAP_HEIGHT),
        outside=int((~inside).sum()),
        extent=f"{_distance(wide)} from west to east and {_distance(high)} from south to north",
    )


def _near(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of `values` are not absurdly far from the middle nine tenths of them."""
    low, high = np.quantile(values, [0.05, 0.95])
    reach = 5 * max(high - low, 0.2)
    near: NDArray[np.bool_] = (values > low - reach) & (values < high + reach)
    return near


def _round_below(value: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten up to `value`.

    >>> _round_below(0.37), _round_below(2.0), _round_below(99)
    (0.2, 2.0, 50.0)
    """
    power = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return next(
        power * factor for factor in (5.0, 2.0, 1.0) if power * factor <= value * (1 + 1e-9)
    )


def _distance(kilometres: float) -> str:
    """
    >>> _distance(0.034), _distance(2.345), _distance(217.8)
    ('34 m', '2.3 km', '218 km')
    """
    if kilometres < 1:
        return f"{1000 * kilometres:.0f} m"
    return f"{kilometres:.1f} km" if kilometres < 100 else f"{kilometres:,.0f} km"
