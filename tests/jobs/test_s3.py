"""The jobs with everything on a real S3 server."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from leafnet.core import lock, storage
from leafnet.core.errors import EXIT_IN_USE, UserError
from leafnet.data import shards, synthetic
from leafnet.models import bundle
from leafnet.preparation.settings import PrepareSettings
from leafnet.scoring import ledger, listing, reading
from leafnet.scoring import score as scoring_score
from leafnet.scoring.settings import ScoreSettings
from leafnet.training import train as training_train
from leafnet.training.settings import TrainSettings
from tests.conftest import leaf_jpeg, make_bucket, use_server, write_data_set
from tests.core.test_storage import allow
from tests.jobs.test_jobs import kill_session
from tests.support.s3_server import Keys, Proxy, Server, free_port

ROOT = Path(__file__).parents[2]
TINY = {"weights": "random", "image_size": 64, "views": 1, "workers": 2, "name": "a"}
TINY |= {"precision": "float32"}
HEAD = {"units": "16", "batch_size": 8, "epochs": 12}

# One Ray for some jobs: each would start its own, which takes longer than the work.
JOBS = """
import json
import runpy
import sys
from leafnet.core import terminal
from leafnet.core.settings import RaySettings
from leafnet.distributed import session
with session.session(RaySettings(cpus=2)):
    for command in json.loads(sys.argv[1]):
        job = runpy.run_path(f"{sys.argv[2]}/jobs/{command[0]}.py")["job"]
        code = terminal.run_job(job, command[1:])
        if code:
            sys.exit(code)
"""


@pytest.fixture
def server(radosgw: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    use_server(monkeypatch, radosgw.environment())
    yield radosgw
    storage._filesystem.cache_clear()


def write_photographs(root: str) -> None:
    for place, name in enumerate(synthetic.CLASS_NAMES):
        for i in range(12):
            jpeg = leaf_jpeg(name, seed=100 * place + i)
            storage.write_bytes(storage.join(root, name, f"{i}.jpg"), jpeg)


def flags(settings: dict[str, object], prefix: str = "") -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{prefix}{name}", str(value))]


class Machine:
    """Where jobs run: folders of its own, and the way to the server."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.here, self.temporary = folder / "here", folder / "tmp"
        self.ray = Path(f"/tmp/lf{os.getpid()}s3")  # sockets' paths must be short
        for path in (self.here, self.temporary):
            path.mkdir()
        self.log = folder / "printed"
        self._environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": endpoint,
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(self.ray),
            "TMPDIR": str(self.temporary),
        }

    def run(self, *commands: list[str], until: Callable[[], bool] | None = None) -> str:
        """Run the jobs one after the other; SIGKILL to all that they started as soon as `until`."""
        already = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as printed:
            process = subprocess.Popen(
                [sys.executable, "-c", JOBS, json.dumps(commands), str(ROOT)],
                cwd=self.here,
                env=self._environment,
                stdout=printed,
                stderr=printed,
                start_new_session=True,
            )
        deadline = time.monotonic() + 600
        while process.poll() is None and not (until and until()):
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        assert (process.poll() is None) == (until is not None), self.log.read_text()
        kill_session(process.pid)
        code = process.wait()
        said = self.log.read_bytes()[already:].decode()
        assert code == (-signal.SIGKILL if until else 0), said
        return said

    def files(self) -> list[tuple[str, bytes]]:
        paths = [path for root in (self.ray, self.temporary) for path in root.rglob("*")]
        return [(str(path), path.read_bytes()) for path in [self.log, *paths] if path.is_file()]


