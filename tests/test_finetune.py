import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from leafnet import backbone, bundle, finetune, metrics, runs, shards, storage, tuning
from leafnet.classifier import head_logits, initial_head
from leafnet.config import FineTuneSettings, TrainSettings
from leafnet.errors import UserError
from leafnet.finetune import TuneState, TuningData
from leafnet.images import decode
from leafnet.photographs import open_split
from leafnet.shards import ShardIndex
from leafnet.training import Place
from leafnet.workers import Survival

SIZE = 32
SETTINGS = {"blocks": 1, "epochs": 2, "batch_size": 12, "mixup": 0.4, "cutmix": 1.0}


@pytest.fixture(scope="module")
def weights() -> backbone.Weights:
    return backbone.load_weights("random")


def probe() -> tuning.Probe:
    ones = np.ones(backbone.FEATURES, np.float32)
    return tuning.Probe(initial_head((8,), 3, inputs=backbone.FEATURES, seed=0), 0 * ones, ones)


def fit(
    data_set: ShardIndex,
    weights: backbone.Weights,
    state: TuneState | None = None,
    *,
    local_gb: float = 1,
    **settings: Any,
) -> tuple[TuneState, list[TuneState]]:
    """(the last state, a copy of each that was saved), in this process."""
    saved: list[TuneState] = []

    def report(row: dict[str, float], state: TuneState | None, save: bool) -> None:
        if state:
            saved.append(dataclasses.replace(state, history=list(state.history)))

    train, valid = (
        open_split(
            data_set.root,
            data_set.of_split(split),
            image_size=SIZE,
            threads=2,
            max_local=local_gb * 1e9,
        )
        for split in ("train", "valid")
    )
    start = probe()
    final = finetune.fine_tune(
        TuningData(train, valid, start.mean, start.deviation),
        weights=weights.convolutions,
        head=start.head,
        settings=FineTuneSettings.model_validate(SETTINGS | settings),
        class_weights="balanced",
        precision="float32",
        image_size=SIZE,
        num_classes=3,
        seed=0,
        place=Place(0, 1),
        save_every_s=0,
        report=report,
        advance=lambda count: None,
        state=state,
    )
    return final, saved


def largest_difference(found: finetune.Arrays, expected: finetune.Arrays) -> float:
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[name] - expected[name]).max()) for name in found)


def test_going_on_from_a_checkpoint_changes_nothing(
    data_set: ShardIndex, weights: backbone.Weights, tmp_path: Path
) -> None:
    final, saved = fit(data_set, weights)
    assert [state.epoch for state in saved] == [1, 2]
    identity = {"seed": 0}
    finetune.save(tmp_path, saved[0], identity=identity)
    initial = finetune.initial_arrays(weights.convolutions, probe().head, 1)
    loaded = finetune.load(tmp_path, initial, identity=identity)
    again, _ = fit(data_set, weights, loaded)
    for name in ("weights", "first", "second", "average", "best"):
        assert largest_difference(getattr(again, name), getattr(final, name)) == 0
    assert (again.best_epoch, again.best_loss) == (final.best_epoch, final.best_loss)
    for found, expected in zip(again.history, final.history, strict=True):
        times = ("images_per_s", "waited")
        assert {k: v for k, v in found.items() if k not in times} == {
            k: v for k, v in expected.items() if k not in times
        }
    # The trained stage and the head moved, each by a small part of its own scale.
    for name, before in initial.items():
        if name.endswith("kernel"):
            moved = np.abs(final.weights[name] - before).max() / np.sqrt((before**2).mean())
            assert 1e-4 < moved < 0.1, name

    with pytest.raises(UserError, match="started with seed 0, not 1"):
        finetune.load(tmp_path, initial, identity={"seed": 1})
    (tmp_path / "arrays.npz").write_bytes(b"damaged")
    with pytest.raises(UserError, match="is damaged"):
        finetune.load(tmp_path, initial, identity=identity)


def test_what_does_not_help_is_not_taken(data_set: ShardIndex, weights: backbone.Weights) -> None:
    """A rate that ruins the network; streamed, and stopped early."""
    final, _ = fit(
        data_set, weights, local_gb=0, learning_rate=3.0, warmup_epochs=0, epochs=9, patience=2
    )
    assert final.epoch < 9
    assert final.epoch - final.best_epoch == 2
    if final.best_epoch == 0:
        initial = finetune.initial_arrays(weights.convolutions, probe().head, 1)
        assert largest_difference(final.best, initial) == 0
        assert final.best_loss == final.head_alone["valid_loss"]


