"""The photographs in the report of a night: those for review, and those that failed."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from markupsafe import Markup

from leafnet.core import storage
from leafnet.reporting import pages
from leafnet.scoring import ledger, thumbnails
from leafnet.scoring.ledger import Published
from leafnet.scoring.night import Night, failure_slugs
from leafnet.scoring.staging import Staging

REPORTS = "_reports"
_THUMBNAILS = "thumbnails"  # below REPORTS; a file for each run
_SECOND = 0.1  # probability from which a second class is shown
# What `thumbnails.wanted` decides on, and what a thumbnail is found by.
_RANKED = ("image", "version", "status", "reason", "confidence", "novelty")
_WHY = {"unlike-training": "unlike the training photographs", "low-confidence": "not sure enough"}
_FAILED = {
    "bad-name": "its name is not valid UTF-8",
    "cannot-read": "could not be read",
    "corrupt": "damaged",
    "empty": "empty file",
    "needs-heif": "HEIC, but its reader is not installed",
    "not-a-file": "a folder, pipe or device",
    "not-an-image": "not a picture",
    "not-finite": "the network gave no number",
    "not-found": "gone before it was read",
    "too-large": "too many pixels",
    "too-many-bytes": "too large a file",
    "truncated": "cut off",
    "unsupported": "an unsupported format",
}


def shown(staging: Staging) -> pa.Table | None:
    """Return the rows of a run that its report shows, at most `thumbnails.LIMIT`; None: none.

    They have thumbnails and, if it was kept, what the network saw.
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
    # Parts of an earlier start with other settings may have other columns.
    table = pa.concat_tables(parts, promote_options="default")
    return table.take(pa.array(thumbnails.wanted(table)))


def keep_thumbnails(staging: Staging, out: str) -> None:
    """Keep at most `thumbnails.LIMIT` thumbnails of a published run for its report.

    Called again after a kill, it writes the same file.
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
    """Add the thumbnails with activation maps, if there are any."""
    try:
        found = staging.read(thumbnails.EXPLAINED)
    except FileNotFoundError:
        return table
    places = ledger.places(ledger.keys(found), table)
    column = found[thumbnails.EXPLAINED].take(pa.array(places, mask=places < 0))
    return table.append_column(thumbnails.EXPLAINED, column)


def _thumbnails_url(out: str, run_id: str) -> str:
    return storage.join(out, REPORTS, _THUMBNAILS, run_id)


def sheet(
    out: str,
    night: Night,
    tonight: Sequence[Published],
    images: str,
    keys: Mapping[str, Markup],
    limits: dict[str, float],
) -> dict[str, Any]:
    """Describe the photographs for review, the most urgent ones first, by the reason for review.

    Args:
        out: of the predictions.
        night: whose photographs they are.
        tonight: the night's published files.
        images: where the photographs came from.
        keys: class -> its mark in charts.
        limits: thresholds of the model, as far as they are known.
    """
    small: dict[tuple[str, str | None], dict[str, bytes]] = {}
    for file in tonight:
        try:
            data = storage.read_bytes(_thumbnails_url(out, file.run_id))
        except FileNotFoundError:  # nothing was for review
            continue
        for row in thumbnails.of(pq.read_table(pa.BufferReader(data))):
            small[row["image"], row["version"]] = row
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in night.waiting.to_pylist() if night.waiting is not None else []:
        slugs = failure_slugs(row["reason"])
        pictures = small.get((row["image"], row["version"]), {})
        groups.setdefault(slugs[0], []).append(
            {
                "name": row["image"].rsplit("/", 1)[-1],
                "path": _below(row["image"], images),
                "href": href(row["image"]),
                "label": row["label"],
                "key": keys[row["label"]],
                "confidence": row["confidence"],
                "second": _second(row),
                "novelty": short(row["novelty"]) if slugs[0] == "unlike-training" else None,
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
    """Name the threshold behind a reason for review, if it is known.

    >>> _limit("low-confidence", {"confidence": 0.755, "novelty": 58.25})
    'confidence under 75.5\\xa0%'
    """
    if slug == "unlike-training" and "novelty" in limits:
        return f"novelty over {short(limits['novelty'])}"
    if slug == "low-confidence" and limits.get("confidence", 2.0) <= 1:
        return f"confidence under {pages.percent(limits['confidence'])}"
    return ""


def _second(row: dict[str, Any]) -> str | None:
    """Name the second class if it is probable enough.

    >>> _second({"label": "rust", "probabilities": {"rust": 0.5, "scab": 0.375, "healthy": 0.125}})
    'or scab 38\\xa0%'
    """
    others = {k: v for k, v in row["probabilities"].items() if k != row["label"]}
    if not others:
        return None
    best = max(others, key=lambda name: others[name])
    return f"or {best} {pages.percent(others[best], 0)}" if others[best] >= _SECOND else None


def failures(night: Night, images: str) -> list[dict[str, Any]]:
    """Describe the photographs that failed, by reason."""
    return [
        {
            "slug": slug,
            "words": _FAILED.get(slug, ""),
            "count": count,
            "named": [
                {"name": _below(image, images), "href": href(image), "message": message}
                for image, message in sorted(night.failures[slug])
            ],
            "left_out": count - len(night.failures[slug]),
        }
        for slug, count in night.failed.most_common()
    ]


def _below(image: str, images: str) -> str:
    """Return the name of `image` relative to `images`.

    >>> _below("/in/a/1.jpg", "/in"), _below("s3://b/x/2.jpg", "s3://b/x/*.jpg")
    ('a/1.jpg', '2.jpg')
    """
    root = images.rstrip("/") + "/"
    return image.removeprefix(root) if image.startswith(root) else image.rsplit("/", 1)[-1]


def href(image: str) -> str | None:
    """Return a link to the photograph; None if a browser cannot follow it.

    Only schemes that merely show a file are linked: a list of photographs may contain anything.

    >>> href("/in/50% off #1.jpg"), href("https://a/b.jpg")
    ('file:///in/50%25%20off%20%231.jpg', 'https://a/b.jpg')
    >>> href("javascript:alert(1)"), href("s3://b/1.jpg"), href("/d/s.parquet#key.jpg")
    (None, None, None)
    """
    if re.match(r"https?://", image):
        return image
    if not image.startswith("/") or ".parquet#" in image:
        return None
    return Path(image).as_uri()


def short(value: float) -> str:
    """Write a novelty with one decimal."""
    return f"{value:.1f}"
