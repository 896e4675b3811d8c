"""Each check on a machine that has what it looks for, and on one that has not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from packaging.requirements import Requirement

from leafnet import doctor
from leafnet.core import hardware
from leafnet.core.hardware import Gpu
from leafnet.core.settings import DoctorSettings
from leafnet.doctor import FAULT, OK, WARNING
from leafnet.models import weights

JOB = Path(__file__).parents[1] / "jobs" / "doctor.py"
H100 = Gpu("NVIDIA H100", "9.0", 80_000_000_000, "570.1")
T4 = Gpu("Tesla T4", "7.5", 16_000_000_000, "570.1")


def here(**changes: Any) -> hardware.Machine:
    return hardware.look()._replace(**changes)


def test_python() -> None:
    assert doctor.python("3.12.4", ">=3.11,<3.14").status == OK
    assert doctor.python("3.14.0", ">=3.11,<3.14").status == FAULT


def test_what_pyproject_asks_for_is_what_is_here() -> None:
    wanted = doctor.requirements()
    assert {one.name for one in wanted.packages} >= {"tensorflow", "keras", "ray"}
    assert "dev" not in wanted.extras
    (check,) = doctor.packages(wanted.packages)
    assert (check.status, check.name) == (OK, "packages")
    assert "keras 3." in check.found


@pytest.mark.parametrize(
    ("requirement", "told"),
    [
        ("no-such-thing-at-all>=1", "no-such-thing-at-all is not installed"),
        ("numpy<1", "numpy is "),
    ],
)
def test_a_package_that_is_not_as_it_should_be(requirement: str, told: str) -> None:
    good, bad = Requirement("pyarrow>=24"), Requirement(requirement)
    (check,) = doctor.packages([good, bad])
    assert check.status == FAULT
    assert check.found.startswith(told)
    assert "pip install" in check.remedy
    (extra,) = doctor.extras({"heif": [bad]}, gpu=False)
    assert (extra.status, extra.name) == (WARNING, "[heif]")
    assert "HEIC" in extra.remedy


def test_the_extra_of_gpus_is_for_who_has_one() -> None:
    wanted = {"gpu": [Requirement("no-such-thing-at-all")]}
    assert doctor.extras(wanted, gpu=False) == []
    (check,) = doctor.extras(wanted, gpu=True)
    assert check.status == FAULT


def test_precision_and_why() -> None:
    assert doctor.precision(here(), gpus=[H100]).found.startswith("bfloat16: GPU of compute cap")
    check = doctor.precision(here(), gpus=[H100, T4])
    assert check.status == WARNING
    assert check.found.startswith("float32: GPU of compute capability 7.5 lacks")


def test_gpus() -> None:
    assert doctor.gpu("auto", here(gpus=())).status == OK
    assert doctor.gpu(True, here(gpus=())).status == FAULT
    check = doctor.gpu("auto", here(gpus=(H100,)))
    assert "NVIDIA H100 (80 GB, compute capability 9.0); driver 570.1" in check.found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"memory": 32e9, "memory_free": 20e9, "shm": 16e9}, (OK, OK)),
        ({"memory": 8e9, "memory_free": 4e9, "shm": 64e6}, (WARNING, WARNING)),
        ({"memory": 4e9, "memory_free": 1e9, "shm": 0}, (FAULT, WARNING)),
    ],
)
def test_memory(changes: dict[str, float], expected: tuple[str, str]) -> None:
    machine_here = here(**{name: int(value) for name, value in changes.items()})
    checks = doctor.memory(machine_here), doctor.shm(machine_here)
    assert tuple(check.status for check in checks) == expected
    assert all(check.remedy for check in checks if check.status != OK)


def test_the_token(tmp_path: Path) -> None:
    assert doctor.token({}, tmp_path).status == OK
    assert doctor.token({"RAY_AUTH_MODE": "token"}, tmp_path).status == FAULT
    assert doctor.token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "no")}, tmp_path).status == FAULT
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("verysecret")
    check = doctor.token({}, tmp_path)
    assert (check.status, check.remedy) == (WARNING, "export RAY_AUTH_MODE=token for both")
    assert doctor.token({"RAY_AUTH_MODE": "token"}, tmp_path).status == OK
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "verysecret"}
    check = doctor.token(environment, tmp_path / "nobody")
    assert check.status == OK
    assert "verysecret" not in str(check)


@pytest.mark.parametrize(
    ("found", "gpu", "status"),
    [
        ({"keras": "3.15.1", "backend": "tensorflow", "gpus": 0}, False, OK),
        ({"keras": "3.15.1", "backend": "tensorflow", "gpus": 0}, True, FAULT),
        ({"keras": "3.15.1", "backend": "jax", "gpus": 0}, False, FAULT),
        ({"keras": "2.15.0", "backend": "tensorflow", "gpus": 1}, True, FAULT),
    ],
)
def test_keras(found: dict[str, Any], gpu: bool, status: str) -> None:
    assert doctor.keras_flavour(found, gpu=gpu).status == status


def test_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    settings = DoctorSettings.model_validate({"ray": {"address": "127.0.0.1:1"}})
    (check,) = doctor.workers(settings, gpus=0)
    assert check.status == FAULT
    assert "no Ray cluster answers at 127.0.0.1:1" in check.found


def test_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert doctor.weights().status == WARNING
    path = weights.imagenet_path()
    path.parent.mkdir()
    path.write_bytes(b"half of it")
    assert doctor.weights().status == FAULT


def test_rights(tmp_path: Path) -> None:
    assert doctor.rights(str(tmp_path / "new")).status == OK
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    check = doctor.rights(str(tmp_path / "file"))
    assert check.status == FAULT
    assert check.found.startswith("[cannot-write] cannot write to ")


@pytest.mark.slow
def test_the_job(tmp_path: Path) -> None:
    """With a Ray of its own; the weights are wrong, and everything else is as the tests need it."""
    environment = {**os.environ, "KERAS_HOME": str(tmp_path), "KERAS_BACKEND": "tensorflow"}
    backbone_file = tmp_path / "models" / weights.imagenet_path().name
    backbone_file.parent.mkdir()
    backbone_file.write_bytes(b"half of it")
    command = [sys.executable, str(JOB), "--storage", str(tmp_path / "new"), "--ray.cpus", "1"]
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, env=environment, timeout=200
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    checks = {line["name"]: line for line in lines if line["event"] == "check"}
    assert done.returncode == 2, done.stdout + done.stderr
    assert checks["weights"]["status"] == FAULT
    assert checks["Ray"]["status"] == OK
    assert checks["Keras"]["found"].endswith(" on tensorflow in a Ray worker")
    assert checks["storage"]["status"] == OK
    assert not (tmp_path / "new").exists()
    assert lines[-1]["event"] == "result"
    assert (lines[-1]["exit_code"], lines[-1]["error"]) == (2, "faults")
    assert "weights" in done.stderr
