"""One verdict of all photographs of a plant or plot: OUT/_units/date=YYYY-MM-DD/RUN_ID.

Parquet, a row for each unit of which the run has a photograph, judged by these and by those of the
four weeks before. Made of what is published, once it is: the same again, after a kill, writes the
same file, which appears whole or not at all. It has no suffix, so that no pattern of a reader of
the predictions meets it; `pandas.read_parquet("OUT/_units")` reads all.
"""

from collections.abc import Mapping, Sequence
from datetime import date as Date
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from leafnet.core import storage
from leafnet.metrics import verdicts
from leafnet.scoring import fields, ledger, shares
from leafnet.scoring.fields import Naming
from leafnet.scoring.ledger import Published

UNITS = "_units"

# A plant may have fallen ill since what is older.
_DAYS = 28

_COLUMNS = ["image", "latitude", "longitude", "probabilities", "novelty"]


def schema(classes: Sequence[str], *, model_id: str, run_id: str, likeness: float) -> pa.Schema:
    """The columns of units; the metadata has the model, the run and how alike photographs are."""
    probabilities = pa.struct([pa.field(name, pa.float32()) for name in classes])
    return pa.schema(
        [
            pa.field("unit", pa.string(), nullable=False),
            pa.field("photographs", pa.int32(), nullable=False),  # that the verdict is of
            pa.field("tonight", pa.int32(), nullable=False),  # of them, those of this run
            pa.field("status", pa.string(), nullable=False),  # ok or review
            pa.field("label", pa.string(), nullable=False),
            pa.field("confidence", pa.float32(), nullable=False),
            pa.field("probabilities", probabilities, nullable=False),
            pa.field("reason", pa.string()),  # `slug: what is the matter`; null: ok
        ],
        metadata={"model_id": model_id, "run_id": run_id, "likeness": f"{likeness:.4f}"},
    )


def url(out: str, date: str, run_id: str) -> str:
    """Where the units of a run are."""
    return storage.join(out, UNITS, f"date={date}", run_id)


def keep(out: str, summary: Mapping[str, Any]) -> None:
    """Keep the units of a run that is published, if it was told what they are.

    Args:
        out: folder of the predictions.
        summary: of the run.
    """
    setting = summary.get("settings", {}).get("unit")
    if setting is None:
        return
    made = judge(
        ledger.published(out),
        summary["run_id"],
        named=fields.naming(setting, flag="--unit"),
        model=summary["model"],
    )
    if made is not None:
        sink = pa.BufferOutputStream()
        pq.write_table(made, sink, compression="zstd")
        target = url(out, summary["date"], summary["run_id"])
        storage.write_bytes(target, sink.getvalue().to_pybytes())


def judge(
    files: Sequence[Published], run_id: str, *, named: Naming, model: Mapping[str, Any]
) -> pa.Table | None:
    """A row for each unit of which the run `run_id` has a photograph; None: there is no unit."""
    own = next(file for file in files if file.run_id == run_id)
    first = (Date.fromisoformat(own.date) - timedelta(days=_DAYS)).isoformat()
    tonight = _read(own, named, model, None)
    if tonight is None:
        return None
    wanted = pc.unique(tonight["unit"])
    before = [
        _read(file, named, model, wanted)
        for file in reversed(files)
        if first <= file.date <= own.date and file.run_id != run_id
    ]
    rows = pa.concat_tables([tonight, *(table for table in before if table is not None)])
    # The newest of each photograph.
    _, newest = np.unique(rows["image"].to_numpy(), return_index=True)
    rows = rows.take(np.sort(newest))
    names, of = np.unique(rows["unit"].to_numpy(), return_inverse=True)
    return _table(names, of, rows, tonight.num_rows, model, run_id)


