"""How right the labels of nights are, by answers to photographs that chance chose.

Those that are most worth a label say little of all the others. So a few more are drawn, of all
photographs that did not fail, and the person who labels cannot tell them apart.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from leafnet.core.terminal import say
from leafnet.scoring import audits, fields, ledger, report
from leafnet.scoring.audits import Audit, accuracy

# The kinds of groups, the first of all photographs.
KINDS = ("all", "label", "field", "night")


def order(rows: pa.Table) -> NDArray[np.int64]:
    """The places of all rows, as chance has it: the first of them are a fair sample.

    By a digest of run and URL, so that the same nights always give the same sample, which nobody
    can draw again until it pleases, and a larger one holds a smaller.
    """
    keys = zip(rows["run_id"].to_pylist(), rows["image"].to_pylist(), strict=True)
    digests = [hashlib.sha256("\n".join(key).encode()).digest() for key in keys]
    return np.array(sorted(range(len(digests)), key=digests.__getitem__), np.int64)


def frame(
    rows: pa.Table,
    shown: Sequence[tuple[str, int, bool, bool]],
    *,
    predictions: str,
    nights: Mapping[str, str],
    model_id: str,
    field: str | None,
) -> dict[str, Any]:
    """What `Audit` reads again.

    Args:
        rows: all photographs that did not fail.
        shown: key, row, whether drawn and whether chosen.
        predictions: where they are published.
        nights: the night of each run.
        model_id: of the model.
        field: `--field` of the newest night.
    """
    of: dict[str, Sequence[str]] = {
        "all": [""] * rows.num_rows,
        "label": rows["label"].to_pylist(),
        "night": [nights[run] for run in rows["run_id"].to_pylist()],
    }
    if field is not None:
        of["field"] = fields.naming(field, flag="--field")(rows).tolist()
    return {
        "predictions": predictions,
        "nights": sorted(set(of["night"])),
        "model_id": model_id,
        "photographs": {
            key: {
                "predicted": of["label"][row],
                "drawn": drawn,
                "chosen": chosen,
                "groups": {kind: names[row] for kind, names in of.items()},
            }
            for key, row, drawn, chosen in shown
        },
        "totals": {kind: dict(Counter(names)) for kind, names in of.items()},
    }


def add_up(name: str, audit: Audit, labels: Mapping[str, str]) -> None:
    """Say and keep how right the nights are by `labels`, which people gave to keys."""
    groups: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        for group, total in audit.totals.get(kind, {}).items():
            found = accuracy(audit, labels, kind, group, total)
            if found is not None:
                told = {"photographs": total, "accuracy": list(found)}
                groups.setdefault(kind, {})[group] = told
    drawn = [key for key, shown in audit.photographs.items() if shown.drawn]
    answered = sum(key in labels for key in drawn)
    if "all" not in groups:
        say(f"audit     none of the {len(drawn):,} photographs that chance chose has an answer")
        return
    if not ledger.published(audit.predictions):
        say(f"audit     {audit.predictions} has no nights any more: what was found is not kept")
        return
    url = audits.keep(
        audit.predictions,
        name,
        {
            "version": 1,
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "nights": audit.nights,
            "model_id": audit.model_id,
            "drawn": len(drawn),
            "drawn_answered": answered,
            "drawn_right": sum(labels.get(k) == audit.photographs[k].predicted for k in drawn),
            "answered": len(labels.keys() & audit.photographs.keys()),
            "groups": groups,
        },
    )
    value, low, high = (100 * part for part in groups["all"][""]["accuracy"])
    say(
        f"audit     {value:.1f} % of the labels of {', '.join(audit.nights)} are right, "
        f"{low:.1f} to {high:.1f} %, by {answered:,} of {len(drawn):,} answers: {url}"
    )
    for night in audit.nights:
        say(f"report    {report.write(audit.predictions, night)}")
