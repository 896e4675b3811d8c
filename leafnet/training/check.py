"""What a run of training refuses before a machine is taken, and whether it is finished."""

from collections.abc import Mapping
from typing import Any

import yaml

from leafnet.core import lock, storage
from leafnet.core import settings as core_settings
from leafnet.core.errors import UserError
from leafnet.core.terminal import say
from leafnet.data import shards
from leafnet.data.shards import ShardIndex
from leafnet.distributed import checkpoint
from leafnet.models import openvino
from leafnet.models.weights import Weights, load_weights
from leafnet.training import mlflow
from leafnet.training.plan import Plan
from leafnet.training.settings import TrainSettings

# Settings that change where and how fast a run computes, and not what.
_PLACEMENT = (
    *("out", "shards", "workers", "gpu", "batch_size", "dry_run", "lock_timeout", "explain"),
    *("max_failures", "hang_timeout", "note"),
    *("data.", "cache.", "checkpoint.", "mlflow.", "ray."),
)


def check(settings: TrainSettings) -> Plan | None:
    """The plan of a run; None where it is finished, which is said.

    Raises:
        UserError: something in the settings, the data or the weights is wrong; another job trains
            under this name (exit code 3).
    """
    settings = settings.model_copy(
        update={"out": storage.absolute(settings.out), "shards": storage.absolute(settings.shards)}
    )
    index = shards.open_index(settings.shards, settings.data)
    shards.check_sizes(index)
    _check_data(index)
    check_search(settings, index)
    if settings.int8:
        _check_int8(index)
    mlflow.check(settings.mlflow)
    if finished(settings, index):
        return None
    lock.refuse_held(storage.join(settings.out, settings.name))
    return Plan(settings, index, load_weights(settings.weights, seed=settings.seed))


def _check_data(index: ShardIndex) -> None:
    if not index.examples("train"):
        there = ", ".join(split for split in shards.SPLITS if index.examples(split)) or "nothing"
        raise UserError(
            "no-training-data",
            f"{index.root} has no training images ({there} only): it is for evaluation, by "
            "jobs/evaluate.py; give a data set with train",
        )
    if len(index.class_names) < 2:
        raise UserError(
            "one-class",
            f"{index.root} has one class only, {index.class_names[0]}; a classifier "
            "needs at least two",
        )


def check_search(settings: TrainSettings, index: ShardIndex) -> None:
    """Refuse a search or a cross-validation that the data set or other settings do not allow.

    Raises:
        UserError: which setting, and why not.
    """
    if not settings.head.search and not settings.cross_validate:
        return
    if settings.head.search and not index.examples("valid"):
        raise UserError(
            "no-validation",
            f"--head.search chooses on the validation split, and {index.root} has none; prepare "
            "it with --split 80/10/10, or leave --head.search out",
        )
    folds = settings.cross_validate or 0
    for name in index.class_names:
        count = sum(index.counts[split][name] for split in ("train", "valid"))
        if count < folds:
            raise UserError(
                "too-many-folds",
                f"--cross_validate {folds}, but class {name} has only {count} images in train and "
                "valid; give fewer folds",
            )


def _check_int8(index: ShardIndex) -> None:
    if not openvino.installed(quantizer=True):
        raise UserError(
            "no-openvino",
            "--int8 needs OpenVINO and NNCF, which are not installed: pip install "
            '"leafnet[openvino]"',
        )
    if not index.examples("valid"):
        raise UserError(
            "int8-unchecked",
            f"--int8 is checked on the validation split, and {index.root} has none; prepare the "
            "data set with one, or train without --int8",
        )


def finished(settings: TrainSettings, index: ShardIndex) -> bool:
    """True when the run's model is published, for the data set as it is; then it says so.

    Raises:
        UserError: the run was started with other settings, or its model was trained on another
            data set.
    """
    run = storage.join(settings.out, settings.name)
    if not (_same_settings(run, settings) and _published(run, index)):
        return False
    say(f"{run} is finished: {storage.join(run, 'model')}; nothing to do")
    return True


def _same_settings(run: str, settings: TrainSettings) -> bool:
    """True when the run was started before, with the same settings."""
    try:
        stored = yaml.safe_load(storage.read_bytes(storage.join(run, "config.yaml")))
    except (FileNotFoundError, NotADirectoryError):
        return False
    earlier, now = _decisive(stored), _decisive(settings.model_dump(mode="json"))
    checkpoint.compare_identity(earlier, now, where=f"run {run}")
    return True


def _published(run: str, index: ShardIndex) -> bool:
    try:
        description = storage.read_json(storage.join(run, "model", "model.json"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    if description["data"]["fingerprint"] != index.fingerprint:
        raise UserError(
            "other-data",
            f"run {run} was trained on another data set than {index.root} holds now; train under "
            "another --name",
        )
    return storage.exists(storage.join(run, "run.json"))


def identity(
    settings: TrainSettings, index: ShardIndex, weights: Weights, *, precision: str
) -> dict[str, Any]:
    """What a checkpoint must agree with, to go on from it."""
    return _decisive(settings.model_dump(mode="json")) | {
        "data": index.fingerprint,
        "weights_fingerprint": weights.fingerprint,
        "precision": precision,
    }


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that change the result, flat: dotted name -> value."""
    # What version 0.1 stored, which could also draw its views `online`.
    flat = {"features": "cached"} | core_settings.flat(settings)
    return {name: value for name, value in flat.items() if not name.startswith(_PLACEMENT)}
