"""Models by name: copies of published models that never change, and which of them is champion.

    REGISTRY/models/MODEL_ID/        a published model, copied once
    REGISTRY/history/00000001.json   what was decided, in order; only ever added to
    REGISTRY/champion.json           the alias: what jobs take for REGISTRY/champion

The alias is one small file, written whole. A decision is written to the history first, under a
number that only one of many can create; the alias says of which decision it is, so whoever holds
the registry next can finish what was interrupted in between.
"""

import json
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from leafnet.core import storage
from leafnet.core.documents import Document, DocumentT, ModelId, Sha256, parse
from leafnet.core.errors import EXIT_IN_USE, UserError
from leafnet.models import document

ALIAS = "champion"
VERSION = 1
Action = Literal["promoted", "kept", "refused", "rolled-back"]  # kept: a tie
PROMOTED: Action = "promoted"
KEPT: Action = "kept"
REFUSED: Action = "refused"
ROLLED_BACK: Action = "rolled-back"
_CHANGES = (PROMOTED, ROLLED_BACK)


class Champion(Document):
    """What the alias says."""

    model_id: ModelId
    digest: Sha256  # of the copy's model.json, which has those of all its other files
    since: str  # UTC, ISO 8601
    decision: Annotated[int, Field(ge=1)]  # number of the history's entry that made it champion


class _Named(Document):
    model_id: ModelId
    digest: Sha256


class Decision(Document):
    """An entry of the history."""

    number: Annotated[int, Field(ge=1)]
    at: str  # UTC, ISO 8601
    action: Action
    candidate: ModelId  # what was tried; of a rollback, what was left
    before: ModelId | None  # the champion until then; None: there was none
    champion: _Named | None  # the new one; None: it did not change
    comparison: dict[str, Any]  # why; {} of a rollback


def model_url(registry: str, model_id: str) -> str:
    """Where the registry keeps the model."""
    return storage.join(registry, "models", model_id)


def resolve(url: str) -> str | None:
    """The URL of the model that the alias `url` names now; None: there is no alias.

    `url` is REGISTRY/champion, or the alias file itself.

    Raises:
        UserError: the alias is damaged, or the model it names is gone or was changed.
    """
    url = storage.absolute(url).removesuffix(".json")
    registry, _, name = url.rpartition("/")
    champion = _read_alias(registry) if name == ALIAS else None
    if champion is None:
        return None
    found = model_url(registry, champion.model_id)
    try:
        data = storage.read_bytes(storage.join(found, "model.json"))
    except FileNotFoundError:
        raise UserError("no-model", f"{url} names {found}, which is gone") from None
    if storage.sha256(data) != champion.digest:
        raise UserError(
            "damaged-model", f"{found} was changed: its model.json is not the one that {url} names"
        )
    return found


def add(registry: str, source: str, description: dict[str, Any]) -> str:
    """Copy the model at `source` into the registry, if it has not got it; returns the digest.

    Args:
        registry: folder or URL.
        source: folder or URL of a published model.
        description: its model.json, as it was loaded. What took its place since is not copied.

    Raises:
        UserError: a file of it is gone or damaged.
    """
    copy = model_url(registry, description["model_id"])
    pointer = storage.join(copy, "model.json")
    try:
        return storage.sha256(storage.read_bytes(pointer))
    except (FileNotFoundError, NotADirectoryError):
        pass
    for entry in document.fields(description, storage.join(source, "model.json")).files:
        place = storage.join(source, entry.file)
        try:
            data = storage.read_bytes(place)
        except FileNotFoundError:
            raise UserError("no-model", f"{place} is gone; was the model replaced?") from None
        if storage.sha256(data) != entry.sha256:
            raise UserError("damaged-model", f"{place} is damaged: its sha256 is another")
        storage.write_bytes(storage.join(copy, entry.file), data)
    card = storage.join(source, "MODEL_CARD.md")
    if storage.exists(card):
        storage.write_bytes(storage.join(copy, "MODEL_CARD.md"), storage.read_bytes(card))
    storage.write_json(pointer, description)
    return storage.sha256(storage.read_bytes(pointer))


