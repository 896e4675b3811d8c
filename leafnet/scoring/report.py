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
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.metrics import drift
from leafnet.metrics.nights import RATE, number_falls, share_differs
from leafnet.reporting import charts, pages
from leafnet.scoring import audits, fields, ledger, shares, thumbnails, units
from leafnet.scoring.ledger import Published
from leafnet.scoring.night import Earlier, Night, earlier_nights, failure_slugs, read, summaries
from leafnet.scoring.staging import Staging

REPORTS = "_reports"
LATEST = "latest.html"
_REPORT = re.compile(r"(\d{4}-\d\d-\d\d)\.html")
_THUMBNAILS = "thumbnails"  # below REPORTS; a file for each run

NIGHTS = 28  # that a night is compared with
# Fewer nights say little of what is usual.
_ENOUGH_NIGHTS = 7
_WORTH = 0.05  # beyond the shares of all nights before, that is worth telling
_SECOND = 0.1  # probability of another class that is worth telling

# What `thumbnails.wanted` decides on, and what a thumbnail is found by.
_RANKED = ("image", "version", "status", "reason", "confidence", "novelty")

_WHY = {"unlike-training": "unlike the training photographs", "low-confidence": "not sure enough"}
# By what is compared, and whether tonight's is higher.
_DIRECTIONS = {
    ("confidence", False): "The model is less sure tonight than it was on validation",
    ("confidence", True): "The model is surer tonight than it was on validation",
    ("novelty", True): "Tonight's photographs are less like the training photographs than those of "
    "validation were",
    ("novelty", False): "Tonight's photographs are more like the training photographs than those "
    "of validation were",
}
_FAILED = {
    "bad-name": "its name is not valid UTF-8",
    "cannot-read": "could not be read",
    "corrupt": "damaged",
    "empty": "empty file",
    "needs-heif": "HEIC, whose reader is not installed",
    "not-a-file": "a folder, pipe or device",
    "not-an-image": "not a picture",
    "not-finite": "the network gave no number",
    "not-found": "gone when it was to be read",
    "too-large": "too many pixels",
    "too-many-bytes": "too large a file",
    "truncated": "cut off",
    "unsupported": "a kind of picture that is not read",
}


def url(out: str, date: str) -> str:
    """Where the report of the night `date` is."""
    return storage.join(out, REPORTS, f"{date}.html")


def shown(staging: Staging) -> pa.Table | None:
    """The rows of a run that its report shows, at most `thumbnails.LIMIT`; None: nothing to see.

    They have thumbnails, and what the network saw where it was kept.
    """
    found: list[pa.Table] = []
    for name in staging.kept:
        part = staging.read(name)
        if thumbnails.COLUMN in part.column_names:
            found.append(part.filter(pc.is_valid(part[thumbnails.COLUMN])))
        # A long night has many parts, with 40 kB of each photograph where maps are wanted.
        if sum(map(len, found)) > 4 * thumbnails.LIMIT:
            found = [_first(found)]
    return _first(found) if any(map(len, found)) else None


def _first(parts: Sequence[pa.Table]) -> pa.Table:
    # Parts of a start that was told to keep less, or more, have other columns.
    table = pa.concat_tables(parts, promote_options="default")
    return table.take(pa.array(thumbnails.wanted(table)))


def keep_thumbnails(staging: Staging, out: str) -> None:
    """Keep the thumbnails of a run that is published, for its report; at most `thumbnails.LIMIT`.

    The same again, after a kill, writes the same file.
    """
    table = shown(staging)
    if table is None:
        return
    table = _with_explained(table.select([*_RANKED, thumbnails.COLUMN]), staging)
    sink = pa.BufferOutputStream()
    # Photographs are compressed already.
    pq.write_table(table, sink, compression="none")
    storage.write_bytes(_thumbnails_url(out, staging.run_id), sink.getvalue().to_pybytes())


