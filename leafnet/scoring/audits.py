"""How right nights were found to be by people: OUT/_audits/NAME.json, beside the nights.

Written when answers are taken back, read by the reports and the metrics.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from leafnet.core import storage
from leafnet.core.documents import Count, Document
from leafnet.metrics.estimate import Estimate, audited

AUDITS = "_audits"
_CHANCE = 0.001


class Shown(Document):
    """A photograph that people were shown."""

    predicted: str
    drawn: bool  # by chance
    chosen: bool  # as worth a label
    groups: dict[str, str]  # its name in each kind of group


class Audit(Document):
    """What is to be known of a sample when the answers come."""

    predictions: str
    nights: list[str] = Field(min_length=1)
    model_id: str
    photographs: dict[str, Shown]
    totals: dict[str, dict[str, Count]]  # photographs of each group


def accuracy(
    audit: Audit, labels: Mapping[str, str], kind: str, group: str, total: int
) -> Estimate | None:
    """The accuracy of a group; None: no answer says anything of it.

    Those chosen for what they are count for themselves, if all of them were answered: some of them
    would be the easier ones. Else only the drawn count.
    """
    inside = {k: s for k, s in audit.photographs.items() if s.groups.get(kind) == group}
    chosen = [key for key, shown in inside.items() if shown.chosen]
    if not all(key in labels for key in chosen):
        chosen = []
    drawn = [k for k, s in inside.items() if s.drawn and k in labels and k not in set(chosen)]

    def right(keys: Sequence[str]) -> int:
        return sum(labels[key] == inside[key].predicted for key in keys)

    return audited(right(drawn), len(drawn), total, chosen_right=right(chosen), chosen=len(chosen))


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


def newest(out: str, model: Mapping[str, Any]) -> dict[str, float] | None:
    """Accuracy of the nights audited last, for a summary; None: nobody has looked.

    With 1 under `alarm` where labels are wrong more often than on the test split, else 0.

    Args:
        out: folder of the predictions.
        model: of the summary; of another model nothing is told.
    """
    found = [audit for audit in read(out) if audit["model_id"] == model["model_id"]]
    if not found:
        return None
    accuracy = Estimate(*found[-1]["groups"]["all"][""]["accuracy"])
    alarm = is_alarming(found[-1], model.get("calibration", ()))
    return {**accuracy._asdict(), "alarm": float(alarm)}


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


def is_alarming(audit: Mapping[str, Any], calibration: Sequence[Mapping[str, Any]]) -> bool:
    """Whether fewer labels are right than on the test split, by more than chance.

    Fisher's exact test of those that chance chose: one in a thousand unchanged nights, at most, is
    called so.
    """
    # Half a second of the start of every job that may need it.
    from scipy.stats import fisher_exact

    tested = sum(entry["count"] for entry in calibration)
    right = round(sum(entry["count"] * entry["accuracy"] for entry in calibration))
    looked, found = audit["drawn_answered"], audit["drawn_right"]
    table = [[found, looked - found], [right, tested - right]]
    return bool(fisher_exact(table, alternative="less").pvalue < _CHANCE)


def alarms(audit: Mapping[str, Any] | None, calibration: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a person should know first: labels that are wrong more often than on the test split."""
    if audit is None or not is_alarming(audit, calibration):
        return []
    tested = sum(entry["count"] for entry in calibration)
    expected = sum(entry["count"] * entry["accuracy"] for entry in calibration) / tested
    return [
        f"Of {audit['drawn_answered']:,} photographs that chance chose, people found "
        f"{audit['drawn_right']:,} labels right; on the test split it was {100 * expected:.0f} %."
    ]
