"""The three pictures of a run, as PNG bytes: learning curves, confusion, reliability.

They are drawn through `Figure` alone, so no display is needed and no figure outlives its call.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from leafnet.metrics.mistakes import most_confused
from leafnet.metrics.scores import CALIBRATION_BINS, exact_interval

DPI = 120
# Okabe and Ito 2008, "Color universal design": any colour vision can tell them apart.
BLUE, VERMILLION = "#0072B2", "#D55E00"
INK, GREY, FAINT = "#222222", "#666666", "#DDDDDD"
MAX_CLASSES_WITH_TEXT = 12
MAX_CLASSES = 60  # of more, those with the most errors are drawn
MAX_NAME = 40  # characters of a class name; longer ones lose their middle

# DejaVu Sans comes with matplotlib. A matplotlibrc on the machine shall not change the pictures.
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.parse_math": False,  # a class may have dollar signs in its name
    "text.color": INK,
    "axes.labelcolor": GREY,
    "axes.labelsize": 9.0,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11.0,
    "axes.titlepad": 10.0,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}


def curves_png(history: Sequence[Mapping[str, float]]) -> bytes:
    """Loss and accuracy by epoch, 1200 x 456 pixels.

    The best epoch is the first with the lowest `valid_loss`; it is marked where that is known.

    Args:
        history: one row an epoch with `epoch` and any of `train_loss`, `train_accuracy`,
            `valid_loss` and `valid_accuracy`; a value that is not finite is left out.

    Raises:
        ValueError: no rows.
    """
    if not history:
        raise ValueError("no epochs to draw: the history is empty")
    validated = _rows_with(history, "valid_loss")
    best = min(validated, key=lambda row: row["valid_loss"]) if validated else None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.8), dpi=DPI)
        loss, accuracy = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.06, right=0.94, top=0.86, bottom=0.14, wspace=0.3)
        _curves(loss, history, "loss", best)
        _curves(accuracy, history, "accuracy", best)
        return _png(figure)


def _curves(
    axes: Axes,
    history: Sequence[Mapping[str, float]],
    quantity: str,
    best: Mapping[str, float] | None,
) -> None:
    axes.set_title(quantity.capitalize(), loc="left", weight="bold")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    first, last = history[0]["epoch"], history[-1]["epoch"]
    margin = 0.02 * (last - first) or 0.5
    axes.set_xlim(first - margin, last + margin)
    if first == last:  # the locator would add fractions of an epoch
        axes.set_xticks([first], [f"{first:.0f}"])

    ends, lowest, highest = [], math.inf, -math.inf
    for name, colour in (("train", BLUE), ("valid", VERMILLION)):
        key = f"{name}_{quantity}"
        rows = _rows_with(history, key)
        if not rows:
            continue
        values = [row[key] for row in rows]
        axes.plot(
            [row["epoch"] for row in rows],
            values,
            color=colour,
            linestyle="-" if name == "valid" else (0, (4, 1.2)),  # different in grey print as well
            marker="o" if len(rows) <= 12 else "",
            markersize=4,
        )
        ends.append((values[-1], name, colour))
        lowest, highest = min(lowest, *values), max(highest, *values)
    if not ends:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_yticks([])
        return
    if quantity == "accuracy":
        # Empty space below a good classifier hides what there is to see.
        span = max(1 - lowest, 0.02)
        axes.set_ylim(max(lowest - 0.08 * span, 0), 1 + 0.03 * span)
        axes.yaxis.set_major_formatter(_percent)
    else:
        axes.set_ylim(0, 1.06 * highest or 1)
    _label_ends(axes, last, ends)

    if best is not None:
        axes.axvline(best["epoch"], color=GREY, linewidth=0.9, linestyle=":", zorder=0)
        text = f"best epoch {best['epoch']:.0f}"
        value = best.get(f"valid_{quantity}")
        if value is not None:
            shown = f"{value:.1%}" if quantity == "accuracy" else f"{value:.3g}"
            text += f":  valid {shown}"
            axes.plot(best["epoch"], value, "o", color=VERMILLION, markersize=8, mec="white")
        axes.set_title(text, loc="right", size=9, color=GREY)


def _rows_with(history: Sequence[Mapping[str, float]], key: str) -> list[Mapping[str, float]]:
    return [row for row in history if math.isfinite(row.get(key, math.nan))]


def _label_ends(axes: Axes, epoch: float, ends: list[tuple[float, str, str]]) -> None:
    """Name each line at its right end, at `epoch`, the names far enough apart to be read."""
    low, high = axes.get_ylim()
    line_height = 0.055  # of the axes
    ends = sorted(ends)
    heights = [(value - low) / (high - low) for value, _, _ in ends]
    if len(ends) == 2 and heights[1] - heights[0] < line_height:
        middle = max(sum(heights) / 2, line_height / 2)
        heights = [middle - line_height / 2, middle + line_height / 2]
    for height, (_, name, colour) in zip(heights, ends, strict=True):
        axes.annotate(
            name,
            (epoch, height),
            (10, 0),
            axes.get_xaxis_transform(),
            "offset points",
            color=colour,
            va="center",
        )


def confusion_png(
    confusion: Sequence[Sequence[int]],
    class_names: Sequence[str],
    *,
    title: str,
    of: int | None = None,
) -> bytes:
    """Which class was taken for which, coloured by the share of the true class.

    The size follows the number of classes and the length of their names. Cells have text, the
    count and its share of the row, up to `MAX_CLASSES_WITH_TEXT` classes. Of more than
    `MAX_CLASSES` those with the most errors are drawn, which bounds size and memory.

    Args:
        confusion: [C, C], row = true class, column = predicted class.
        class_names: [C].
        title: what was evaluated, as in "test split".
        of: how many classes there are, if `confusion` is of some of them.

    Raises:
        ValueError: `confusion` is not square, or has another size than `class_names`.
    """
    counts = np.asarray(confusion, np.int64)
    classes = len(class_names)
    if counts.shape != (classes, classes):
        raise ValueError(f"{classes} class names for a confusion of shape {counts.shape}")
    of = of or classes
    if classes > MAX_CLASSES:
        chosen = most_confused(counts, MAX_CLASSES)
        counts, class_names = counts[np.ix_(chosen, chosen)], [class_names[i] for i in chosen]
        classes = MAX_CLASSES
    with_text = classes <= MAX_CLASSES_WITH_TEXT
    support = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(support, 1)
    names = [_shortened(name) for name in class_names]

    with matplotlib.rc_context(STYLE):
        cell = 0.62 if with_text else 0.24  # inches
        side = max(cell * classes, 2.2)
        cell = side / classes
        figure = Figure(figsize=(side, side), dpi=DPI)
        axes = figure.add_axes((0, 0, 1, 1))
        colours = _confusion_colours(shares)
        axes.imshow(colours)
        axes.spines[:].set_visible(False)
        axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=FAINT, linewidth=0.8)
        axes.tick_params(which="both", length=0, pad=6)
        size = 8.5 if with_text else 7.5
        axes.set_yticks(range(classes), names, size=size, color=INK)
        widest = max(map(len, names)) * size * 0.62 / 72  # inches, roughly
        turned: dict[str, Any] = {}
        if widest >= 0.95 * cell:
            turned = {"rotation": 45, "ha": "right", "va": "center", "rotation_mode": "anchor"}
            if cell < 0.4:
                turned = {"rotation": 90, "ha": "center", "va": "top"}
        axes.set_xticks(range(classes), names, size=size, color=INK, **turned)
        axes.set_xlabel("predicted class", labelpad=8)
        axes.set_ylabel("true class", labelpad=8)
        if with_text:
            _write_cells(axes, counts, shares, colours)
        total, right = int(counts.sum()), int(counts.trace())
        lines = [f"{right:,} of {total:,} right" + (f" ({right / total:.1%})" if total else "")]
        if classes < of:
            lines = [f"the {classes} classes with the most errors, of {of:,}"]
        lines.append("blue: right, orange: wrong, darker: a larger share of the row")
        axes.annotate(
            "\n".join(lines), (0, 1), (0, 8), "axes fraction", "offset points", color=GREY, size=8.5
        )
        axes.annotate(
            f"Confusion matrix, {title}",
            (0, 1),
            (0, 36),
            "axes fraction",
            "offset points",
            weight="bold",
            size=11,
        )
        return _png(figure, tight=True)


def _write_cells(
    axes: Axes,
    counts: NDArray[np.int64],
    shares: NDArray[np.float64],
    colours: NDArray[np.float64],
) -> None:
    """Write the count and the share of the row into each cell."""
    for i, j in np.ndindex(counts.shape):
        luminance = float(colours[i, j, :3] @ (0.299, 0.587, 0.114))
        colour = "white" if luminance < 0.6 else INK
        if counts[i, j]:
            count, share = f"{counts[i, j]:,}", _rounded(float(shares[i, j]))
            axes.text(j, i + 0.04, count, ha="center", va="bottom", color=colour, size=9)
            axes.text(j, i + 0.07, share, ha="center", va="top", color=colour, size=7)
        else:
            axes.text(j, i, "0", ha="center", va="center", color="#AAAAAA", size=8)


def _confusion_colours(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """[C, C, 4] for [C, C] shares of a row: blues on the diagonal, oranges off it."""
    right = LinearSegmentedColormap.from_list("right", ["#FFFFFF", "#6BAED6", "#08519C"])
    wrong = LinearSegmentedColormap.from_list("wrong", ["#FFFFFF", "#FDAE6B", "#A63603"])
    # The root keeps an error of a few per cent visible on white.
    colours = wrong(np.sqrt(shares))
    diagonal = np.arange(len(shares))
    colours[diagonal, diagonal] = right(shares[diagonal, diagonal])
    return colours


def _rounded(share: float) -> str:
    """A share in whole per cent that says 0 % and 100 % only of none and all.

    >>> [_rounded(share) for share in (0.001, 0.125, 0.999, 1.0)]
    ['<1%', '12%', '>99%', '100%']
    """
    if 0 < share < 0.005:
        return "<1%"
    if 0.995 <= share < 1:
        return ">99%"
    return f"{share:.0%}"


def _shortened(name: str) -> str:
    if len(name) <= MAX_NAME:
        return name
    # Class names of one crop share their beginning, so more of the end is kept.
    return name[:12] + "\N{HORIZONTAL ELLIPSIS}" + name[-(MAX_NAME - 13) :]


def reliability_png(
    calibration: Sequence[Mapping[str, float]],
    *,
    ece: float,
    before: Sequence[Mapping[str, float]] = (),
    ece_before: float = math.nan,
) -> bytes:
    """Accuracy against the probability of the prediction, 576 x 720 pixels.

    The bars around a point are its 95 % interval; the histogram below has the same bins.

    Args:
        calibration: `scores(...)["calibration"]`, rows of `confidence`, `accuracy` and `count`.
        ece: `scores(...)["ece"]`.
        before: the same before the temperature was fitted, drawn hollow; empty: not drawn.
        ece_before: likewise.

    Raises:
        ValueError: no rows.
    """
    if not calibration:
        raise ValueError("no bins to draw: the calibration is empty")
    confidence = np.array([row["confidence"] for row in calibration])
    accuracy = np.array([row["accuracy"] for row in calibration])
    count = np.array([row["count"] for row in calibration])
    bounds = np.array(
        [exact_interval(round(a * n), n) for a, n in zip(accuracy, count.tolist(), strict=True)]
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 6.0), dpi=DPI)
        axes, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        figure.subplots_adjust(left=0.15, right=0.95, top=0.92, bottom=0.09, hspace=0.12)

        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(0.03, 0.94, "too cautious", color=GREY, style="italic")
        axes.text(0.97, 0.03, "too sure", color=GREY, style="italic", ha="right")
        if before:
            x, y = ([row[name] for row in before] for name in ("confidence", "accuracy"))
            axes.plot(x, y, "o", color="none", mec=VERMILLION, markersize=6, clip_on=False)
        axes.vlines(confidence, bounds[:, 0], bounds[:, 1], color=BLUE, linewidth=1.4, alpha=0.45)
        axes.plot(confidence, accuracy, "o", color=BLUE, markersize=6, mec="white", clip_on=False)
        axes.set_ylim(0, 1)
        axes.set_ylabel("share that is right")
        axes.yaxis.set_major_formatter(_percent)
        axes.set_title("Reliability", loc="left", weight="bold")
        subtitle = f"calibration error (ECE) {ece:.3f}"
        if before:
            subtitle = f"ECE {ece:.3f}, before calibration {ece_before:.3f} (hollow)"
        axes.set_title(subtitle, loc="right", size=9, color=GREY)
        axes.grid(color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)

        bins = np.ceil(confidence * CALIBRATION_BINS) - 1
        width = 1 / CALIBRATION_BINS
        histogram.bar((bins + 0.5) * width, count / count.sum(), 0.85 * width, color=BLUE)
        histogram.set_ylabel("examples")
        histogram.yaxis.set_major_locator(MaxNLocator(nbins=2))
        histogram.yaxis.set_major_formatter(_percent)
        histogram.set_xlim(0, 1)
        histogram.xaxis.set_major_formatter(_percent)
        histogram.set_xlabel("probability of the predicted class")
        figure.align_ylabels()
        return _png(figure)


def _percent(value: float, position: float) -> str:
    """A label of an axis of shares, called by matplotlib."""
    return f"{round(100 * value, 2):g}%"


def _png(figure: Figure, *, tight: bool = False) -> bytes:
    FigureCanvasAgg(figure)
    sink = io.BytesIO()
    # Without the Software entry the bytes depend on the picture only; there is no date in them.
    figure.savefig(
        sink,
        format="png",
        metadata={"Software": None},
        bbox_inches="tight" if tight else None,
        pad_inches=0.15,
    )
    return sink.getvalue()
