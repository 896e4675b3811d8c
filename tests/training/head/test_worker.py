"""The parts of fitting that need no cluster; Ray's own calls are replaced where they are met."""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from scipy.special import softmax
from sklearn.metrics import confusion_matrix, log_loss

from leafnet.distributed import group
from leafnet.distributed import worker as distributed_worker
from leafnet.distributed.failures import Restart
from leafnet.distributed.worker import Hooks, Place
from leafnet.features.cache import SplitFeatures
from leafnet.metrics import calibration, novelty
from leafnet.models.classifier import Head, fold_standardisation, head_logits
from leafnet.models.weights import FEATURES
from leafnet.training.head import fit
from leafnet.training.head import worker as head_worker
from leafnet.training.head.state import TrainState, load
from leafnet.training.head.worker import HeadJob, HeadResult
from leafnet.training.worker import Placement
from tests.support.made_features import CLASSES, ROWS, head_jobs

WIDTH = 6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few examples are more than one block."""
    monkeypatch.setattr(head_worker, "BLOCK", 4)


def made_head(inputs: int = WIDTH) -> Head:
    generator = np.random.default_rng(7)
    kernel, bias = generator.normal(size=(inputs, 3)), generator.normal(size=3)
    return [(kernel.astype(np.float32), bias.astype(np.float32))]


def made_split(count: int) -> SplitFeatures:
    """Two views, of which only the first is plain; no class as often as another."""
    generator = np.random.default_rng(count)
    values = np.abs(generator.normal(size=(count, 2, WIDTH))).astype(np.float16)
    labels = np.where(np.arange(count) % 5 < 3, 0, np.arange(count) % 3)
    return SplitFeatures(values, labels.astype(np.int32))


def test_workers_count_every_example_of_a_split_once() -> None:
    split, head = made_split(11), made_head()
    parts = [head_worker.tally_part(split, head, Place(rank, 3), 3) for rank in range(3)]
    logits = split.features[:, 0].astype(np.float64) @ head[0][0] + head[0][1]
    expected = confusion_matrix(split.labels, logits.argmax(axis=1), labels=range(3))
    np.testing.assert_array_equal(sum(part.confusion.toarray() for part in parts), expected)
    assert [part.examples for part in parts] == [3, 4, 4]
    total = log_loss(split.labels, softmax(logits, axis=1), normalize=False, labels=range(3))
    assert sum(part.log_loss_sum for part in parts) == pytest.approx(total, rel=1e-5)


def test_a_head_is_calibrated_on_the_plain_views_of_validation() -> None:
    valid = made_split(30)
    head = [(made_head()[0][0] * 5, made_head()[0][1])]  # too sure of itself
    temperature, calibrated = head_worker.calibrated(head, valid)
    logits = valid.features[:, 0].astype(np.float32) @ head[0][0] + head[0][1]
    assert temperature == pytest.approx(calibration.fit_temperature(logits, valid.labels))
    assert temperature > 2
    np.testing.assert_allclose(
        head_logits(calibrated, valid.features[:, 0]), logits / temperature, rtol=1e-3, atol=1e-4
    )


def test_without_validation_a_head_stays_as_it_is() -> None:
    head = made_head()
    assert head_worker.calibrated(head, made_split(0)) == (1.0, head)


def test_answers_are_the_logits_of_the_plain_views_of_what_was_held_back() -> None:
    splits, head = (
        {"train": made_split(3), "valid": made_split(9), "test": made_split(0)},
        made_head(),
    )
    found = head_worker.answers_of(splits, head)
    assert list(found) == ["valid"]
    expected = splits["valid"].features[:, 0].astype(np.float32) @ head[0][0] + head[0][1]
    np.testing.assert_allclose(found["valid"].logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["valid"].labels, splits["valid"].labels)


def test_outcomes_are_the_highest_probability_whether_it_is_right_and_the_distance() -> None:
    splits, head = (
        {"train": made_split(40), "valid": made_split(0), "test": made_split(9)},
        made_head(),
    )
    distance = novelty.fit(splits["train"].features[:, 0])
    found = head_worker.outcomes_of(splits, head, distance)
    assert list(found) == ["test"]
    plain, labels = splits["test"].features[:, 0].astype(np.float32), splits["test"].labels
    probabilities = softmax(plain @ head[0][0] + head[0][1], axis=1)
    np.testing.assert_allclose(found["test"].confidence, probabilities.max(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(found["test"].correct, probabilities.argmax(axis=1) == labels)
    np.testing.assert_allclose(found["test"].novelty, distance.distance(plain), rtol=1e-4)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HeadJob:
    """Over features in a cache of the test, with the node's copies beside it."""
    (tmp_path / "node").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    return head_jobs(str(tmp_path / "cache"))(epochs=2, dropout=0.0)


