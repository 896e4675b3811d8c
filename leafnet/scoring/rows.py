"""Photographs to rows of the output: reading and decoding before the network, the row after it.

A photograph that gives no pixels becomes a row as well, with its reason; nothing here raises for
what is wrong with one of them. B photographs, S image size, C classes, D features.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

import leafnet
from leafnet.data.images import DECODER_VERSION
from leafnet.metrics.thresholds import Review, judge

Pixels = NDArray[np.uint8]  # [B, S, S, 3]
Array = NDArray[np.float32]

# Reasons that another night may find gone. All others are of the bytes, which do not change
# without the version.
PASSING = ("cannot-read", "not-found", "needs-heif")


def schema(class_names: Sequence[str], *, model_id: str = "", run_id: str = "") -> pa.Schema:
    """The columns of the predictions of a model with these classes.

    The schema's metadata names the classes in the order of the logits (`class_names`, JSON), the
    model and the run.
    """
    probabilities = pa.struct([pa.field(name, pa.float32()) for name in class_names])
    return pa.schema(
        [
            pa.field("image", pa.string(), nullable=False),  # URL; in a shard: URL#key
            pa.field("version", pa.string()),  # etag, or time of change and size; null: not found
            pa.field("status", pa.string(), nullable=False),  # ok, review or failed
            pa.field("label", pa.string()),  # class of the highest probability; null: failed
            pa.field("confidence", pa.float32()),  # its probability
            pa.field("probabilities", probabilities),  # a field for each class; null: failed
            pa.field("reason", pa.string()),  # `slug: what is the matter`; null: ok
            pa.field("width", pa.int32()),  # of the original, upright [pixels]
            pa.field("height", pa.int32()),
            pa.field("captured_at", pa.timestamp("us")),  # EXIF: the camera's clock, no time zone
            pa.field("latitude", pa.float64()),  # EXIF, degrees, north positive
            pa.field("longitude", pa.float64()),  # EXIF, degrees, east positive
            pa.field("novelty", pa.float32()),  # distance from the training features
            pa.field("decoder_version", pa.int32(), nullable=False),
            pa.field("model_id", pa.string(), nullable=False),
            pa.field("run_id", pa.string(), nullable=False),
            pa.field("scored_at", pa.timestamp("us", tz="UTC"), nullable=False),
        ],
        metadata={
            "class_names": json.dumps(list(class_names), ensure_ascii=False),
            "model_id": model_id,
            "run_id": run_id,
            "decoder_version": str(DECODER_VERSION),
            "leafnet": leafnet.__version__,
        },
    )


# After the network


def rows(
    photographs: pa.Table,
    logits: Array,
    novelty: Array | None,
    *,
    output: pa.Schema,
    class_names: Sequence[str],
    review: Review | None,
    model_id: str,
    run_id: str,
) -> pa.Table:
    """The rows of the output for some photographs.

    Args:
        photographs: of PHOTOGRAPH.
        logits: [B, C], of the rows without a reason, in their order.
        novelty: [B], likewise; None: the model has no such measure.
        output: `schema` of the model.
        class_names: in the order of the logits.
        review: thresholds; None: the model has none.
        model_id: of the model.
        run_id: of the job's run.

    Returns:
        A table of `output`. A photograph for which the network gave no finite numbers is failed.
    """
    count = photographs.num_rows
    decoded = np.flatnonzero(pc.is_null(photographs["reason"]).to_numpy())
    if len(decoded) != len(logits):
        raise ValueError(f"{len(logits)} rows of logits for {len(decoded)} decoded photographs")
    judged = judge(logits, novelty, review)
    reasons = np.array(photographs["reason"].to_pylist(), object)
    reasons[decoded] = judged.reasons
    failed = np.ones(count, bool)
    failed[decoded] = judged.failed
    status = np.where(failed, "failed", np.where(reasons == None, "ok", "review"))  # noqa: E711

    def spread(values: NDArray[Any]) -> NDArray[Any]:
        """Values of the decoded photographs, at their rows among all."""
        found = np.zeros((count, *values.shape[1:]), values.dtype)
        found[decoded] = values
        return found

    distances = spread(judged.novelty)
    names = np.array(class_names, object)
    now = datetime.now(UTC)
    columns = {
        "image": photographs["image"],
        "version": photographs["version"],
        "status": pa.array(status),
        "label": pa.array(names[spread(judged.label)], pa.string(), mask=failed),
        "confidence": pa.array(spread(judged.confidence), mask=failed),
        "probabilities": pa.StructArray.from_arrays(
            [pa.array(np.ascontiguousarray(column)) for column in spread(judged.probabilities).T],
            fields=list(output.field("probabilities").type),
            mask=pa.array(failed),
        ),
        "reason": pa.array(reasons, pa.string()),
        **{
            name: photographs[name]
            for name in ("width", "height", "captured_at", "latitude", "longitude")
        },
        "novelty": pa.array(distances, mask=failed | np.isnan(distances)),
        "decoder_version": pa.array([DECODER_VERSION] * count, pa.int32()),
        "model_id": pa.array([model_id] * count),
        "run_id": pa.array([run_id] * count),
        "scored_at": pa.array([now] * count, pa.timestamp("us", tz="UTC")),
    }
    return pa.table([columns[name] for name in output.names], schema=output)
