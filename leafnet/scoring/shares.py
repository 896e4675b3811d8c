"""What the photographs of a night come to: shares of the classes, and how right their labels are.

By the model's probabilities, its bias on held-out photographs and its calibration on the test
split, all of which hold only for nights like validation.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from leafnet.core import storage
from leafnet.metrics import drift, estimate, prevalence
from leafnet.metrics.estimate import Estimate
from leafnet.metrics.prevalence import Bias, Shares

Array = NDArray[np.float32]

# More, evenly from all, do not move a share by a tenth of its interval.
_MOST = 100_000


class Told(NamedTuple):
    """What a report says of a night."""

    holds: bool  # False: the night is unlike validation, and neither of the two is to be quoted
    shares: dict[str, Estimate]  # of each class, corrected; {}: the model has no bias to correct by
    accuracy: Estimate | None  # that is expected


def validated(description: Mapping[str, Any]) -> dict[str, Any]:
    """What a night's summary keeps of model.json, for the corrections."""
    scores = description.get("metrics", {})
    split = next((split for split in ("test", "valid") if split in scores), None)
    found = {"calibration": scores[split]["calibration"]} if split else {}
    return found | {name: description[name] for name in ("prevalence",) if name in description}


def probabilities(column: pa.ChunkedArray, *, every: int = 1) -> Array:
    """Probabilities [N, C] of the rows that have some; of `every` so many of them one."""
    known = pc.drop_null(column).combine_chunks()
    columns = [part.to_numpy(zero_copy_only=False)[::every] for part in known.flatten()]
    return np.stack(columns, axis=1).astype(np.float32)


def every(rows: int) -> int:
    """Of so many rows one is enough."""
    return 1 + rows // _MOST


def bias_of(model: Mapping[str, Any]) -> Bias | None:
    """The bias of the model of a summary; None: it was published without."""
    stored = model.get("prevalence")
    return prevalence.read_bias(stored) if stored else None


def told(answers: Array, classes: Sequence[str], model: Mapping[str, Any], *, holds: bool) -> Told:
    """What probabilities `answers` [N, C] come to.

    Args:
        answers: of the photographs that did not fail.
        classes: of the model, in order.
        model: of a summary.
        holds: the night is like validation.
    """
    bias = bias_of(model)
    sure = answers.max(axis=1, initial=0.0).astype(np.float64)
    return Told(
        holds,
        by_class(prevalence.estimate(answers, bias), classes) if bias and len(answers) else {},
        estimate.expected(
            len(sure), float(sure.sum()), float((sure**2).sum()), model.get("calibration", ())
        ),
    )


def expected_accuracy(url: str, model: Mapping[str, Any]) -> dict[str, float] | None:
    """Of the published night at `url`, for its summary; None: it is unlike validation, or unknown.

    Args:
        url: of the file.
        model: of the summary.
    """
    reference = model.get("reference")
    if reference is None:
        return None
    with storage.open_file(url) as opened:
        rows = pq.read_table(opened, columns=["probabilities", "confidence", "novelty"])
    for name in ("confidence", "novelty"):
        histogram = drift.histogram(reference[name])
        none = histogram._replace(counts=np.zeros_like(histogram.counts))
        shift = drift.shift(histogram, none.counted(rows[name].drop_null().to_numpy()))
        if shift is None or shift.is_large:
            return None
    answers = probabilities(rows["probabilities"])
    found = told(answers, model["class_names"], model, holds=True).accuracy
    return None if found is None else dict(found._asdict())


def by_class(shares: Shares, classes: Sequence[str]) -> dict[str, Estimate]:
    """The share of each class, with its interval."""
    parts = zip(shares.value.tolist(), shares.low.tolist(), shares.high.tolist(), strict=True)
    return {name: Estimate(*part) for name, part in zip(classes, parts, strict=True)}