def test_features_are_copied_to_the_node_once(job: HeadJob) -> None:
    first = head_worker.local_features(job)
    assert {split: each.features.shape[:2] for split, each in first.splits.items()} == {
        "train": (ROWS["train"], 2),
        "valid": (ROWS["valid"], 1),
        "test": (ROWS["test"], 1),
    }
    for split, each in first.splits.items():
        np.testing.assert_array_equal(each.labels, np.arange(ROWS[split]) % len(CLASSES))
    shutil.rmtree(job.cache_root)
    again = head_worker.local_features(job)
    assert again.shared.path == first.shared.path
    for split in first.splits:
        np.testing.assert_array_equal(again.splits[split].features, first.splits[split].features)
        np.testing.assert_array_equal(again.splits[split].labels, first.splits[split].labels)


def test_statistics_are_of_all_views_of_the_training_split_alone(job: HeadJob) -> None:
    local = head_worker.local_features(job)
    values = local.splits["train"].features.astype(np.float64).reshape(-1, FEATURES)
    np.testing.assert_allclose(local.mean, values.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(local.deviation, values.std(axis=0), rtol=1e-4)


def test_other_features_have_another_folder(job: HeadJob) -> None:
    shutil.copytree(job.cache_root, f"{job.cache_root}-2")
    plain = {**job.parts, "train": tuple(part for part in job.parts["train"] if part.first == 0)}
    others = [
        job,
        dataclasses.replace(job, cache_root=f"{job.cache_root}-2"),
        dataclasses.replace(job, parts={**job.parts, "test": ()}),
        dataclasses.replace(job, parts=plain),
        dataclasses.replace(job, parts=plain, views=1),
    ]
    folders = [head_worker.local_features(other).shared.path for other in others]
    assert len(set(folders)) == len(others)


class Alone:
    """What a worker meets when it fits: its post, and the checkpoints that it keeps."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, Any]] = []
        self.kept: list[tuple[int, bool]] = []  # step, and whether this worker wrote it
        self.doing: list[str] = []
        self.newest: str | None = None
        self._folder = folder
        monkeypatch.setattr(distributed_worker, "hooks", lambda: Hooks(long=self.doing.append))
        monkeypatch.setattr(distributed_worker, "uploaded", lambda: True)
        monkeypatch.setattr(distributed_worker, "newest_checkpoint", lambda url: self.newest)
        monkeypatch.setattr(distributed_worker, "keep", self._keep)
        monkeypatch.setattr(ray, "get", lambda value: value)

    def _keep(self, write: Callable[[str], None] | None, *, step: int) -> None:
        self.kept.append((step, write is not None))
        if write is not None:
            write(str(self._folder / f"step_{step}"))

    def of(self, kind: str) -> list[Any]:
        return [value for each, value in self.events if each == kind]


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Alone:
    return Alone(tmp_path, monkeypatch)


def test_a_worker_fits_calibrates_and_tells(job: HeadJob, alone: Alone, tmp_path: Path) -> None:
    head_worker.fit_and_evaluate(job, Place(0, 1), alone.events.append, str(tmp_path))
    # 48 examples in batches of 16, saved at the end of each of two epochs.
    assert [row["step"] for row in alone.of("epoch")] == [3, 6]
    assert alone.kept == [(3, True), (6, True)]
    assert alone.doing == ["reading the features", "evaluating"]
    assert not list((tmp_path / "node").rglob("*.npy"))  # nothing is left on the node
    (result,), (tallies,) = alone.of("result"), alone.of("tallies")
    assert {split: each.examples for split, each in tallies.items()} == ROWS
    local = head_worker.local_features(job)
    head = fold_standardisation(result.state.best_head, mean=local.mean, deviation=local.deviation)
    plain = {split: each.features[:, 0] for split, each in local.splits.items()}
    logits = {split: head_logits(head, of) / result.temperature for split, of in plain.items()}
    for split in ("valid", "test"):
        np.testing.assert_allclose(
            result.answers[split].logits, logits[split], rtol=1e-3, atol=1e-3
        )
    for split, each in local.splits.items():
        expected = confusion_matrix(each.labels, logits[split].argmax(axis=1), labels=range(3))
        np.testing.assert_array_equal(tallies[split].confusion.toarray(), expected)
    found = novelty.fit(plain["train"])
    np.testing.assert_allclose(result.novelty.mean, found.mean, rtol=1e-4, atol=1e-6)
    stored = load(tmp_path / "step_6", identity=job.identity)
    np.testing.assert_array_equal(stored.head[0][0], result.state.head[0][0])


def test_a_worker_goes_on_from_the_newest_checkpoint(
    job: HeadJob, alone: Alone, tmp_path: Path
) -> None:
    head_worker.fit_and_evaluate(job, Place(0, 1), alone.events.append, str(tmp_path))
    (whole,) = alone.of("result")
    alone.events.clear()
    alone.newest = str(tmp_path / "step_3")
    head_worker.fit_and_evaluate(job, Place(0, 1), alone.events.append, str(tmp_path))
    assert [row["step"] for row in alone.of("epoch")] == [6]
    (resumed,) = alone.of("result")
    np.testing.assert_array_equal(resumed.state.head[0][0], whole.state.head[0][0])


def test_only_the_first_worker_tells_the_result(job: HeadJob, alone: Alone, tmp_path: Path) -> None:
    head_worker.fit_and_evaluate(job, Place(1, 2), alone.events.append, str(tmp_path))
    assert [kind for kind, _ in alone.events] == ["tallies"]
    assert all(not wrote for _, wrote in alone.kept)
    # Its half of each split: the second, and the larger where they are not equal.
    assert {split: each.examples for split, each in alone.of("tallies")[0].items()} == {
        "train": 24,
        "valid": 7,
        "test": 4,
    }


def empty_result() -> HeadResult:
    nothing = np.zeros(0, np.float32)
    state = TrainState(0, 0, [], [], [], 0, np.inf)
    return HeadResult(state, nothing, nothing, {}, novelty.fit(np.eye(4)), {}, 1.0, {})


def test_the_driver_adds_up_what_the_last_group_counted(
    job: HeadJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that failed after it had told its counts is not counted twice."""
    given: dict[str, Any] = {}
    told: list[dict[str, float]] = []
    splits = {split: made_split(rows) for split, rows in ROWS.items()}
    parts = [
        {
            split: head_worker.tally_part(of, made_head(), Place(rank, 2), 3)
            for split, of in splits.items()
        }
        for rank in range(2)
    ]
    first, last = empty_result(), empty_result()
    restart = Restart("2026-01-01", "why", True, 2, "the beginning")

    def run(loop: Any, given_job: HeadJob, **more: Any) -> list[Restart]:
        given.update(more, loop=loop, job=given_job)
        for event in (("epoch", {"epoch": 1}), ("tallies", parts[0]), ("result", first)):
            more["on_event"](event)
        more["on_restart"]()
        for event in (("epoch", {"epoch": 1}), ("tallies", parts[1]), ("epoch", {"epoch": 2})):
            more["on_event"](event)
        more["on_event"](("tallies", parts[0]))
        more["on_event"](("result", last))
        return [restart]

    monkeypatch.setattr(group, "run", run)
    policy = group.RestartPolicy(keep=5)
    result = head_worker.fit_head(
        job,
        Placement((2, 40), 1.5, True, "runs/a", policy),
        on_epoch=told.append,
    )
    assert result is last
    assert result.restarts == [restart]
    assert {split: each.examples for split, each in result.tallies.items()} == ROWS
    assert told == [{"epoch": 1}, {"epoch": 2}]
    assert given["workers"] == (2, 16)  # a row of the batch of 16 each, at the least
    assert (given["loop"], given["job"]) == (head_worker.fit_and_evaluate, job)
    assert (given["name"], given["storage_path"]) == ("head", "runs/a")
    assert (given["cpus_per_worker"], given["gpu"], given["policy"]) == (1.5, True, policy)


def test_a_job_takes_the_views_of_the_cache(
    job: HeadJob, alone: Alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    cached_views = fit.cached_views

    def noted(values: Any, *, seed: int) -> Any:
        seeds.append(seed)
        return cached_views(values, seed=seed)

    monkeypatch.setattr(fit, "cached_views", noted)
    job = dataclasses.replace(job, seed=11)
    head_worker.fit_and_evaluate(job, Place(0, 1), alone.events.append, str(tmp_path))
    assert seeds == [11]
