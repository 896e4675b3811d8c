"""The accuracy of the head with its spread, by cross-validation."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafnet.core import storage, terminal
from leafnet.core.errors import UserError
from leafnet.core.terminal import say
from leafnet.data import shards
from leafnet.data.groups import components
from leafnet.data.shards import ShardIndex
from leafnet.distributed.resources import Node
from leafnet.training.head.trials import Fit, run_trials, store, stored
from leafnet.training.head.worker import HeadJob

CROSS_VALIDATION = "cross_validation.json"


def cross_validate(
    job: HeadJob, index: ShardIndex, *, count: int, nodes: list[Node], run: str
) -> dict[str, Any]:
    """The accuracy over `count` folds of train and valid, each scored by a head that never saw it.

    A fold is scored on the plain view. The head is the one after the last epoch: choosing the
    epoch needs examples of its own, and choosing it on the fold would flatter the result. Mean and
    deviation come from the other folds. Photographs of the validation split have one view in the
    cache, so they are learned from without augmentation; more views of them would cost more time
    than all the fits.

    Raises:
        UserError: fewer groups than folds, or the stored folds are of other settings.
        DamagedParts: the cache has to be repaired first.
    """
    labels, groups, how = _grouped(index)
    fold_of = folds(labels, groups, count, seed=job.seed)
    url = storage.join(run, CROSS_VALIDATION)
    done = stored(url, job)

    def keep(number: int, result: Mapping[str, Any]) -> None:
        scores = dict(result["scores"])
        done[number] = {"fold": number, **scores, "seconds": result["seconds"]}
        store(url, job, done)

    fits = {i: Fit(job.head, fold_of == i) for i in range(count) if i not in done}
    run_trials(job, fits, keep, title="folds", unit="folds", nodes=nodes, run=run, stop_early=False)
    rows = [done[i] for i in range(count)]
    summary = {
        name: {
            "mean": float(np.mean([row[name] for row in rows])),
            "deviation": float(np.std([row[name] for row in rows], ddof=1)),
        }
        for name in ("accuracy", "macro_f1", "log_loss")
    }
    store(url, job, done, summary=summary, grouped_by=how)
    _say_folds(rows, summary, how, url)
    return summary


def folds(
    labels: NDArray[np.int32], groups: NDArray[np.int64], count: int, *, seed: int
) -> NDArray[np.int64]:
    """The fold [N] of each example: classes evenly over folds, no group in two of them.

    Raises:
        UserError: fewer groups than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    distinct = np.unique(groups).size
    if distinct < count:
        raise UserError(
            "too-many-folds",
            f"--cross_validate {count}, but train and valid have only {distinct} independent "
            "groups of photographs; give fewer folds",
        )
    options = {"n_splits": count, "shuffle": True, "random_state": seed}
    if distinct == labels.size:
        # The same where every example is a group of its own, and linear in their number.
        split = StratifiedKFold(**options).split(labels, labels)
    else:
        split = StratifiedGroupKFold(**options).split(labels, labels, groups)
    fold_of = np.empty(labels.size, np.int64)
    for number, (_, held_out) in enumerate(split):
        fold_of[held_out] = number
    return fold_of


def _grouped(index: ShardIndex) -> tuple[NDArray[np.int32], NDArray[np.int64], str]:
    """Labels [N] and groups [N] of train and valid, in that order, and what the groups are.

    What prepare kept together: photographs with the same match of its --group, and those that its
    table of duplicates ties.
    """
    keys: list[str] = []
    labels = []
    for shard in (*index.of_split("train"), *index.of_split("valid")):
        table = shards.read_columns(index.root, shard, ["key", "label"])
        keys += table.column("key").to_pylist()
        labels.append(table.column("label").to_numpy())
    row_of = {key: row for row, key in enumerate(keys)}
    a, b = [], []
    pattern = shards.prepared(index.root).get("settings", {}).get("group")
    if pattern is not None:
        compiled = re.compile(pattern)
        first: dict[str, int] = {}
        for row, key in enumerate(keys):
            match = compiled.search(key)
            if match:
                a.append(row)
                b.append(first.setdefault(match.group(min(compiled.groups, 1)), row))
    by_group = len(a)
    for key_a, key_b in shards.duplicates(index.root):
        if key_a in row_of and key_b in row_of:
            a.append(row_of[key_a])
            b.append(row_of[key_b])
    tied = components(len(keys), np.array(a, np.int64), np.array(b, np.int64))
    how = [f"a match of {pattern!r}"] if by_group else []
    how += ["looking alike"] if len(a) > by_group else []
    return np.concatenate(labels).astype(np.int32), tied, " and ".join(how)


def _say_folds(
    rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], how: str, url: str
) -> None:
    terminal.records(
        [
            ("fold", "{fold}"),
            ("images", "{examples:,}"),
            ("accuracy", "{accuracy:.3f}"),
            ("macro F1", "{macro_f1:.3f}"),
            ("log loss", "{log_loss:.3f}"),
        ],
        rows,
    )
    accuracy = summary["accuracy"]
    kept = f", kept together by {how}" if how else ""
    say(
        f"folds     accuracy {accuracy['mean']:.3f} ± {accuracy['deviation']:.3f} over {len(rows)} "
        f"folds of train and valid{kept}; {url}"
    )
