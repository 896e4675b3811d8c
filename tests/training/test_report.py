"""The report of a training run, of runs that were made without a network."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leafnet.core.errors import UserError
from leafnet.data import shards
from leafnet.data.shards import ShardIndex
from leafnet.evaluation import document
from leafnet.preparation import duplicates, plan
from leafnet.training import pictures, report
from tests.conftest import write_data_set
from tests.support import stored
from tests.support.markup import Parsed, check


@pytest.fixture
def run(data_set: ShardIndex, tmp_path: Path) -> Path:
    folder = tmp_path / "leaves"
    folder.mkdir()
    stored.write_run(folder, data_set)
    return folder


def written(run: Path) -> Parsed:
    return check((run / "report.html").read_bytes())


def test_a_report_of_what_is_stored(run: Path, data_set: ShardIndex) -> None:
    assert report.write(str(run)) == str(run / "report.html")
    page = written(run)
    scores = json.loads((run / "metrics.json").read_text())["test"]
    assert f"Of 90 test photographs, {100 * scores['accuracy']:.1f} % are" in page.text
    for name in data_set.class_names:
        assert name in page.text
    assert "python jobs/train.py --shards data/shards --name leaves" in page.text
    for fingerprint in (data_set.fingerprint, "0123456789abcdef", "a" * 64, "b" * 64):
        assert fingerprint in page.text
    assert "38.2" in page.text  # images/s of the features
    assert "head.batch_size" in page.text
    # Eight samples of each of three classes.
    assert len(page.all("img")) == 24
    assert "Most confident errors" not in page.text


def test_galleries_are_kept_for_the_next_time(run: Path) -> None:
    items = [
        *stored.items(4, "confident-error"),
        *stored.items(3, "likely-wrong-label"),
        *stored.items(6, "confused-pair"),
    ]
    document.write(str(run / "evaluation"), {}, "test", items)
    report.write(str(run))
    first = (run / "report.html").read_bytes()
    page = check(first)
    assert len(page.all("img")) == 24 + 2 * 13  # each with its map of where the model looked
    for words in ("Most confident errors", "Likely wrong labels", "early_blight taken for healthy"):
        assert words in page.text
    report.write(str(run))
    assert (run / "report.html").read_bytes() == first


def test_duplicates_and_rejected_photographs(tmp_path: Path) -> None:
    root = tmp_path / "shards"
    index = write_data_set(str(root), {"train": 2, "valid": 1, "test": 1})
    document = json.loads((root / "index.json").read_text())
    document["prepared"] = {
        "source": "photos",
        "read": 20,
        "rejected": {"truncated": 2},
        "duplicates": {"exact": 1, "near": 40},
        "dropped": {"other-split": 3},
    }
    (root / "index.json").write_text(json.dumps(document))
    pair = {
        **{"key_a": "a.jpg", "key_b": "<b>.jpg", "split_a": "train", "split_b": None},
        **{"label_a": "healthy", "label_b": "late_blight", "distance": 2},
        **{"dropped_a": False, "dropped_b": True},
    }
    pairs = [{"kind": "exact"} | pair, *({"kind": "near"} | pair for _ in range(40))]
    rejected = [{"key": "x.jpg", "reason": "truncated", "message": "cut off"}]
    for name, rows, schema in (
        ("duplicates", pairs, duplicates.DUPLICATES_SCHEMA),
        ("rejected", rejected, plan.REJECTED_SCHEMA),
    ):
        pq.write_table(pa.Table.from_pylist(rows, schema), root / f"{name}.parquet")
    run = tmp_path / "leaves"
    run.mkdir()
    stored.write_run(run, index)
    report.write(str(run))
    page = written(run)
    assert "20 photographs were read from photos ; 2 were rejected." in page.text
    assert "Identical pairs: 1; pairs that look alike: 40; photographs dropped" in page.text
    assert "the first 30, 11 more are in duplicates.parquet" in page.text
    assert "<b>.jpg" in page.text
    assert "x.jpg truncated cut off" in page.text


def test_a_data_set_that_is_gone_or_another(run: Path, tmp_path: Path) -> None:
    model = run / "model" / "model.json"
    document = json.loads(model.read_text())
    other = write_data_set(str(tmp_path / "other"), {"train": 1}, seed=9)
    for place in (str(tmp_path / "nowhere"), other.root):
        document["data"]["shards"] = place
        model.write_text(json.dumps(document))
        report.write(str(run))
        page = written(run)
        assert "no longer exists, or has changed since" in page.text
        assert page.all("img") == []


def test_very_many_classes(tmp_path: Path, data_set: ShardIndex) -> None:
    """Eighty of them: a picture in place of a table of 6,400 cells."""
    run = tmp_path / "leaves"
    run.mkdir()
    names = tuple(f"Tomato___Yellow_Leaf_Curl_Virus_{i}" for i in range(80))
    stored.write_run(run, data_set, class_names=names)
    model = run / "model" / "model.json"
    document = json.loads(model.read_text())
    document["data"] = {}
    model.write_text(json.dumps(document))
    report.write(str(run))
    page = written(run)
    (picture,) = page.all("img")
    assert str(picture["src"]).startswith("data:image/png")
    assert "The most frequent errors" in page.text


def test_random_weights_and_small_classes_are_told_first(run: Path) -> None:
    model = run / "model" / "model.json"
    document = json.loads(model.read_text())
    document["backbone"]["source"] = "random"
    model.write_text(json.dumps(document))
    metrics = run / "metrics.json"
    scores = json.loads(metrics.read_text())
    scores["test"]["per_class"]["healthy"]["support"] = 4
    metrics.write_text(json.dumps(scores))
    report.write(str(run))
    text = written(run).text
    assert "The backbone has random weights: this is a check of the pipeline" in text
    assert "healthy has 4 photographs in the test split: its figures are a matter of" in text
    scores["test"]["per_class"]["late_blight"]["support"] = 1
    metrics.write_text(json.dumps(scores))
    report.write(str(run))
    assert "healthy (4) and late_blight (1) have few photographs in the" in written(run).text


def test_the_note_of_a_run_is_at_the_top(run: Path) -> None:
    report.write(str(run))
    assert not [tag for tag in written(run).all("p") if tag.get("class") == "remark"]
    config = run / "config.yaml"
    config.write_text(config.read_text() + "note: drawn <b>leaves</b>, not photographs\n")
    report.write(str(run))
    page = written(run)
    assert "drawn <b>leaves</b>, not photographs" in page.text.split("accuracy on test")[0]
    assert [tag for tag in page.all("p") if tag.get("class") == "remark"]
    assert page.all("b") == []


def test_a_run_on_a_range_of_workers(run: Path) -> None:
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"workers": "1..4"}))
    report.write(str(run))
    assert "1..4 workers" in written(run).text


def test_a_run_that_is_not_finished(run: Path, tmp_path: Path) -> None:
    (run / "run.json").unlink()
    for folder in (run, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="is no finished run") as caught:
            report.write(str(folder))
        assert caught.value.reason == "unfinished-run"


def test_samples_are_thumbnails_of_each_class(data_set: ShardIndex) -> None:
    found = pictures.samples(data_set)
    keys = {key for shard in data_set.of_split("train") for key in _keys(data_set, shard)}
    assert [item.label for item in found] == sorted(item.label for item in found)
    assert {item.label for item in found} == set(data_set.class_names)
    assert {item.key for item in found} <= keys
    assert len({item.jpeg for item in found}) == len(found)


def _keys(index: ShardIndex, shard: shards.Shard) -> list[str]:
    found: list[str] = shards.read_columns(index.root, shard, ["key"])["key"].to_pylist()
    return found


def test_a_run_that_was_started_again_has_its_report(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    report.write(str(run))
    first = (run / "report.html").read_bytes()
    restart = {"at": "2026-11-24T20:00:00+00:00", "why": "worker 1 died", "counted": True}
    (run / "metrics.json").write_text(json.dumps({**metrics, "restarts": [restart]}))
    report.write(str(run))
    assert (run / "report.html").read_bytes() == first


def test_what_fine_tuning_gained(tmp_path: Path, data_set: ShardIndex) -> None:
    run = tmp_path / "leaves"
    run.mkdir()
    stored.write_run(run, data_set, fine_tuned=True)
    report.write(str(run))
    page = written(run)
    gained = "took validation accuracy from 85.4 % (head alone) to"
    assert f"Fine-tuning the last 2 of 4 stages {gained}" in page.text
    assert "in epoch 17 of 20, which is published" in page.text
    assert (
        "spent 1.3 % of their time waiting for photographs; the mean speed was 12.5 images/s"
        in page.text
    )
    assert page.text.count("Dotted: the head alone on validation") == 2
    assert "Learning curves of the head" in page.text
    labels = [str(svg.get("aria-label")) for svg in page.all("svg")]
    assert sum("The best epoch is 17." in label for label in labels) == 2
    assert "last stages and head, on photographs 12.5 8 min" in page.text


def test_fine_tuning_that_gained_nothing(tmp_path: Path, data_set: ShardIndex) -> None:
    run = tmp_path / "leaves"
    run.mkdir()
    stored.write_run(run, data_set, fine_tuned=True)
    facts = json.loads((run / "run.json").read_text())
    told = facts["fine_tune"]
    told |= {"published": False, "best_epoch": 0}
    told["head_alone_valid"] = {"valid_loss": 0.11, "valid_accuracy": 0.97}
    del told["head_alone"], told["fine_tuned"]
    (run / "run.json").write_text(json.dumps(facts))
    report.write(str(run))
    page = written(run)
    assert "Fine-tuning the last 2 of 4 stages for 20 epochs gained nothing" in page.text
    assert "that of the head alone is 0.11. The head alone is published" in page.text
    assert page.text.count("No epoch was better than the head alone.") == 2


def test_a_peak_is_cut_off_and_told(tmp_path: Path, data_set: ShardIndex) -> None:
    run = tmp_path / "leaves"
    run.mkdir()
    stored.write_run(run, data_set)
    head, *rows = (run / "history.csv").read_text().splitlines()
    fields = rows[1].split(",")
    fields[head.split(",").index("valid_loss")] = "987.0"
    (run / "history.csv").write_text("\n".join([head, rows[0], ",".join(fields), *rows[2:]]))
    report.write(str(run))
    assert "are cut off; the largest was 987." in written(run).text


def test_no_confidence_is_too_low(tmp_path: Path, data_set: ShardIndex) -> None:
    run = tmp_path / "leaves"
    run.mkdir()
    stored.write_run(run, data_set)
    path = run / "model" / "model.json"
    model = json.loads(path.read_text())
    model["review"]["confidence"] = 0.0
    path.write_text(json.dumps(model))
    report.write(str(run))
    text = written(run).text
    assert "No photograph is for review because of its confidence" in text
    assert "confidence under" not in text


def test_fine_tuning_without_a_validation_split(tmp_path: Path, data_set: ShardIndex) -> None:
    run = tmp_path / "leaves"
    run.mkdir()
    stored.write_run(run, data_set, fine_tuned=True)
    (run / "fine_tune.csv").write_text("epoch,train_loss,train_accuracy\n1,0.5,0.8\n")
    facts = json.loads((run / "run.json").read_text())
    facts["fine_tune"] |= {"blocks": "all", "best_epoch": 1, "head_alone_valid": {}}
    (run / "run.json").write_text(json.dumps(facts))
    report.write(str(run))
    page = written(run)
    assert (
        "Fine-tuning all 4 stages and the stem took 1 epoch, and epoch 1 is published" in page.text
    )
    assert "Dotted" not in page.text


def test_samples_of_more_classes_than_have_room(
    data_set: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "_MAX_SAMPLES", 2)
    found = pictures.samples(data_set)
    assert [item.label for item in found] == [data_set.class_names[0], data_set.class_names[2]]
