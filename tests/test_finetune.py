import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from leafnet import (
    backbone,
    bundle,
    checkpoint,
    finetune,
    metrics,
    runs,
    shards,
    storage,
    tuning,
)
from leafnet.classifier import head_logits, initial_head
from leafnet.config import FineTuneSettings, TrainSettings
from leafnet.errors import UserError
from leafnet.finetune import TuneState, TuningData
from leafnet.images import decode
from leafnet.photographs import open_split
from leafnet.shards import ShardIndex
from leafnet.training import Hooks, Leaving, Place, Saving
from leafnet.workers import Survival
from tests import test_tensorboard
from tests.markup import check

SIZE = 32
STRONG = {"crop": 0.4, "brightness": 0.2, "colour": 0.2}
SETTINGS = {"blocks": 1, "epochs": 2, "batch_size": 12, "mixup": 0.4, "cutmix": 1.0, **STRONG}


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
    every_steps: int | None = None,
    hooks: Hooks | None = None,
    saved: list[TuneState] | None = None,
    **settings: Any,
) -> tuple[TuneState, list[TuneState]]:
    """(the last state, a copy of each that was saved), in this process."""
    kept: list[TuneState] = [] if saved is None else saved

    def save(state: TuneState | None) -> None:
        assert state is not None
        kept.append(dataclasses.replace(state, history=list(state.history)))

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
        report=lambda row: None,
        advance=lambda count: None,
        saving=Saving(save, 0, every_steps),
        hooks=hooks,
        state=state,
    )
    return final, kept


@pytest.fixture(scope="module")
def whole(data_set: ShardIndex, weights: backbone.Weights) -> tuple[TuneState, list[TuneState]]:
    """A fit of two epochs of three steps that was not interrupted, and its state at each step."""
    return fit(data_set, weights, every_steps=1)


def equals(found: TuneState, expected: TuneState) -> None:
    """Bit for bit, but for what the clock says."""
    for name in ("weights", "first", "second", "average", "best"):
        assert largest_difference(getattr(found, name), getattr(expected, name)) == 0
    assert (found.best_epoch, found.best_loss) == (expected.best_epoch, expected.best_loss)
    assert found.head_alone == expected.head_alone
    assert len(found.history) == len(expected.history)
    times = ("images_per_s", "waited")
    for row, other in zip(found.history, expected.history, strict=True):
        assert {k: v for k, v in row.items() if k not in times} == {
            k: v for k, v in other.items() if k not in times
        }


def largest_difference(found: finetune.Arrays, expected: finetune.Arrays) -> float:
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[name] - expected[name]).max()) for name in found)


@pytest.mark.parametrize("step", [3, 5])
def test_going_on_from_a_checkpoint_changes_nothing(
    step: int,
    data_set: ShardIndex,
    weights: backbone.Weights,
    whole: tuple[TuneState, list[TuneState]],
    tmp_path: Path,
) -> None:
    """Between two epochs, and inside the second one."""
    final, saved = whole
    assert [state.step for state in saved] == [1, 2, 3, 4, 5, 6]
    identity = {"seed": 0}
    finetune.save(tmp_path, saved[step - 1], identity=identity)
    initial = finetune.initial_arrays(weights.convolutions, probe().head, 1)
    loaded = finetune.load(tmp_path, initial, identity=identity)
    assert (loaded.epoch, loaded.step, loaded.losses.size) == (1, step, step - 3)
    again, _ = fit(data_set, weights, loaded)
    equals(again, final)


def small(number: float) -> finetune.Arrays:
    return {"head/0/kernel": np.full((2, 3), number, np.float32)}


@pytest.mark.parametrize(
    ("best_epoch", "losses", "best"), [(0, [], 9), (0, [0.5], 9), (2, [], 4), (2, [0.5], 5)]
)
def test_a_checkpoint_has_the_best_weights(
    best_epoch: int, losses: list[float], best: int, tmp_path: Path
) -> None:
    """What fine-tuning began from, the average right after the best epoch, or those kept since."""
    state = TuneState(
        *(2, 6 + len(losses), small(1), small(2), small(3), small(4), small(5)),
        *(best_epoch, 0.25, {"valid_loss": 0.5}, [{"epoch": 1.0}]),
        *(np.array(losses), 7.0, 2.5, 0.125),
    )
    finetune.save(tmp_path, state, identity={"seed": 0})
    found = finetune.load(tmp_path, small(9), identity={"seed": 0})
    assert found.best["head/0/kernel"][0, 0] == best
    assert found.losses.tolist() == losses
    assert (found.step, found.correct, found.seconds, found.waited) == (state.step, 7.0, 2.5, 0.125)

    with pytest.raises(UserError, match="started with seed 0, not 1"):
        finetune.load(tmp_path, small(9), identity={"seed": 1})
    (tmp_path / "arrays.npz").write_bytes(b"damaged")
    with pytest.raises(UserError, match="is damaged"):
        finetune.load(tmp_path, small(9), identity={"seed": 0})


