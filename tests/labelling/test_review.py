"""From a night's predictions to photographs for people, and from their answers to shards."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.core.settings import validate
from leafnet.data import shards, synthetic
from leafnet.data.images import decode
from leafnet.data.shards import ShardIndex
from leafnet.labelling import answers
from leafnet.labelling.review import run
from leafnet.labelling.settings import ReviewSettings
from leafnet.models import bundle
from leafnet.preparation import sources
from leafnet.scoring.settings import ScoreSettings
from tests.conftest import leaf_jpeg
from tests.preparation.test_sources import samples, write_parquet


def settings(**values: Any) -> ReviewSettings:
    return validate(ReviewSettings, values)


def images_of(index: ShardIndex, split: str) -> list[bytes]:
    tables = [shards.read_columns(index.root, s, ["image"]) for s in index.of_split(split)]
    return [image for table in tables for image in table["image"].to_pylist()]


@pytest.fixture(scope="module")
def night(
    local_ray: None,
    random_model: str,
    data_set: ShardIndex,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Predictions of fourteen photographs: nine leaves, two of the data set, and worse."""
    from leafnet.scoring import score

    root = tmp_path_factory.mktemp("night")
    incoming = root / "in"
    incoming.mkdir()
    for i in range(9):
        data = leaf_jpeg(synthetic.CLASS_NAMES[i % 3], seed=100 + i)
        (incoming / f"leaf {i}.jpg").write_bytes(data)
    (incoming / "copy.jpg").write_bytes((incoming / "leaf 0.jpg").read_bytes())
    (incoming / "of_test.jpg").write_bytes(images_of(data_set, "test")[0])
    (incoming / "of_train.jpg").write_bytes(images_of(data_set, "train")[0])
    (incoming / "gone.jpg").write_bytes(leaf_jpeg("healthy", seed=500))
    (incoming / "text.jpg").write_text("no leaf")
    values = {"model": random_model, "images": str(incoming), "out": str(root / "predictions")}
    score.run(validate(ScoreSettings, values | {"date": "2026-11-24", "max_failed": 100}))
    (incoming / "gone.jpg").unlink()
    return root


