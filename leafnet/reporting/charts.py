"""Charts of the reports as SVG inside the page.

They take their colours from the page's style sheet, so that they follow light, dark and print, and
have about the size at which they are shown, so that their text can be read on a phone. Each says in
a sentence what it shows, for those who cannot see it. The pictures of `plots` are files of their
own, for slides and for places that show no SVG.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

from leafnet.metrics.drift import Histogram
from leafnet.metrics.scores import exact_interval

# Classes of the style sheet, `c0` to `c5`: colours that any colour vision can tell apart. More
# classes than these share `cx`, grey.
COLOURS = 6
_SHAPES = 6

_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 24, 18, 40

Format = Callable[[float], str]


class _Axes(NamedTuple):
    """Where values lie in the picture."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    left: float = _LEFT
    right: float = _WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = _HEIGHT - _BOTTOM

    def x(self, value: float) -> float:
        """Pixels from the left."""
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return self.bottom - share * (self.bottom - self.top)


def _percent(value: float) -> str:
    """A share as a label of an axis.

    >>> _percent(0.25), _percent(0.985), _percent(0.0)
    ('25 %', '98.5 %', '0 %')
    """
    return f"{round(100 * value, 1):g} %"


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Round values between `low` and `high`, about `count` of them.

    >>> ticks(0, 1), ticks(0.83, 1.0, count=4)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.85, 0.9, 0.95, 1.0])
    """
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [round(i * step, 12) for i in range(first, last + 1)]


def curves(
    history: Sequence[Mapping[str, float]],
    quantity: str,
    *,
    best_epoch: int,
    description: str,
    head_alone: float | None = None,
) -> Markup:
    """`quantity` of train and valid by epoch, the best epoch marked.

    Args:
        history: rows of a history.
        quantity: `loss` or `accuracy`.
        best_epoch: 0: none is marked.
        description: what it shows, in a sentence.
        head_alone: what it was on validation before the first epoch; None: nothing is drawn of it.
    """
    series = {
        name: [
            (row["epoch"], row[f"{name}_{quantity}"])
            for row in history
            if math.isfinite(row.get(f"{name}_{quantity}", math.nan))
        ]
        for name in ("train", "valid")
    }
    values = [value for points in series.values() for _, value in points]
    if not values:
        return Markup("")
    values += [] if head_alone is None else [head_alone]
    first, last = history[0]["epoch"], max(history[-1]["epoch"], history[0]["epoch"] + 1)
    if quantity == "accuracy":
        low, high = max(0.0, min(values) - 0.08 * max(1 - min(values), 0.02)), 1.0
    else:
        low, high = 0.0, 1.06 * loss_limit(history, head_alone)[0] or 1.0
    series = {name: [(x, min(y, high)) for x, y in points] for name, points in series.items()}
    axes = _Axes(first, last, low, high, right=_WIDTH - 48)
    show: Format = _percent if quantity == "accuracy" else lambda value: f"{value:g}"
    parts = [_y_axis(axes, show)]
    epochs = [tick for tick in ticks(first, last, count=6) if tick == int(tick)]
    parts.append(_x_axis(axes, epochs, lambda value: f"{value:g}", "epoch"))
    if best_epoch:
        marked = f"M{axes.x(best_epoch):.1f} {axes.top}V{axes.bottom}"
        parts.append(f'<path class="mark" d="{marked}"/>')
    ends: list[tuple[float, str]] = []
    if head_alone is not None:
        y = axes.y(head_alone)
        parts.append(f'<path class="before" d="M{axes.left} {y:.1f}H{axes.right}"/>')
        ends.append((y, "head"))
    for name, points in series.items():
        if points:
            line = "M" + "L".join(f"{axes.x(x):.1f} {axes.y(y):.1f}" for x, y in points)
            parts.append(f'<path class="line {name}" d="{line}"/>')
            ends.append((axes.y(points[-1][1]), name))
    for x, y in series["valid"]:
        if x == best_epoch:
            at = f'cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}"'
            parts.append(f'<circle class="dot valid" {at} r="4"/>')
    ends.sort()
    for y, (_, name) in zip(_apart([y for y, _ in ends], 14), ends, strict=True):
        parts.append(f'<text class="{name}" x="{axes.right + 6}" y="{y + 4:.1f}">{name}</text>')
    return svg(parts, description)


def loss_limit(
    history: Sequence[Mapping[str, float]], head_alone: float | None = None
) -> tuple[float, float]:
    """Where a chart of losses ends, and the largest loss, which may be above it.

    It ends at the largest, or sooner where a few would flatten the rest.

    >>> loss_limit([{"train_loss": 1.0, "valid_loss": 1.5}] * 19 + [{"train_loss": 90.0}])
    (4.5, 90.0)
    >>> loss_limit([{"train_loss": 2.0}, {"train_loss": 1.0}])
    (2.0, 2.0)
    """
    losses = [row.get(f"{name}_loss", math.nan) for row in history for name in ("train", "valid")]
    losses = sorted(loss for loss in losses if math.isfinite(loss)) or [0.0]
    usual = losses[int(0.9 * (len(losses) - 1))]
    return max(min(losses[-1], 3 * usual), head_alone or 0.0), losses[-1]


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Rising `places`, moved as little as may be until each is at least `gap` after the one before.

    >>> _apart([0.0, 10.0, 11.0, 50.0], 5), _apart([], 5)
    ([0.0, 8.0, 13.0, 50.0], [])
    """
    # Without the gaps they must not fall: the nearest such numbers are means of neighbours.
    groups: list[list[float]] = []
    for i, place in enumerate(places):
        groups.append([place - i * gap])
        while len(groups) > 1 and _mean(groups[-2]) > _mean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    moved = [_mean(group) for group in groups for _ in group]
    return [place + i * gap for i, place in enumerate(moved)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def histogram(
    found: Histogram,
    expected: Histogram | None,
    *,
    names: tuple[str, str],
    description: str,
    label: str,
    limit: float | None = None,
    limit_name: str = "",
) -> Markup:
    """Shares of `found` as bars and of `expected` as an outline, in the same bins, two in one.

    Args:
        found: what is looked at.
        expected: what it is compared with; None: nothing is.
        names: of the two.
        description: what it shows, in a sentence.
        label: of the horizontal axis.
        limit: a threshold to be marked; None: there is none.
        limit_name: what is beyond it.
    """
    both = [each for each in (found, expected) if each is not None]
    shares = [each.counts.reshape(-1, 2).sum(axis=1) / max(each.total, 1) for each in both]
    top = max(float(max(each.max() for each in shares)), 0.01)
    axes = _Axes(found.low, found.high, 0.0, 1.08 * top, top=26)
    edges = np.linspace(found.low, found.high, len(shares[0]) + 1)
    parts = [_y_axis(axes, _percent, count=4)]
    is_share = (found.low, found.high) == (0.0, 1.0)
    show: Format = _percent if is_share else lambda value: f"{value:g}"
    parts.append(_x_axis(axes, ticks(found.low, found.high), show, label))
    bars = [
        f"M{axes.x(a) + 0.7:.1f} {axes.bottom}V{axes.y(share):.1f}"
        f"H{axes.x(b) - 0.7:.1f}V{axes.bottom}Z"
        for a, b, share in zip(edges[:-1], edges[1:], shares[0], strict=True)
        if share
    ]
    parts.append(f'<path class="bars" d="{"".join(bars)}"/>')
    if expected is not None:
        steps = "".join(
            f"V{axes.y(share):.1f}H{axes.x(b):.1f}"
            for b, share in zip(edges[1:], shares[1], strict=True)
        )
        parts.append(f'<path class="outline" d="M{axes.left} {axes.bottom}{steps}V{axes.bottom}"/>')
    if limit is not None and found.low < limit < found.high:
        at = axes.x(limit)
        parts.append(f'<path class="mark" d="M{at:.1f} {axes.top}V{axes.bottom}"/>')
        anchor = "end" if at > 0.6 * _WIDTH else "start"
        shift = -5 if anchor == "end" else 5
        parts.append(
            f'<text x="{at + shift:.1f}" y="{axes.top + 9}" text-anchor="{anchor}">'
            f"{escape(limit_name)}</text>"
        )
    key = f'<rect class="bars" x="{axes.left}" y="4" width="11" height="11" rx="1.5"/>'
    key += f'<text x="{axes.left + 16}" y="14">{escape(names[0])}</text>'
    if expected is not None:
        x = axes.left + 34 + 6.6 * len(names[0])
        key += f'<path class="outline" d="M{x:.1f} 10h14"/>'
        key += f'<text x="{x + 19:.1f}" y="14">{escape(names[1])}</text>'
    return svg([*parts, key], description)


def reliability(calibration: Sequence[Mapping[str, float]], *, description: str) -> Markup:
    """Share that is right against the confidence, with 95 % intervals, and how many there are."""
    low = min(0.5, math.floor(10 * min(row["confidence"] for row in calibration)) / 10)
    axes = _Axes(low, 1.0, 0.0, 1.0, bottom=_HEIGHT - _BOTTOM)
    parts = [_y_axis(axes, _percent)]
    parts.append(_x_axis(axes, ticks(low, 1.0), _percent, "confidence"))
    total = sum(row["count"] for row in calibration)
    for row in calibration:
        height = 0.22 * (axes.bottom - axes.top) * row["count"] / total
        x = axes.x(row["confidence"])
        parts.append(
            f'<rect class="bars" x="{x - 7:.1f}" y="{axes.bottom - height:.1f}" width="14" '
            f'height="{height:.1f}"/>'
        )
    diagonal = f"M{axes.x(low):.1f} {axes.y(low):.1f}L{axes.right} {axes.y(1):.1f}"
    parts.append(f'<path class="mark" d="{diagonal}"/>')
    for row in calibration:
        bounds = exact_interval(round(row["accuracy"] * row["count"]), int(row["count"]))
        x, (bottom, top) = axes.x(row["confidence"]), map(axes.y, bounds)
        parts.append(f'<path class="interval" d="M{x:.1f} {bottom:.1f}V{top:.1f}"/>')
    for row in calibration:
        parts.append(
            f'<circle class="dot train" cx="{axes.x(row["confidence"]):.1f}" '
            f'cy="{axes.y(row["accuracy"]):.1f}" r="4.5"/>'
        )
    parts.append(f'<text x="{axes.left + 8}" y="{axes.top + 16}" class="it">too cautious</text>')
    parts.append(
        f'<text x="{axes.right - 6}" y="{axes.y(0.3):.1f}" class="it" text-anchor="end">'
        "too sure</text>"
    )
    return svg(parts, description)


def interval(low: float, value: float, high: float) -> Markup:
    """A share with its interval as a bar of a table's row; its numbers stand beside it."""
    x = [4 + 88 * share for share in (low, value, high)]
    return Markup(
        '<svg class="interval-bar" viewBox="0 0 96 14" width="96" height="14" aria-hidden="true">'
        f'<path class="rail" d="M4 7H92"/><path class="span" d="M{x[0]:.1f} 7H{x[2]:.1f}"/>'
        f'<circle class="dot train" cx="{x[1]:.1f}" cy="7" r="4"/></svg>'
    )


def stacked(
    nights: Sequence[tuple[str, Sequence[int]]], classes: Sequence[str], *, description: str
) -> Markup:
    """Shares of the classes of each night, from the bottom up; the last night stands out.

    Args:
        nights: a label and a count for each of `classes`; nothing was scored where all are 0.
        classes: names of the style sheet's colours.
        description: what it shows, in a sentence.
    """
    axes = _Axes(0.0, float(len(nights)), 0.0, 1.0, top=10)
    parts = [_y_axis(axes, _percent)]
    width = (axes.right - axes.left) / len(nights)
    gap = min(2.0, 0.15 * width)
    bars: dict[str, list[str]] = {name: [] for name in classes}
    for place, (_, counts) in enumerate(nights):
        total, below = sum(counts), 0.0
        left = axes.x(place) + gap / 2
        for name, count in zip(classes, counts, strict=True):
            if count:
                above = below + count / total
                bars[name].append(
                    f"M{left:.1f} {axes.y(below):.1f}V{axes.y(above):.1f}"
                    f"h{width - gap:.1f}V{axes.y(below):.1f}Z"
                )
                below = above
    for name, shapes in bars.items():
        parts.append(f'<path class="{name} sep" d="{"".join(shapes)}"/>')
    every = max(1, math.ceil(len(nights) / 5))
    shown = range(len(nights) - 1, -1, -every)
    for place in shown:
        x = axes.x(place + 0.5)
        parts.append(
            f'<text x="{x:.1f}" y="{axes.bottom + 16}" text-anchor="middle">'
            f"{escape(nights[place][0])}</text>"
        )
    x = axes.x(len(nights) - 1)
    parts.append(
        f'<rect class="frame" x="{x:.1f}" y="{axes.top - 1}" width="{width:.1f}" '
        f'height="{axes.bottom - axes.top + 2:.1f}"/>'
    )
    return svg(parts, description, height=_HEIGHT - 14)


def spark(values: Sequence[float | None]) -> Markup:
    """A row of small bars, the last one in colour; None: there was no night. Not for reading.

    It begins with the first night there was, below the figures that stand above it.
    """
    top = max((value for value in values if value is not None), default=0.0) or 1.0
    step = 120 / max(len(values), 1)
    first = next((place for place, value in enumerate(values) if value is not None), 0)
    bars = ["", ""]
    for place, value in enumerate(values):
        if value is None:
            continue
        height = max(26 * value / top, 1.0)
        left = (place - first) * step + 0.5
        shape = f"M{left:.1f} 28v-{height:.1f}h{step - 1:.1f}v{height:.1f}Z"
        bars[place == len(values) - 1] += shape
    return Markup(
        '<svg class="spark" viewBox="0 0 120 28" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="past" d="{bars[0]}"/><path class="now" d="{bars[1]}"/></svg>'
    )


def mark(group: int, x: float, y: float) -> str:
    """A shape of its own for each class, so that colour is not all that tells them apart."""
    shapes = (
        "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",  # circle
        "m-3.6-3.6h7.2v7.2h-7.2Z",  # square
        "m0-5l4.8 8.4h-9.6Z",  # triangle
        "m0-5.2l5.2 5.2l-5.2 5.2l-5.2-5.2Z",  # diamond
        "m0 5l4.8-8.4h-9.6Z",  # triangle, downwards
        "m-1.6-5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4Z",  # cross
        "m-2 0a2 2 0 1 0 4 0a2 2 0 1 0-4 0",  # dot, for all others
    )
    return f"M{x} {y}{shapes[min(group, _SHAPES)]}"


def key_mark(group: int, name: str) -> Markup:
    """The mark of a class, for the key beside a chart."""
    return Markup(
        '<svg class="key" viewBox="-7 -7 14 14" width="14" height="14" aria-hidden="true">'
        f'<path class="{name}" d="{mark(group, 0, 0)}"/></svg>'
    )


# Parts


def _y_axis(axes: _Axes, show: Format, label: str = "", *, count: int = 5) -> str:
    parts = []
    for value in ticks(axes.y_low, axes.y_high, count=count):
        y = axes.y(value)
        parts.append(f'<path class="grid" d="M{axes.left} {y:.1f}H{axes.right}"/>')
        at = f'x="{axes.left - 6}" y="{y + 4:.1f}"'
        parts.append(f'<text {at} text-anchor="end">{escape(show(value))}</text>')
    if label:
        parts.append(f'<text x="{axes.left}" y="{axes.top - 4}">{escape(label)}</text>')
    return "".join(parts)


def _x_axis(axes: _Axes, values: Iterable[float], show: Format, label: str) -> str:
    parts = [f'<path class="axis" d="M{axes.left} {axes.bottom}H{axes.right}"/>']
    for value in values:
        parts.append(
            f'<text x="{axes.x(value):.1f}" y="{axes.bottom + 16}" text-anchor="middle">'
            f"{escape(show(value))}</text>"
        )
    middle = (axes.left + axes.right) / 2
    parts.append(
        f'<text x="{middle:.1f}" y="{axes.bottom + 33}" text-anchor="middle">{escape(label)}</text>'
    )
    return "".join(parts)


def svg(
    parts: Iterable[str], description: str, *, width: int = _WIDTH, height: int = _HEIGHT
) -> Markup:
    return Markup(
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(description)}">'
        f"{''.join(parts)}</svg>"
    )
