"""Evaluating published models on a tiny data set, on the session's Ray."""

import contextlib
import functools
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image

from jobs import evaluate as evaluate_job
from leafnet.core import terminal
from leafnet.core.cache import LocalCache
from leafnet.core.errors import UserError
from leafnet.core.settings import DataSettings
from leafnet.data import shards
from leafnet.data.groups import groups_of
from leafnet.data.images import decode
from leafnet.data.shards import ShardIndex
from leafnet.distributed import fastest, session
from leafnet.distributed.resources import Machines, Node
from leafnet.evaluation import evaluate, gallery
from leafnet.evaluation import predict as evaluation_predict
from leafnet.evaluation.document import Described, compare, describe, figures, read
from leafnet.evaluation.predict import Evaluated, Predictions
from leafnet.evaluation.settings import EvaluateSettings
from leafnet.evaluation.tables import say_evaluation
from leafnet.metrics import background, calibration, intervals
from leafnet.metrics.scores import softmax
from leafnet.models import bundle, weights
from leafnet.models.bundle import Bundle
from leafnet.models.classifier import head_logits, initial_head
from tests.conftest import leaf_jpeg, write_data_set
from tests.metrics.test_calibration import simulated

NAMES = ("early_blight", "healthy", "late_blight")


@pytest.fixture(scope="module")
def other_model(random_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model with another head."""
    url = str(tmp_path_factory.mktemp("other"))
    bundle.save(
        url,
        convolutions=bundle.load(random_model).convolutions,
        head=initial_head([8], 3, inputs=weights.FEATURES, seed=1),
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
    evaluate.run(
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
    document, items = read(str(out))
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
        ours = [p.label for p in model.predict(images, precision="float32")]
        right = np.array(ours) == labels
        assert scores["tta"]["accuracy_without"] == pytest.approx(right.mean())
        pixels = np.stack([decode(image, 32).pixels for image in images])
        for each, accuracy in ((model, scores["accuracy"]), (other, scores["against"]["accuracy"])):
            features = functools.partial(each.features, precision="float32")
            # All eight flips and turns of a photograph, whose logits are taken together.
            views = [
                np.rot90(flipped, k, axes=(1, 2))
                for flipped in (pixels, pixels[:, :, ::-1])
                for k in range(4)
            ]
            logits = sum(head_logits(each.head, features(np.ascontiguousarray(v))) for v in views)
            found = np.array(NAMES)[np.argmax(logits, axis=1)]
            assert accuracy == pytest.approx(np.mean(found == labels))
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
    evaluate.run(
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
            evaluate.run(settings(random_model, data_set, **changes))


def described(count: int, *, seed: int = 0) -> Described:
    logits, labels = simulated(count, times=1.0, classes=3, seed=seed)
    rest = "0c6d4a5b-9e32-leaf"
    keys = [f"farm_{i % 3}/{NAMES[label]}/{rest}{i}.jpg" for i, label in enumerate(labels)]
    return Described(keys, labels, logits, np.full((count, 2), 256, np.int32))


def test_a_description_is_json_and_prints_in_80_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours, theirs = described(90), described(90, seed=1)
    scores = describe(ours, NAMES)
    assert list(scores["slices"]) == ["folder"]
    assert {row["value"] for row in scores["slices"]["folder"]} == {"farm_0", "farm_1", "farm_2"}
    scores["against"] = compare(ours, theirs.logits, NAMES)
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
    groups = groups_of(index, keys)
    assert groups is not None
    assert groups[0] == groups[2]
    assert len(set(groups.tolist())) == 4
    assert groups_of(data_set, keys) is None


def small() -> Described:
    """Eight examples of three classes, of which rows 1, 4, 5 and 7 are wrong."""
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    predicted = np.array([0, 2, 0, 1, 2, 1, 2, 1])
    sure = np.array([0.9, 0.8, 0.6, 0.7, 0.5, 0.95, 0.55, 0.65])
    probabilities = np.repeat((1 - sure)[:, None] / 2, 3, axis=1)
    probabilities[np.arange(8), predicted] = sure
    keys = [f"valid/{NAMES[label]}/farm_{i % 2}/{i}.jpg" for i, label in enumerate(labels)]
    sizes = np.array([[100, 900]] * 3 + [[900, 300]] * 5, np.int32)
    return Described(keys, labels, np.log(probabilities).astype(np.float32), sizes)


def test_a_description_by_hand() -> None:
    examples, groups = small(), np.array([0, 0, 1, 1, 2, 2, 3, 3])
    scores = describe(examples, NAMES, pattern=re.compile("(?P<number>[0-3])[.]"), groups=groups)
    assert (scores["accuracy"], scores["resampled_by_group"]) == (0.5, True)
    # Nine tenths of eight are eight, rounded up.
    assert scores["selective_accuracy_90"] == 0.5
    confidence = softmax(examples.logits).max(axis=1)
    assert scores["ece_if_calibrated"] == calibration.ece_if_calibrated(confidence)
    found = intervals.intervals(examples.logits, examples.labels, groups=groups)
    assert scores["intervals"] == {name: list(interval) for name, interval in found.items()}
    assert scores["confused_pairs"][0] == {
        "label": "late_blight",
        "predicted": "healthy",
        "count": 2,
        "share": pytest.approx(2 / 3),
    }
    errors = [tuple(row.values()) for row in scores["confident_errors"]]
    assert errors == [
        ("valid/late_blight/farm_1/5.jpg", "late_blight", "healthy", pytest.approx(0.95)),
        ("valid/early_blight/farm_1/1.jpg", "early_blight", "late_blight", pytest.approx(0.8)),
        ("valid/late_blight/farm_1/7.jpg", "late_blight", "healthy", pytest.approx(0.65)),
        ("valid/healthy/farm_0/4.jpg", "healthy", "late_blight", pytest.approx(0.5)),
    ]
    assert list(scores["confident_errors"][0]) == ["key", "label", "predicted", "confidence"]
    assert list(scores["slices"]) == ["number", "shorter side [pixels]", "folder"]
    told = {
        name: {row["value"]: (row["examples"], row["accuracy"]) for row in rows}
        for name, rows in scores["slices"].items()
    }
    assert told["shorter side [pixels]"] == {
        "under 128": (3, pytest.approx(2 / 3)),
        "256 to 511": (5, 0.4),
    }
    assert told["folder"] == {"farm_0": (4, 0.75), "farm_1": (4, 0.25)}
    alone = {str(i): (1, float(i != 1)) for i in range(4)}
    assert told["number"] == {**alone, "(no match)": (4, 0.25)}


def test_a_description_without_groups_or_pattern() -> None:
    examples = small()
    scores = describe(examples, NAMES)
    assert scores["resampled_by_group"] is False
    assert list(scores["slices"]) == ["shorter side [pixels]", "folder"]
    found = intervals.intervals(examples.logits, examples.labels)
    assert scores["intervals"]["accuracy"] == list(found["accuracy"])
    # What the run's table, its report and metrics.json show.
    assert [scores["accuracy_low"], scores["accuracy_high"]] == scores["intervals"]["accuracy"]
    grouped = describe(examples, NAMES, groups=np.array([0, 0, 1, 1, 2, 2, 3, 3]))
    assert [grouped["accuracy_low"], grouped["accuracy_high"]] == grouped["intervals"]["accuracy"]


def test_suspects_are_told_with_what_they_seem_to_be() -> None:
    labels = np.arange(120) % 3
    logits = np.array(6 * np.eye(3)[labels], np.float32)
    given = labels.copy()
    given[[17, 61]] = [0, 2]  # they are of classes 2 and 1
    keys = [f"{i}.jpg" for i in range(120)]
    told = describe(Described(keys, given, logits, np.full((120, 2), 9, np.int32)), NAMES)[
        "likely_wrong_labels"
    ]
    of_label = pytest.approx(1 / (np.exp(6) + 2), rel=1e-3)
    assert told["examples"] == 2
    assert told["first"] == [
        {"key": "17.jpg", "label": NAMES[0], "suggested": NAMES[2], "self_confidence": of_label},
        {"key": "61.jpg", "label": NAMES[2], "suggested": NAMES[1], "self_confidence": of_label},
    ]


def test_fifty_of_each_kind_are_listed() -> None:
    labels = np.repeat([0, 1, 2], [200, 60, 60])
    logits = np.array(6 * np.eye(3)[labels], np.float32)
    given = labels.copy()
    given[:60] = 1
    keys = [f"{i}.jpg" for i in range(320)]
    examples = Described(keys, given, logits, np.full((320, 2), 9, np.int32))
    scores = describe(examples, NAMES)
    assert [row["key"] for row in scores["confident_errors"]] == keys[:50]
    assert scores["likely_wrong_labels"]["examples"] == 60
    assert [row["key"] for row in scores["likely_wrong_labels"]["first"]] == keys[:50]
    found = compare(examples, np.roll(logits, 1, axis=1), NAMES)
    assert (found["disagreements"], len(found["first"])) == (320, 50)


def test_two_models_compared_by_hand() -> None:
    ours = small()
    others = ours.logits.copy()
    others[[1, 4, 5, 7]] = 9 * np.eye(3, dtype=np.float32)[[0, 0, 1, 2]]
    others[0] = [0, 9, 0]
    groups = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    found = compare(ours, others, NAMES, groups=groups)
    # The other has 1, 2, 3, 6 and 7 right, this model 0, 2, 3 and 6.
    expected = intervals.compare(
        np.isin(range(8), [0, 2, 3, 6]), np.isin(range(8), [1, 2, 3, 6, 7]), groups=groups
    )
    assert (found["accuracy"], found["difference"]) == (0.625, -0.125)
    assert (found["only_ours"], found["only_theirs"], found["mcnemar_p"]) == (1, 2, 1.0)
    assert found["interval"] == list(expected.interval)
    assert found["interval"] != compare(ours, others, NAMES)["interval"]
    assert found["disagreements"] == 4
    early, healthy, late = NAMES
    assert [tuple(row.values()) for row in found["first"]] == [
        (ours.keys[0], early, early, healthy),
        (ours.keys[1], early, late, early),
        (ours.keys[4], healthy, late, early),
        (ours.keys[7], late, healthy, late),
    ]
    assert list(found["first"][0]) == ["key", "label", "ours", "theirs"]
    assert [kind["count"] for kind in found["kinds"]] == [1, 1, 1, 1]


def test_the_most_frequent_kind_of_disagreement_is_first() -> None:
    labels, mine = np.array([2, 0, 0, 1, 0]), np.array([2, 0, 0, 2, 0])
    ours = Described([""] * 5, labels, np.eye(3, dtype=np.float32)[mine], np.zeros((5, 2), int))
    found = compare(ours, np.eye(3, dtype=np.float32)[[0, 1, 0, 1, 1]], "abc")
    assert found["kinds"] == [
        {"label": "a", "ours": "a", "theirs": "b", "count": 2},
        {"label": "b", "ours": "c", "theirs": "b", "count": 1},
        {"label": "c", "ours": "c", "theirs": "a", "count": 1},
    ]


def predictions(examples: Described, *, plain: Any = None) -> Predictions:
    keys, labels, logits, sizes = examples
    border = np.zeros((len(keys), background.STATISTICS), np.float32)
    border[:, 3] = labels
    plain = logits if plain is None else plain
    return Predictions(list(keys), np.asarray(labels, np.int64), logits, plain, sizes, border)


def test_what_more_views_change_by_hand() -> None:
    made = predictions(small(), plain=4 * np.eye(3, dtype=np.float32)[[0, 0, 0, 2, 2, 1, 1, 1]])
    found = evaluate._gain(made, Evaluated({}, 12.0, 1.5), None, views=8)
    sure = np.exp(4) / (np.exp(4) + 2)
    paired = intervals.compare(np.isin(range(8), [0, 2, 3, 6]), np.isin(range(8), [0, 1, 2]))
    assert found == {
        "views": 8,
        "accuracy_without": 0.375,
        "log_loss_without": pytest.approx((3 * -np.log(sure) + 5 * (4 - np.log(sure))) / 8),
        "ece_without": pytest.approx(sure - 0.375),
        "difference": 0.125,
        "interval": list(paired.interval),
        "mcnemar_p": 1.0,
        "times_as_long": 8.0,
    }


def test_numbers_of_a_split_are_its_figures() -> None:
    split = {"accuracy": 0.5, "examples": 3, "intervals": {"ece": [0, 1]}, "first": [], "what": "x"}
    told = figures({"test": split, "valid": {"ece": 0.25, "slices": {}}})
    assert told == {"test": {"accuracy": 0.5, "examples": 3}, "valid": {"ece": 0.25}}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("plant_[0-9]", [0, 0, 1, 2, 3]),
        ("[a-z]_([0-9])", [0, 0, 1, 2, 3]),
        ("plant_([0-9])_", [0, 1, 2, 3, 4]),
        ("([a-z]+)_[0-9]", [0, 0, 0, 1, 2]),
    ],
)
def test_groups_of_a_pattern(
    pattern: str, expected: list[int], data_set: ShardIndex, tmp_path: Path
) -> None:
    """Of the first group, or of the whole match; what does not match is alone."""
    index = shards.write_index(
        str(tmp_path),
        class_names=data_set.class_names,
        shards=data_set.shards,
        counts=data_set.counts,
        prepared={"settings": {"group": pattern}},
    )
    keys = ["plant_1_a.jpg", "plant_1.jpg", "plant_2.jpg", "other.jpg", "plant"]
    groups = groups_of(index, keys)
    assert groups is not None
    order = list(dict.fromkeys(groups.tolist()))
    assert [order.index(group) for group in groups.tolist()] == expected


def test_a_key_that_does_not_match_is_not_of_the_group_of_its_name(
    data_set: ShardIndex, tmp_path: Path
) -> None:
    index = shards.write_index(
        str(tmp_path),
        class_names=data_set.class_names,
        shards=data_set.shards,
        counts=data_set.counts,
        prepared={"settings": {"group": "of_(.*)"}},
    )
    groups = groups_of(index, ["of_leaf", "leaf"])
    assert groups is not None
    assert groups[0] != groups[1]


def test_a_cache_is_that_of_the_settings(data_set: ShardIndex, tmp_path: Path) -> None:
    with_cache = DataSettings(local_cache=str(tmp_path), local_cache_gb=3.0)
    found = shards.open_index(data_set.root, with_cache)
    assert found.cache == LocalCache(str(tmp_path), 3.0)
    assert shards.open_index(data_set.root, DataSettings()).cache is None


@pytest.mark.parametrize(
    ("out", "log"),
    [("made/run", "made/run/evaluate.log"), ("made/numbers.json", "made/numbers.log")],
)
def test_the_log_is_beside_the_results(out: str, log: str, tmp_path: Path) -> None:
    with evaluate._log(str(tmp_path / out)) as path:
        assert path == tmp_path / log
    with evaluate._log(None) as path:
        assert path.name == "evaluate.log"
        assert tmp_path not in path.parents


def test_keys_and_sizes_are_in_the_order_of_the_gallery(data_set: ShardIndex) -> None:
    keys, sizes = evaluate._keys(data_set, "valid")
    assert keys == [f"valid/{i}.jpg" for i in range(9)]
    tables = [shards.read_columns(data_set.root, s, ["image"]) for s in data_set.of_split("valid")]
    images = [Image.open(io.BytesIO(each)) for t in tables for each in t["image"].to_pylist()]
    assert sizes.tolist() == [list(image.size) for image in images]


@pytest.mark.parametrize(("wanted", "expected"), [(5, 5), (9, 9), (36, 36), (99, 36)])
def test_the_probe_reads_the_first_photographs(
    wanted: int, expected: int, data_set: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "_PROBED", wanted)
    found = list(evaluate._first_photographs(data_set, "train"))
    (table,) = [
        shards.read_columns(data_set.root, s, ["key", "image", "label"])
        for s in data_set.of_split("train")
    ]
    assert [image for _, image, _ in found] == table["image"].to_pylist()[:expected]
    assert [label for _, _, label in found] == [i % 3 for i in range(expected)]


def test_a_probe_of_photographs_is_of_their_borders(data_set: ShardIndex) -> None:
    told = evaluate._probe(data_set, "train", 0.75)
    pixels = [
        decode(image, 256).pixels for _, image, _ in evaluate._first_photographs(data_set, "train")
    ]
    expected = background.probe(
        background.border(np.stack(pixels)), np.arange(36) % 3, model_accuracy=0.75
    )
    assert told is not None
    assert told == expected


CPU = Machines(gpus=0, actors=1, threads_per_actor=1, cpus_per_actor=1.0)


@pytest.fixture
def without_a_network(monkeypatch: pytest.MonkeyPatch, other_model: str) -> None:
    """`small` is what every model says of each split, but `other_model` says class 0 always."""

    def predict(model: Bundle, index: ShardIndex, splits: Any, **given: Any) -> Evaluated:
        assert given["batch_size"] == 32
        examples = small()
        if model.url == other_model:
            always = np.tile(np.array([[1, 0, 0]], np.float32), (8, 1))
            examples = examples._replace(logits=always)
        return Evaluated(dict.fromkeys(splits, predictions(examples)), 3.0 * given["views"], 3.0)

    monkeypatch.setattr(evaluation_predict, "predict", predict)
    monkeypatch.setattr(session, "session", lambda _: contextlib.nullcontext([Node(2.0, 0.0)]))
    one = lambda *_, **__: ("tensorflow", "float32", "the fastest")  # noqa: E731
    monkeypatch.setattr(fastest, "choose", one)
    monkeypatch.setattr(ray, "put", lambda value: value)


@pytest.mark.usefixtures("without_a_network")
def test_a_document_of_two_models(
    random_model: str,
    other_model: str,
    data_set: ShardIndex,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "numbers.json"
    result: dict[str, Any] = {}
    monkeypatch.setattr(terminal, "result", lambda **values: result.update(values))
    evaluate.run(
        settings(
            random_model,
            data_set,
            split="all",
            against=other_model,
            tta="4",
            out=str(out),
            slice_by="farm_(.)",
            gpu=False,
        )
    )
    document = json.loads(out.read_text())
    assert document["version"] == 1
    assert document["model"] == {
        "url": random_model,
        "model_id": bundle.load(random_model).model_id,
    }
    assert document["against"] == {
        "url": other_model,
        "model_id": bundle.load(other_model).model_id,
    }
    assert document["data"] == {"shards": data_set.root, "fingerprint": data_set.fingerprint}
    assert document["precision"] == "float32"
    assert list(document["splits"]) == ["test", "valid", "train"]
    scores = document["splits"]["valid"]
    expected = describe(small(), NAMES, pattern=re.compile("farm_(.)"))
    assert {name: scores[name] for name in expected} == json.loads(json.dumps(expected))
    assert list(scores["slices"]) == ["key", "shorter side [pixels]", "folder"]
    # It names the three of class 0, and this model has four right.
    assert (scores["against"]["accuracy"], scores["against"]["difference"]) == (0.375, 0.125)
    assert scores["background"] is None
    assert (scores["tta"]["views"], scores["tta"]["times_as_long"]) == (4, 4.0)
    # The last line of --json.
    assert result == {
        "model": random_model,
        "model_id": document["model"]["model_id"],
        "metrics": figures(document["splits"]),
    }


@pytest.mark.usefixtures("without_a_network")
def test_a_document_of_one_model_and_one_split(
    random_model: str, data_set: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def make_gallery(index: ShardIndex, split: str, chosen: Any, **given: Any) -> list[Any]:
        asked.append((split, len(chosen), given["image_size"], given["explain"]))
        return []

    monkeypatch.setattr(evaluation_predict, "make_gallery", make_gallery)
    evaluate.run(settings(random_model, data_set, out=str(tmp_path / "made"), gpu=False))
    document, items = read(str(tmp_path / "made"))
    assert list(document["splits"]) == ["test"]
    assert not {"against", "tta"} & set(document["splits"]["test"])
    assert "against" not in document
    assert (document["gallery"], items) == ({"split": "test", "items": []}, [])
    chosen = gallery.choose(small().logits, small().labels)
    assert asked == [("test", len(chosen), 32, True)]


@pytest.mark.parametrize(
    ("source", "explain"), [("random", False), ("imagenet", True), (None, True)]
)
def test_random_weights_see_nothing(random_model: str, source: str | None, explain: bool) -> None:
    model = bundle.load(random_model)
    description = {} if source is None else {"backbone": {"source": source}}
    assert evaluate._sees_something(replace(model, description=description)) is explain


@pytest.mark.ray
def test_photographs_are_evaluated_without_preparing_them(
    local_ray: None, random_model: str, tmp_path: Path
) -> None:
    """Of two of the model's three classes, numbered otherwise, with a copy and without a split."""
    names = {"late_blight": 3, "healthy": 2}
    for name, count in names.items():
        for i in range(count):
            path = tmp_path / "field" / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(leaf_jpeg(name, seed=min(i, 1)))
    out = tmp_path / "evaluation"
    asked = {"model": random_model, "images": str(tmp_path / "field"), "out": str(out)}
    evaluate_job.run(EvaluateSettings.model_validate({**asked, "precision": "float32"}))
    document, _ = read(str(out))
    assert document["data"]["shards"] == asked["images"]
    confusion = np.array(document["splits"]["test"]["confusion"])
    assert confusion.sum(axis=1).tolist() == [0, 2, 3]
    model = bundle.load(random_model)
    for name, count in names.items():
        for i in range(count):
            data = (tmp_path / "field" / name / f"{i}.jpg").read_bytes()
            predicted = model.class_names.index(model.predict([data])[0].label)
            confusion[model.class_names.index(name), predicted] -= 1
    assert not confusion.any()
    assert {path.name for path in tmp_path.iterdir()} == {"field", "evaluation"}
    (tmp_path / "field" / "healthy").rename(tmp_path / "field" / "rust")
    with pytest.raises(UserError, match="has late_blight, rust, and the model knows no rust"):
        evaluate_job.run(EvaluateSettings.model_validate(asked))


@pytest.mark.usefixtures("without_a_network")
def test_models_and_splits_that_do_not_fit_are_refused(
    random_model: str, data_set: ShardIndex, tmp_path: Path
) -> None:
    other = shutil.copytree(data_set.root, tmp_path / "other")
    index = shards.write_index(
        str(other),
        class_names=("rust", "healthy", "mildew"),
        shards=data_set.shards,
        counts={},
        prepared={},
    )
    with pytest.raises(UserError, match=r"has the classes early_blight, .* has rust, healthy"):
        evaluate.run(settings(random_model, index))
    trained = write_data_set(str(tmp_path / "trained"), {"train": 1, "valid": 1})
    with pytest.raises(UserError, match="has no images in the test split"):
        evaluate.run(settings(random_model, trained, gpu=False))


def ended(index: ShardIndex, folder: Path, answers: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `after_training` gives, with a gallery that tells what was asked of it."""
    monkeypatch.setattr(evaluation_predict, "make_gallery", lambda _, split, chosen, **given: [])
    return evaluate.after_training(
        str(folder),
        index,
        answers=answers,
        model_url="runs/x/model",
        model_id="abc",
        convolutions=None,
        head=[],
        image_size=32,
        precision="bfloat16",
        machines=CPU,
        explain=False,
    )


def test_the_evaluation_of_a_run_that_ends(
    data_set: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ended(data_set, tmp_path / "none", {}, monkeypatch) == []
    assert not (tmp_path / "none").exists()
    labels = np.arange(9) % 3
    valid = np.array(3 * np.eye(3)[(labels + (labels == 1)) % 3], np.float32)
    test = np.array(2 * np.eye(3)[labels], np.float32)
    answers = {"valid": (valid, labels), "test": (test, labels)}
    assert ended(data_set, tmp_path / "made", answers, monkeypatch) == []
    document, items = read(str(tmp_path / "made"))
    assert items == []
    told = {name: document[name] for name in ("version", "model", "data", "engine", "precision")}
    assert told == {
        "version": 1,
        "model": {"url": "runs/x/model", "model_id": "abc"},
        "data": {"shards": data_set.root, "fingerprint": data_set.fingerprint},
        "engine": "tensorflow",
        "precision": "bfloat16",
    }
    assert document["gallery"]["split"] == "test"
    assert list(document["splits"]) == ["test", "valid"]
    scores = document["splits"]["valid"]
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert [row["key"] for row in scores["confident_errors"]] == [
        f"valid/{i}.jpg" for i in (1, 4, 7)
    ]
    assert document["splits"]["test"]["accuracy"] == 1.0
    # Three photographs of a class are too few for five folds.
    assert document["splits"]["test"]["background"] is None
    assert "background" not in scores


def test_an_evaluation_of_ten_thousand_classes_is_of_bounded_size() -> None:
    """On drawn answers: seven of ten right, three examples of each of 150 classes."""
    generator = np.random.default_rng(0)
    names = [f"species {i}" for i in range(10_000)]
    labels = np.repeat(generator.choice(10_000, 150, replace=False), 3)
    logits = generator.random((450, 10_000), np.float32)
    said = np.where(generator.random(450) < 0.7, labels, (labels + 1) % 10_000)
    logits[np.arange(450), said] += 12
    keys, sizes = [f"{i}.jpg" for i in range(450)], np.full((450, 2), 9, np.int32)
    groups = np.arange(450) // 2
    for each in (None, groups):
        scores = describe(Described(keys, labels, logits, sizes), names, groups=each)
        assert len(json.dumps(scores)) < 5_000_000
        low, high = scores["intervals"]["macro_f1"]
        assert low < scores["macro_f1"] < high < 0.03, "9,850 of the classes count as 0"