@pytest.mark.ray
@pytest.mark.slow
def test_out_to_people_and_back(
    night: Path,
    random_model: str,
    data_set: ShardIndex,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    review = tmp_path / "review"
    run(settings(predictions=str(night / "predictions"), count=20, out=str(review)))
    said = capfd.readouterr().out
    assert "passed over 1 photographs that cannot be read any more (1 not-found)" in said
    # Not the copy, not the text, not what is gone.
    assert "chosen    11 of 13 photographs" in said
    tasks = json.loads((review / "tasks.json").read_text())
    index = list(csv.DictReader((review / "index.csv").open()))
    model = bundle.load(random_model)
    for task, row in zip(tasks, index, strict=True):
        original = Path(row["image"]).read_bytes()
        assert (review / "photographs" / row["key"]).read_bytes() == original
        assert task["data"]["image"] == f"/data/local-files/?d=review/photographs/{row['key']}"
        (prediction,) = model.predict([original], precision="float32")
        assert task["predictions"][0]["score"] == pytest.approx(prediction.confidence, abs=0.02)
        lead = np.sort(list(prediction.probabilities.values()))
        assert float(row["margin"]) == pytest.approx(lead[-1] - lead[-2], abs=0.03)
    assert float(index[0]["margin"]) == min(float(row["margin"]) for row in index)

    # People answer, as Label Studio exports it: an unknown class, one passed over, the rest right.
    def annotation(label: str, **more: Any) -> dict[str, Any]:
        value = {"choices": [label]}
        return {"result": [{"type": "choices", "from_name": "label", "value": value}], **more}

    answered = {}
    for number, task in enumerate(sorted(tasks, key=lambda task: task["data"]["source"])):
        name = Path(task["data"]["source"]).name
        label = synthetic.CLASS_NAMES[number % 3]
        task["annotations"] = [annotation(label, was_cancelled=name == "leaf 3.jpg")]
        if name == "leaf 4.jpg":
            task["annotations"] = [annotation("rust")]
        answered[task["data"]["key"]] = (name, label)
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    out = tmp_path / "shards"
    back = {"answers": str(tmp_path / "export.json"), "base": data_set.root, "out": str(out)}
    run(settings(**back))
    said = capfd.readouterr().out
    assert "answers   9 taken, 1 without a label, 1 refused" in said
    assert "refused   unknown class 'rust': " in said
    assert "1 training examples give way to answers" in said
    assert "1 answers are left out: their bytes are in valid or test" in said

    made = shards.read_index(str(out))
    assert made.class_names == data_set.class_names
    for split in ("valid", "test"):
        found, before = (shards.split_fingerprint(i, split) for i in (made, data_set))
        assert found == before
        assert keys_of(made, split) == keys_of(data_set, split)
    assert made.examples("train") == data_set.examples("train") - 1 + 8
    new = {}
    for shard in made.of_split("train"):
        table = shards.read_columns(made.root, shard, ["key", "image", "label"])
        for row in table.to_pylist():
            if row["key"].startswith("review/"):
                new[row["key"].removeprefix("review/")] = row
    expected = {
        key: label
        for key, (name, label) in answered.items()
        if name not in ("leaf 3.jpg", "leaf 4.jpg", "of_test.jpg")
    }
    assert {key: made.class_names[row["label"]] for key, row in new.items()} == expected
    for key, row in new.items():
        assert row["image"] == (review / "photographs" / key).read_bytes()
    assert shards.prepared(made.root)["review"]["base_fingerprint"] == data_set.fingerprint
    assert not (tmp_path / "shards.source").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_chance_chooses_some_and_their_answers_tell_of_the_night(
    night: Path, data_set: ShardIndex, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    review, predictions = tmp_path / "review", str(night / "predictions")
    run(settings(predictions=predictions, count=2, audit=6, out=str(review)))
    said = capfd.readouterr().out
    assert "chosen    2 of 13 photographs" in said
    assert "audit     6 photographs that chance chose are among them" in said
    document = json.loads((review / "review.json").read_text())["audit"]
    shown = document["photographs"].values()
    assert sum(one["chosen"] for one in shown) == 2
    assert sum(one["drawn"] for one in shown) == 6
    assert document["totals"]["all"] == {"": 13}
    rows = list(csv.DictReader((review / "index.csv").open()))
    assert {row["key"] for row in rows} == set(document["photographs"])
    lines = [f"{row['key']},{row['predicted']}" for row in rows]
    (review / "index.csv").write_text("\n".join(["key,label", *lines]) + "\n")
    back = {"answers": str(review / "index.csv"), "base": data_set.root}
    run(settings(**back, out=str(tmp_path / "shards")))
    assert "audit     100.0 % of the labels of 2026-11-24 are right" in capfd.readouterr().out
    kept = json.loads((night / "predictions" / "_audits" / "review.json").read_text())
    assert kept["groups"]["night"]["2026-11-24"]["photographs"] == 13
    page = (night / "predictions" / "_reports" / "2026-11-24.html").read_text()
    assert "People looked at" in page


def keys_of(index: ShardIndex, split: str) -> set[str]:
    tables = [shards.read_columns(index.root, s, ["key"]) for s in index.of_split(split)]
    return {key for table in tables for key in table["key"].to_pylist()}


@pytest.mark.ray
def test_fewer_are_as_unlike_as_can_be(night: Path, random_model: str, tmp_path: Path) -> None:
    review = tmp_path / "review"
    run(settings(predictions=str(night / "predictions"), count=3, pool=5, out=str(review)))
    index = list(csv.DictReader((review / "index.csv").open()))
    assert len(index) == 3
    model = bundle.load(random_model)
    images = [p.read_bytes() for p in (night / "in").glob("*.jpg") if p.name != "text.jpg"]
    pixels = np.stack([decode(data, model.image_size).pixels for data in images])
    features = model.features(pixels, precision="float32")
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    chosen = [images.index(Path(row["image"]).read_bytes()) for row in index]
    apart = np.linalg.norm(unit - unit[chosen[0]], axis=1)
    assert apart[chosen[1]] == pytest.approx(apart.max(), rel=0.05)  # bfloat16 may be at work


@pytest.mark.ray
def test_a_model_that_cannot_be_had(
    night: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    predictions = tmp_path / "predictions"
    (predictions / "date=2026-11-24").mkdir(parents=True)
    (file,) = (night / "predictions").glob("date=*/*.parquet")
    (predictions / "date=2026-11-24" / file.name).write_bytes(file.read_bytes())
    review = tmp_path / "review"
    run(settings(predictions=str(predictions), count=4, out=str(review)))
    assert "by probabilities and not by features, since the night has no" in capfd.readouterr().out
    assert len(json.loads((review / "tasks.json").read_text())) == 4


def write_review(folder: Path, *names: str) -> Path:
    """What the job leaves for its own way back."""
    digests = {}
    (folder / "photographs").mkdir(parents=True)
    for name in names:
        data = name.encode()
        (folder / "photographs" / name).write_bytes(data)
        digests[name] = storage.sha256(data)
    document = {"version": 1, "class_names": ["a", "b"], "photographs": digests}
    (folder / "review.json").write_text(json.dumps(document))
    return folder


def test_answers_that_cannot_be_taken(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    review = write_review(tmp_path / "review", "1.jpg", "2.jpg", "3.jpg")
    (review / "photographs/2.jpg").unlink()
    (review / "photographs/3.jpg").write_text("other")
    lines = ["key,label", "1.jpg,c", "2.jpg,a", "3.jpg,b", "4.jpg,a"]
    (review / "index.csv").write_text("\n".join(lines))
    out = tmp_path / "shards"
    with pytest.raises(UserError, match="has no label that can be taken"):
        run(settings(answers=str(review / "index.csv"), out=str(out)))
    said = capfd.readouterr().out
    assert "answers   0 taken, 0 without a label, 4 refused" in said
    assert "unknown class 'c': 1.jpg; the photograph is gone: 2.jpg; the photograph was " in said
    assert "no such photograph: 4.jpg (the classes are a, b)" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give --predictions OUT to choose photographs, or --answers FILE"),
        ({"predictions": "p", "answers": "a.csv"}, "give --predictions OUT"),
        ({"predictions": "nowhere"}, "nowhere has no nights; score some first"),
        ({"predictions": "p", "date": "24.11.2026"}, "--date cannot be"),
        ({"answers": "lost/index.csv"}, "lost/index.csv does not exist"),
    ],
)
def test_what_is_refused(
    values: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(settings(**values, out="out"))
    assert not (tmp_path / "out").exists()


def test_only_files_that_say_so_name_their_examples(tmp_path: Path) -> None:
    answers._write_examples(
        str(tmp_path / "ours/a.parquet"), [("p/1", b"1", "a"), ("p/2", b"2", "b")], split="train"
    )
    found = samples(sources.look(str(tmp_path / "ours")))
    assert [(s.key, s.label, s.image) for s in found] == [("p/1", "a", b"1"), ("p/2", "b", b"2")]
    write_parquet(tmp_path / "others/a.parquet", ["a", "b"], key=["same", "same"])
    others = samples(sources.look(str(tmp_path / "others")))
    assert [sample.key for sample in others] == [
        "a.parquet/00000000/0.jpg",
        "a.parquet/00000001/1.jpg",
    ]
