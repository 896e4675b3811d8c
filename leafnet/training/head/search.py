"""More head fits on the cached features: a search over settings, and cross-validation.

Both are lists of fits that do not depend on each other, run by Ray Tune. A process of its own for
each would spend more time on starting TensorFlow than on fitting, so processes are used again, and
all of a node's map the same features.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from leafnet.core import storage, terminal
from leafnet.core.errors import UserError
from leafnet.core.terminal import say
from leafnet.distributed.resources import Node
from leafnet.training.head.trials import DIVERGED, Fit, run_trials, store, stored
from leafnet.training.head.worker import HeadJob
from leafnet.training.settings import HeadSettings

SEARCH = "search.json"

# What the search draws from. Widths and rates on a logarithmic scale: a doubling matters as much
# at one end as at the other. AdamW's decay is multiplied by the rate, so below 1e-3 it does little.
WIDTHS = (128, 256, 512, 1024)
LEARNING_RATE = (1e-4, 1e-2)
WEIGHT_DECAY = (1e-4, 1.0)
DROPOUT = (0.0, 0.6)
LABEL_SMOOTHING = (0.0, 0.05, 0.1, 0.2)
SEARCHED = ("units", "learning_rate", "weight_decay", "dropout", "label_smoothing")
_SHOWN = 10


def draw(given: HeadSettings, count: int, *, seed: int) -> list[HeadSettings]:
    """The settings [count] of a search: first those given, then random ones.

    Trial i is a function of (seed, i), so a longer search begins with the shorter one.
    """
    trials = [given]
    for i in range(1, count):
        generator = np.random.default_rng([seed, 0x5EA4C, i])
        drawn = {
            "units": (int(generator.choice(WIDTHS)),),
            "learning_rate": _rounded(_log_uniform(generator, *LEARNING_RATE)),
            "weight_decay": _rounded(_log_uniform(generator, *WEIGHT_DECAY)),
            "dropout": round(float(generator.uniform(*DROPOUT)), 2),
            "label_smoothing": float(generator.choice(LABEL_SMOOTHING)),
        }
        trials.append(given.model_copy(update=drawn))
    return trials


def _log_uniform(generator: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(generator.uniform(math.log(low), math.log(high))))


def _rounded(value: float) -> float:
    """Two significant digits: what a person would write down."""
    return float(f"{value:.1e}")


def search(job: HeadJob, *, count: int, nodes: list[Node], run: str) -> HeadSettings:
    """The head settings with the lowest validation loss of `count`, and all trials.

    The loss and not the accuracy: on some hundred validation images accuracy moves in steps and
    many trials tie, and it is the loss that chooses the epoch within a fit. Test is not looked at.
    Trials that an earlier start of the run finished are read from the run's search.json.

    Raises:
        UserError: no trial has a finite loss, or the stored trials are of other settings.
        DamagedParts: the cache has to be repaired first.
    """
    trials = draw(job.head, count, seed=job.seed)
    url = storage.join(run, SEARCH)
    done = stored(url, job)

    def keep(number: int, result: Mapping[str, Any]) -> None:
        settings = trials[number].model_dump(mode="json", include=set(SEARCHED))
        diverged = result["valid_loss"] >= DIVERGED
        done[number] = {
            "trial": number,
            "settings": settings,
            "epochs": result["epoch"],
            "stopped_early": not result["whole"],
            "best_epoch": result["best_epoch"],
            "valid_loss": None if diverged else result["valid_loss"],
            "valid_accuracy": None if diverged else result["valid_accuracy"],
            "seconds": result["seconds"],
        }
        store(url, job, done)

    began = time.monotonic()
    fits = {i: Fit(trials[i], None) for i in range(count) if i not in done}
    run_trials(
        job, fits, keep, title="search", unit="trials", nodes=nodes, run=run, stop_early=True
    )
    ranked = sorted(done.values(), key=lambda row: (_loss(row), row["trial"]))
    if ranked[0]["valid_loss"] is None:
        raise UserError(
            "loss-not-finite", f"no trial of {url} has a finite loss; lower --head.learning_rate"
        )
    _say_search(ranked, url, time.monotonic() - began)
    return trials[int(ranked[0]["trial"])]


def _loss(row: Mapping[str, Any]) -> float:
    return math.inf if row["valid_loss"] is None else float(row["valid_loss"])


def _say_search(ranked: Sequence[Mapping[str, Any]], url: str, seconds: float) -> None:
    best, given = ranked[0], next(row for row in ranked if row["trial"] == 0)
    shown = [*ranked[:_SHOWN], *([given] if given not in ranked[:_SHOWN] else [])]
    terminal.table(
        "",
        ["trial", "units", "rate", "decay", "dropout", "smooth", "epochs", "loss", "accuracy"],
        [
            [
                "0 given" if row["trial"] == 0 else str(row["trial"]),
                ",".join(map(str, row["settings"]["units"])) or "none",
                *(f"{row['settings'][name]:g}" for name in SEARCHED[1:]),
                f"{row['epochs']}{'-' if row['stopped_early'] else ''}",
                "not finite" if row["valid_loss"] is None else f"{row['valid_loss']:.4f}",
                "" if row["valid_accuracy"] is None else f"{row['valid_accuracy']:.3f}",
            ]
            for row in shown
        ],
    )
    spent = sum(row["seconds"] for row in ranked)
    say(
        f"search    trial {best['trial']} of {len(ranked)} has the lowest validation loss "
        f"({sum(row['stopped_early'] for row in ranked)} stopped early, -); "
        f"{terminal.duration(spent)} of fits in {terminal.duration(seconds)}; all in {url}"
    )
