"""The jobs as people start them: command lines, exit codes, kills, and a cluster with a token."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest

from leafnet.core import terminal
from leafnet.data.shards import ShardIndex
from leafnet.models import bundle
from leafnet.training.head import search
from tests.conftest import leaf_jpeg
from tests.left_out import leave_out
from tests.support import stored
from tests.training import test_tensorboard

ROOT = Path(__file__).parents[2]
TINY = (
    *("--weights", "random", "--image_size", "64", "--views", "2"),
    *("--head.units", "16", "--head.batch_size", "8"),
)


def job(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / name), *map(str, arguments)]


def run(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


def train(data_set: ShardIndex, out: Path, *more: object) -> list[str]:
    return job("train.py", "--shards", data_set.root, "--out", out, "--name", "a", *TINY, *more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shards", "nowhere", "--name", "a"], "nowhere/index.json does not exist (nothing is"),
        (["--name", "a"], "error[missing-setting]: --shards is required"),
        (["--shards", "SHARDS", "--name", "a", "--workers", "0"], "--workers cannot be '0': must"),
        (["--shards", "SHARDS", "--name", "a", "--epocs", "3"], "did you mean --head.epochs?"),
        (["--shards", "SHARDS", "--name", "a", "--config", "CONFIG"], "did you mean head.dropout?"),
        (["--shards", "SHARDS", "--name", "a", "--weights", "WEIGHTS"], "is not a ResNet50: layer"),
        (["--shards", "SHARDS", "--name", "a", "--weights", "no.h5"], "no.h5 does not exist; give"),
        (["--shards", "ftpx://a/b", "--name", "a"], "error[unknown-protocol]: cannot open ftpx:"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(
    arguments: list[str], message: str, data_set: ShardIndex, tmp_path: Path
) -> None:
    config, weights = tmp_path / "train.yaml", tmp_path / "vgg.h5"
    config.write_text("head:\n  dropuot: 0.5\n")
    with h5py.File(weights, "w") as file:
        file["block1_conv1/kernel"] = np.zeros((3, 3, 3, 64))
    places = {"SHARDS": data_set.root, "CONFIG": str(config), "WEIGHTS": str(weights)}
    given = [places.get(word, word) for word in arguments]
    done = run(job("train.py", *given, "--out", tmp_path / "runs"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error[")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "runs").exists()


def test_no_cluster_at_the_address(data_set: ShardIndex, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    done = run(train(data_set, tmp_path, "--ray.address", address))
    assert done.returncode == 2, done.stderr
    assert f"error[no-cluster]: no Ray cluster answers at {address}" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    [
        *("prepare.py", "train.py", "evaluate.py", "promote.py", "export.py", "review.py"),
        *("doctor.py", "report.py"),
    ],
)
def test_help_names_every_setting_and_ends_with_examples(name: str) -> None:
    done = run(job(name, "--help"))
    assert done.returncode == 0
    *_, examples = done.stdout.split("examples:\n")
    assert examples.count(f"python jobs/{name} ") == 3
    for flag in terminal.FLAGS:
        assert f"\n  {flag}" in done.stdout


def start_and_wait_for_lock(command: Sequence[str], out: Path) -> subprocess.Popen[str]:
    """A job in a session of its own that holds `out`."""
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 100
    while not any(json.loads(p.read_text())["pid"] == process.pid for p in locks(out)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def locks(out: Path) -> list[Path]:
    return list((out / "_lock").glob("*.json"))


def check_in_use(command: Sequence[str], holder: int) -> None:
    os.kill(holder, signal.SIGSTOP)  # so that it is not done before the other asks
    done = run(command)
    os.kill(holder, signal.SIGCONT)
    assert done.returncode == 3, done.stdout + done.stderr
    assert f"is in use by process {holder} on {socket.gethostname()}, since 2" in done.stderr
    assert done.stderr.startswith("error[output-in-use]: ")
    assert done.stderr.count("\n") == 1


def interrupt(process: subprocess.Popen[str], kept: str) -> None:
    """As Ctrl-C in a shell: to the whole group of processes."""
    try:
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert stderr == f"interrupted: {kept}; run the same command again to continue\n"
    finally:
        kill_session(process.pid)


@pytest.mark.slow
def test_two_runs_of_one_name_and_what_is_left_by_a_kill(
    data_set: ShardIndex, tmp_path: Path
) -> None:
    command = train(data_set, tmp_path, "--ray.cpus", "2", "--head.epochs", "100000")
    first = start_and_wait_for_lock(command, tmp_path / "a")
    try:
        check_in_use(command, first.pid)
    finally:
        kill_session(first.pid)
    first.communicate()
    assert len(locks(tmp_path / "a")) == 1
    second = start_and_wait_for_lock(command, tmp_path / "a")  # the owner is dead
    assert second.stdout is not None
    while not second.stdout.readline().startswith("epoch "):
        assert second.poll() is None
    interrupt(second, f"features and checkpoints are kept in {tmp_path}")
    (left,) = locks(tmp_path / "a")
    assert json.loads(left.read_text())["released"]


@pytest.mark.slow
def test_an_interrupted_search_chooses_nothing(data_set: ShardIndex, tmp_path: Path) -> None:
    trials, stored = ("--head.search", "100", "--head.epochs", "50"), tmp_path / "a" / search.SEARCH
    command = train(data_set, tmp_path, "--ray.cpus", "2", *trials)
    process = start_and_wait_for_lock(command, tmp_path / "a")
    while not stored.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    interrupt(process, f"features and checkpoints are kept in {tmp_path}")
    assert 0 < len([row for row in json.loads(stored.read_text())["rows"] if row]) < 100


@pytest.mark.slow
def test_two_preparations_of_one_output(tmp_path: Path) -> None:
    for i in range(200):  # enough that it is at work for a while after it was held up
        for label in ("rust", "healthy"):
            path = tmp_path / "photos" / label / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(leaf_jpeg("healthy", seed=2 * i + (label == "rust")))
    out = tmp_path / "shards"
    command = job("prepare.py", "--source", tmp_path / "photos", "--out", out, "--ray.cpus", "2")
    first = start_and_wait_for_lock(command, out)
    try:
        while not (out / "prepare.log").exists():
            assert first.poll() is None
        check_in_use(command, first.pid)
    except BaseException:
        kill_session(first.pid)
        raise
    interrupt(first, "nothing of the data set is kept, it is made in one go")
    assert {path.name for path in out.iterdir()} == {"_lock", "unfinished.json", "prepare.log"}


def test_reports_are_written_again(data_set: ShardIndex, tmp_path: Path) -> None:
    out, leaves = tmp_path / "predictions", tmp_path / "leaves"
    done = run(job("report.py", "--run", leaves, "--predictions", out))
    assert done.returncode == 2
    assert done.stderr.startswith("error[which-report]: give either")
    stored.write_night(out, "2026-11-23", images="/in", names=["1.jpg", "2.jpg"])
    stored.write_night(out, "2026-11-24", images="/in", names=["3.jpg"], seed=1)
    stored.write_run(leaves, data_set)
    assert run(job("report.py", "--run", leaves)).stdout.endswith("leaves/report.html\n")
    done = run(job("report.py", "--predictions", out))
    assert done.stdout.endswith("_reports/2026-11-24.html\n")


@pytest.mark.ray
@pytest.mark.slow
def test_killed_and_started_again_equals_never_killed(data_set: ShardIndex, tmp_path: Path) -> None:
    """SIGKILL to the job and all that it started, once Ray Train counts a checkpoint as saved."""
    more = ["--head.epochs", "12", "--checkpoint.every_seconds", "0", "--ray.cpus", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(train(data_set, whole, *more))
    assert done.returncode == 0, done.stdout + done.stderr

    slow = [*more, "--cache.url", whole / "features"]
    process = subprocess.Popen(
        train(data_set, killed, *slow), start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    counted = killed / "a/head/checkpoint_manager_snapshot.json"
    while not counted.exists() or "checkpoint_0" not in counted.read_text():
        assert process.poll() is None, "it ended before there was a checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_session(process.pid)
    process.wait()
    assert not (killed / "a" / "model" / "model.json").exists()

    done = run(train(data_set, killed, *slow))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goes on where it stopped" in done.stdout
    assert "epoch  1/12" not in done.stdout
    assert (killed / "a/history.csv").read_text() == (whole / "a/history.csv").read_text()
    for split in ("train", "valid"):
        assert test_tensorboard.written(killed / "a", split, "loss") == list(range(1, 13))
    first, second = (bundle.load(str(out / "a/model")) for out in (whole, killed))
    assert first.model_id == second.model_id


def kill_session(leader: int) -> None:
    """SIGKILL to every process of the session that `leader` started, Ray's own included."""
    listed = subprocess.run(["ps", "-eo", "pid,sid"], capture_output=True, text=True, check=True)
    for line in listed.stdout.splitlines()[1:]:
        pid, session = map(int, line.split())
        if session == leader:
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def head_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a client of a cluster that `ray start --head` began, with a token."""
    # Ray puts sockets below it, and their paths must stay short.
    temporary = tmp_path_factory.mktemp("r")
    token = temporary / "token"
    token.write_text("f" * 64)
    ports = [free_port() for _ in range(4)]
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": f"/tmp/lf{os.getpid()}",
        # `python` of a job is that of the node it runs on.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [
        str(Path(sys.executable).with_name("ray")),
        *("start", "--head", "--block", "--num-cpus=2", f"--port={ports[0]}"),
        *(f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"),
        # Its usual port is taken where another Ray runs on this machine, and then no job is taken.
        f"--dashboard-agent-listen-port={ports[3]}",
    ]
    with open(temporary / "head.log", "w") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            start_new_session=True,
            stdout=log,
            stderr=log,
        )
        yield environment | {
            "RAY_ADDRESS": f"127.0.0.1:{ports[0]}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[1]}",
        }
        kill_session(process.pid)
        process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Client:
    """`ray job` in a folder of its own, with nothing of this repository on its path."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self._environment = {**os.environ, **environment}
        self._environment.pop("PYTHONPATH", None)
        self.folder = folder

    def call(self, *words: object, **changed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).with_name("ray")), "job", *map(str, words)],
            cwd=self.folder,
            env={**self._environment, **changed},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 200
        while not done():
            assert time.monotonic() < deadline, self.call("list").stdout
            time.sleep(0.2)


