import json
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from leafnet.core.errors import UserError
from leafnet.data import shards
from leafnet.data.shards import Shard, ShardIndex
from leafnet.distributed.resources import Node
from leafnet.distributed.worker import Place
from leafnet.features.cache import Part, SplitFeatures, write_part
from leafnet.models.weights import FEATURES
from leafnet.training.check import check_search
from leafnet.training.head import cross_validation, fit, search, trials, worker
from leafnet.training.head.fit import TrainingData
from leafnet.training.head.worker import HeadJob
from leafnet.training.settings import HeadSettings, TrainSettings

CLASSES = ("early_blight", "healthy", "late_blight")
NODES = [Node(2, 0)]


def labels_of(count: int) -> NDArray[np.int32]:
    return (np.arange(count) % len(CLASSES)).astype(np.int32)


def values_of(split: str, labels: NDArray[np.int32], views: int) -> NDArray[np.float16]:
    """Classes apart in some of their features, with noise; those of test would spoil any fit."""
    generator = np.random.default_rng(len(split))
    values = generator.normal(size=(labels.size, views, FEATURES))
    values[..., : 64 * len(CLASSES)] += 2 * np.repeat(np.eye(len(CLASSES))[labels], 64, 1)[:, None]
    return (values if split != "test" else 1e4 * values).astype(np.float16)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[HeadJob, ShardIndex]:
    """Cached features, and the data set they would be of: the photographs are not needed."""
    root = tmp_path_factory.mktemp("data")
    cache, written, parts = str(root / "cache"), [], {}
    for split, rows, views in (("train", 60, 3), ("valid", 30, 1), ("test", 12, 1)):
        labels = labels_of(rows)
        table = pa.table(
            {
                # Plants of three photographs each: one of each class.
                "key": [f"{split}/plant{i // 3}/{i}.jpg" for i in range(rows)],
                "image": [b"none"] * rows,
                "label": labels,
                "split": [split] * rows,
                "width": [1] * rows,
                "height": [1] * rows,
                "sha256": [""] * rows,
            }
        )
        shard = shards.write_shard(str(root), f"{split}-00000.parquet", table, row_group=rows)
        written.append(shard)
        made = [Part(shard, 0, 0, 1, 0), *([Part(shard, 0, 1, views, 0)] if views > 1 else [])]
        values = values_of(split, labels, views)
        for part in made:
            write_part(cache, part, values[:, part.first : part.stop], labels)
        parts[split] = tuple(made)
    pairs = {"key_a": ["train/plant0/0.jpg"], "key_b": ["valid/plant1/4.jpg"]}
    pq.write_table(pa.table(pairs), root / shards.DUPLICATES_NAME)
    index = shards.write_index(
        str(root),
        class_names=CLASSES,
        shards=written,
        counts={
            split: dict.fromkeys(CLASSES, rows // 3)
            for split, rows in (("train", 60), ("valid", 30), ("test", 12))
        },
        prepared={"settings": {"group": r"(\w+/plant\d+)/"}},
    )
    head = HeadSettings(units=(16,), epochs=4, warmup_epochs=0.0)
    job = HeadJob(
        head=head,
        class_names=CLASSES,
        seed=0,
        save_every_s=0,
        identity={"data": index.fingerprint, "head.units": [16]},
        cache_root=cache,
        parts=parts,
        views=3,
    )
    return job, index


def test_trials_begin_with_the_given_settings_and_longer_searches_go_on() -> None:
    given = HeadSettings(units=(77,), epochs=9)
    ten, twenty = (search.draw(given, count, seed=3) for count in (10, 20))
    assert ten[0] == given
    assert twenty[:10] == ten
    assert search.draw(given, 10, seed=4)[1:] != ten[1:]
    assert len({trial.model_dump_json() for trial in twenty}) == 20


def test_trials_stay_in_the_space_and_change_nothing_else() -> None:
    given = HeadSettings(units=(77,), epochs=9, class_weights="balanced")
    for trial in search.draw(given, 200, seed=0)[1:]:
        assert HeadSettings(**trial.model_dump()) == trial
        changed = {name for name, value in given if getattr(trial, name) != value}
        assert changed <= set(search.SEARCHED)
        (width,) = trial.units
        assert width in search.WIDTHS
        assert 0.99 * search.LEARNING_RATE[0] <= trial.learning_rate
        assert trial.learning_rate <= 1.01 * search.LEARNING_RATE[1]
        assert search.DROPOUT[0] <= trial.dropout <= search.DROPOUT[1]


def test_folds_hold_every_example_once_and_every_class_evenly() -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 10]).astype(np.int32)
    fold_of = cross_validation.folds(labels, np.arange(90), 5, seed=0)
    counts = [np.bincount(labels[fold_of == fold]).tolist() for fold in range(5)]
    assert counts == [[10, 6, 2]] * 5
    np.testing.assert_array_equal(fold_of, cross_validation.folds(labels, np.arange(90), 5, seed=0))
    assert (fold_of != cross_validation.folds(labels, np.arange(90), 5, seed=1)).any()


