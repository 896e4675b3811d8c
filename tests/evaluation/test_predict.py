import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from numpy.typing import NDArray

from leafnet.core import storage, terminal
from leafnet.data import shards
from leafnet.data.images import decode
from leafnet.data.shards import ShardIndex
from leafnet.data.synthetic import write_photographs
from leafnet.distributed.resources import Machines
from leafnet.evaluation import predict
from leafnet.features import cache as features_cache
from leafnet.features import extraction
from leafnet.features.cache import Plan, read_part
from leafnet.features.views import draw_view
from leafnet.models import bundle, resnet
from leafnet.models.rates import Way
from leafnet.models.weights import load_weights
from leafnet.preparation import prepare, sources
from leafnet.preparation.settings import PrepareSettings
from leafnet.scoring import score
from leafnet.scoring.settings import ScoreSettings
from leafnet.training import stages
from leafnet.training.head.worker import HeadJob
from leafnet.training.settings import HeadSettings, TrainSettings
from leafnet.training.train import run
from tests.conftest import write_data_set, write_deadly_decoder

SIZE, VIEWS = 64, 3
# Half a CPU, so that two pipelines fit on the two of the tests' Ray at once.
MACHINES = Machines(gpus=0, actors=1, threads_per_actor=1, cpus_per_actor=0.5)

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> ShardIndex:
    """A data set of 36 leaves in row groups of 4."""
    root = tmp_path_factory.mktemp("leaves")
    write_photographs(root / "photographs", per_class=12)
    out = str(root / "shards")
    settings = PrepareSettings(
        source=str(root / "photographs"), out=out, split="60/20/20", row_group=4
    )
    prepare.run(settings, sources.look(settings.source))
    return shards.read_index(out)


def plan_of(index: ShardIndex, root: Path | str) -> Plan:
    return features_cache.plan(str(root), [(shard, VIEWS) for shard in index.shards], seed=0)


def extract(index: ShardIndex, plan: Plan) -> int:
    """The number of views that were computed."""
    counts: list[int] = []
    extraction.extract(
        index,
        plan,
        ray.put(load_weights("random").convolutions),
        image_size=SIZE,
        precision="float32",
        batch_size=8,
        machines=MACHINES,
        advance=counts.append,
    )
    return sum(counts)


def evaluate(model: str, index: ShardIndex) -> None:
    predict.predict(
        bundle.load(model),
        index,
        ["test"],
        way=Way("tensorflow", "float32"),
        views=1,
        batch_size=8,
        machines=MACHINES,
        advance=lambda count: None,
    )


def all_views(plan: Plan) -> int:
    return sum(part.rows * (part.stop - part.first) for part in plan.parts)


def everything(index: ShardIndex, root: Path | str) -> dict[str, NDArray[np.float16]]:
    """The features of every part, read back."""
    found = {}
    for part in plan_of(index, root).parts:
        read = read_part(str(root), part)
        assert read is not None, part.name
        found[part.name] = read[0]
    return found


@pytest.fixture(scope="module")
def expected(index: ShardIndex) -> dict[str, NDArray[np.floating]]:
    """The features of every part from a plain loop, without Ray."""
    network = resnet.build(
        load_weights("random").convolutions, image_size=SIZE, precision="float32"
    )
    made = {}
    for part in plan_of(index, "nowhere").parts:
        table = list(shards.row_groups(index.root, part.shard))[part.row_group]
        views = [
            draw_view(decode(image, SIZE).pixels, key=key, number=number, seed=0)
            for key, image in zip(
                table.column("key").to_pylist(), table.column("image").to_pylist(), strict=True
            )
            for number in range(part.first, part.stop)
        ]
        made[part.name] = network.predict_on_batch(np.stack(views)).reshape(part.rows, -1, 2048)
    return made


def assert_equal(
    found: dict[str, NDArray[np.float16]], expected: dict[str, NDArray[np.floating]]
) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-3, atol=1e-4 * values.max())


def test_extraction_computes_every_view_once(
    index: ShardIndex, expected: dict[str, NDArray[np.floating]], tmp_path: Path
) -> None:
    plan = plan_of(index, tmp_path)
    assert extract(index, plan) == all_views(plan) == VIEWS * 36
    assert_equal(everything(index, tmp_path), expected)
    assert not plan_of(index, tmp_path).missing


KILLED = """
import ray, sys
from leafnet.core.settings import RaySettings
from leafnet.distributed import session
import sys
from tests.evaluation import test_predict as t
with session.session(RaySettings(address=sys.argv[1])):
    index = t.shards.read_index(sys.argv[2])
    t.extract(index, t.plan_of(index, sys.argv[3]))
"""