def _with_explained(table: pa.Table, staging: Staging) -> pa.Table:
    """`table` with the thumbnails that were explained, if any was."""
    try:
        found = staging.read(thumbnails.EXPLAINED)
    except FileNotFoundError:
        return table
    places = ledger.places(ledger.keys(found), table)
    column = found[thumbnails.EXPLAINED].take(pa.array(places, mask=places < 0))
    return table.append_column(thumbnails.EXPLAINED, column)


def _thumbnails_url(out: str, run_id: str) -> str:
    return storage.join(out, REPORTS, _THUMBNAILS, run_id)


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
        "sheet": _sheet(out, night, tonight, images, ordered, model.get("review") or {}),
        "failures": _failures(night, images),
        "others": sorted(night.others.items()),
        "before": _report_before(out, date),
        "predictions": [_href(file.url) or file.url for file in tonight],
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
    told = []
    scored = night.scored
    failed = night.status["failed"] / max(scored, 1)
    allowed = summary.get("settings", {}).get("max_failed")
    if allowed is not None and 100 * failed > allowed:
        told.append(
            f"{pages.percent(failed)} of the photographs failed, more than the {allowed:g} % that "
            "are allowed."
        )
    for entry in distributions:
        if entry["shift"] is not None and entry["shift"].is_large:
            told.append(
                f"{entry['direction']} (population stability index {entry['shift'].psi:.2f}; a "
                f"shift begins at {entry['shift'].limit:.2f}). {entry['told']} Look at some "
                "photographs before you trust the counts."
            )
    before = [one for one in earlier if one.scored]
    if night.scored and len(before) >= _ENOUGH_NIGHTS:
        told += _unusual(night, before)
    return told


