"""The jobs with everything on a real S3 server."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from leafnet import bundle, demo, runs, shards, storage
from leafnet.config import PrepareSettings, TrainSettings
from tests.conftest import leaf_jpeg, make_bucket, use_server, write_data_set
from tests.s3_server import Keys, Server
from tests.test_storage import allow

ROOT = Path(__file__).parent.parent
TINY = {"weights": "random", "image_size": 64, "views": 1, "workers": 2, "name": "a"}
HEAD = {"units": "16", "batch_size": 8, "epochs": 2}

# One Ray for all jobs: each would start its own, which takes longer than the work.
JOBS = """
import json, runpy, sys
from leafnet import cluster, config
with cluster.session(config.RaySettings(cpus=2)):
    for command in json.loads(sys.argv[1]):
        job = runpy.run_path(f"{sys.argv[2]}/jobs/{command[0]}.py")
        code = job["terminal"].run_job(job["main"], command[1:])
        if code:
            sys.exit(code)
"""


@pytest.fixture
def server(radosgw: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    use_server(monkeypatch, radosgw.environment())
    yield radosgw
    storage._filesystem.cache_clear()


def write_photographs(root: str) -> None:
    for place, name in enumerate(demo.CLASS_NAMES):
        for i in range(12):
            jpeg = leaf_jpeg(name, seed=100 * place + i)
            storage.write_bytes(storage.join(root, name, f"{i}.jpg"), jpeg)


def flags(settings: dict[str, object], prefix: str = "") -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{prefix}{name}", str(value))]


@pytest.mark.ray
@pytest.mark.slow
def test_prepare_train_evaluate_on_s3_equal_local_disk(
    server: Server, local_ray: None, tmp_path: Path
) -> None:
    root = make_bucket("end-to-end") + "/project"
    write_photographs(f"{root}/photographs")
    prepare = ["prepare", "--source", f"{root}/photographs", "--out", f"{root}/shards"]
    train = ["train", "--shards", f"{root}/shards", "--out", f"{root}/runs"]
    train += flags(TINY) + flags(HEAD, "head.")
    evaluate = ["evaluate", "--model", f"{root}/runs/a/model", "--shards", f"{root}/shards"]
    evaluate += ["--split", "all", "--out", f"{root}/evaluated.json"]

    here, ray_folder = tmp_path / "here", Path(f"/tmp/lf{os.getpid()}s3")
    here.mkdir()
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = subprocess.run(
        [
            *(sys.executable, "-c", JOBS),
            json.dumps([prepare, prepare, train, train, evaluate]),
            str(ROOT),
        ],
        cwd=here,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(ray_folder),
            "TMPDIR": str(temporary),
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is already prepared; nothing to do" in done.stdout
    assert "is finished" in done.stdout

    # The same on local disk, with the same seeds.
    from leafnet import ingest, sources

    write_photographs(str(tmp_path / "photographs"))
    local_shards, local_runs = str(tmp_path / "shards"), str(tmp_path / "runs")
    settings = PrepareSettings(source=str(tmp_path / "photographs"), out=local_shards)
    ingest.run(settings, sources.look(settings.source))
    runs.train(
        TrainSettings.model_validate(
            {"shards": local_shards, "out": local_runs, **TINY, "head": {**HEAD, "units": (16,)}}
        )
    )
    index = shards.read_index(f"{root}/shards")
    assert index.fingerprint == shards.read_index(local_shards).fingerprint
    for name in ("metrics.json", "history.csv"):
        assert storage.read_bytes(f"{root}/runs/a/{name}") == storage.read_bytes(
            f"{local_runs}/a/{name}"
        )
    model = bundle.load(f"{root}/runs/a/model")
    assert model.model_id == bundle.load(f"{local_runs}/a/model").model_id
    evaluated = storage.read_json(f"{root}/evaluated.json")
    for split, scores in storage.read_json(f"{root}/runs/a/metrics.json").items():
        assert evaluated[split]["examples"] == scores["examples"] == index.examples(split)

    assert not list(here.iterdir())
    files = storage.list_files(root)
    names = {file.url.removeprefix(f"{root}/") for file in files}
    assert {"shards/prepare.log", "runs/a/train.log", "runs/a/config.yaml"} <= names
    assert any(name.startswith("runs/a/head/checkpoint_") for name in names)
    kept = [(file.url, storage.read_bytes(file.url)) for file in files]
    kept += [
        (str(path), path.read_bytes())
        for folder in (ray_folder, temporary)
        for path in folder.rglob("*")
        if path.is_file()
    ]
    assert any(name.endswith("raylet.out") for name, _ in kept)
    kept.append(("what was printed", (done.stdout + done.stderr).encode()))
    secret = server.keys.secret.encode()
    assert [name for name, data in kept if secret in data] == []


MISTAKES = {
    "no-such-bucket": ["train", "--shards", "s3://not-there/shards", "--out", "OUT", "--name", "a"],
    "wrong-keys": ["evaluate", "--shards", "SHARDS", "--model", "OUT/a/model"],
    "no-access": ["train", "--shards", "SHARDS", "--out", "OUT", *flags(TINY)],
}


@pytest.mark.parametrize("reason", MISTAKES)
def test_mistakes_end_a_job_in_one_line_before_a_machine_is_taken(
    reason: str, server: Server
) -> None:
    bucket = make_bucket(f"mistake-{reason}")
    index = write_data_set(f"{bucket}/shards", {"train": 2, "valid": 1, "test": 1})
    allow(bucket, "arn:aws:iam:::user/reader", "GetObject", "ListBucket")
    keys = Keys(server.keys.id, "wrong") if reason == "wrong-keys" else server.reader
    places = {"SHARDS": index.root, "OUT": f"{bucket}/runs", "OUT/a/model": f"{bucket}/model"}
    job, *words = (places.get(word, word) for word in MISTAKES[reason])
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *words],
        env={**os.environ, **keys.environment()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert time.monotonic() - began < 60
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith(f"error[{reason}]: s3://")
    assert done.stderr.count("\n") == 1
    assert server.endpoint in done.stderr
    assert "device" not in done.stdout