@pytest.mark.ray
@pytest.mark.slow
def test_all_jobs_on_s3_through_harm_and_kills_equal_local_disk(
    server: Server, local_ray: None, tmp_path: Path
) -> None:
    """prepare, train (killed), evaluate, score (killed): nothing on local disk but caches.

    Between the jobs and the server stands a proxy that answers 503, resets, cuts bodies and stalls.
    """
    root = make_bucket("end-to-end") + "/project"
    write_photographs(f"{root}/photographs")
    cache = tmp_path / "cache"
    prepare = ["prepare", "--source", f"{root}/photographs", "--out", f"{root}/shards"]
    train = ["train", "--shards", f"{root}/shards", "--out", f"{root}/runs"]
    train += [*flags(TINY), *flags(HEAD, "head."), "--checkpoint.every_seconds", "0"]
    cached = ["--data.local_cache", str(cache), "--data.local_cache_gb", "0.1"]
    evaluate = ["evaluate", "--model", f"{root}/runs/a/model", "--shards", f"{root}/shards"]
    evaluate += ["--split", "all", "--out", f"{root}/evaluated.json", "--precision", "float32"]
    score = ["score", "--model", f"{root}/runs/a/model", "--images", f"{root}/photographs"]
    score += ["--date", "2026-11-24", "--batch-size", "1", "--keep-every", "0"]
    score += ["--engine", "tensorflow", "--precision", "float32", "--out", f"{root}/predictions"]
    mixed = [*score[:3], "--images", f"{root}/shards", "--out", str(tmp_path / "predictions")]

    def has_checkpoint() -> bool:
        url = f"{root}/runs/a/head/checkpoint_manager_snapshot.json"
        return storage.exists(url) and b"checkpoint_0" in storage.read_bytes(url)

    def staged() -> list[str]:
        found = [file.url for file in storage.list_files(f"{root}/predictions/_staging")]
        return [url for url in found if "part-" in url]

    proxy = Proxy(server.endpoint, seed=5, share=0.05, stall_s=0.5)
    with proxy.running() as endpoint:
        machine = Machine(tmp_path, endpoint)
        said = machine.run(prepare, prepare, train + cached, until=has_checkpoint)
        assert "is already prepared; nothing to do" in said
        assert not storage.exists(f"{root}/runs/a/model/model.json")
        said = machine.run(
            *(train + cached, train, evaluate + cached, score), until=lambda: bool(staged())
        )
        assert "goes on where it stopped" in said
        assert "epoch  1/12" not in said
        assert "is finished" in said
        finished = pd.concat(pd.read_parquet(read_back(url, tmp_path)) for url in staged())
        assert 0 < len(finished) < 36
        said = machine.run(score, score, mixed)
        assert f"{len(finished)} photographs were finished when" in said
        assert "nothing new" in said
    assert proxy.done.total() - proxy.done["passed"] > 10, proxy.done

    # The same on local disk, with the same seeds.
    from leafnet.preparation import prepare as preparation_prepare
    from leafnet.preparation import sources

    write_photographs(str(tmp_path / "photographs"))
    local_shards, local_runs = str(tmp_path / "shards"), str(tmp_path / "runs")
    settings = PrepareSettings(source=str(tmp_path / "photographs"), out=local_shards)
    preparation_prepare.run(settings, sources.look(settings.source))
    training_train.run(
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
    evaluated = storage.read_json(f"{root}/evaluated.json")["splits"]
    for split, scores in storage.read_json(f"{root}/runs/a/metrics.json").items():
        assert evaluated[split]["examples"] == scores["examples"] == index.examples(split)
    assert {path.name for path in cache.iterdir() if len(path.name) == 64} == {
        shard.sha256 for shard in index.shards
    }

    # One row for each photograph, those that were finished before the kill not done again.
    (published,) = ledger.published(f"{root}/predictions")
    frame = pd.read_parquet(read_back(published.url, tmp_path)).set_index("image")
    photographs = [file.url for file in storage.list_files(f"{root}/photographs")]
    assert sorted(frame.index) == sorted(photographs)
    again = frame.scored_at[finished.image].to_numpy()
    assert (again == finished.scored_at.to_numpy()).all()
    # In passes of 32, which sum in another order than passes of one.
    expected = model.predict([storage.read_bytes(url) for url in photographs], precision="float32")
    for url, prediction in zip(photographs, expected, strict=True):
        assert frame.label[url] == prediction.label
        assert frame.confidence[url] == pytest.approx(prediction.confidence, abs=1e-3)
    assert set(storage.list_names(f"{root}/predictions")) == {
        "_lock",
        "_reports",
        "_runs",
        "date=2026-11-24",
    }
    of_shards = pd.read_parquet(tmp_path / "predictions")
    assert of_shards.image.nunique() == len(of_shards) == 36

    assert not list(machine.here.iterdir())
    files = storage.list_files(root)
    names = {file.url.removeprefix(f"{root}/") for file in files}
    assert {"shards/prepare.log", "runs/a/train.log", "runs/a/config.yaml"} <= names
    assert any(name.startswith("runs/a/head/checkpoint_") for name in names)
    kept = [(file.url, storage.read_bytes(file.url)) for file in files] + machine.files()
    assert any(name.endswith("raylet.out") for name, _ in kept)
    secret = server.keys.secret.encode()
    assert [name for name, data in kept if secret in data] == []
    shutil.rmtree(machine.ray)


def read_back(url: str, folder: Path) -> Path:
    path = folder / "read_back.parquet"
    path.write_bytes(storage.read_bytes(url))
    return path


def test_more_keys_than_a_page_of_a_listing(server: Server) -> None:
    root = make_bucket("pages") + "/images"
    urls = [f"{root}/{min(i, 1)}/{i:04d}.jpg" for i in range(1100)]
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda url: storage.write_bytes(url, b"1"), urls))
    found = listing.look(root)
    assert (found.kind, found.photographs["image"].to_pylist()) == ("folder", sorted(urls))
    assert None not in found.photographs["version"].to_pylist()
    assert len(listing.look(f"{root}/*/*.jpg").photographs) == 1100
    assert len(listing.look(f"{root}/1/0").photographs) == 999
    assert len(storage.list_files(root)) == 1100
    storage.delete_folder(root, mark=urls[0])
    assert storage.list_files(root) == []


