"""How right nights were found to be by people: OUT/_audits/NAME.json, beside the nights.

Written when answers are taken back, read by the reports and the metrics.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from leafnet.core import storage
from leafnet.metrics.estimate import Estimate

AUDITS = "_audits"


def keep(out: str, name: str, document: Mapping[str, Any]) -> str:
    """Keep what was found of nights below `out`, in place of what `name` was before; its URL."""
    url = storage.join(out, AUDITS, f"{name}.json")
    storage.write_json(url, dict(document))
    return url


def read(out: str) -> list[dict[str, Any]]:
    """What was found of nights below `out`, the newest night last."""
    names = [name for name in storage.list_names(storage.join(out, AUDITS)) if name[-5:] == ".json"]
    found = [storage.read_json(storage.join(out, AUDITS, name)) for name in names]
    return sorted(found, key=lambda audit: (max(audit["nights"]), audit["made_at"]))


def newest_accuracy(out: str) -> dict[str, float] | None:
    """Of the nights audited last, for a summary; None: nobody has looked."""
    found = read(out)
    return dict(Estimate(*found[-1]["groups"]["all"][""]["accuracy"])._asdict()) if found else None


def of_night(out: str, date: str, model_id: str) -> dict[str, Any] | None:
    """What was found last of the night `date` of a model; None: nobody has looked.

    Under `groups`, for each kind of group and each of its names: `photographs`, and the accuracy as
    an `Estimate`.
    """
    found = [a for a in read(out) if date in a["nights"] and a["model_id"] == model_id]
    if not found:
        return None
    groups = {
        kind: {
            name: {"photographs": one["photographs"], "accuracy": Estimate(*one["accuracy"])}
            for name, one in of_kind.items()
        }
        for kind, of_kind in found[-1]["groups"].items()
    }
    return found[-1] | {"groups": groups, "accuracy": groups["all"][""]["accuracy"]}


def alarms(audit: Mapping[str, Any] | None, calibration: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a person should know first: labels that are wrong more often than on the test split."""
    tested = sum(entry["count"] for entry in calibration)
    if audit is None or not tested:
        return []
    expected = sum(entry["count"] * entry["accuracy"] for entry in calibration) / tested
    found: Estimate = audit["accuracy"]
    if found.high >= expected:
        return []
    return [
        f"People looked at {audit['answered']:,} photographs, and {100 * found.value:.0f} % of the "
        f"night's labels are right by that, {100 * found.high:.0f} % at most; on the test split it "
        f"was {100 * expected:.0f} %."
    ]
