"""The report of a night: OUT/_reports/YYYY-MM-DD.html, and latest.html, a copy of the newest.

It is made of what is published and of the summaries and thumbnails beside it, never of the
photographs. A night that is scored again, with more photographs, gets its report anew, of all runs
of that night. No reader of the predictions meets it: they pass over names that begin with `_`, and
nothing below has the suffix `.parquet`.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from datetime import date as Date
from datetime import timedelta
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.metrics import drift
from leafnet.metrics.nights import RATE, number_falls, share_differs
from leafnet.metrics.rounding import apart
from leafnet.reporting import charts, maps, pages
from leafnet.scoring import audits, fields, ledger, shares, sheet, units
from leafnet.scoring.ledger import Published
from leafnet.scoring.night import Earlier, Night, earlier_nights, read, summaries
from leafnet.scoring.sheet import REPORTS

LATEST = "latest.html"
_REPORT = re.compile(r"(\d{4}-\d\d-\d\d)\.html")

NIGHTS = 28  # that a night is compared with
# With fewer nights there is no telling what is usual.
_ENOUGH_NIGHTS = 7
_WORTH = 0.05  # beyond the shares of all nights before, that is worth telling


# By what is compared, and whether tonight's is higher.
_DIRECTIONS = {
    ("confidence", False): "The model is less sure tonight than it was on validation",
    ("confidence", True): "The model is surer tonight than it was on validation",
    ("novelty", True): "Tonight's photographs are less like the training photographs than those of "
    "validation were",
    ("novelty", False): "Tonight's photographs are more like the training photographs than those "
    "of validation were",
}


def url(out: str, date: str) -> str:
    """Where the report of the night `date` is."""
    return storage.join(out, REPORTS, f"{date}.html")


def write(out: str, date: str) -> str:
    """Write the report of the night `date` below `out`, and `latest.html` if no later is there.

    Returns:
        Its URL.

    Raises:
        UserError: nothing was published for that night.
    """
    out = storage.absolute(out)
    files = ledger.published(out)
    tonight = [file for file in files if file.date == date]
    if not tonight:
        raise UserError("no-such-night", f"{out} has no predictions for the night {date}")
    page = pages.render("night.html", **_content(out, date, files, tonight))
    target = url(out, date)
    storage.write_bytes(target, page)
    if date == max(file.date for file in files):
        storage.write_bytes(storage.join(out, REPORTS, LATEST), page)
    return target


# The page


def _content(
    out: str, date: str, files: Sequence[Published], tonight: Sequence[Published]
) -> dict[str, Any]:
    first = (Date.fromisoformat(date) - timedelta(days=NIGHTS)).isoformat()
    recent = [file for file in files if first <= file.date <= date]
    by_date = summaries(out, recent)
    last = by_date[date][-1]
    model = last.get("model", {})
    model_id, classes = _model_of(tonight[-1])
    reference = model.get("reference")
    night = read(tonight, model_id=model_id, classes=classes, reference=reference)
    earlier = [earlier_nights(day, found) for day, found in by_date.items() if day < date]
    images = str(last.get("images", ""))
    distributions = _distributions(night, model, reference)
    ordered = _ordered(night, earlier)
    audit = audits.of_night(out, date, model_id)
    keys = {label.name: charts.key_mark(label.group, label.colour) for label in ordered}
    holds = not any(entry["shift"] and entry["shift"].is_large for entry in distributions)
    return {
        "date": date,
        "night": night,
        "runs": by_date[date],
        "summary": last,
        "model": model,
        "earlier": earlier,
        "nights": NIGHTS,
        "enough": _ENOUGH_NIGHTS,
        "tiles": _tiles(night, earlier, date),
        "note": last.get("settings", {}).get("note"),
        "alarms": audits.alarms(audit, model.get("calibration", ()))
        + _alarms(night, earlier, distributions, last),
        "labels": _labels(night, earlier, ordered),
        "shares": _shares(night, earlier, ordered, date),
        "audit": audit,
        "units": units.told(out, tonight),
        "told": shares.told(night.probabilities(), classes, model, holds=holds),
        "fields": fields.of_night(date, recent, last, classes, ordered, holds=holds),
        "distributions": distributions,
        "map": _map(night, ordered),
        "sheet": sheet.sheet(out, night, tonight, images, keys, model.get("review") or {}),
        "failures": sheet.failures(night, images),
        "others": sorted(night.others.items()),
        "before": _report_before(out, date),
        "predictions": [sheet.href(file.url) or file.url for file in tonight],
        "published": [file.url for file in tonight],
        "seconds": sum(run.get("seconds", {}).get("total", 0.0) for run in by_date[date]),
    }


def _model_of(file: Published) -> tuple[str, tuple[str, ...]]:
    """Id and classes of the model that made a published file."""
    with storage.open_file(file.url) as opened:
        metadata = pq.ParquetFile(opened).schema_arrow.metadata
    return metadata[b"model_id"].decode(), tuple(json.loads(metadata[b"class_names"]))


class _Label(NamedTuple):
    name: str
    colour: str  # class of the style sheet
    group: int  # of the marks


def _ordered(night: Night, earlier: Sequence[Earlier]) -> list[_Label]:
    """The classes with their colours: those of the model's order, or the most frequent if many."""
    names = list(night.classes)
    if len(names) > charts.COLOURS:
        total = Counter(night.labels)
        for one in earlier:
            total.update(one.labels)
        names.sort(key=lambda name: -total[name])
    return [
        _Label(name, f"c{i}" if i < charts.COLOURS else "cx", min(i, charts.COLOURS))
        for i, name in enumerate(names)
    ]


