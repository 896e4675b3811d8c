"""What is told by field, of nights whose shares are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from leafnet.core.errors import UserError
from leafnet.scoring import fields, ledger, report, shares
from leafnet.scoring.night import summaries
from tests.support import stored
from tests.support.markup import Parsed, check

EARLY, HEALTHY, LATE = range(3)


def logits(labels: list[int], seed: int = 0) -> np.ndarray:
    """What a model says that is right in nine of ten."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal(0, 1, (len(labels), 3)).astype(np.float32)
    drawn[np.arange(len(labels)), labels] += 3
    return drawn


def night(out: Path, date: str, ill: dict[str, float], *, each: int = 60, **more: Any) -> None:
    """A night with `each` photographs of each field, the given share of which is ill."""
    names, labels = [], []
    for field, share in ill.items():
        names += [f"field-{field}/leaf_{i:04d}.jpg" for i in range(each)]
        labels += [LATE if i < share * each else HEALTHY for i in range(each)]
    stored.write_night(
        out,
        date,
        images="/in",
        names=names,
        logits=logits(labels, seed=int(date[-2:])),
        seed=int(date[-2:]),
        field=r"/field-(\w+)/",
        **more,
    )


def page(out: Path, date: str) -> Parsed:
    return check(Path(report.write(str(out), date)).read_bytes())


def of(out: Path, date: str) -> dict[str, dict[str, Any]]:
    """Of each field, what is told of the late blight in it."""
    files = ledger.published(str(out))
    summary = summaries(str(out), files)[date][-1]
    found = fields.table(
        date,
        files,
        named=fields.naming(summary["settings"]["field"], flag="--field"),
        model_id=summary["model"]["model_id"],
        classes=stored.CLASSES,
        bias=shares.bias_of(summary["model"]),
        marks={name: (i, f"c{i}") for i, name in enumerate(stored.CLASSES)},
    )
    assert found is not None
    place = found["classes"].index(stored.CLASSES[LATE])
    return {row["name"]: row["cells"][place] for row in found["rows"]}


def test_the_share_of_each_field_and_what_changed(tmp_path: Path) -> None:
    night(tmp_path, "2026-11-20", {"7": 0.1, "12": 0.5, "9": 0.3}, each=150)
    night(tmp_path, "2026-11-23", {"7": 0.1, "12": 0.5}, each=150)
    night(tmp_path, "2026-11-24", {"12": 0.5, "7": 0.6, "30": 0.2})
    told = of(tmp_path, "2026-11-24")
    assert list(told) == ["7", "12", "30"]
    for name, share in {"7": 0.6, "12": 0.5, "30": 0.2}.items():
        assert told[name]["share"].value == pytest.approx(share, abs=0.1)
        assert told[name]["share"].low <= share <= told[name]["share"].high
    assert told["7"]["change"] == "more than last night; more than last week"
    assert told["12"]["change"] == ""
    assert told["7"]["week"] == pytest.approx(0.1, abs=0.06)
    assert told["30"]["night"] is None
    assert told["30"]["week"] is None


def test_the_page_has_a_table_by_field(tmp_path: Path) -> None:
    night(tmp_path, "2026-11-23", {"7": 0.1, "12": 0.5})
    night(tmp_path, "2026-11-24", {"7": 0.7, "12": 0.5}, placed=True)
    shown = page(tmp_path, "2026-11-24")
    assert "2 fields" in shown.text
    assert "Changed: 7." in shown.text.replace(" .", ".")
    assert "more than last night" in shown.text
    assert "Each mark is a field" in shown.text
    without = page(tmp_path, "2026-11-23")
    assert "No field changed" in without.text
    assert "than last night" not in without.text


def test_a_night_unlike_validation_is_counted_and_not_judged(tmp_path: Path) -> None:
    night(tmp_path, "2026-11-23", {"7": 0.1})
    night(tmp_path, "2026-11-24", {"7": 0.7}, novelty=90.0)
    shown = page(tmp_path, "2026-11-24").text
    assert "Tonight is unlike validation" in shown
    assert "whether a change is more than chance cannot be told" in shown
    assert "more than last night" not in shown


def test_chance_alone_changes_few_of_many_fields(tmp_path: Path) -> None:
    ill = {str(i): 0.3 for i in range(60)}
    night(tmp_path, "2026-11-23", ill, each=20)
    night(tmp_path, "2026-11-24", ill, each=20)
    assert sum(bool(cell["change"]) for cell in of(tmp_path, "2026-11-24").values()) <= 2


def rows(*places: tuple[float, float] | None) -> pa.Table:
    return pa.table(
        {
            "image": [f"/in/{i}.jpg" for i in range(len(places))],
            "latitude": pa.array([place and place[0] for place in places], pa.float64()),
            "longitude": pa.array([place and place[1] for place in places], pa.float64()),
        }
    )


def test_polygons(tmp_path: Path) -> None:
    square = [[11, 52], [12, 52], [12, 53], [11, 53], [11, 52]]
    hole = [[11.4, 52.4], [11.6, 52.4], [11.6, 52.6], [11.4, 52.6], [11.4, 52.4]]
    far = [[[20, 50], [21, 50], [20.5, 51], [20, 50]]]
    document = {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "properties": {"name": "Long acre"},
                "geometry": {"type": "Polygon", "coordinates": [square, hole]},
            },
            {
                "type": "Feature",
                "properties": {"name": 7},
                "geometry": {"type": "MultiPolygon", "coordinates": [far, [hole]]},
            },
        ],
    }
    file = tmp_path / "fields.geojson"
    file.write_text(json.dumps(document))
    named = fields.naming(str(file), flag="--field")
    found = named(rows((52.2, 11.2), (52.5, 11.5), (50.2, 20.5), (50.9, 20.1), None))
    assert found.tolist() == ["Long acre", "7", "7", "(outside)", "(no position)"]


@pytest.mark.parametrize(
    ("setting", "text", "reason"),
    [
        ("a(b", None, "bad-regex"),
        ("(a)(b)", None, "bad-regex"),
        ("gone.geojson", None, "no-fields"),
        ("fields.geojson", "[1, 2]", "bad-fields"),
        ("fields.geojson", '{"type": "Feature", "geometry": {"type": "Point"}}', "bad-fields"),
        (
            "fields.geojson",
            '{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[1, 2]]]}}',
            "bad-fields",
        ),
        ("plot", None, "matches-nothing"),
    ],
)
def test_what_names_no_field(setting: str, text: str | None, reason: str, tmp_path: Path) -> None:
    if setting.endswith("json"):
        setting = str(tmp_path / setting)
        if text is not None:
            Path(setting).write_text(text)
    with pytest.raises(UserError) as error:
        fields.refuse_no_match(setting, rows(None), flag="--field")
    assert error.value.reason == reason
