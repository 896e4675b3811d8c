"""Training and evaluating a tiny data set in this process, on the session's Ray."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import yaml
from PIL import Image

from leafnet.core import lock, storage, terminal
from leafnet.core.errors import EXIT_IN_USE, UserError
from leafnet.core.settings import validate
from leafnet.data import shards
from leafnet.data.images import decode
from leafnet.data.shards import ShardIndex
from leafnet.evaluation import evaluate
from leafnet.evaluation.document import read
from leafnet.evaluation.settings import EvaluateSettings
from leafnet.features.cache import mark_used
from leafnet.metrics import prevalence
from leafnet.metrics import scores as metrics_scores
from leafnet.metrics.calibration import fit_temperature
from leafnet.metrics.scores import tally
from leafnet.metrics.thresholds import Outcomes
from leafnet.models import bundle, openvino
from leafnet.models.classifier import head_logits
from leafnet.models.openvino import Int8
from leafnet.models.weights import load_weights
from leafnet.training import quantize, train
from leafnet.training.quantize import Quantized
from leafnet.training.settings import TrainSettings
from tests.conftest import write_data_set
from tests.support.markup import check
from tests.training import test_tensorboard

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HEAD = {"units": [16], "epochs": 4, "batch_size": 8}


def settings(data_set: ShardIndex, out: Path, **more: Any) -> TrainSettings:
    values = {
        "shards": data_set.root,
        "out": str(out),
        "name": "leaves",
        "weights": "random",
        "image_size": 64,
        "views": 3,
        "head": HEAD,
        **more,
    }
    return validate(TrainSettings, values)


@pytest.fixture(scope="module")
def run(
    local_ray: None, data_set: ShardIndex, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainSettings, Path]:
    """A finished run of two workers."""
    out = tmp_path_factory.mktemp("runs")
    chosen = settings(data_set, out, workers=2)
    train.run(chosen)
    return chosen, out / "leaves"


def test_a_run_leaves_all_that_it_should(
    run: tuple[TrainSettings, Path], data_set: ShardIndex
) -> None:
    chosen, folder = run
    scores = json.loads((folder / "metrics.json").read_text())
    assert {split: scores[split]["examples"] for split in scores} == {
        "test": 9,
        "valid": 9,
        "train": 36,
    }
    wanted = {"accuracy", "accuracy_low", "accuracy_high", "macro_f1", "log_loss", "ece"}
    for split, of_split in scores.items():
        assert wanted <= of_split.keys(), split
        assert set(of_split["per_class"]) == set(data_set.class_names)
        assert np.sum(of_split["confusion"]) == of_split["examples"]
        assert of_split["accuracy_low"] <= of_split["accuracy"] <= of_split["accuracy_high"]
    rows = list(csv.DictReader(io.StringIO((folder / "history.csv").read_text())))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert validate(TrainSettings, yaml.safe_load((folder / "config.yaml").read_text())) == chosen
    for name in ("curves.png", "confusion.png", "reliability.png"):
        with Image.open(folder / name) as picture:
            picture.load()
    log = (folder / "train.log").read_text()
    assert "epoch 4/4" in log
    card = (folder / "model" / "MODEL_CARD.md").read_text()
    assert "random weights: a check of the pipeline" in card
    description = json.loads((folder / "model" / "model.json").read_text())
    assert description["metrics"] == scores
    told = description["temperature"]
    assert told["examples"] == 9
    for split in ("valid", "test"):
        assert told["ece"][split]["after"] == scores[split]["ece"]
        assert told["ece"][split]["before"] == scores[split]["before_temperature"]["ece"]
    assert f"a temperature of {told['value']:.3f}" in card
    document, items = read(str(folder / "evaluation"))
    assert list(document["splits"]) == ["test", "valid"]
    assert document["splits"]["test"]["accuracy"] == scores["test"]["accuracy"]
    assert len(items) >= 9
    assert not any(item.cam_jpeg for item in items), "random weights see nothing"
    assert description["data"]["fingerprint"] == data_set.fingerprint
    assert description["settings"] == chosen.model_dump(mode="json")
    assert sum(description["reference"]["confidence"]["counts"]) == 9
    assert len(prevalence.read_bias(description["prevalence"]).covariance) == 3
    page = check((folder / "report.html").read_bytes())
    assert "The backbone has random weights: this is a check of the pipeline" in page.text
    assert len(page.all("img")) >= len(items)
    facts = json.loads((folder / "run.json").read_text())
    assert facts["images_per_second"]["features"] > 0
    assert facts["command"] in page.text
    assert [p.name for p in folder.rglob("*") if p.suffix in (".pkl", ".pickle", ".keras")] == []


def test_tensorboard_shows_every_epoch_once(run: tuple[TrainSettings, Path]) -> None:
    _, folder = run
    for split, tag in (("train", "loss"), ("train", "learning_rate"), ("valid", "accuracy")):
        assert test_tensorboard.written(folder, split, tag) == [1, 2, 3, 4]
    shown = test_tensorboard.read(folder, "test").Tags()
    assert {"confusion", "samples/healthy"} <= set(shown["images"])
    assert "final/macro_f1" in shown["scalars"]


def test_the_published_model_gives_the_metrics(
    run: tuple[TrainSettings, Path], data_set: ShardIndex, tmp_path: Path
) -> None:
    """evaluate, and predict without Ray, agree with what training said of the same examples."""
    _, folder = run
    told = json.loads((folder / "metrics.json").read_text())["test"]
    out = tmp_path / "evaluated.json"
    model, precision = str(folder / "model"), json.loads((folder / "run.json").read_text())
    evaluate.run(
        EvaluateSettings(
            model=model,
            shards=data_set.root,
            split="test",
            out=str(out),
            engine="tensorflow",
            precision=precision["precision"],
        )
    )
    found = json.loads(out.read_text())["splits"]["test"]
    assert found["examples"] == 9
    assert found["confusion"] == told["confusion"]
    assert found["log_loss"] == pytest.approx(told["log_loss"], abs=5e-3)

    tables = [t for s in data_set.of_split("test") for t in shards.row_groups(data_set.root, s)]
    images = [image for t in tables for image in t["image"].to_pylist()]
    labels = [label for t in tables for label in t["label"].to_pylist()]
    predictions = bundle.load(model).predict(images, precision=precision["precision"])
    right = [data_set.class_names[y] == p.label for y, p in zip(labels, predictions, strict=True)]
    assert np.mean(right) == pytest.approx(told["accuracy"])


def test_the_published_model_needs_no_other_temperature(
    run: tuple[TrainSettings, Path], data_set: ShardIndex
) -> None:
    """What was fitted on the validation split is folded into the published head."""
    _, folder = run
    model = bundle.load(str(folder / "model"))
    precision = json.loads((folder / "run.json").read_text())["precision"]
    tables = [t for s in data_set.of_split("valid") for t in shards.row_groups(data_set.root, s)]
    pixels = [decode(image, 64).pixels for t in tables for image in t["image"].to_pylist()]
    labels = np.array([label for t in tables for label in t["label"].to_pylist()])
    logits = head_logits(model.head, model.features(np.stack(pixels), precision=precision))
    assert fit_temperature(logits, labels) == pytest.approx(1, rel=0.02)


def test_a_finished_run_says_so_and_does_nothing(
    run: tuple[TrainSettings, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    chosen, folder = run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    train.run(chosen)
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_another_setting_or_data_set_under_the_same_name_is_refused(
    run: tuple[TrainSettings, Path], data_set: ShardIndex, tmp_path: Path
) -> None:
    chosen, folder = run
    with pytest.raises(UserError, match=r"was started with head\.epochs 4, not 9") as caught:
        train.run(settings(data_set, folder.parent, head={**HEAD, "epochs": 9}))
    assert caught.value.reason == "started-differently"
    other = write_data_set(str(tmp_path), {"train": 3, "valid": 1, "test": 1}, seed=5)
    with pytest.raises(UserError, match="was trained on another data set"):
        train.run(chosen.model_copy(update={"shards": other.root}))


def test_another_head_finds_the_features_in_the_cache(
    run: tuple[TrainSettings, Path], data_set: ShardIndex
) -> None:
    """On one worker and without a hidden layer."""
    _, folder = run
    cache = (folder.parent / "features").rglob("*.parquet")
    parts = {path: path.stat().st_mtime_ns for path in cache}
    train.run(settings(data_set, folder.parent, name="linear", head={**HEAD, "units": []}))
    log = (folder.parent / "linear" / "train.log").read_text()
    assert "126 of 126 views are in the cache" in log
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    assert (folder.parent / "linear" / "model" / "model.json").exists()


def test_shards_that_changed_are_refused(data_set: ShardIndex, tmp_path: Path) -> None:
    root = tmp_path / "shards"
    storage.upload_folder(data_set.root, str(root))
    index = shards.read_index(str(root))
    victim = root / "train-00000.parquet"
    data = bytearray(victim.read_bytes())
    victim.write_bytes(data[:-1])
    with pytest.raises(UserError, match="was changed after preparation"):
        train.run(settings(index, tmp_path / "runs"))
    victim.unlink()
    with pytest.raises(UserError, match="is gone; prepare the data set again"):
        train.run(settings(index, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_shards_of_the_same_size_with_other_bytes_are_refused(
    local_ray: None, data_set: ShardIndex, tmp_path: Path
) -> None:
    """Seen when they are read, by a task far from the driver, and told as the same error."""
    root = tmp_path / "shards"
    storage.upload_folder(data_set.root, str(root))
    victim = root / "train-00000.parquet"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(UserError, match="is not the file that was prepared") as caught:
        train.run(settings(shards.read_index(str(root)), tmp_path / "runs"))
    assert caught.value.reason == "shard-changed"
    assert "\n" not in str(caught.value)


def test_evaluate_refuses_a_data_set_of_other_classes(
    run: tuple[TrainSettings, Path], tmp_path: Path
) -> None:
    _, folder = run
    index = write_data_set(str(tmp_path), {"train": 1})
    renamed = shards.write_index(
        str(tmp_path),
        class_names=["a", "b", "c"],
        shards=index.shards,
        counts={"train": dict.fromkeys("abc", 1)},
        prepared={},
    )
    with pytest.raises(UserError, match="has the classes early_blight, healthy, late_blight"):
        evaluate.run(EvaluateSettings(model=str(folder / "model"), shards=renamed.root))


def dry_run(chosen: TrainSettings, capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The plan of a dry run."""
    code = terminal.run_job(lambda argv: train.run(chosen), ["--json"])
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert code == 0, lines
    assert "all is well" in lines[-2]["text"]
    plan: dict[str, Any] = lines[-1]["plan"]
    return plan