def test_a_batch_that_workers_cannot_share_is_refused() -> None:
    mixed = FineTuneSettings(batch_size=14, mixup=0.4)
    finetune.check_batch(mixed, examples=12, workers=2)
    finetune.check_batch(FineTuneSettings(batch_size=13), examples=99, workers=2)
    with pytest.raises(UserError, match=r"give a multiple of 4 with --fine_tune\.batch_size"):
        finetune.check_batch(mixed, examples=99, workers=2)
    with pytest.raises(UserError, match="give at least 2"):
        finetune.check_batch(FineTuneSettings(batch_size=1), examples=99, workers=2)


@pytest.mark.ray
def test_two_workers_take_the_steps_of_one(
    local_ray: None, data_set: ShardIndex, weights: backbone.Weights, tmp_path: Path
) -> None:
    convolutions, start = ray.put(weights.convolutions), ray.put(probe())
    made: list[tuning.Tuned] = []
    for workers in (1, 2):
        rows: list[dict[str, float]] = []
        images: list[int] = []
        job = tuning.TuneJob(
            settings=FineTuneSettings.model_validate(
                SETTINGS | {"epochs": 1, "learning_rate": 0.01}
            ),
            class_names=data_set.class_names,
            class_weights="none",
            seed=0,
            save_every_s=0,
            identity={},
            index=data_set,
            weights=convolutions,
            probe=start,
            precision="float32",
            image_size=SIZE,
            threads=1,
        )
        tuned, restarts = tuning.fine_tune(
            job,
            count=workers,
            cpus_per_worker=0.75,
            gpu=False,
            storage_path=str(tmp_path / str(workers)),
            on_epoch=rows.append,
            on_images=images.append,
            survival=Survival(),
        )
        assert restarts == []
        made.append(tuned)
        assert [row["epoch"] for row in rows] == [1]
        assert sum(images) == 36
    one, two = made
    assert one.best_epoch == two.best_epoch == 1
    for name, (kernel, bias) in one.convolutions.items():
        np.testing.assert_allclose(two.convolutions[name][0], kernel, atol=1e-4)
        np.testing.assert_allclose(two.convolutions[name][1], bias, atol=1e-4)
        assert np.abs(kernel - weights.convolutions[name][0]).max() > 1.5e-4, "nothing was learnt"
    for (kernel, bias), (other_kernel, other_bias) in zip(two.head, one.head, strict=True):
        np.testing.assert_allclose(kernel, other_kernel, atol=1e-4)
        np.testing.assert_allclose(bias, other_bias, atol=1e-4)
    assert two.history[0]["train_loss"] == pytest.approx(one.history[0]["train_loss"], rel=1e-4)
    assert two.history[0]["valid_loss"] == pytest.approx(one.history[0]["valid_loss"], rel=1e-4)


@pytest.mark.ray
def test_a_run_publishes_what_was_fine_tuned(
    local_ray: None, data_set: ShardIndex, weights: backbone.Weights, tmp_path: Path
) -> None:
    """The published model gives the figures that the run tells, and says what it is."""
    runs.train(
        TrainSettings.model_validate(
            {
                "shards": data_set.root,
                "out": str(tmp_path),
                "name": "tuned",
                "weights": "random",
                "image_size": SIZE,
                "views": 1,
                "precision": "float32",
                "head": {"units": [], "epochs": 1},
                "fine_tune": {"blocks": 1, "epochs": 2, "batch_size": 12},
            }
        )
    )
    folder = tmp_path / "tuned"
    told = storage.read_json(str(folder / "run.json"))["fine_tune"]
    assert told["published"]
    model = bundle.load(str(folder / "model"))
    assert model.description["fine_tune"]["best_epoch"] == told["best_epoch"]
    assert "fine-tuned with the head" in (folder / "model" / "MODEL_CARD.md").read_text()
    changed = {
        name
        for name, (kernel, _) in model.convolutions.items()
        if (kernel != weights.convolutions[name][0]).any()
    }
    assert changed == {name for name in model.convolutions if name.startswith("conv5")}
    tables = list(shards.row_groups(data_set.root, data_set.of_split("valid")[0]))
    images = [image for table in tables for image in table["image"].to_pylist()]
    labels = np.array([label for table in tables for label in table["label"].to_pylist()])
    pixels = np.stack([decode(image, SIZE).pixels for image in images])
    features = model.features(pixels, precision="float32")
    scores = metrics.scores(
        metrics.tally(head_logits(model.head, features), labels), data_set.class_names
    )
    found, alone = (
        storage.read_json(str(folder / name))["valid"]["log_loss"]
        for name in ("metrics.json", "metrics_head.json")
    )
    assert scores["log_loss"] == pytest.approx(found, abs=1e-3)
    assert found < alone
    assert model.novelty is not None
    rows = (folder / "fine_tune.csv").read_text().splitlines()
    assert len(rows) == 3
    assert rows[0].startswith("epoch,step,learning_rate")