def champion(registry: str) -> Champion | None:
    """What the alias says; None: there is no champion.

    Raises:
        UserError: the alias is damaged.
    """
    return _read_alias(registry)


def settle(registry: str) -> None:
    """Write the alias of the newest decision, if a job was interrupted before it did.

    For the holder of the registry, see `lock.hold`.
    """
    found = _read_alias(registry)
    changes = [decision for decision in decisions(registry) if decision.action in _CHANGES]
    if changes and (found is None or found.decision < changes[-1].number):
        _write_alias(registry, changes[-1])


def previous(registry: str) -> dict[str, str] | None:
    """model_id and digest of the champion before this one; None: there was none.

    A rollback counts as if what it left had never been champion: two of them go back twice.
    """
    line: list[dict[str, str]] = []
    for decision in decisions(registry):
        if decision.action == PROMOTED and decision.champion:
            line.append(decision.champion.model_dump())
        elif decision.action == ROLLED_BACK:
            line = line[:-1]
    return line[-2] if len(line) > 1 else None


def decisions(registry: str) -> list[Decision]:
    """The history, oldest first."""
    return [_read(Decision, url) for url in _history(registry)]


def decide(
    registry: str,
    action: Action,
    *,
    candidate: str,
    champion: dict[str, str] | None,
    comparison: dict[str, Any],
) -> Decision:
    """Write a decision to the history, and then the alias if it changes.

    Args:
        registry: folder or URL; held by the caller, see `lock.hold`.
        action: PROMOTED, KEPT, REFUSED or ROLLED_BACK.
        candidate: model id.
        champion: model_id and digest of the new champion, a model that is in the registry; None of
            KEPT and REFUSED.
        comparison: JSON-ready.

    Raises:
        UserError: another job decided something meanwhile; exit code 3.
    """
    before = _read_alias(registry)
    names = _history(registry)
    number = _number(names[-1]) + 1 if names else 1
    decision = Decision(
        number=number,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        action=action,
        candidate=candidate,
        before=before.model_id if before else None,
        champion=_Named(**champion) if champion else None,
        comparison=comparison,
    )
    stored = {"version": VERSION} | decision.model_dump()
    text = json.dumps(stored, indent=2, allow_nan=False)
    if not storage.create_bytes(_decision_url(registry, number), (text + "\n").encode()):
        raise UserError(
            "registry-changed",
            f"another job decided something in {registry} meanwhile; run the same command again",
            exit_code=EXIT_IN_USE,
        )
    # A job that was suspended since may have lost the registry: the newest decision counts.
    if action in _CHANGES and _history(registry)[-1] == _decision_url(registry, number):
        _write_alias(registry, decision)
    return decision


def _write_alias(registry: str, decision: Decision) -> None:
    if decision.champion is None:
        raise ValueError(f"decision {decision.number} is {decision.action} and names no champion")
    named = decision.champion.model_dump()
    found = Champion(**named, since=decision.at, decision=decision.number)
    by = _decision_url(registry, decision.number).rpartition("/")[2]
    storage.write_json(
        storage.join(registry, f"{ALIAS}.json"),
        {"version": VERSION} | found.model_dump() | {"by": f"history/{by}"},
    )


def _read_alias(registry: str) -> Champion | None:
    url = storage.join(registry, f"{ALIAS}.json")
    try:
        return _read(Champion, url)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read(kind: type[DocumentT], url: str) -> DocumentT:
    return parse(
        kind,
        storage.read_json(url),
        url=url,
        version=VERSION,
        reason="bad-registry",
        remedy="take it from a copy of the registry, or start another with --registry",
    )


def _history(registry: str) -> list[str]:
    """URLs of the decisions, oldest first."""
    folder = storage.join(registry, "history")
    names = storage.list_names(folder)
    return [storage.join(folder, n) for n in names if n.endswith(".json") and n[:8].isdigit()]


def _decision_url(registry: str, number: int) -> str:
    return storage.join(registry, "history", f"{number:08d}.json")


def _number(url: str) -> int:
    return int(url.rpartition("/")[2].removesuffix(".json"))