def test_a_dry_run_tells_the_plan_and_leaves_nothing(
    local_ray: None, data_set: ShardIndex, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = dry_run(settings(data_set, tmp_path / "new" / "runs", dry_run=True), capfd)
    assert (plan["views"], plan["cached"]) == (36 * 3 + 18, 0)
    assert plan["batches"] == 2 * (1 + 2) + 4  # two row groups a shard, and parts by themselves
    assert plan["steps"] == 4 * 4
    assert plan["views_per_second"] > 0
    assert plan["features_seconds"] > 0
    assert plan["fingerprint"] == data_set.fingerprint
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_tells_what_fine_tuning_takes(
    local_ray: None, data_set: ShardIndex, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tuned = {"blocks": 1, "epochs": 3, "batch_size": 12, "local_gb": 1}
    plan = dry_run(settings(data_set, tmp_path / "runs", dry_run=True, fine_tune=tuned), capfd)
    assert plan["fine_tune_steps"] == 3 * 3
    assert plan["fine_tune_seconds"] > 0
    assert plan["photographs"] == (36 + 9) * 64**2 * 3
    # Of conv5 and the head: variables, two moments and two averages, three times.
    assert 3 * 5 * 4 * 14.9e6 < plan["checkpoints"] < 3 * 5 * 4 * 16.2e6
    assert plan["memory"] > 10**9
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_counts_what_is_cached(
    run: tuple[TrainSettings, Path], data_set: ShardIndex, capfd: pytest.CaptureFixture[str]
) -> None:
    _, folder = run
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*") if path.is_file()}
    plan = dry_run(settings(data_set, folder.parent, name="b", dry_run=True), capfd)
    assert (plan["views"], plan["cached"], plan["batches"]) == (126, 126, 0)
    assert plan["views_per_second"] is None
    size = sum(path.stat().st_size for path in (folder.parent / "features").rglob("*.parquet"))
    assert plan["cache"] == pytest.approx(size, rel=0.1)
    after = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*") if path.is_file()}
    assert after == before


def test_a_dry_run_finds_what_a_run_would_meet(
    local_ray: None, data_set: ShardIndex, tmp_path: Path
) -> None:
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot write to .*/runs: "):
        train.run(settings(data_set, tmp_path / "runs", dry_run=True))
    with lock.hold(str(tmp_path / "leaves"), timeout_s=60), pytest.raises(UserError) as caught:
        train.run(settings(data_set, tmp_path, dry_run=True))
    assert caught.value.exit_code == EXIT_IN_USE
    root = tmp_path / "shards"
    storage.upload_folder(data_set.root, str(root))
    index = shards.read_index(str(root))
    victim = root / "train-00000.parquet"
    victim.write_bytes(bytes(victim.stat().st_size))
    with pytest.raises(UserError, match=r"train-00000\.parquet"):
        train.run(settings(index, tmp_path / "new", dry_run=True))


def test_a_job_that_evaluates_has_its_log_beside_its_metrics(
    run: tuple[TrainSettings, Path], data_set: ShardIndex, tmp_path: Path
) -> None:
    out = tmp_path / "of_test.json"
    model = str(run[1] / "model")
    evaluate.run(EvaluateSettings(model=model, shards=data_set.root, out=str(out)))
    assert {path.name for path in tmp_path.iterdir()} == {"of_test.json", "of_test.log"}
    assert "INFO leafnet: evaluate     9 of 9 images" in (tmp_path / "of_test.log").read_text()


@pytest.fixture(scope="module")
def in_vain(
    local_ray: None, data_set: ShardIndex, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run whose fine-tuning ruins the network and whose int8 finds no photograph's class.

    Beside it were features of a network that nobody has used for longest.
    """
    out = tmp_path_factory.mktemp("in_vain")
    old = str(out / "features" / "old")
    mark_used(old)
    storage.write_bytes(storage.join(old, "part.parquet"), bytes(1000))
    wrong = Outcomes(np.full(9, 0.9, np.float32), np.zeros(9, bool), np.zeros(9, np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino, "installed", lambda *, quantizer=False: True)
        patch.setattr(quantize, "quantize", lambda *_, **__: Quantized(Int8(b"", b""), 36, wrong))
        train.run(
            settings(
                data_set,
                out,
                image_size=32,
                views=1,
                int8=True,
                # Adam moves each weight by about this much at each step; they are around 0.05.
                fine_tune={"blocks": 1, "epochs": 2, "learning_rate": 0.5, "warmup_epochs": 0},
                cache={"max_gb": 1e-9},
            )
        )
    return out / "leaves"


def test_where_fine_tuning_does_not_help_the_head_alone_is_published(
    in_vain: Path, data_set: ShardIndex
) -> None:
    told = storage.read_json(str(in_vain / "run.json"))["fine_tune"]
    assert (told["published"], told["best_epoch"], told["epochs"]) == (False, 0, 2)
    assert storage.read_json(str(in_vain / "metrics.json")).keys() == {"test", "valid", "train"}
    before, after = (
        storage.read_json(str(in_vain / name))["test"]
        for name in ("metrics_head.json", "metrics.json")
    )
    assert {name: after[name] for name in before} == before
    assert "which is published" in (in_vain / "train.log").read_text()
    model = bundle.load(str(in_vain / "model"))
    weights = load_weights("random").convolutions
    assert all(np.array_equal(model.convolutions[name][0], weights[name][0]) for name in weights)


def test_the_head_alone_gives_the_figures_that_are_told(
    in_vain: Path, data_set: ShardIndex
) -> None:
    model = bundle.load(str(in_vain / "model"))
    tables = list(shards.row_groups(data_set.root, data_set.of_split("test")[0]))
    images = [image for table in tables for image in table["image"].to_pylist()]
    labels = np.array([label for table in tables for label in table["label"].to_pylist()])
    pixels = np.stack([decode(image, 32).pixels for image in images])
    precision = storage.read_json(str(in_vain / "run.json"))["precision"]
    logits = head_logits(model.head, model.features(pixels, precision=precision))
    found = metrics_scores.scores(tally(logits, labels), data_set.class_names)
    told = storage.read_json(str(in_vain / "metrics.json"))["test"]
    assert found["confusion"] == told["confusion"]
    assert found["log_loss"] == pytest.approx(told["log_loss"], abs=5e-3)


def test_int8_that_costs_accuracy_is_left_out_of_the_model(in_vain: Path) -> None:
    model = bundle.load(str(in_vain / "model"))
    told = model.description["int8"]
    assert told["valid_accuracy_float"] > 0.3
    assert (told["valid_accuracy"], told["accepted"], model.int8) == (0, False, None)
    assert not list((in_vain / "model").glob("*.int8.*"))
    assert "refused, it falls by more than 0.5 points" in (in_vain / "train.log").read_text()
    assert "refused" in (in_vain / "model" / "MODEL_CARD.md").read_text()


def test_a_network_that_8_bits_cannot_hold_is_published_without_int8(
    local_ray: None, data_set: ShardIndex, tmp_path: Path
) -> None:
    """One channel is 100,000 times the others, and is made small again by what reads it.

    In floating point that is the same network. In int8 the 127 steps of the layer are as wide as
    that channel, and the others become 0.
    """
    weights = str(tmp_path / "uneven.weights.h5")
    keras.utils.set_random_seed(0)
    network = keras.applications.ResNet50(include_top=False, weights=None)
    for name, scale in (("conv2_block1_1_conv", 1e5), ("conv2_block1_2_conv", 1e-5)):
        kernel, bias = network.get_layer(name).get_weights()
        channel = np.s_[:, :, :, 0] if scale > 1 else np.s_[:, :, 0]
        kernel[channel] *= scale
        network.get_layer(name).set_weights([kernel, bias])
    network.save_weights(weights)
    train.run(settings(data_set, tmp_path, weights=weights, int8=True, head=HEAD))
    model = bundle.load(str(tmp_path / "leaves" / "model"))
    of_int8 = model.description["int8"]
    assert of_int8["valid_accuracy"] < of_int8["valid_accuracy_float"]
    assert (of_int8["accepted"], model.int8) == (False, None)
    assert "published without int8" in (tmp_path / "leaves" / "train.log").read_text()


def test_the_cache_gives_up_what_was_not_used_for_longest_and_keeps_its_own(in_vain: Path) -> None:
    (kept,) = (in_vain.parent / "features").iterdir()
    assert kept.name != "old"
    assert list(kept.rglob("*.parquet"))
    assert (
        f"evicted {in_vain.parent / 'features' / 'old'} from" in (in_vain / "train.log").read_text()
    )
