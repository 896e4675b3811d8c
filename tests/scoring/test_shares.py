"""What is told of a night's shares, and of how many labels are right."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from leafnet.metrics import prevalence
from leafnet.metrics.scores import scores, softmax, tally
from leafnet.scoring import report, shares
from tests.support import stored
from tests.support.markup import check


def test_labels_are_corrected_where_the_night_is_like_validation(tmp_path: Path) -> None:
    names = [f"leaf_{i:04d}.jpg" for i in range(300)]
    stored.write_night(tmp_path, "2026-11-24", images="/in", names=names)
    page = check(Path(report.write(str(tmp_path), "2026-11-24")).read_bytes())
    assert "corrected" in page.text
    assert "of the labels are right" in page.text
    stored.write_night(tmp_path, "2026-11-25", images="/in", names=names, novelty=90.0, seed=1)
    page = check(Path(report.write(str(tmp_path), "2026-11-25")).read_bytes())
    assert "Tonight is unlike validation" in page.text
    assert "of the labels are right" not in page.text


def test_a_rare_class_is_corrected_downwards() -> None:
    rng = np.random.default_rng(0)
    made = rng.normal(0, 1, (900, 3)).astype(np.float32)
    labels = np.arange(900) % 3
    made[np.arange(900), labels] += 1.8
    model = {
        "prevalence": prevalence.document(prevalence.fit_bias(made, labels)),
        "calibration": scores(tally(made, labels), stored.CLASSES)["calibration"],
    }
    tonight = made[(labels != 0) | (np.arange(900) < 60)]
    found = shares.told(softmax(tonight), stored.CLASSES, model, holds=True)
    rare = found.shares[stored.CLASSES[0]]
    counted = (tonight.argmax(axis=1) == 0).mean()
    assert counted > 0.1
    assert rare.low < 20 / 620 < rare.high
    assert rare.value < 0.6 * counted
    assert found.accuracy is not None


def test_a_model_without_held_out_examples_corrects_nothing() -> None:
    found = shares.told(np.eye(3, dtype=np.float32), stored.CLASSES, {}, holds=True)
    assert found == (True, {}, None)
    nothing = shares.told(np.empty((0, 3), np.float32), stored.CLASSES, {}, holds=True)
    assert nothing.accuracy is None


def test_what_of_a_model_is_kept_with_a_night() -> None:
    told = {"calibration": [{"count": 1}]}
    assert shares.validated(
        {"metrics": {"test": told, "valid": {}}, "prevalence": {"value": [0]}}
    ) == {
        "calibration": [{"count": 1}],
        "prevalence": {"value": [0]},
    }
    assert shares.validated({"metrics": {"valid": told}}) == told
    assert shares.validated({}) == {}


def test_probabilities_of_rows_that_have_some() -> None:
    kind = pa.struct([("a", pa.float32()), ("b", pa.float32())])
    column = pa.chunked_array(
        [pa.array([{"a": 0.25, "b": 0.75}, None], kind), pa.array([{"a": 1.0, "b": 0.0}], kind)]
    )
    assert shares.probabilities(column).tolist() == [[0.25, 0.75], [1.0, 0.0]]
    assert shares.probabilities(column, every=2).tolist() == [[0.25, 0.75]]
    assert shares.probabilities(column.slice(1, 1)).shape == (0, 2)
    assert [shares.every(rows) for rows in (0, 99_999, 1_000_000)] == [1, 1, 11]


def test_a_night_of_failures_has_no_shares(tmp_path: Path) -> None:
    names = [f"leaf_{i:04d}.jpg" for i in range(20)]
    stored.write_night(tmp_path, "2026-11-24", images="/in", names=names, failed=20, field="leaf")
    page = check(Path(report.write(str(tmp_path), "2026-11-24")).read_bytes())
    assert "corrected" not in page.text
    assert "By field" not in page.text
