"""Evaluating published models on a tiny data set, on the session's Ray."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leafnet import backbone, bundle, evaluation, shards
from leafnet.classifier import initial_head
from leafnet.config import EvaluateSettings
from leafnet.errors import UserError
from leafnet.evaluation import Described
from leafnet.evaluation_tables import say_evaluation
from leafnet.shards import ShardIndex
from tests.test_calibration import simulated

NAMES = ("early_blight", "healthy", "late_blight")


@pytest.fixture(scope="module")
def other_model(random_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model with another head."""
    url = str(tmp_path_factory.mktemp("other"))
    bundle.save(
        url,
        convolutions=bundle.load(random_model).convolutions,
        head=initial_head([8], 3, inputs=backbone.FEATURES, seed=1),
        class_names=NAMES,
        image_size=32,
        provenance={},
    )
    return url


def settings(model: str, data_set: ShardIndex, **more: Any) -> EvaluateSettings:
    values = {"model": model, "shards": data_set.root, "precision": "float32", **more}
    return EvaluateSettings.model_validate(values)


@pytest.mark.ray
def test_an_evaluation_of_everything(
    local_ray: None,
    random_model: str,
    other_model: str,
    data_set: ShardIndex,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "evaluation"
    evaluation.run(
        settings(
            random_model,
            data_set,
            split="all",
            against=other_model,
            slice_by="(?P<last>[0-9])[.]jpg",
            tta="8",
            out=str(out),
        )
    )
    shown = capfd.readouterr().out
    lines = [line for line in shown.splitlines() if "/" not in line]
    assert max(map(len, lines)) <= 80, "but those with a path"
    for words in ("last (test)", "8 views", "McNemar's exact p", "class (test)"):
        assert words in shown, shown
    document, items = evaluation.read(str(out))
    assert document["against"]["model_id"] == bundle.load(other_model).model_id
    assert list(document["splits"]) == ["test", "valid", "train"]
    assert document["gallery"]["split"] == "test"
    assert all(item.cam_jpeg for item in items)
    # Three photographs of a class are too few for five folds.
    probes = {split: scores["background"] for split, scores in document["splits"].items()}
    assert probes["test"] is None
    assert probes["train"]["examples"] == 36

    model = bundle.load(random_model)
    other = bundle.load(other_model)
    for split, scores in document["splits"].items():
        tables = [t for s in data_set.of_split(split) for t in shards.row_groups(data_set.root, s)]
        images = [image for t in tables for image in t["image"].to_pylist()]
        keys = [key for t in tables for key in t["key"].to_pylist()]
        labels = [NAMES[label] for t in tables for label in t["label"].to_pylist()]
        assert scores["examples"] == len(images)
        ours, theirs = (
            [p.label for p in each.predict(images, precision="float32")] for each in (model, other)
        )
        right = np.array(ours) == labels
        assert scores["tta"]["accuracy_without"] == pytest.approx(right.mean())
        assert scores["against"]["accuracy"] == pytest.approx(
            np.mean([a == b for a, b in zip(theirs, labels, strict=True)]), abs=0.25
        ), "without augmentation, here"
        rows = scores["slices"]["last"]
        assert sum(row["examples"] for row in rows) == len(images)
        wrong = {row["key"]: (row["label"], row["predicted"]) for row in scores["confident_errors"]}
        assert set(wrong) <= set(keys)
        for key, (label, predicted) in wrong.items():
            assert labels[keys.index(key)] == label != predicted
        low, high = scores["intervals"]["accuracy"]
        assert low <= scores["accuracy"] <= high


@pytest.mark.ray
def test_a_model_is_as_good_as_itself_and_a_file_has_the_numbers_alone(
    local_ray: None, random_model: str, data_set: ShardIndex, tmp_path: Path
) -> None:
    out = tmp_path / "numbers.json"
    evaluation.run(
        settings(random_model, data_set, split="valid", against=random_model, out=str(out))
    )
    scores = json.loads(out.read_text())["splits"]["valid"]
    assert scores["against"]["mcnemar_p"] == 1.0
    assert scores["against"]["disagreements"] == 0
    assert "tta" not in scores
    assert {path.name for path in tmp_path.iterdir()} == {"numbers.json", "numbers.log"}


def test_mistakes_are_told_before_a_machine_is_taken(
    random_model: str, data_set: ShardIndex, tmp_path: Path
) -> None:
    for changes, message in (
        ({"slice_by": "("}, "--slice_by '\\(' is not a regular expression"),
        ({"against": str(tmp_path)}, "model.json does not exist"),
        ({"precision": "int8"}, "the model carries no int8 network"),
    ):
        with pytest.raises(UserError, match=message):
            evaluation.run(settings(random_model, data_set, **changes))


def described(count: int, *, seed: int = 0) -> Described:
    logits, labels = simulated(count, times=1.0, classes=3, seed=seed)
    rest = "0c6d4a5b-9e32-leaf"
    keys = [f"farm_{i % 3}/{NAMES[label]}/{rest}{i}.jpg" for i, label in enumerate(labels)]
    return Described(keys, labels, logits, np.full((count, 2), 256, np.int32))


def test_a_description_is_json_and_prints_in_80_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours, theirs = described(90), described(90, seed=1)
    scores = evaluation.describe(ours, NAMES)
    assert list(scores["slices"]) == ["folder"]
    assert {row["value"] for row in scores["slices"]["folder"]} == {"farm_0", "farm_1", "farm_2"}
    scores["against"] = evaluation.compare(ours, theirs.logits, NAMES)
    kinds = scores["against"]["kinds"]
    assert sum(kind["count"] for kind in kinds) == scores["against"]["disagreements"]
    assert len(scores["against"]["first"]) == min(50, scores["against"]["disagreements"])
    scores["background"] = None
    document = {"splits": {"test": scores}}
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    say_evaluation(document)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "folder (test)" in shown
    # What does not fit is cut, and neither wrapped nor are numbers lost.
    errors = [line for line in shown.splitlines() if line.startswith("\N{HORIZONTAL ELLIPSIS}")]
    assert len(errors) == 8 + min(8, scores["likely_wrong_labels"]["examples"])
    assert all(line.split()[-1].startswith("0.") and len(line.split()) == 4 for line in errors)
    assert not any(line.strip().endswith("\N{HORIZONTAL ELLIPSIS}") for line in shown.splitlines())


def test_a_data_set_prepared_in_groups_is_resampled_in_groups(
    data_set: ShardIndex, tmp_path: Path
) -> None:
    index = shards.write_index(
        str(tmp_path),
        class_names=data_set.class_names,
        shards=data_set.shards,
        counts=data_set.counts,
        prepared={"settings": {"group": "plant_([0-9]+)"}},
    )
    keys = ["plant_1_a.jpg", "plant_2.jpg", "plant_1_b.jpg", "other.jpg", "another.jpg"]
    groups = evaluation.groups_of(index, keys)
    assert groups is not None
    assert groups[0] == groups[2]
    assert len(set(groups.tolist())) == 4
    assert evaluation.groups_of(data_set, keys) is None