def _unusual(night: Night, earlier: Sequence[Earlier]) -> list[str]:
    """What is outside of all nights before, and more than they and chance leave possible."""
    told = []
    rate = RATE / (len(night.classes) + 2)
    numbers = [one.scored for one in earlier]
    usual = median(numbers)
    if night.scored < 0.5 * usual and number_falls(night.scored, numbers) < rate:
        told.append(
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
            told.append(
                f"{pages.percent(now)} are {what}; on the last {len(shares)} nights it was "
                f"{pages.percent(low)} to {pages.percent(high)}."
            )
    return told


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
    told = f"Shares of {len(names)} classes on {len(rows)} nights; the numbers are in the table."
    return {
        "svg": charts.stacked(short, colours, told=told),
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
        show = pages.percent if name == "confidence" else _short
        told = f"Half of tonight's photographs have a {name} {side} {show(found.median())}"
        direction = ""
        if expected is not None:
            told += f"; on validation it was {show(expected.median())}"
            direction = _DIRECTIONS[name, found.median() > expected.median()]
        told += "."
        made.append(
            {
                "name": name,
                "title": title,
                "told": told,
                "direction": direction,
                "shift": shift,
                "svg": charts.histogram(
                    found,
                    expected,
                    names=("tonight", "validation"),
                    told=told,
                    label=title.lower(),
                    limit=limit,
                    limit_name=f"review {side} {show(limit)}" if limit is not None else "",
                ),
            }
        )
    return made


def _short(value: float) -> str:
    return f"{value:.1f}"


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
    drawn = charts.scatter_map(
        placed._replace(group=group),
        colours,
        told=f"Map of {total:,} photographs with positions, marked by class.",
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


def _sheet(
    out: str,
    night: Night,
    tonight: Sequence[Published],
    images: str,
    ordered: Sequence[_Label],
    limits: dict[str, float],
) -> dict[str, Any]:
    """The photographs for review, those that a person should see first, by why."""
    small: dict[tuple[str, str | None], dict[str, bytes]] = {}
    for file in tonight:
        try:
            data = storage.read_bytes(_thumbnails_url(out, file.run_id))
        except FileNotFoundError:  # nothing was for review
            continue
        for row in thumbnails.of(pq.read_table(pa.BufferReader(data))):
            small[row["image"], row["version"]] = row
    colour = {label.name: charts.key_mark(label.group, label.colour) for label in ordered}
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in night.waiting.to_pylist() if night.waiting is not None else []:
        slugs = failure_slugs(row["reason"])
        pictures = small.get((row["image"], row["version"]), {})
        groups.setdefault(slugs[0], []).append(
            {
                "name": row["image"].rsplit("/", 1)[-1],
                "path": _below(row["image"], images),
                "href": _href(row["image"]),
                "label": row["label"],
                "key": colour[row["label"]],
                "confidence": row["confidence"],
                "second": _second(row),
                "novelty": _short(row["novelty"]) if slugs[0] == "unlike-training" else None,
                "both": len(slugs) > 1,
                "jpeg": pictures.get(thumbnails.COLUMN),
                "explained": pictures.get(thumbnails.EXPLAINED),
            }
        )
    return {
        "groups": [
            {
                "title": _WHY.get(slug, slug),
                "limit": _limit(slug, limits),
                "total": night.why[slug],
                "cards": cards,
            }
            for slug, cards in sorted(groups.items(), key=lambda item: item[0] != "unlike-training")
        ],
        "maps": any(card["explained"] for cards in groups.values() for card in cards),
        "shown": sum(map(len, groups.values())),
        "left_out": night.status["review"] - sum(map(len, groups.values())),
    }


def _limit(slug: str, limits: dict[str, float]) -> str:
    """The threshold that a reason for review speaks of, as far as it is known.

    >>> _limit("low-confidence", {"confidence": 0.755, "novelty": 58.25})
    'confidence under 75.5\\xa0%'
    """
    if slug == "unlike-training" and "novelty" in limits:
        return f"novelty over {_short(limits['novelty'])}"
    if slug == "low-confidence" and limits.get("confidence", 2.0) <= 1:
        return f"confidence under {pages.percent(limits['confidence'])}"
    return ""


def _second(row: dict[str, Any]) -> str | None:
    """What else it may be, where that is worth a thought.

    >>> _second({"label": "rust", "probabilities": {"rust": 0.5, "scab": 0.375, "healthy": 0.125}})
    'or scab 38\\xa0%'
    """
    others = {k: v for k, v in row["probabilities"].items() if k != row["label"]}
    if not others:
        return None
    best = max(others, key=lambda name: others[name])
    return f"or {best} {pages.percent(others[best], 0)}" if others[best] >= _SECOND else None


def _failures(night: Night, images: str) -> list[dict[str, Any]]:
    return [
        {
            "slug": slug,
            "words": _FAILED.get(slug, ""),
            "count": count,
            "named": [
                {"name": _below(image, images), "href": _href(image), "told": told}
                for image, told in sorted(night.failures[slug])
            ],
            "left_out": count - len(night.failures[slug]),
        }
        for slug, count in night.failed.most_common()
    ]


def _below(image: str, images: str) -> str:
    """`image` as it is called below `images`.

    >>> _below("/in/a/1.jpg", "/in"), _below("s3://b/x/2.jpg", "s3://b/x/*.jpg")
    ('a/1.jpg', '2.jpg')
    """
    root = images.rstrip("/") + "/"
    return image.removeprefix(root) if image.startswith(root) else image.rsplit("/", 1)[-1]


def _href(image: str) -> str | None:
    """A link to the photograph; None where a browser cannot follow one.

    Only of schemes that do nothing but show a file: a list of photographs may hold anything.

    >>> _href("/in/50% off #1.jpg"), _href("https://a/b.jpg")
    ('file:///in/50%25%20off%20%231.jpg', 'https://a/b.jpg')
    >>> _href("javascript:alert(1)"), _href("s3://b/1.jpg"), _href("/d/s.parquet#key.jpg")
    (None, None, None)
    """
    if re.match(r"https?://", image):
        return image
    if not image.startswith("/") or ".parquet#" in image:
        return None
    return Path(image).as_uri()


def _report_before(out: str, date: str) -> str | None:
    """The date of the newest report before that of `date`."""
    names = storage.list_names(storage.join(out, REPORTS))
    nights = [found[1] for found in map(_REPORT.fullmatch, names) if found]
    return max((night for night in nights if night < date), default=None)
