"""Features that nobody computed, for tests of what comes after them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from leafnet.data.shards import SPLITS, Shard
from leafnet.features import cache
from leafnet.models.weights import FEATURES
from leafnet.training.head.worker import HeadJob
from leafnet.training.settings import HeadSettings

CLASSES = ("early_blight", "healthy", "late_blight")
ROWS = {"train": 48, "valid": 13, "test": 7}


def head_jobs(root: str) -> Callable[..., HeadJob]:
    """Write features into the cache `root`, and return what makes jobs of them."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(len(CLASSES), FEATURES))
    parts = {}
    for split in SPLITS:
        rows, views = ROWS[split], 2 if split == "train" else 1
        shard = Shard(f"{split}-00000.parquet", split, rows, (rows,), 1, f"{split:0<64}")
        parts[split] = cache.plan(root, [(shard, views)], seed=0).missing
        labels = np.arange(rows, dtype=np.int32) % len(CLASSES)
        for part in parts[split]:
            noise = generator.normal(size=(rows, part.stop - part.first, FEATURES))
            values = np.abs(centres[labels][:, None] + 4 * noise).astype(np.float16)
            cache.write_part(root, part, values, labels)

    def make(*, save_every_steps: int | None = None, **head: Any) -> HeadJob:
        settings = {"epochs": 3, "batch_size": 16, "units": (8,), "dropout": 0.2, **head}
        return HeadJob(
            head=HeadSettings(**settings),
            class_names=CLASSES,
            seed=0,
            save_every_s=0,
            identity={"data": "made"},
            cache_root=root,
            parts=parts,
            views=2,
            save_every_steps=save_every_steps,
        )

    return make
