"""Models by name, on local disk and in object storage."""

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from leafnet import bundle, registry, storage
from leafnet.errors import UserError
from tests.conftest import make_bucket, use_server


@pytest.fixture(params=["local", "moto"])
def root(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of a registry that is not there yet."""
    if request.param == "local":
        return str(tmp_path / "registry")
    use_server(monkeypatch, request.getfixturevalue("moto").environment())
    return make_bucket(f"registry-{uuid.uuid4().hex[:12]}") + "/models"


def model(folder: Path, model_id: str) -> tuple[str, dict[str, Any]]:
    """The URL and model.json of a folder that looks like a published model to the registry."""
    data = model_id.encode()
    weights = {"file": f"{model_id}.weights.h5", "sha256": storage.sha256(data)}
    int8 = {"file": f"{model_id}.int8.xml", "sha256": storage.sha256(data)}
    description = {"model_id": model_id, "weights": weights, "int8": {"graph": int8}}
    url = str(folder / model_id)
    for entry in (weights, int8):
        storage.write_bytes(storage.join(url, entry["file"]), data)
    storage.write_json(storage.join(url, "model.json"), description)
    return url, description


def promote(root: str, folder: Path, model_id: str) -> str:
    """Make it champion; what the alias then names."""
    digest = registry.add(root, *model(folder, model_id))
    named = {"model_id": model_id, "digest": digest}
    registry.decide(
        root, registry.PROMOTED, candidate=model_id, champion=named, comparison={"why": 1}
    )
    return str(registry.resolve(f"{root}/champion"))


def roll_back(root: str) -> str:
    registry.decide(
        root,
        registry.ROLLED_BACK,
        candidate="",
        champion=registry.previous(root),
        comparison={},
    )
    return str(registry.resolve(f"{root}/champion"))


def test_an_alias_and_its_history(root: str, tmp_path: Path) -> None:
    assert registry.champion(root) is None
    assert registry.resolve(f"{root}/champion") is None
    assert promote(root, tmp_path, "a") == f"{root}/models/a"
    assert registry.previous(root) is None
    assert promote(root, tmp_path, "b") == f"{root}/models/b"
    registry.decide(root, registry.REFUSED, candidate="x", champion=None, comparison={})
    assert promote(root, tmp_path, "c") == f"{root}/models/c"
    assert roll_back(root) == f"{root}/models/b"
    assert promote(root, tmp_path, "d") == f"{root}/models/d"
    assert roll_back(root) == f"{root}/models/b"
    assert roll_back(root) == f"{root}/models/a"
    assert registry.previous(root) is None
    assert registry.resolve(f"{root}/champion.json") == f"{root}/models/a"
    history = registry.decisions(root)
    assert [(d.number, d.action, d.candidate, d.before) for d in history[:4]] == [
        (1, "promoted", "a", None),
        (2, "promoted", "b", "a"),
        (3, "refused", "x", "b"),
        (4, "promoted", "c", "b"),
    ]
    alias = storage.read_json(f"{root}/champion.json")
    assert (alias["model_id"], alias["by"]) == ("a", "history/00000008.json")
    assert storage.read_bytes(f"{root}/models/d/d.int8.xml") == b"d"


def test_one_of_many_decides(root: str, tmp_path: Path) -> None:
    digests = {name: registry.add(root, *model(tmp_path, name)) for name in "abcdef"}

    def decide(name: str) -> int | str:
        named = {"model_id": name, "digest": digests[name]}
        try:
            return registry.decide(
                root, registry.PROMOTED, candidate=name, champion=named, comparison={}
            ).number
        except UserError as error:
            return error.reason

    with ThreadPoolExecutor(6) as pool:
        said = list(pool.map(decide, digests))
    history = registry.decisions(root)
    won = [answer for answer in said if isinstance(answer, int)]
    assert set(said) - set(won) <= {"registry-changed"}
    assert sorted(won) == [decision.number for decision in history] == [*range(1, len(won) + 1)]
    registry.settle(root)
    assert registry.champion(root).model_id == history[-1].candidate  # type: ignore[union-attr]


def test_a_job_killed_before_it_wrote_the_alias(root: str, tmp_path: Path) -> None:
    promote(root, tmp_path, "a")
    before = storage.read_bytes(f"{root}/champion.json")
    promote(root, tmp_path, "b")
    after = storage.read_bytes(f"{root}/champion.json")
    storage.write_bytes(f"{root}/champion.json", before)
    assert registry.resolve(f"{root}/champion") == f"{root}/models/a"
    registry.settle(root)
    assert storage.read_bytes(f"{root}/champion.json") == after
    storage.delete(f"{root}/champion.json")
    registry.settle(root)
    assert storage.read_bytes(f"{root}/champion.json") == after


def test_a_copy_never_changes(root: str, tmp_path: Path) -> None:
    url, description = model(tmp_path, "a")
    digest = registry.add(root, url, description)
    assert registry.add(root, url, description | {"trained_at": "later"}) == digest
    assert "trained_at" not in storage.read_json(f"{root}/models/a/model.json")


@pytest.mark.parametrize(
    ("harm", "reason", "message"),
    [
        ("models/a/model.json", "damaged-model", "models/a was changed"),
        ("champion.json", "bad-registry", "is damaged: it has no 'model_id'"),
        ("-models/a/model.json", "no-model", "names .*models/a, which is gone"),
    ],
)
def test_what_was_harmed_is_told(harm: str, reason: str, message: str, tmp_path: Path) -> None:
    root = str(tmp_path / "registry")
    promote(root, tmp_path, "a")
    place = tmp_path / "registry" / harm.removeprefix("-")
    place.unlink() if harm.startswith("-") else place.write_text('{"version": 1}')
    with pytest.raises(UserError, match=message) as caught:
        registry.resolve(f"{root}/champion")
    assert caught.value.reason == reason


def test_a_model_that_was_replaced_while_it_was_judged(tmp_path: Path) -> None:
    url, description = model(tmp_path, "a")
    description["weights"]["sha256"] = "0" * 64
    with pytest.raises(UserError, match="is damaged"):
        registry.add(str(tmp_path / "registry"), url, description)
    Path(url, description["weights"]["file"]).unlink()
    with pytest.raises(UserError, match=r"a.weights.h5 is gone"):
        registry.add(str(tmp_path / "registry"), url, description)
    assert not (tmp_path / "registry/models/a/model.json").exists()


def test_a_bundle_is_loaded_by_its_alias(root: str, random_model: str, tmp_path: Path) -> None:
    loaded = bundle.load(random_model)
    digest = registry.add(root, random_model, loaded.description)
    with pytest.raises(UserError, match=r"champion/model.json does not exist"):
        bundle.load(f"{root}/champion")
    named = {"model_id": loaded.model_id, "digest": digest}
    registry.decide(
        root, registry.PROMOTED, candidate=loaded.model_id, champion=named, comparison={}
    )
    found = bundle.load(f"{root}/champion")
    assert (found.url, found.model_id) == (f"{root}/models/{loaded.model_id}", loaded.model_id)
    assert json.loads(json.dumps(found.description)) == loaded.description