def test_folds_do_not_cut_groups() -> None:
    labels, groups = labels_of(90), np.arange(90) // 6
    fold_of = cross_validation.folds(labels, groups, 5, seed=0)
    assert set(fold_of) == set(range(5))
    for group in range(15):
        assert np.unique(fold_of[groups == group]).size == 1


def test_more_folds_than_groups_are_refused() -> None:
    with pytest.raises(UserError, match=r"--cross_validate 5, but .* only 3 independent groups"):
        cross_validation.folds(labels_of(30), np.arange(30) // 10, 5, seed=0)


def test_groups_are_what_prepare_kept_together(data: tuple[HeadJob, ShardIndex]) -> None:
    labels, groups, how = cross_validation._grouped(data[1])
    np.testing.assert_array_equal(labels, np.concatenate([labels_of(60), labels_of(30)]))
    assert np.unique(groups).size == 20 + 10 - 1
    assert groups[0] == groups[2] == groups[60 + 3] == groups[60 + 5] != groups[3]
    assert "plant" in how
    assert "looking alike" in how


def test_a_fold_is_seen_neither_by_the_head_nor_by_the_statistics() -> None:
    generator = np.random.default_rng(0)
    train, valid = (
        SplitFeatures(
            generator.normal(1, 2, (rows, views, 5)).astype(np.float16), np.arange(rows, dtype="i4")
        )
        for rows, views in ((8, 3), (4, 1))
    )
    held_out = np.zeros(12, np.bool_)
    held_out[[1, 7, 9]] = True
    train.features[[1, 7]] = valid.features[1] = 1e4
    made = trials.fold_data(train, valid, held_out, seed=0)
    kept = [0, 2, 3, 4, 5, 6], [0, 2, 3]
    flat = np.concatenate([train.features[kept[0]].reshape(-1, 5), valid.features[kept[1]][:, 0]])
    np.testing.assert_allclose(made.mean, flat.astype(float).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(made.deviation, flat.astype(float).std(axis=0), rtol=1e-4)
    np.testing.assert_array_equal(made.labels, [*kept[0], *kept[1]])
    assert made.valid.labels.size == 0
    for epoch in range(5):
        taken = made.gather(np.arange(9), epoch)
        for row, values in zip(kept[0], taken[:6], strict=True):
            assert (values == train.features[row]).all(axis=1).any()
        np.testing.assert_array_equal(taken[6:], valid.features[kept[1]][:, 0])


def losses_of(job: HeadJob) -> list[float]:
    """The losses on valid of a fit of its own, by epoch."""
    local = worker.local_features(job)
    train = local.splits["train"]
    views = fit.cached_views(train.features, seed=job.seed)
    made = TrainingData(views, train.labels, local.splits["valid"], local.mean, local.deviation)
    state = fit.fit_head(
        made, settings=job.head, num_classes=3, seed=job.seed, place=Place(0, 1), report=print
    )
    return [row["valid_loss"] for row in state.history]


@pytest.mark.ray
def test_search_keeps_the_best_and_goes_on_after_a_crash(
    data: tuple[HeadJob, ShardIndex], local_ray: None, tmp_path: Path
) -> None:
    job, run = data[0], str(tmp_path)
    best = search.search(job, count=4, nodes=NODES, run=run)
    document = json.loads((tmp_path / search.SEARCH).read_text())
    rows = document["rows"]
    assert [row["trial"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["settings"]["units"] == [16]
    assert rows[0]["epochs"] == 4
    assert not rows[0]["stopped_early"]
    chosen = min(rows, key=lambda row: row["valid_loss"])
    assert list(best.units) == chosen["settings"]["units"]
    assert best.learning_rate == chosen["settings"]["learning_rate"]
    assert [path.name for path in tmp_path.iterdir()] == [search.SEARCH]
    # Ray Tune would leave one that takes no notice of the next Ctrl-C.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    # As after a crash in the third trial; a mark shows which rows are not computed again.
    rows[1]["valid_loss"] = -1.0
    document["rows"] = [rows[0], rows[1], None, rows[3]]
    (tmp_path / search.SEARCH).write_text(json.dumps(document))
    again = search.search(job, count=4, nodes=NODES, run=run)
    after = json.loads((tmp_path / search.SEARCH).read_text())["rows"]
    assert after[1]["valid_loss"] == -1.0
    # Alone, a trial has no rival that could stop it.
    assert (after[2]["settings"], after[2]["epochs"]) == (rows[2]["settings"], 4)
    assert not after[2]["stopped_early"]
    losses = losses_of(
        replace(job, head=HeadSettings(**job.head.model_dump() | rows[2]["settings"]))
    )
    assert after[2]["valid_loss"] == pytest.approx(min(losses), rel=1e-3)
    assert list(again.units) == rows[1]["settings"]["units"]


@pytest.mark.ray
def test_cross_validation_scores_every_example_once(
    data: tuple[HeadJob, ShardIndex], local_ray: None, tmp_path: Path
) -> None:
    # Enough steps to learn from 60 examples; four epochs of one step are not.
    job = replace(data[0], head=data[0].head.model_copy(update={"epochs": 10, "batch_size": 8}))
    index = data[1]
    summary = cross_validation.cross_validate(job, index, count=3, nodes=NODES, run=str(tmp_path))
    document = json.loads((tmp_path / cross_validation.CROSS_VALIDATION).read_text())
    rows = document["rows"]
    assert sum(row["examples"] for row in rows) == 90
    assert np.sum([row["confusion"] for row in rows], axis=(0, 2)).tolist() == [30, 30, 30]
    accuracy = [row["accuracy"] for row in rows]
    assert summary["accuracy"]["mean"] == pytest.approx(np.mean(accuracy))
    assert summary["accuracy"]["deviation"] == pytest.approx(np.std(accuracy, ddof=1))
    assert np.mean(accuracy) > 0.6
    assert document["summary"] == summary


def test_trials_of_other_settings_are_refused(
    data: tuple[HeadJob, ShardIndex], tmp_path: Path
) -> None:
    stored = {"rows": [], "identity": dict(data[0].identity) | {"head.units": [8]}}
    (tmp_path / search.SEARCH).write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"search\.json was started with head\.units \[8\]"):
        search.search(data[0], count=2, nodes=NODES, run=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "counts", "message"),
    [
        ({"head": {"search": 3}}, {"valid": 0}, "has none"),
        ({"cross_validate": 5}, {"train": 2, "valid": 2}, "class a has only 4 images"),
    ],
)
def test_impossible_searches_are_refused(
    settings: Mapping[str, Any], counts: dict[str, int], message: str
) -> None:
    counts = {"train": 10, "valid": 10, "test": 10} | counts
    made = tuple(Shard(split, split, rows, (rows,), 1, "") for split, rows in counts.items())
    index = ShardIndex(
        "data", ("a", "b"), made, {split: {"a": n, "b": n} for split, n in counts.items()}, ""
    )
    with pytest.raises(UserError, match=message):
        check_search(TrainSettings(shards="data", name="run", **settings), index)
