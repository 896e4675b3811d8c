"""Models by name, on local disk and in object storage."""

import hashlib
import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.models import bundle
from leafnet.models import registry as models_registry
from leafnet.models.registry import (
    KEPT,
    PROMOTED,
    REFUSED,
    ROLLED_BACK,
    Champion,
    add,
    champion,
    decisions,
    previous,
    resolve,
    settle,
)
from tests.conftest import make_bucket, use_server


@pytest.fixture(params=["local", "moto"])
def root(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of a registry that is not there yet."""
    if request.param == "local":
        return str(tmp_path / "registry")
    use_server(monkeypatch, request.getfixturevalue("moto").environment())
    return make_bucket(f"registry-{uuid.uuid4().hex[:12]}") + "/models"


A, B, C, D, E, F = (letter * 16 for letter in "abcdef")  # ids of models


def model(folder: Path, model_id: str) -> tuple[str, dict[str, Any]]:
    """The URL and model.json of a folder that looks like a published model to the registry."""
    data = model_id.encode()
    described = {"sha256": storage.sha256(data), "bytes": len(data)}
    weights = {"file": f"{model_id}.weights.h5", **described}
    int8 = {"file": f"{model_id}.int8.xml", **described}
    description = {
        **{"version": 1, "model_id": model_id, "class_names": ["rust"], "image_size": 32},
        **{"decoder_version": 1, "weights": weights, "int8": {"graph": int8}},
    }
    url = str(folder / model_id)
    for entry in (weights, int8):
        storage.write_bytes(storage.join(url, str(entry["file"])), data)
    storage.write_json(storage.join(url, "model.json"), description)
    return url, description


def promote(root: str, folder: Path, model_id: str) -> str:
    """Make it champion; what the alias then names."""
    digest = add(root, *model(folder, model_id))
    named = {"model_id": model_id, "digest": digest}
    models_registry.decide(
        root, PROMOTED, candidate=model_id, champion=named, comparison={"why": 1}
    )
    return str(resolve(f"{root}/champion"))


def roll_back(root: str) -> str:
    models_registry.decide(
        root,
        ROLLED_BACK,
        candidate=A,
        champion=previous(root),
        comparison={},
    )
    return str(resolve(f"{root}/champion"))


def test_what_is_written_of_a_decision(tmp_path: Path) -> None:
    root, comparison = str(tmp_path / "registry"), {"gain": 0.25}
    named = {"model_id": A, "digest": add(root, *model(tmp_path, A))}
    began = datetime.now(UTC).replace(microsecond=0)
    models_registry.decide(root, PROMOTED, candidate=A, champion=named, comparison=comparison)
    history = tmp_path / "registry/history"
    decided = json.loads((history / "00000001.json").read_text())
    at = datetime.fromisoformat(decided["at"])
    assert began <= at <= datetime.now(UTC)
    assert decided["at"] == at.strftime("%Y-%m-%dT%H:%M:%S+00:00")
    assert decided == {
        **{"version": 1, "number": 1, "at": decided["at"], "action": "promoted"},
        **{"candidate": A, "before": None, "champion": named, "comparison": {"gain": 0.25}},
    }
    copied = (tmp_path / f"registry/models/{A}/model.json").read_bytes()
    assert json.loads((tmp_path / "registry/champion.json").read_text()) == {
        **{"version": 1, "model_id": A, "digest": hashlib.sha256(copied).hexdigest()},
        **{"since": decided["at"], "decision": 1, "by": "history/00000001.json"},
    }
    assert champion(root) == Champion(
        model_id=A, digest=named["digest"], since=decided["at"], decision=1
    )
    models_registry.decide(root, KEPT, candidate=B, champion=None, comparison={})
    second = decisions(root)[1]
    assert (second.number, second.action, second.before, second.champion) == (2, "kept", A, None)
    # A line for each value, for who reads it.
    assert '\n  "number": 2,\n' in (history / "00000002.json").read_text()


def test_only_a_change_changes_the_alias(tmp_path: Path) -> None:
    root = str(tmp_path / "registry")
    promote(root, tmp_path, A)
    before = (tmp_path / "registry/champion.json").read_bytes()
    for action in (KEPT, REFUSED):
        models_registry.decide(root, action, candidate=B, champion=None, comparison={})
        settle(root)
        assert (tmp_path / "registry/champion.json").read_bytes() == before
    with pytest.raises(ValueError, match="decision 4 is promoted and names no champion"):
        models_registry.decide(root, PROMOTED, candidate=B, champion=None, comparison={})


def test_a_decision_that_is_no_json_is_not_written(tmp_path: Path) -> None:
    nan = {"gain": float("nan")}
    with pytest.raises(ValueError, match="JSON"):
        models_registry.decide(str(tmp_path), KEPT, candidate=B, champion=None, comparison=nan)
    assert decisions(str(tmp_path)) == []


def test_who_comes_second_is_told_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "registry")
    promote(root, tmp_path, A)
    named = {"model_id": B, "digest": add(root, *model(tmp_path, B))}
    monkeypatch.setattr(models_registry, "_history", lambda registry: [])  # as it was listed before
    with pytest.raises(UserError, match="run the same command again") as caught:
        models_registry.decide(root, PROMOTED, candidate=B, champion=named, comparison={})
    assert (caught.value.reason, caught.value.exit_code) == ("registry-changed", 3)
    assert resolve(f"{root}/champion") == f"{root}/models/{A}"


def test_numbers_go_on_after_the_last(tmp_path: Path) -> None:
    """Whatever else lies beside the history, or was deleted from it."""
    root = str(tmp_path)
    for _ in range(2):
        models_registry.decide(root, KEPT, candidate=B, champion=None, comparison={})
    (tmp_path / "history/00000001.json").rename(tmp_path / "history/00000009.json")
    for name in ("00000099.json.tmp", "notes.json", "zzz"):
        (tmp_path / "history" / name).write_text("{}")
    assert [decision.number for decision in decisions(root)] == [2, 1]
    made = models_registry.decide(root, KEPT, candidate=B, champion=None, comparison={})
    assert made.number == 10


def test_settling_what_is_settled_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "registry")
    settle(root)
    assert champion(root) is None
    promote(root, tmp_path, A)
    promote(root, tmp_path, B)
    monkeypatch.setattr(storage, "write_json", None)
    settle(root)
    (tmp_path / "registry/history/00000002.json").unlink()  # the alias is of a later decision
    settle(root)


def test_a_promotion_of_a_champion_that_is_not_named_is_not_gone_back_to(tmp_path: Path) -> None:
    root = str(tmp_path / "registry")
    promote(root, tmp_path, A)
    promote(root, tmp_path, B)
    path = tmp_path / "registry/history/00000001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"champion": None}))
    assert previous(root) is None


def test_only_the_alias_is_resolved(tmp_path: Path) -> None:
    root = str(tmp_path / "registry")
    promote(root, tmp_path, A)
    assert resolve(f"{root}/challenger") is None
    assert resolve(f"{root}/models/{A}") is None


def test_a_copy_has_the_files_and_the_card(tmp_path: Path) -> None:
    root = str(tmp_path / "registry")
    url, description = model(tmp_path, A)
    (tmp_path / A / "MODEL_CARD.md").write_text("a card")
    (tmp_path / A / "notes.txt").write_text("notes")
    # Nothing that a reader of a model opens.
    description |= {"told": {"file": "../notes.txt", "sha256": storage.sha256(b"notes")}}
    digest = add(root, url, description)
    copy = tmp_path / f"registry/models/{A}"
    assert {path.name: path.read_text() for path in copy.iterdir() if path.suffix != ".json"} == {
        **{f"{A}.weights.h5": A, f"{A}.int8.xml": A, "MODEL_CARD.md": "a card"},
    }
    assert json.loads((copy / "model.json").read_text()) == description
    assert hashlib.sha256((copy / "model.json").read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("file", "document", "reason", "message"),
    [
        ("champion.json", "[]", "other-version", "has version None, this leafnet reads 1"),
        ("champion.json", '{"version": 2}', "other-version", "has version 2"),
        ("history/00000001.json", '{"version": 2}', "other-version", "has version 2"),
        ("history/00000001.json", '{"version": 1}', "bad-registry", "number: Field required; take"),
    ],
)
def test_what_another_program_wrote_is_refused(
    tmp_path: Path, file: str, document: str, reason: str, message: str
) -> None:
    root = str(tmp_path / "registry")
    promote(root, tmp_path, A)
    (tmp_path / "registry" / file).write_text(document)
    with pytest.raises(UserError, match=message) as caught:
        settle(root)
    assert caught.value.reason == reason


def test_an_alias_and_its_history(root: str, tmp_path: Path) -> None:
    assert champion(root) is None
    assert resolve(f"{root}/champion") is None
    assert promote(root, tmp_path, A) == f"{root}/models/{A}"
    assert previous(root) is None
    assert promote(root, tmp_path, B) == f"{root}/models/{B}"
    models_registry.decide(root, REFUSED, candidate=E, champion=None, comparison={})
    assert promote(root, tmp_path, C) == f"{root}/models/{C}"
    assert roll_back(root) == f"{root}/models/{B}"
    assert promote(root, tmp_path, D) == f"{root}/models/{D}"
    assert roll_back(root) == f"{root}/models/{B}"
    assert roll_back(root) == f"{root}/models/{A}"
    assert previous(root) is None
    assert resolve(f"{root}/champion.json") == f"{root}/models/{A}"
    history = decisions(root)
    assert [(d.number, d.action, d.candidate, d.before) for d in history[:4]] == [
        (1, "promoted", A, None),
        (2, "promoted", B, A),
        (3, "refused", E, B),
        (4, "promoted", C, B),
    ]
    alias = storage.read_json(f"{root}/champion.json")
    assert (alias["model_id"], alias["by"]) == (A, "history/00000008.json")
    assert storage.read_bytes(f"{root}/models/{D}/{D}.int8.xml") == D.encode()


def test_one_of_many_decides(root: str, tmp_path: Path) -> None:
    digests = {name: add(root, *model(tmp_path, name)) for name in (A, B, C, D, E, F)}

    def decide(name: str) -> int | str:
        named = {"model_id": name, "digest": digests[name]}
        try:
            return models_registry.decide(
                root, PROMOTED, candidate=name, champion=named, comparison={}
            ).number
        except UserError as error:
            return error.reason

    with ThreadPoolExecutor(6) as pool:
        said = list(pool.map(decide, digests))
    history = decisions(root)
    won = [answer for answer in said if isinstance(answer, int)]
    assert set(said) - set(won) <= {"registry-changed"}
    assert sorted(won) == [decision.number for decision in history] == [*range(1, len(won) + 1)]
    settle(root)
    assert champion(root).model_id == history[-1].candidate  # type: ignore[union-attr]


def test_a_job_killed_before_it_wrote_the_alias(root: str, tmp_path: Path) -> None:
    promote(root, tmp_path, A)
    before = storage.read_bytes(f"{root}/champion.json")
    promote(root, tmp_path, B)
    after = storage.read_bytes(f"{root}/champion.json")
    storage.write_bytes(f"{root}/champion.json", before)
    assert resolve(f"{root}/champion") == f"{root}/models/{A}"
    settle(root)
    assert storage.read_bytes(f"{root}/champion.json") == after
    storage.delete(f"{root}/champion.json")
    settle(root)
    assert storage.read_bytes(f"{root}/champion.json") == after


def test_a_copy_never_changes(root: str, tmp_path: Path) -> None:
    url, description = model(tmp_path, A)
    digest = add(root, url, description)
    assert add(root, url, description | {"trained_at": "later"}) == digest
    assert "trained_at" not in storage.read_json(f"{root}/models/{A}/model.json")


@pytest.mark.parametrize(
    ("harm", "reason", "message"),
    [
        (f"models/{A}/model.json", "damaged-model", f"models/{A} was changed"),
        ("champion.json", "bad-registry", "model_id: Field required; take it from a copy"),
        (f"-models/{A}/model.json", "no-model", f"names .*models/{A}, which is gone"),
    ],
)
def test_what_was_harmed_is_told(harm: str, reason: str, message: str, tmp_path: Path) -> None:
    root = str(tmp_path / "registry")
    promote(root, tmp_path, A)
    place = tmp_path / "registry" / harm.removeprefix("-")
    place.unlink() if harm.startswith("-") else place.write_text('{"version": 1}')
    with pytest.raises(UserError, match=message) as caught:
        resolve(f"{root}/champion")
    assert caught.value.reason == reason


def test_a_model_that_was_replaced_while_it_was_judged(tmp_path: Path) -> None:
    url, description = model(tmp_path, A)
    description["weights"]["sha256"] = "0" * 64
    with pytest.raises(UserError, match="is damaged"):
        add(str(tmp_path / "registry"), url, description)
    Path(url, description["weights"]["file"]).unlink()
    with pytest.raises(UserError, match=r"weights\.h5 is gone"):
        add(str(tmp_path / "registry"), url, description)
    assert not (tmp_path / f"registry/models/{A}/model.json").exists()


def test_a_bundle_is_loaded_by_its_alias(root: str, random_model: str, tmp_path: Path) -> None:
    loaded = bundle.load(random_model)
    digest = add(root, random_model, loaded.description)
    with pytest.raises(UserError, match=r"champion/model.json does not exist"):
        bundle.load(f"{root}/champion")
    named = {"model_id": loaded.model_id, "digest": digest}
    models_registry.decide(root, PROMOTED, candidate=loaded.model_id, champion=named, comparison={})
    found = bundle.load(f"{root}/champion")
    assert (found.url, found.model_id) == (f"{root}/models/{loaded.model_id}", loaded.model_id)
    assert json.loads(json.dumps(found.description)) == loaded.description


def test_a_job_that_wakes_up_after_others_have_decided_changes_no_alias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Suspended between the history and the alias, while another took the registry over."""
    root = str(tmp_path / "registry")
    named = {"model_id": A, "digest": add(root, *model(tmp_path, A))}
    create = storage.create_bytes

    def suspended(url: str, data: bytes) -> bool:
        created = create(url, data)
        monkeypatch.setattr(storage, "create_bytes", create)
        settle(root)
        promote(root, tmp_path, B)
        return created

    monkeypatch.setattr(storage, "create_bytes", suspended)
    models_registry.decide(root, PROMOTED, candidate=A, champion=named, comparison={})
    assert [decision.candidate for decision in decisions(root)] == [A, B]
    assert resolve(f"{root}/champion") == f"{root}/models/{B}"