def _read(
    file: Published, named: Naming, model: Mapping[str, Any], wanted: pa.Array | None
) -> pa.Table | None:
    """The photographs of units, of all or of those `wanted`; None: there are none."""
    with storage.open_file(file.url) as opened:
        parquet = pq.ParquetFile(opened)
        metadata = parquet.schema_arrow.metadata or {}
        if metadata.get(b"model_id", b"").decode() != model["model_id"]:
            return None
        rows = parquet.read(columns=_COLUMNS)
    rows = rows.filter(pc.is_valid(rows["probabilities"]))
    units = pa.array(named(rows).tolist(), pa.string())
    known = pc.invert(pc.is_in(units, pa.array(fields.NO_FIELD)))
    if wanted is not None:
        known = pc.and_(known, pc.is_in(units, wanted))
    rows = rows.append_column("unit", units).filter(known)
    return rows if rows.num_rows else None


def _table(
    names: NDArray[Any],
    of: NDArray[np.int64],
    rows: pa.Table,
    of_tonight: int,
    model: Mapping[str, Any],
    run_id: str,
) -> pa.Table:
    classes = model["class_names"]
    probabilities = shares.probabilities(rows["probabilities"])
    bias = shares.bias_of(model)
    held_out = bias.shares if bias else np.full(len(classes), 1 / len(classes))
    likeness = verdicts.likeness(probabilities, of)
    found = verdicts.combine(probabilities, of, likeness=likeness, shares=held_out)
    sure = found.probabilities.max(axis=1)
    limits = model.get("review") or {"confidence": 0.0, "novelty": np.inf}
    far = pc.fill_null(rows["novelty"], 0).to_numpy() > limits["novelty"]
    unlike = np.bincount(of, far)
    reasons = [
        _reason(float(confidence), limits["confidence"], int(odd), int(count))
        for confidence, odd, count in zip(sure, unlike, found.photographs, strict=True)
    ]
    output = schema(classes, model_id=model["model_id"], run_id=run_id, likeness=likeness)
    columns = {
        "unit": pa.array(names.tolist(), pa.string()),
        "photographs": pa.array(found.photographs, pa.int32()),
        "tonight": pa.array(np.bincount(of[:of_tonight], minlength=len(names)), pa.int32()),
        "status": pa.array(["review" if reason else "ok" for reason in reasons]),
        "label": pa.array([classes[place] for place in found.probabilities.argmax(axis=1)]),
        "confidence": pa.array(sure.astype(np.float32)),
        "probabilities": pa.StructArray.from_arrays(
            [pa.array(column.astype(np.float32)) for column in found.probabilities.T],
            fields=list(output.field("probabilities").type),
        ),
        "reason": pa.array(reasons, pa.string()),
    }
    return pa.table([columns[name] for name in output.names], schema=output)


def _reason(confidence: float, limit: float, unlike: int, count: int) -> str | None:
    """Why a person should look at a unit; None: nobody has to.

    >>> _reason(0.7, 0.8, 2, 3)
    'unlike-training: 2 of 3 photographs; low-confidence: 0.700 is under 0.800'
    >>> _reason(0.9, 0.8, 1, 3)
    """
    told = []
    if 2 * unlike > count:
        told.append(f"unlike-training: {unlike} of {count} photographs")
    if confidence < limit:
        told.append(f"low-confidence: {confidence:.3f} is under {limit:.3f}")
    return "; ".join(told) or None


def told(out: str, files: Sequence[Published]) -> dict[str, Any] | None:
    """What the report says of the units of a night; None: it has none.

    Args:
        out: folder of the predictions.
        files: of the night, in order.
    """
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            data = storage.read_bytes(url(out, file.date, file.run_id))
        except FileNotFoundError:
            continue
        table = pq.read_table(pa.BufferReader(data))
        likeness = float(table.schema.metadata[b"likeness"])
        # A later run of the night judged anew what it has photographs of.
        rows = table.select(["unit", "label", "status", "photographs"]).to_pylist()
        found |= {row["unit"]: row for row in rows}
    if not found:
        return None
    labels: dict[str, list[int]] = {}
    for row in found.values():
        counted = labels.setdefault(row["label"], [0, 0])
        counted[0] += 1
        counted[1] += row["status"] == "review"
    return {
        "units": len(found),
        "photographs": sum(row["photographs"] for row in found.values()),
        "labels": sorted(labels.items(), key=lambda item: -item[1][0]),
        "likeness": likeness,
    }