def installed_wheel(folder: Path) -> Path:
    """Where a wheel of this repository was installed, and nothing else."""
    source = folder / "source"
    for name in ("leafnet", "jobs"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(source)])
    if "No matching distribution found for setuptools" in built.stderr:
        leave_out("a wheel cannot be built without setuptools from a package index")
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    target = folder / "installed"
    done = run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)])
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.ray
@pytest.mark.slow
def test_submitted_to_a_cluster_with_a_token(
    head_node: dict[str, str], data_set: ShardIndex, tmp_path: Path
) -> None:
    """From the repository, stopped, from another folder, and with an installed wheel instead."""
    client = Client(head_node, ROOT)
    client.until(lambda: client.call("list").returncode == 0)
    assert client.call("list", RAY_AUTH_TOKEN="0" * 64).returncode != 0

    flags = ["--shards", data_set.root, "--out", tmp_path, "--name", "a", *TINY, "--workers", 2]
    flags += ["--head.epochs", 160, "--checkpoint.every_seconds", 0]
    entry = ["--", "python", "jobs/train.py", *flags]
    submit = ["submit", "--no-wait", "--submission-id", "first", "--working-dir", "."]
    # It answers before it can take a job.
    client.until(lambda: "No available agent" not in client.call(*submit, *entry).stderr)
    counted = tmp_path / "a/head/checkpoint_manager_snapshot.json"
    client.until(lambda: counted.exists() and "checkpoint_0" in counted.read_text())
    stopped = client.call("stop", "first")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "was stopped" in stopped.stdout
    assert not (tmp_path / "a/metrics.json").exists()

    client.folder = tmp_path
    done = client.call("submit", "--working-dir", ROOT, *entry)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goes on where it stopped" in done.stdout
    assert "epoch   1/160" not in done.stdout
    # It may have been stopped after its last epoch, and then has none to tell any more.
    assert len((tmp_path / "a/history.csv").read_text().splitlines()) == 1 + 160
    scores = json.loads((tmp_path / "a/metrics.json").read_text())
    assert scores["train"]["examples"] == data_set.examples("train")

    target = installed_wheel(tmp_path / "wheel")
    environment = json.dumps({"env_vars": {"PYTHONPATH": str(target)}})
    evaluate = (
        f"python -P -m leafnet.jobs.evaluate --model {tmp_path}/a/model --shards {data_set.root}"
    )
    where = "python -P -c 'import leafnet; print(leafnet.__file__)'"
    submit = ["submit", "--runtime-env-json", environment]
    done = client.call(*submit, "--", "sh", "-c", f"{where} && {evaluate}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(target / "leafnet/__init__.py") in done.stdout
    assert f"test        {scores['test']['examples']}" in done.stdout
