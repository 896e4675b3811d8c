"""What a night says of each field, beside the nights before.

A field is what a regular expression finds in the URL of a photograph, or the polygon of a GeoJSON
file (RFC 7946) in which its EXIF position lies. Nothing is guessed: a photograph without a match,
without a position or outside of all polygons is told as such.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date as Date
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.core.settings import compile_pattern
from leafnet.metrics import prevalence
from leafnet.metrics.estimate import Estimate
from leafnet.metrics.prevalence import Bias
from leafnet.metrics.scores import exact_interval
from leafnet.metrics.slices import NO_MATCH
from leafnet.reporting import charts, maps
from leafnet.scoring import shares
from leafnet.scoring.ledger import Published

Floats = NDArray[np.float64]
Names = NDArray[np.str_]
Naming = Callable[[pa.Table], Names]

NO_POSITION, OUTSIDE = "(no position)", "(outside)"
NO_FIELD = (NO_MATCH, NO_POSITION, OUTSIDE)

_COLUMNS = ["image", "latitude", "longitude", "probabilities"]
_DAYS = 7
_CLASSES = 6  # in the table; the most frequent of more
_CHANCE = 0.05  # of the changes that are called so, those that chance made


def naming(setting: str, *, flag: str) -> Naming:
    """What names the field, or the unit, of each row of a night.

    Args:
        setting: a regular expression with at most one group, or the URL of a GeoJSON file.
        flag: that it was given with.

    Raises:
        UserError: it is neither.
    """
    if setting.endswith((".geojson", ".json")):
        polygons = _polygons(setting)
        return lambda rows: _in_polygons(rows, polygons)
    pattern = compile_pattern(setting, flag=flag)
    if pattern.groups > 1:
        raise UserError(
            "bad-regex", f"{flag} {setting!r} has {pattern.groups} groups; make all but one (?:…)"
        )

    def by_pattern(rows: pa.Table) -> Names:
        found = map(pattern.search, rows["image"].to_pylist())
        names = [(match and match[pattern.groups]) or NO_MATCH for match in found]
        return np.array(names, np.str_)

    return by_pattern


def refuse_no_match(setting: str, photographs: pa.Table, *, flag: str) -> None:
    """Refuse a regular expression that finds nothing in any photograph of a listing.

    Raises:
        UserError: it does not, or is none.
    """
    named = naming(setting, flag=flag)
    if "json" not in setting.rpartition(".")[2] and (named(photographs) == NO_MATCH).all():
        raise UserError(
            "matches-nothing",
            f"{flag} {setting!r} finds nothing in {photographs.num_rows:,} photographs, of which "
            f"the first is {photographs['image'][0]}",
        )


# Polygons


class _Polygon(NamedTuple):
    name: str
    rings: tuple[Floats, ...]  # [P, 2] of longitude and latitude; holes too, and all parts


def _polygons(url: str) -> list[_Polygon]:
    try:
        document = storage.read_json(url)
        features = document["features"] if document["type"] == "FeatureCollection" else [document]
        return [_polygon(feature, place) for place, feature in enumerate(features, start=1)]
    except FileNotFoundError:
        raise UserError("no-fields", f"{url} does not exist") from None
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            "bad-fields",
            f"{url} is not GeoJSON with polygons, each with a property name ({error})",
        ) from None


def _polygon(feature: Mapping[str, Any], place: int) -> _Polygon:
    shape = feature["geometry"]
    coordinates = shape["coordinates"]
    if shape["type"] not in ("Polygon", "MultiPolygon"):
        raise ValueError(f"the {place}. feature is a {shape['type']}")
    parts = [coordinates] if shape["type"] == "Polygon" else coordinates
    rings = [ring for part in parts for ring in part]
    name = (feature.get("properties") or {}).get("name", feature.get("id"))
    if name is None:
        raise ValueError(f"the {place}. feature has no name")
    return _Polygon(str(name), tuple(np.array(ring, float)[:, :2] for ring in rings))


def _in_polygons(rows: pa.Table, polygons: Iterable[_Polygon]) -> Names:
    latitude, longitude = (
        pc.fill_null(rows[name].cast(pa.float64()), np.nan).to_numpy()
        for name in ("latitude", "longitude")
    )
    found = np.full(len(latitude), OUTSIDE, object)
    found[np.isnan(latitude) | np.isnan(longitude)] = NO_POSITION
    for polygon in polygons:
        inside = np.zeros(len(found), bool)
        for ring in polygon.rings:
            inside ^= inside_ring(longitude, latitude, ring)
        found[inside & (found == OUTSIDE)] = polygon.name
    return found.astype(np.str_)


def inside_ring(x: Floats, y: Floats, ring: Floats) -> NDArray[np.bool_]:
    """Which points [N] lie in a closed ring [P, 2], by how often a ray to the right crosses it.

    Shimrat 1962, "Algorithm 112: position of point relative to polygon", doi:10.1145/368637.368653.

    >>> square = np.array([[0.0, 0], [2, 0], [2, 2], [0, 2], [0, 0]])
    >>> inside_ring(np.array([1.0, 3, 1]), np.array([1.0, 1, -1]), square).tolist()
    [True, False, False]
    """
    inside = np.zeros(len(x), bool)
    for (x1, y1), (x2, y2) in itertools.pairwise(ring):
        if y1 != y2:
            crosses = (y1 > y) != (y2 > y)
            inside ^= crosses & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
    return inside


# The table


class _Field(NamedTuple):
    """The photographs of a field on some nights."""

    answers: NDArray[np.float32]  # [N, C]
    places: Floats  # [P, 2] of latitude and longitude


def of_night(
    date: str,
    files: Sequence[Published],
    summary: Mapping[str, Any],
    classes: Sequence[str],
    labels: Sequence[tuple[str, str, int]],
    *,
    holds: bool,
) -> dict[str, Any] | None:
    """`table` of a night as its last `summary` was told to; None: without fields.

    Args:
        date: of the night.
        files: of it and of those before.
        summary: of its last run.
        classes: of the model.
        labels: name, colour and group of each class.
        holds: the night is like validation, so that its shares can be corrected.
    """
    setting = summary.get("settings", {}).get("field")
    if setting is None:
        return None
    model = summary["model"]
    return table(
        date,
        files,
        named=naming(setting, flag="--field"),
        model_id=model["model_id"],
        classes=classes,
        bias=shares.bias_of(model) if holds else None,
        marks={name: (group, colour) for name, colour, group in labels},
    )


def table(
    date: str,
    files: Sequence[Published],
    *,
    named: Naming,
    model_id: str,
    classes: Sequence[str],
    bias: Bias | None,
    marks: Mapping[str, tuple[int, str]],
) -> dict[str, Any] | None:
    """What the report says by field; None: no photograph could be scored.

    Args:
        date: of the night.
        files: of it and of those before.
        named: of `naming`.
        model_id: of the night; photographs of other models are left out.
        classes: of the model.
        bias: by which the shares are corrected; None: they are counted.
        marks: group and colour of each class on a map.
    """
    first = (Date.fromisoformat(date) - timedelta(days=_DAYS)).isoformat()
    nights: dict[str, dict[str, _Field]] = {}
    for file in files:
        if first <= file.date <= date:
            of_date = nights.setdefault(file.date, {})
            for name, found in _read(file, named, model_id, classes).items():
                of_date[name] = _together([of_date[name], found]) if name in of_date else found
    tonight = nights.pop(date, {})
    if not tonight:
        return None
    counted = _counted(np.concatenate([field.answers for field in tonight.values()]))
    shown = np.sort(np.argsort(-counted, kind="stable")[:_CLASSES])
    told = {name: _row(name, nights, tonight[name], bias, shown) for name in _ordered(tonight)}
    _call_changes([cell for row in told.values() for cell in row["cells"]])
    return {
        "corrected": bias is not None,
        "classes": [classes[place] for place in shown],
        "left_out": len(classes) - len(shown),
        "changed": [n for n, row in told.items() if any(c["change"] for c in row["cells"])],
        "rows": list(told.values()),
        **_map(tonight, told, [classes[place] for place in shown], marks),
    }


def _read(
    file: Published, named: Naming, model_id: str, classes: Sequence[str]
) -> dict[str, _Field]:
    with storage.open_file(file.url) as opened:
        parquet = pq.ParquetFile(opened)
        if (parquet.schema_arrow.metadata or {}).get(b"model_id", b"").decode() != model_id:
            return {}
        rows = parquet.read(columns=_COLUMNS)
    rows = rows.filter(pc.is_valid(rows["probabilities"]))
    if not rows.num_rows:
        return {}
    answers = shares.probabilities(rows["probabilities"])
    places = np.stack(
        [pc.fill_null(rows[name], np.nan).to_numpy() for name in ("latitude", "longitude")], axis=1
    )
    names, of = np.unique(named(rows), return_inverse=True)
    return {
        str(name): _Field(answers[of == i], places[of == i][~np.isnan(places[of == i]).any(axis=1)])
        for i, name in enumerate(names)
    }


def _together(fields: Sequence[_Field]) -> _Field:
    return _Field(*(np.concatenate(part) for part in zip(*fields, strict=True)))


def _ordered(names: Iterable[str]) -> list[str]:
    """By name, numbers by their size, and those without a field last."""

    def rank(name: str) -> tuple[bool, list[tuple[bool, int, str]]]:
        parts = re.split(r"(\d+)", name)
        return name in NO_FIELD, [
            (part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts if part
        ]

    return sorted(names, key=rank)


def _counted(answers: NDArray[np.float32]) -> Floats:
    """The share [C] of each label."""
    return np.bincount(answers.argmax(axis=1), minlength=answers.shape[1]) / len(answers)


def _row(
    name: str,
    nights: Mapping[str, Mapping[str, _Field]],
    tonight: _Field,
    bias: Bias | None,
    shown: NDArray[np.int64],
) -> dict[str, Any]:
    before = {date: fields[name] for date, fields in nights.items() if name in fields}
    past = [before[max(before)], _together(list(before.values()))] if before else []
    counted = _counted(tonight.answers)
    count = len(tonight.answers)
    if bias is None:
        of = [Estimate(c, *exact_interval(round(c * count), count)) for c in counted]
        earlier = [_counted(field.answers) for field in past]
        chances = [np.ones(len(counted)) for _ in past]
    else:
        found = prevalence.estimate(tonight.answers, bias)
        of = [Estimate(*map(float, part)) for part in zip(*found[:3], strict=True)]
        others = [prevalence.estimate(field.answers, bias) for field in past]
        earlier = [other.value for other in others]
        chances = [prevalence.chance_of_change(found, other) for other in others]
    cells = [
        {
            "share": of[place],
            "counted": float(counted[place]),
            "night": float(earlier[0][place]) if past else None,
            "week": float(earlier[1][place]) if past else None,
            "chances": [float(chance[place]) for chance in chances],
            "change": "",
        }
        for place in shown
    ]
    return {"name": name, "photographs": count, "cells": cells}


def _call_changes(cells: Sequence[dict[str, Any]]) -> None:
    """Say of each cell whether it changed: of all that is called so, one in twenty is chance.

    Benjamini and Hochberg 1995, doi:10.1111/j.2517-6161.1995.tb02031.x: with hundreds of fields,
    chance alone would else change dozens.
    """
    # Half a second of the start of every job that may need it.
    from scipy.stats import false_discovery_control

    chances = [chance for cell in cells for chance in cell["chances"]]
    if not chances:
        return
    adjusted = iter(false_discovery_control(chances))
    for cell in cells:
        real = [next(adjusted) < _CHANCE for _ in cell["chances"]]
        cell["change"] = "; ".join(
            f"{'more' if cell['share'].value > cell[when] else 'less'} than last {when}"
            for when, is_real in zip(("night", "week"), real, strict=False)
            if is_real
        )


def _map(
    tonight: Mapping[str, _Field],
    rows: Mapping[str, Any],
    classes: Sequence[str],
    marks: Mapping[str, tuple[int, str]],
) -> dict[str, Any]:
    there = [name for name, field in tonight.items() if len(field.places) and name not in NO_FIELD]
    if not there:
        return {"map": None}
    middle = np.stack([np.median(tonight[name].places, axis=0) for name in there])
    most = [
        classes[int(np.argmax([cell["share"].value for cell in rows[name]["cells"]]))]
        for name in there
    ]
    group = np.array([marks[name][0] for name in most])
    colours = [f"c{i}" for i in range(charts.COLOURS)] + ["cx"]
    drawn = maps.scatter_map(
        maps.Placed(middle[:, 0], middle[:, 1], group),
        colours,
        description=f"Map of {len(there)} fields, marked by the class of which each has most.",
    )
    keys = [(charts.key_mark(*marks[name]), name) for name in classes if name in most]
    return {"map": drawn, "keys": keys}