def _tiles(night: Night, earlier: Sequence[Earlier], date: str) -> list[dict[str, Any]]:
    """The figures at the top, each with the nights before."""
    by_date = {one.date: one for one in earlier}
    days = [
        (Date.fromisoformat(date) - timedelta(days=back)).isoformat()
        for back in range(NIGHTS, 0, -1)
    ]
    scored = max(night.scored, 1)
    made = []
    for title, status in (("photographs", None), ("for review", "review"), ("failed", "failed")):
        past: list[float | None] = []
        for day in days:
            one = by_date.get(day)
            if one is None or not one.scored:
                past.append(None)
            elif status is None:
                past.append(float(one.scored))
            else:
                past.append(one.status[status] / one.scored)
        known = [value for value in past if value is not None]
        count = night.scored if status is None else night.status[status]
        now = float(count) if status is None else count / scored
        made.append(
            {
                "title": title,
                "status": status or "all",
                "count": count,
                "share": None if status is None else now,
                "usual": median(known) if known else None,
                "nights": len(known),
                "spark": charts.spark([*past, now]) if known else "",
            }
        )
    return made


def _alarms(
    night: Night,
    earlier: Sequence[Earlier],
    distributions: Sequence[dict[str, Any]],
    summary: dict[str, Any],
) -> list[str]:
    """What a person should know first, in plain words with the number behind each."""
    warnings = []
    scored = night.scored
    failed = night.status["failed"] / max(scored, 1)
    allowed = summary.get("settings", {}).get("max_failed")
    if allowed is not None and 100 * failed > allowed:
        warnings.append(
            "{} % of the photographs failed, more than the {} % that are allowed.".format(
                *apart(100 * failed, allowed, ".3g")
            )
        )
    for entry in distributions:
        if entry["shift"] is not None and entry["shift"].is_large:
            index, limit = apart(entry["shift"].psi, entry["shift"].limit, ".2f")
            warnings.append(
                f"{entry['direction']} (population stability index {index}; a shift begins at "
                f"{limit}). {entry['caption']} Look at some "
                "photographs before you trust the counts."
            )
    before = [one for one in earlier if one.scored]
    if night.scored and len(before) >= _ENOUGH_NIGHTS:
        warnings += _unusual(night, before)
    return warnings


def _unusual(night: Night, earlier: Sequence[Earlier]) -> list[str]:
    """What is outside of all nights before, and more than they and chance leave possible."""
    warnings = []
    rate = RATE / (len(night.classes) + 2)
    numbers = [one.scored for one in earlier]
    usual = median(numbers)
    if night.scored < 0.5 * usual and number_falls(night.scored, numbers) < rate:
        warnings.append(
            f"Only {night.scored:,} photographs came; the median of the last {len(earlier)} nights "
            f"is {usual:,.0f}."
        )
    watched = {"for review": (night.status["review"], [one.status["review"] for one in earlier])}
    for label in night.classes:
        watched[label] = (night.labels[label], [one.labels[label] for one in earlier])
    for what, (count, counts) in watched.items():
        shares = [one / of for one, of in zip(counts, numbers, strict=True)]
        now, low, high = count / max(night.scored, 1), min(shares), max(shares)
        if low - _WORTH <= now <= high + _WORTH:
            continue
        if share_differs(count, night.scored, list(zip(counts, numbers, strict=True))) < rate:
            warnings.append(
                f"{pages.percent(now)} are {what}; on the last {len(shares)} nights it was "
                f"{pages.percent(low)} to {pages.percent(high)}."
            )
    return warnings