def test_the_trained_stage_and_the_head_move_each_by_a_small_part_of_its_own_scale(
    weights: backbone.Weights, whole: tuple[TuneState, list[TuneState]]
) -> None:
    for name, before in finetune.initial_arrays(weights.convolutions, probe().head, 1).items():
        if name.endswith("kernel"):
            moved = np.abs(whole[0].weights[name] - before).max() / np.sqrt((before**2).mean())
            assert 1e-4 < moved < 0.1, name


def leaving_at(what: str) -> Hooks:
    """Hooks of a worker that is asked to leave when it tells of `what`."""
    told: list[str] = []
    return Hooks(doing=told.append, leave=lambda: any(what in each for each in told))


@pytest.mark.parametrize(
    ("what", "step"), [("epoch 1, step 2 to", 2), ("validating epoch 1, 0 ", 3)]
)
def test_asked_to_leave_it_saves_within_the_epoch_and_the_rest_is_the_same(
    what: str,
    step: int,
    data_set: ShardIndex,
    weights: backbone.Weights,
    whole: tuple[TuneState, list[TuneState]],
) -> None:
    """Validation is given up; nothing of this would have been saved by the clock."""
    saved: list[TuneState] = []
    with pytest.raises(Leaving, match=f"after step {step}"):
        fit(data_set, weights, hooks=leaving_at(what), saved=saved)
    (state,) = saved
    assert (state.epoch, state.step, state.losses.size) == (0, step, step)
    again, _ = fit(data_set, weights, state)
    equals(again, whole[0])


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


def tune_job(data_set: ShardIndex, weights: backbone.Weights, **more: Any) -> tuning.TuneJob:
    return tuning.TuneJob(
        settings=FineTuneSettings.model_validate(SETTINGS | {"epochs": 1, "learning_rate": 0.01}),
        class_names=data_set.class_names,
        class_weights="balanced",
        seed=0,
        save_every_s=0,
        identity={},
        index=data_set,
        weights=ray.put(weights.convolutions),
        probe=ray.put(probe()),
        precision="float32",
        image_size=SIZE,
        threads=1,
        **more,
    )


def run_job(job: tuning.TuneJob, workers: int, folder: Path) -> tuple[tuning.Tuned, int]:
    """(what it came to, images that were told of), on Ray Train."""
    rows: list[dict[str, float]] = []
    images: list[int] = []
    tuned, restarts = tuning.fine_tune(
        job,
        count=workers,
        cpus_per_worker=0.75,
        gpu=False,
        storage_path=str(folder),
        on_epoch=rows.append,
        on_images=images.append,
        survival=Survival(keep=9),
    )
    assert restarts == []
    assert [row["epoch"] for row in rows] == [1]
    return tuned, sum(images)


@pytest.mark.ray
def test_two_workers_take_the_steps_of_one_also_from_inside_an_epoch(
    local_ray: None, data_set: ShardIndex, weights: backbone.Weights, tmp_path: Path
) -> None:
    """One worker; two workers; and one that goes on from the second step of the two."""
    one, _ = fit(data_set, weights, epochs=1, learning_rate=0.01)
    job = tune_job(data_set, weights, save_every_steps=2)
    two, images = run_job(job, 2, tmp_path)
    assert images == 36
    folder = str(tmp_path / "fine_tune")
    third, second, *_ = checkpoint.names(folder)
    assert second.startswith("checkpoint_000000002")
    storage.delete(storage.join(folder, third))
    resumed, images = run_job(job, 1, tmp_path)
    assert images == 36

    assert one.best_epoch == two.best_epoch == resumed.best_epoch == 1
    for made in (two, resumed):
        for name, (kernel, bias) in finetune.convolutions(one.best).items():
            close(made.convolutions[name][0], kernel)
            close(made.convolutions[name][1], bias)
            moved = np.abs(kernel - weights.convolutions[name][0]).max()
            assert moved > 1.5e-4, "nothing was learnt"
        for layer, expected in zip(made.head, finetune.head(one.best), strict=True):
            close(layer[0], expected[0])
            close(layer[1], expected[1])
        for name in ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy"):
            assert made.history[0][name] == pytest.approx(one.history[0][name], rel=1e-4)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal to a hundred thousandth of their scale."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(scale, 1e-3))


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
                # At a higher rate random weights lose by it.
                "fine_tune": {
                    **{"blocks": 1, "epochs": 2, "batch_size": 12, "learning_rate": 0.002},
                    **STRONG,
                },
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
    for split in ("train", "valid"):
        assert test_tensorboard.written(folder, split, "fine_tune/loss") == [1, 2]
        assert test_tensorboard.written(folder, split, "loss") == [1]
    page = check((folder / "report.html").read_bytes())
    assert "Fine-tuning the last of 4 stages took validation accuracy from" in page.text
    assert f"in epoch {told['best_epoch']} of 2, which is published" in page.text
