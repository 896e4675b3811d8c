"""What earlier versions stored, written by tests/earlier/make.py, is continued by this one."""

import csv
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.core.settings import validate
from leafnet.data import shards
from leafnet.data.images import decode
from leafnet.distributed import checkpoint
from leafnet.evaluation import document, promote
from leafnet.evaluation.settings import PromoteSettings
from leafnet.features import cache, extraction
from leafnet.models import bundle, registry
from leafnet.training import report, train
from leafnet.training.head.state import load
from leafnet.training.settings import TrainSettings
from tests.conftest import make_bucket, use_server
from tests.earlier import make
from tests.support.markup import check
from tests.support.s3_server import Server

STORED = Path(make.__file__).parent
ROOT = Path(__file__).parents[1]
VERSIONS = sorted(path.parent.name for path in STORED.glob("*/weights.xz"))


@pytest.fixture(params=VERSIONS)
def earlier(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of all that a version stored."""
    return Path(shutil.copytree(STORED / request.param, tmp_path / "earlier"))


@pytest.fixture
def champion(earlier: Path) -> str:
    """The alias of the champion, whose weights are unpacked."""
    (pointer,) = (earlier / "registry" / "models").glob("*/model.json")
    weights = pointer.parent / json.loads(pointer.read_text())["weights"]["file"]
    weights.write_bytes(lzma.decompress((earlier / "weights.xz").read_bytes()))
    return str(earlier / "registry" / "champion")


def train_settings(earlier: Path) -> TrainSettings:
    places = {"shards": str(earlier / "shards"), "out": str(earlier), "weights": make.WEIGHTS}
    return validate(TrainSettings, make.TRAIN | places)


def history(run: Path) -> dict[str, list[float]]:
    rows = list(csv.DictReader(io.StringIO((run / "history.csv").read_text())))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_something_is_stored() -> None:
    assert "0.1" in VERSIONS


def test_shards_are_read(earlier: Path) -> None:
    index = shards.read_index(str(earlier / "shards"))
    shards.check_sizes(index)
    assert index.class_names == make.CLASSES
    assert [index.examples(split) for split in ("train", "valid", "test")] == [12, 6, 3]
    for shard in index.shards:
        rows = [
            row
            for table in shards.row_groups(index.root, shard)
            for row in table.select(["key", "image", "label"]).to_pylist()
        ]
        assert len(rows) == shard.rows
        for row in rows:
            # The folder of the photograph is its class, and its number the seed.
            label, number = row["key"].removesuffix(".jpg").split("/")
            assert row["image"] == make.leaf(label, int(number))
            assert index.class_names[row["label"]] == label
            assert decode(row["image"], 32).pixels.shape == (32, 32, 3)


def test_features_are_found_and_read(earlier: Path) -> None:
    index = shards.read_index(str(earlier / "shards"))
    (root,) = (earlier / "features").iterdir()
    wanted = [(shard, 2 if shard.split == "train" else 1) for shard in index.shards]
    plan = cache.plan(str(root), wanted, seed=0)
    assert plan.missing == ()
    assert sum(part.rows * (part.stop - part.first) for part in plan.present) == 33
    for part in plan.present:
        read = cache.read_part(str(root), part)
        assert read is not None
        assert np.ptp(read[0].astype(np.float32), axis=2).min() > 0


def test_the_checkpoint_inside_the_head_fit_is_loaded(earlier: Path) -> None:
    folder = str(earlier / "interrupted" / "head")
    newest = checkpoint.newest(folder, print)
    assert newest is not None
    identity = json.loads((Path(folder) / newest / checkpoint.MANIFEST).read_text())["identity"]
    state = load(Path(folder) / newest, identity=identity)
    assert newest == checkpoint.name(state.step, newest.rpartition("_")[2])
    assert 0 < state.epoch < 20
    assert state.epoch == state.step // 3
    assert [row["epoch"] for row in state.history] == list(range(1, state.epoch + 1))
    assert [kernel.shape for kernel, _ in state.head] == [(2048, 2), (2, 3)]
    with pytest.raises(UserError, match="was started with seed 0, not 7"):
        load(Path(folder) / newest, identity=identity | {"seed": 7})


@pytest.mark.ray
@pytest.mark.slow
def test_an_interrupted_run_ends_as_the_earlier_version_ended_it(
    local_ray: None,
    earlier: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def extract(*_: Any, **__: Any) -> None:
        raise AssertionError("all features are in the cache")

    monkeypatch.chdir(earlier)
    monkeypatch.setattr(extraction, "extract", extract)
    make.write_weights(earlier / make.WEIGHTS)
    run = (earlier / "interrupted").rename(earlier / "leaves")
    newest = checkpoint.names(str(run / "head"))[0]
    done = int(newest.split("_")[1]) // 3  # steps of an epoch
    assert 0 < done < 20
    train.run(train_settings(earlier))
    said = "".join(capfd.readouterr())
    assert "goes on where it stopped" in said
    assert "33 of 33 views are in the cache" in said
    epochs = [int(number) for number in re.findall(r"epoch +(\d+)/20", said)]
    assert epochs == list(range(done + 1, 21))
    found, expected = history(run), history(earlier / "finished")
    assert found.keys() == expected.keys()
    for name, column in expected.items():
        np.testing.assert_allclose(found[name], column, rtol=1e-3, atol=1e-4, err_msg=name)
    scores = [json.loads((r / "metrics.json").read_text()) for r in (run, earlier / "finished")]
    for split in ("train", "valid", "test"):
        assert scores[0][split]["confusion"] == scores[1][split]["confusion"], split
    bundle.load(str(run / "model"))


def test_a_run_of_other_settings_is_refused_by_name(earlier: Path) -> None:
    run = (earlier / "interrupted").rename(earlier / "leaves")
    before = tree(run)
    chosen = train_settings(earlier).model_copy(update={"seed": 7})
    with pytest.raises(UserError, match=r"seed 0, not 7; give the same settings") as caught:
        train.run(chosen)
    assert caught.value.reason == "started-differently"
    assert tree(run) == before


def test_a_finished_run_is_known_for_one(earlier: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = (earlier / "finished").rename(earlier / "leaves")
    before = tree(run)
    train.run(train_settings(earlier))
    assert "leaves is finished" in "".join(capfd.readouterr())
    assert tree(run) == before


def test_evaluation_and_report(earlier: Path) -> None:
    run = earlier / "finished"
    scores = json.loads((run / "metrics.json").read_text())
    stored, items = document.read(str(run / "evaluation"))
    assert stored["splits"]["test"]["accuracy"] == scores["test"]["accuracy"]
    assert items
    place = report.write(str(run))
    assert place == str(run / "report.html")
    page = check((run / "report.html").read_bytes())
    assert len(page.all("img")) >= len(items)
    assert json.loads((run / "run.json").read_text())["command"] in page.text


def test_a_model_predicts_what_it_did(earlier: Path, champion: str) -> None:
    model = bundle.load(champion)
    assert model.class_names == make.CLASSES
    assert model.novelty is not None
    assert model.review is not None
    rows = pd.concat(
        pd.read_parquet(path) for path in (earlier / "night" / "night").glob("date=*/*.parquet")
    ).sort_values("image")
    assert len(rows) == make.FINISHED
    predictions = model.predict(
        [(earlier / "night/images" / Path(image).name).read_bytes() for image in rows["image"]],
        precision="float32",
    )
    for (_, row), prediction in zip(rows.iterrows(), predictions, strict=True):
        assert prediction.label == row["label"]
        for name, probability in prediction.probabilities.items():
            assert probability == pytest.approx(row["probabilities"][name], abs=1e-4)
        assert prediction.novelty == pytest.approx(row["novelty"], rel=1e-3)


@pytest.mark.ray
@pytest.mark.slow
def test_a_champion_is_promoted_over_and_gone_back_to(
    local_ray: None, earlier: Path, champion: str
) -> None:
    root = str(earlier / "registry")
    before = bundle.load(champion)
    candidate = str(earlier / "candidate")
    kernel, bias = before.head[-1]
    model_id = bundle.save(
        candidate,
        convolutions=before.convolutions,
        head=[*before.head[:-1], (kernel, bias + 1)],  # the same answers
        class_names=before.class_names,
        image_size=before.image_size,
        provenance={},
    )
    values = {"registry": root, "shards": str(earlier / "shards"), "candidate": candidate}
    floors = {
        "margin": 100,
        "min_recall": 0.0,
        "max_ece_rise": 1.0,
        "tie": "promote",
        "precision": "float32",
    }
    promote.run(validate(PromoteSettings, values | floors))
    found = registry.champion(root)
    assert found is not None
    assert (found.model_id, found.decision) == (model_id, 2)
    promote.run(validate(PromoteSettings, {"registry": root, "rollback": True}))
    assert bundle.load(champion).model_id == before.model_id
    told = [(one.number, one.action) for one in registry.decisions(root)]
    assert told == [(1, "promoted"), (2, "promoted"), (3, "rolled-back")]


@pytest.mark.slow
def test_a_half_night_is_finished_and_a_finished_one_not_scored_again(
    moto: Server, earlier: Path, champion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_server(monkeypatch, moto.environment())
    url = make_bucket(make.BUCKET)
    stored = earlier / "night"
    for path in stored.rglob("*"):
        if path.is_file():
            storage.write_bytes(storage.join(url, str(path.relative_to(stored))), path.read_bytes())
    (finished,) = (stored / "night").glob("date=*/*.parquet")
    kept = pd.concat(
        pd.read_parquet(io.BytesIO(path.read_bytes()))
        for path in (stored / "night/_staging").glob("*/part-*")
    ).set_index("image")
    assert 0 < len(kept) < make.LISTED - make.FINISHED
    places = {"model": champion, "images": f"{url}/images", "out": f"{url}/night"}
    night = make.words(make.SCORE | places | {"date": "2026-11-29"})
    job = subprocess.run(
        [sys.executable, ROOT / "jobs" / "score.py", *night, "--ray.cpus=2"],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert f"{len(kept)} photographs were finished when" in job.stdout + job.stderr
    names = [
        file.url for file in storage.list_files(f"{url}/night") if file.url.endswith(".parquet")
    ]
    old, new = sorted(name for name in names if "/date=" in name)
    assert storage.read_bytes(old) == finished.read_bytes()
    rows = {name: pd.read_parquet(io.BytesIO(storage.read_bytes(name))) for name in (old, new)}
    images = [image for of_night in rows.values() for image in of_night["image"]]
    assert sorted(images) == [f"{url}/images/{n:02d}.jpg" for n in range(make.LISTED)]
    assert len(rows[old]) == make.FINISHED
    # What was scored by the earlier version is published as it was.
    again = rows[new].set_index("image").loc[kept.index]
    pd.testing.assert_frame_equal(again, kept[again.columns])
    assert storage.list_files(f"{url}/night/_staging") == []