def _labels(
    night: Night, earlier: Sequence[Earlier], ordered: Sequence[_Label]
) -> list[dict[str, Any]]:
    total = max(night.labels.total(), 1)
    rows = []
    for label in ordered:
        past = [one.labels[label.name] / one.labels.total() for one in earlier if one.labels]
        share = night.labels[label.name] / total
        rows.append(
            {
                "name": label.name,
                "key": charts.key_mark(label.group, label.colour),
                "colour": label.colour,
                "count": night.labels[label.name],
                "share": share,
                "review": night.reviewed[label.name],
                "usual": median(past) if past else None,
            }
        )
    return rows


def _shares(
    night: Night, earlier: Sequence[Earlier], ordered: Sequence[_Label], date: str
) -> dict[str, Any] | None:
    """The chart of class shares over the nights; None: this is the first night."""
    nights = [(one.date, one.labels) for one in earlier if one.labels] + [(date, night.labels)]
    if len(nights) < 2:
        return None
    colours = [f"c{i}" for i in range(min(len(ordered), charts.COLOURS))]
    if len(ordered) > charts.COLOURS:
        colours.append("cx")
    rows = []
    for day, labels in nights:
        counts = [0] * len(colours)
        for label in ordered:
            counts[label.group] += labels[label.name]
        rows.append((day, counts))
    names = [label.name for label in ordered[: charts.COLOURS]]
    if len(ordered) > charts.COLOURS:
        names.append(f"{len(ordered) - charts.COLOURS} other classes")
    short = [(f"{Date.fromisoformat(day):%-d %b}", counts) for day, counts in rows]
    description = (
        f"Shares of {len(names)} classes on {len(rows)} nights; the numbers are in the table."
    )
    return {
        "svg": charts.stacked(short, colours, description=description),
        "keys": [
            (charts.key_mark(group, colours[group]), name) for group, name in enumerate(names)
        ],
        "names": names,
        "rows": rows,
    }


def _distributions(
    night: Night, model: dict[str, Any], reference: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Confidence and novelty of the night against the validation split."""
    limits = model.get("review") or {}
    made = []
    for name, title, found, side in (
        ("confidence", "Confidence", night.confidence, "under"),
        ("novelty", "Novelty", night.novelty, "over"),
    ):
        if found is None or not found.total:
            continue
        expected = drift.histogram(reference[name]) if reference else None
        shift = drift.shift(expected, found) if expected else None
        limit = limits.get(name)
        show = pages.percent if name == "confidence" else sheet.short
        caption = f"Half of tonight's photographs have a {name} {side} {show(found.median())}"
        direction = ""
        if expected is not None:
            caption += f"; on validation it was {show(expected.median())}"
            direction = _DIRECTIONS[name, found.median() > expected.median()]
        caption += "."
        made.append(
            {
                "name": name,
                "title": title,
                "caption": caption,
                "direction": direction,
                "shift": shift,
                "svg": charts.histogram(
                    found,
                    expected,
                    names=("tonight", "validation"),
                    description=caption,
                    label=title.lower(),
                    limit=limit,
                    limit_name=f"review {side} {show(limit)}" if limit is not None else "",
                ),
            }
        )
    return made


def _map(night: Night, ordered: Sequence[_Label]) -> dict[str, Any] | None:
    if not night.places:
        return None
    placed = night.placed()
    # Groups are places in the model's order until here.
    to_group = {label.name: label.group for label in ordered}
    group = np.array([to_group[name] for name in night.classes])[placed.group]
    colours = [f"c{i}" for i in range(charts.COLOURS)] + ["cx"]
    total = sum(len(latitude) for latitude, _, _ in night.places)
    there = [label for label in ordered if label.group in set(group.tolist())]
    drawn = maps.scatter_map(
        placed._replace(group=group),
        colours,
        description=f"Map of {total:,} photographs with positions, marked by class.",
    )
    if drawn is None:
        return None
    return {
        "svg": drawn.svg,
        "outside": drawn.outside,
        "extent": drawn.extent,
        "total": total,
        "sampled": len(placed.latitude),
        "keys": [(charts.key_mark(label.group, label.colour), label.name) for label in there],
    }


def _report_before(out: str, date: str) -> str | None:
    """The date of the newest report before that of `date`."""
    names = storage.list_names(storage.join(out, REPORTS))
    nights = [found[1] for found in map(_REPORT.fullmatch, names) if found]
    return max((night for night in nights if night < date), default=None)