def test_two_jobs_for_one_output(server: Server, random_model: str) -> None:
    root = make_bucket("two-jobs")
    storage.write_bytes(f"{root}/images/a.jpg", b"1")
    settings = {"model": random_model, "images": f"{root}/images", "out": f"{root}/predictions"}
    with lock.hold(settings["out"], timeout_s=60):
        with pytest.raises(UserError, match=f"{root}/predictions is in use by process") as caught:
            scoring_score.run(ScoreSettings.model_validate(settings))
        assert caught.value.exit_code == EXIT_IN_USE
    assert storage.list_names(f"{root}/predictions") == [lock.FOLDER]


class Poison(Proxy):
    """Answers 503 to whoever asks for one object, and all else."""

    def _fault(self, request: bytes) -> str | None:
        return "503" if b"poison.jpg " in request.split(b"\r\n", 1)[0] else None


def test_one_object_that_cannot_be_read_is_a_row_and_a_store_that_is_away_an_error(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_bucket("poison") + "/images"
    for name in ("a", "poison", "z"):
        storage.write_bytes(f"{root}/{name}.jpg", leaf_jpeg("healthy", seed=1))
    listed = listing.look(root).photographs
    listed = listed.append_column("place", pa.array(range(3)))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")

    def reasons() -> list[str | None]:
        stacks = reading.decode_photographs(listed, image_size=32, batch_size=8, max_pixels=10**6)
        return [reason for stack in stacks for reason in stack.photographs["reason"].to_pylist()]

    with Poison(server.endpoint).running() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        storage._filesystem.cache_clear()
        first, poisoned, last = reasons()
    assert (first, last) == (None, None)
    assert poisoned is not None
    assert poisoned.startswith(f"cannot-read: UserError: {root}/poison.jpg: http")
    with pytest.raises(UserError, match=f"{root}/a.jpg: cannot reach") as told:
        reasons()
    assert told.value.reason == "no-network"


# Job and mistake -> how it is told.
MISTAKES = {
    ("prepare --source s3://not-there/images --out OUT", "bucket"): "no-such-bucket",
    ("prepare --source IMAGES --out OUT/shards", "rights"): "no-access",
    ("train --shards s3://not-there/shards --out OUT --name a", "bucket"): "no-such-bucket",
    ("train --shards SHARDS --out OUT --name a --weights random", "rights"): "no-access",
    ("train --shards SHARDS --out OUT --name a", "silence"): "no-answer",
    ("evaluate --model OUT/model --shards SHARDS", "keys"): "wrong-keys",
    ("score --model s3://not-there/model --images IMAGES --out OUT", "bucket"): "no-such-bucket",
    ("score --model MODEL --images s3://not-there/images --out LOCAL", "bucket"): "no-such-bucket",
    ("score --model MODEL --images IMAGES --out s3://not-there", "bucket"): "no-such-bucket",
    ("score --model MODEL --images IMAGES --out LOCAL", "keys"): "wrong-keys",
    ("score --model MODEL --images IMAGES --out OUT", "rights"): "no-access",
    ("score --model MODEL --images IMAGES --out LOCAL", "port"): "no-network",
    ("score --model MODEL --images IMAGES --out LOCAL", "silence"): "no-answer",
}


def test_mistakes_end_a_job_in_one_line_before_a_machine_is_taken(
    server: Server, random_model: str, tmp_path: Path
) -> None:
    bucket = make_bucket("mistakes")
    index = write_data_set(f"{bucket}/shards", {"train": 2, "valid": 1, "test": 1})
    for label in ("healthy", "late_blight"):
        storage.write_bytes(f"{bucket}/images/{label}/a.jpg", leaf_jpeg(label, seed=1))
    allow(bucket, "arn:aws:iam:::user/reader", "GetObject", "ListBucket")
    places = {"SHARDS": index.root, "OUT": f"{bucket}/out", "IMAGES": f"{bucket}/images"}
    places |= {"MODEL": random_model}
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        # One try waits as long as a job waits for all: this is not a test of patience.
        silence = f"http://127.0.0.1:{silent.getsockname()[1]}"
        changes = {
            "bucket": {},
            "keys": Keys(server.keys.id, "wrong").environment(),
            "rights": server.reader.environment(),
            "port": {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"},
            "silence": {"AWS_ENDPOINT_URL": silence, "AWS_MAX_ATTEMPTS": "1"},
        }
        began = time.monotonic()
        started = {}
        for i, (given, mistake) in enumerate(MISTAKES):
            places["LOCAL"] = str(tmp_path / f"out{i}")  # only one job may have it
            filled = re.sub("[A-Z]{3,}", lambda match: places[match[0]], given)
            job, *words = filled.split()
            started[given, mistake] = subprocess.Popen(
                [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *words],
                env={**os.environ, **changes[mistake]},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        for (given, mistake), process in started.items():
            said, told = process.communicate(timeout=120)
            assert process.returncode == 2, (given, mistake, said, told)
            assert told.startswith(f"error[{MISTAKES[given, mistake]}]: s3://"), (given, told)
            assert told.count("\n") == 1, told
            endpoint = changes[mistake].get("AWS_ENDPOINT_URL", server.endpoint)
            assert endpoint in told
            assert "device" not in said
        # Each ends within a minute; here all are at work at once.
        assert time.monotonic() - began < 120
    assert list(tmp_path.rglob("*.parquet")) == []