def test_killed_extraction_goes_on(
    index: ShardIndex, expected: dict[str, NDArray[np.floating]], tmp_path: Path
) -> None:
    address = ray.get_runtime_context().gcs_address
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    driver = subprocess.Popen(
        [sys.executable, "-c", KILLED, address, index.root, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob("*.parquet")):
            assert driver.poll() is None, "the driver ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    # Ray ends the actors of a dead driver within seconds; until then they still write parts.
    plan = plan_of(index, tmp_path)
    kept = {part.name: (tmp_path / part.name).stat().st_mtime_ns for part in plan.present}
    assert kept
    computed = extract(index, plan)
    assert computed == all_views(plan) - sum(p.rows * (p.stop - p.first) for p in plan.present)
    assert computed < all_views(plan)
    assert_equal(everything(index, tmp_path), expected)
    for name, written in kept.items():
        assert (tmp_path / name).stat().st_mtime_ns == written


@pytest.mark.parametrize("stage", ["prepare", "features", "evaluate", "score"])
def test_an_interruption_that_ray_forgot_ends_every_stage(
    stage: str, index: ShardIndex, random_model: str, tmp_path: Path
) -> None:
    write_photographs(tmp_path / "photographs", per_class=4)
    photographs, out = str(tmp_path / "photographs"), str(tmp_path / "out")

    def job(argv: Sequence[str]) -> None:
        with suppress(KeyboardInterrupt):  # as Python does with what a hook raises
            signal.raise_signal(signal.SIGINT)
        match stage:
            case "prepare":
                settings = PrepareSettings(source=photographs, out=out)
                prepare.run(settings, sources.look(settings.source))
            case "features":
                extract(index, plan_of(index, out))
            case "evaluate":
                evaluate(random_model, index)
            case "score":
                score.run(ScoreSettings(model=random_model, images=photographs, out=out))

    assert terminal.run_job(job, []) == 130


def test_two_runs_fill_the_same_cache(
    index: ShardIndex, expected: dict[str, NDArray[np.floating]], tmp_path: Path
) -> None:
    plans = [plan_of(index, tmp_path) for _ in range(2)]
    computed: list[int] = []
    threads = [
        threading.Thread(target=lambda plan=plan: computed.append(extract(index, plan)))
        for plan in plans
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert computed == [VIEWS * 36] * 2
    assert_equal(everything(index, tmp_path), expected)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert names == set(expected)


def train(index: ShardIndex, out: Path, name: str, **changes: Any) -> dict[str, Any]:
    """The metrics of a run."""
    head = {"units": (8,), "epochs": 2, "batch_size": 8}
    settings = TrainSettings(
        shards=index.root, out=str(out), name=name, weights="random", image_size=SIZE,
        views=2, precision="float32", head=HeadSettings(**head), **changes,
    )  # fmt: skip
    run(settings)
    return dict(storage.read_json(str(out / name / "metrics.json")))


def test_damaged_and_evicted_parts_are_computed_again(
    index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part is damaged before the second run, and all are evicted in the middle of the third."""
    first = train(index, tmp_path, "first")
    files = sorted((tmp_path / "features").rglob("*.parquet"))
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-100])
    files[2].write_bytes(whole)
    written = {file: file.stat().st_mtime_ns for file in files}
    assert train(index, tmp_path, "second") == first
    assert files[1].read_bytes() == whole
    assert [file.stat().st_mtime_ns == written[file] for file in files[:4]] == [
        True,
        False,
        False,
        True,
    ]

    head_job = stages._head_job
    evicted: list[str] = []

    def evict(*args: Any, **kwargs: Any) -> HeadJob:
        if not evicted:
            cache = str(tmp_path / "features")
            evicted.extend(features_cache.evict(cache, max_gb=1e-9, keep="another run's"))
        return head_job(*args, **kwargs)

    monkeypatch.setattr(stages, "_head_job", evict)
    assert train(index, tmp_path, "third") == first
    assert len(evicted) == 1


def put_into(index: ShardIndex, image: bytes, *, shard: int, row: int) -> str:
    """Put `image` in the place of an example of the data set; the key of that."""
    rows = pa.concat_tables(shards.row_groups(index.root, index.shards[shard])).to_pylist()
    rows[row] |= {"image": image, "sha256": storage.sha256(image)}
    written = list(index.shards)
    written[shard] = shards.write_shard(
        index.root,
        written[shard].name,
        pa.Table.from_pylist(rows, shards.SCHEMA),
        row_group=written[shard].row_groups[0],
    )
    shards.write_index(
        index.root, class_names=index.class_names, shards=written, counts=index.counts, prepared={}
    )
    return str(rows[row]["key"])


@pytest.mark.slow
def test_a_photograph_that_kills_ends_the_job_with_its_name(tmp_path: Path) -> None:
    """Shards hold what jobs/prepare.py could decode; another machine may not."""
    index = write_data_set(str(tmp_path / "shards"), {"train": 4, "valid": 2, "test": 2})
    key = put_into(index, write_deadly_decoder(tmp_path), shard=0, row=7)
    job = Path(__file__).parents[2] / "jobs" / "train.py"
    arguments = [
        *("--shards", index.root, "--out", str(tmp_path / "runs"), "--name", "a"),
        *("--weights", "random", "--image_size", "64", "--views", "1", "--ray.cpus", "2"),
    ]
    done = subprocess.run(
        [sys.executable, job, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(job.parents[1]), str(tmp_path)])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    url = re.escape(f"{index.root}/{index.shards[0].name}")
    assert re.fullmatch(
        rf"error\[bad-photograph\]: {key} in {url} cannot be decoded on \S+: the decoder's "
        r"process died on it \(SIGSEGV\); prepare the data set again there[^\n]*\n",
        done.stderr,
    ), done.stderr
