"""What a run will take, in passes, bytes and seconds: the arithmetic of a dry run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from leafnet.features import cache as features_cache
from leafnet.features.cache import Part
from leafnet.models.weights import FEATURES
from leafnet.training.loop import Steps

# Of each view in a part: the features in float16, and row, view and label.
_VIEW_BYTES = FEATURES * 2 + 3 * 4
# Of a part beside its views: Parquet's pages and footer.
_PART_BYTES = 3_000
# Round figures: a process that fits a head, the one that drives the job, Ray's own together.
_TENSORFLOW_BYTES, _DRIVER_BYTES, _RAY_BYTES = 900_000_000, 500_000_000, 600_000_000
# Row groups of decoded photographs that are between the stages for each actor.
_GROUPS_BETWEEN = 4


@dataclass(frozen=True)
class Work:
    """What a run has to compute."""

    views: int  # of all splits
    cached: int  # of them, how many are computed already
    batches: int  # passes of the backbone for the others
    steps_per_epoch: int
    steps: int
    batch_size: int  # global batch of the head


@dataclass(frozen=True)
class Room:
    """What a run takes [bytes]."""

    cache: int  # of the features, all of them
    cache_new: int  # of the features that are computed
    local: int  # of the copy of the features on each node that fits the head
    photographs: int  # decoded, on each node that fine-tunes; 0: none are kept
    checkpoints: int  # of fine-tuning, all that are kept
    memory: int  # of a node, at most


def feature_work(cached: features_cache.Plan, *, batch_size: int, steps: Steps) -> Work:
    """The steps of a run.

    Args:
        cached: what the features' cache has and lacks.
        batch_size: views in a pass of the backbone.
        steps: of the head.
    """
    return Work(
        views=views_of(cached.parts),
        cached=views_of(cached.present),
        # A part is computed by itself, and its last batch is often not full.
        batches=sum(-(-part.views // batch_size) for part in cached.missing),
        steps_per_epoch=steps.per_epoch,
        steps=steps.total,
        batch_size=steps.batch,
    )


def views_of(parts: Sequence[Part]) -> int:
    """Views in `parts`."""
    return sum(part.views for part in parts)


def cache_bytes(parts: Sequence[Part]) -> int:
    """Bytes of the files of `parts`."""
    return views_of(parts) * _VIEW_BYTES + len(parts) * _PART_BYTES


def local_bytes(examples: Mapping[str, int], views: int) -> int:
    """Bytes of the arrays that a node maps: features and labels of every split.

    >>> local_bytes({"train": 1000, "valid": 10, "test": 0}, views=8)
    32813000
    """
    total = sum(examples.values())
    vectors = examples["train"] * views + total - examples["train"]
    return vectors * FEATURES * 2 + total * 4


def photograph_bytes(examples: Mapping[str, int], image_size: int, *, most: float) -> int:
    """Bytes of the decoded photographs of train and valid that each node keeps, `most` of a split.

    >>> photograph_bytes({"train": 900, "valid": 300}, 160, most=1e9)
    92160000
    """
    of_each = (examples[split] * image_size**2 * 3 for split in ("train", "valid"))
    return sum(size for size in of_each if size <= most)


def node_memory(
    *,
    actors: int,
    actor_bytes: int,
    workers: int,
    row_group: int,
    image_size: int,
    tuner_bytes: int = 0,
) -> int:
    """Bytes that a node needs: while features are computed, the head is fitted, or it fine-tunes.

    Args:
        actors: processes with the network on the node; 0: all features are there.
        actor_bytes: of each.
        workers: processes that fit the head on the node.
        row_group: rows of the largest.
        image_size: pixels.
        tuner_bytes: of each process that fine-tunes; 0: none does.
    """
    between = actors * _GROUPS_BETWEEN * row_group * image_size**2 * 3
    stages = (actors * actor_bytes + between, workers * max(_TENSORFLOW_BYTES, tuner_bytes))
    return _RAY_BYTES + _DRIVER_BYTES + max(stages)


def extraction_seconds(missing: int, rate: float, actors: int) -> float:
    """Seconds for `missing` views where each of `actors` computes `rate` of them a second.

    >>> extraction_seconds(7800, 39.0, 2)
    100.0
    """
    return missing / (rate * actors)
