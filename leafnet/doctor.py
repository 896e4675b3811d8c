"""What jobs/doctor.py does: one check after the other, each with its result and the remedy."""

import os
import platform
import shutil
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.exceptions
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import leafnet
from leafnet.core import hardware, storage, terminal
from leafnet.core.errors import UserError
from leafnet.core.hardware import Machine
from leafnet.core.settings import DoctorSettings
from leafnet.core.terminal import say
from leafnet.distributed import session
from leafnet.models.weights import imagenet_path, is_imagenet

OK, WARNING, FAULT = "ok", "warning", "fault"

_PATIENCE_S = 120.0  # for a worker to import Keras
# Below these the jobs are known to fail, or to be near it [bytes].
_MEMORY_FAULT, _MEMORY_WARNING = 2_000_000_000, 6_000_000_000
_DISK_FAULT, _DISK_WARNING = 1_000_000_000, 10_000_000_000
_SHM_SHARE = 0.3  # of the memory: Ray's object store, as it chooses by itself
_FULL = 0.95  # from here on Ray writes nothing more to a disk

# What an extra is for; an extra that is not here is told by its name alone.
_EXTRAS = {
    "heif": "HEIC photographs of phones",
    "openvino": "faster scoring on CPUs, and --int8",
    "aws": "machines started by `ray up` on AWS",
    "gpu": "TensorFlow on this machine's GPU",
}


class Check(NamedTuple):
    """The result of one check."""

    status: str  # OK, WARNING or FAULT
    name: str
    found: str
    remedy: str = ""


class Requirements(NamedTuple):
    """What pyproject.toml asks for."""

    python: str
    packages: tuple[Requirement, ...]
    extras: dict[str, tuple[Requirement, ...]]


def run(settings: DoctorSettings) -> None:
    """Check everything and print it.

    Raises:
        UserError: there is a fault; exit code 2.
    """
    terminal.keeps("nothing was changed")
    say("checking this machine, and a Ray worker on it: some seconds")
    here = hardware.look()
    wanted = requirements()
    gpus = here.gpus if settings.gpu else ()
    checks = [
        python(platform.python_version(), wanted.python),
        *packages(wanted.packages),
        *extras(wanted.extras, gpu=bool(gpus)),
        processor(here),
        precision(here, gpus=gpus),
        gpu(settings.gpu, here),
        memory(here),
        shm(here),
        disk(here),
        token(os.environ, Path.home()),
        *workers(settings, gpus=len(gpus)),
        weights(),
    ]
    if settings.storage is not None:
        checks.append(rights(settings.storage))
    terminal.checklist(checks)
    faults = [check.name for check in checks if check.status == FAULT]
    warnings = sum(check.status == WARNING for check in checks)
    if faults:
        raise UserError(
            "faults", f"{len(faults)} of {len(checks)} checks found a fault: {', '.join(faults)}"
        )
    say(f"no fault, {warnings} warning{'s' * (warnings != 1)}")


def requirements() -> Requirements:
    """Those of the pyproject.toml beside the package, or of the installed distribution."""
    path = Path(leafnet.__file__).parents[1] / "pyproject.toml"
    if path.exists():
        project = tomllib.loads(path.read_text())["project"]
        texts: Sequence[str] = project["dependencies"]
        return Requirements(
            project["requires-python"],
            tuple(map(Requirement, texts)),
            {
                extra: tuple(map(Requirement, of_extra))
                for extra, of_extra in project["optional-dependencies"].items()
                if extra != "dev"
            },
        )
    about = metadata.metadata("leafnet")
    every = [Requirement(text) for text in metadata.requires("leafnet") or ()]
    names = [name for name in about.get_all("Provides-Extra") or () if name != "dev"]
    return Requirements(
        about["Requires-Python"],
        tuple(one for one in every if one.marker is None or one.marker.evaluate({"extra": ""})),
        {
            name: tuple(
                one
                for one in every
                if one.marker is not None
                and one.marker.evaluate({"extra": name})
                and not one.marker.evaluate({"extra": ""})
            )
            for name in names
        },
    )


# Software


def python(version: str, wanted: str) -> Check:
    """Whether Python's version is in the range."""
    found = f"{version}, wanted is {wanted}"
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Check(OK, "Python", found)
    return Check(FAULT, "Python", found, "make the virtual environment with another Python")


def packages(wanted: Sequence[Requirement]) -> list[Check]:
    """One check for all that is as it should be, and one for each package that is not."""
    wrong = [told for one in wanted if (told := _wrong(one))]
    remedy = "pip install --constraint constraints.txt --editable ."
    checks = [Check(FAULT, "packages", told, remedy) for told in wrong]
    shown = ("tensorflow", "keras", "ray")
    versions = ", ".join(f"{name} {version}" for name, version in hardware.versions(shown).items())
    if not wrong:
        checks.append(Check(OK, "packages", f"all {len(wanted)} in range: {versions}"))
    return checks


def _wrong(wanted: Requirement, *, deep: bool = True) -> str:
    """What is wrong with an installed package and its own extras; empty: nothing."""
    version = hardware.versions([wanted.name])[wanted.name]
    if not version:
        return f"{wanted.name} is not installed"
    if not wanted.specifier.contains(version, prereleases=True):
        return f"{wanted.name} is {version}, wanted is {wanted.specifier}"
    for extra in sorted(wanted.extras if deep else ()):
        for text in metadata.requires(wanted.name) or ():
            one = Requirement(text)
            if one.marker is None or not one.marker.evaluate({"extra": extra}):
                continue
            if not one.marker.evaluate({"extra": ""}) and (told := _wrong(one, deep=False)):
                return f"{told}, which {wanted.name}[{extra}] needs"
    return ""


def extras(wanted: Mapping[str, Sequence[Requirement]], *, gpu: bool) -> list[Check]:
    """One check for each extra; that of GPUs only where there are some."""
    checks = []
    for name, of_extra in wanted.items():
        if name == "gpu" and not gpu:
            continue
        use = _EXTRAS.get(name, f"the extra {name}")
        wrong = [told for one in of_extra if (told := _wrong(one))]
        if wrong:
            status = FAULT if name == "gpu" else WARNING
            remedy = f"for {use}: pip install 'leafnet[{name}]'"
            checks.append(Check(status, f"[{name}]", "; ".join(wrong), remedy))
            continue
        versions = hardware.versions([one.name for one in of_extra])
        told = ", ".join(f"{package} {version}" for package, version in versions.items())
        checks.append(Check(OK, f"[{name}]", f"{told}: {use}"))
    return checks


# The machine


def processor(here: Machine) -> Check:
    """What the processor is able to."""
    abilities = ", ".join(here.abilities) or "none of the fast instructions"
    return Check(OK, "processor", f"{here.processor}, {here.cores} cores; {abilities}")


def precision(here: Machine, *, gpus: Sequence[hardware.Gpu]) -> Check:
    """What `--precision auto` will choose, and why."""
    capability = None
    if gpus:
        major, minor = min(gpu.compute_capability for gpu in gpus).split(".")
        capability = (int(major), int(minor))
    chosen, why = hardware.choose_precision("auto", compute_capability=capability)
    found = f"{chosen}: {why}"
    if chosen == "float32":
        remedy = "nothing is wrong; a processor with avx512_bf16 or amx_bf16 is twice as fast"
        return Check(WARNING, "precision", found, remedy)
    if not gpus:
        found += "; the first job measures whether it is faster here, and which engine is"
    return Check(OK, "precision", found)


def gpu(wanted: bool | str, here: Machine) -> Check:
    """The GPUs that nvidia-smi sees."""
    if here.gpus:
        told = ", ".join(
            f"{one.name} ({one.memory / 1e9:.0f} GB, compute capability {one.compute_capability})"
            for one in here.gpus
        )
        return Check(OK, "GPUs", f"{told}; driver {here.gpus[0].driver}")
    if wanted is True:
        return Check(FAULT, "GPUs", "nvidia-smi sees none", "install the driver, or --gpu auto")
    return Check(OK, "GPUs", "none; the jobs run on CPUs")


def memory(here: Machine) -> Check:
    """What is free of the memory."""
    found = f"{_gb(here.memory_free)} of {_gb(here.memory)} free"
    remedy = "end what else runs here, or take a larger machine"
    if here.memory_free < _MEMORY_FAULT:
        return Check(FAULT, "memory", found, remedy)
    return (
        Check(WARNING, "memory", found, remedy)
        if here.memory_free < _MEMORY_WARNING
        else (Check(OK, "memory", found))
    )


def shm(here: Machine) -> Check:
    """Whether Ray's object store fits where Linux keeps shared memory."""
    found = f"/dev/shm has {_gb(here.shm)}"
    if here.shm < _SHM_SHARE * here.memory:
        least = f"{_SHM_SHARE * here.memory / 1e9:.0f}g"
        remedy = f"docker run --shm-size={least}; without, Ray keeps its objects on the disk"
        return Check(WARNING, "shared memory", found, remedy)
    return Check(OK, "shared memory", found)


def disk(here: Machine) -> Check:
    """What is free where Ray and the jobs keep temporary files."""
    folder = os.environ.get("RAY_TMPDIR", here.folder)
    total, _, free = shutil.disk_usage(folder if os.path.isdir(folder) else here.folder)
    found = f"{_gb(free)} of {_gb(total)} free in {folder}"
    remedy = "make room, or set TMPDIR and RAY_TMPDIR to a larger disk"
    if free < _DISK_FAULT:
        return Check(FAULT, "disk", found, remedy)
    if free < _DISK_WARNING or free < (1 - _FULL) * total:
        return Check(WARNING, "disk", found, remedy)
    return Check(OK, "disk", found)


# Ray


def token(environment: Mapping[str, str], home: Path) -> Check:
    """Whether Ray asks for a token, and has one. What it is stays untold."""
    mode = environment.get("RAY_AUTH_MODE")
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else home / ".ray" / "auth_token"
    place = "RAY_AUTH_TOKEN" if environment.get("RAY_AUTH_TOKEN") else str(path)
    there = bool(environment.get("RAY_AUTH_TOKEN")) or path.is_file()
    if mode == "token":
        if there:
            return Check(OK, "Ray token", f"RAY_AUTH_MODE is token, and it is in {place}")
        return Check(
            FAULT,
            "Ray token",
            f"RAY_AUTH_MODE is token, and there is none in {place}",
            "ray get-auth-token --generate, or name the cluster's in RAY_AUTH_TOKEN_PATH",
        )
    if named and not there:
        return Check(
            FAULT,
            "Ray token",
            f"RAY_AUTH_TOKEN_PATH names {path}, which is not there",
            "correct it, or unset it",
        )
    if there:
        return Check(
            WARNING,
            "Ray token",
            f"there is one in {place}, and RAY_AUTH_MODE is not set: `ray start` asks for it, and "
            "`ray job submit` does not send it (401)",
            "export RAY_AUTH_MODE=token for both",
        )
    return Check(OK, "Ray token", "none, and none is asked for")


def workers(settings: DoctorSettings, *, gpus: int) -> list[Check]:
    """Whether Ray starts or answers, what its nodes are, and which Keras a worker has."""
    address = settings.ray.address or os.environ.get("RAY_ADDRESS")
    folder = Path(tempfile.mkdtemp(prefix="leafnet-"))
    log = folder / "doctor.log"
    try:
        with terminal.chatter_to(log), session.session(settings.ray) as nodes:
            place = f"a cluster at {address}" if address else "a local one, no RAY_ADDRESS"
            cpus = sum(node.cpus for node in nodes)
            found = f"{place}: {len(nodes)} node{'s' * (len(nodes) > 1)}, {cpus:g} CPUs"
            checks = [Check(OK, "Ray", found)]
            if len(nodes) > 1:
                checks.append(_nodes(session.on_every_node(hardware.look)))
            task = ray.remote(num_cpus=0, num_gpus=1 if gpus else 0, max_calls=1)(_in_worker)
            flavour: dict[str, Any] = ray.get(task.remote(), timeout=_PATIENCE_S)
            checks.append(keras_flavour(flavour, gpu=gpus > 0))
    except UserError as error:
        shutil.rmtree(folder, ignore_errors=True)
        return [Check(FAULT, "Ray", str(error), "see above; unset RAY_ADDRESS for a local Ray")]
    except ray.exceptions.GetTimeoutError:
        found = f"a task did not start and import Keras within {_PATIENCE_S:.0f} s"
        return [Check(FAULT, "Ray", found, "look at the cluster with: ray status")]
    # Whatever a broken installation does: it is what the doctor is asked about.
    except Exception as error:
        lines = str(error).strip().splitlines()
        found = f"{type(error).__name__}: {lines[-1] if lines else ''}"
        return [Check(FAULT, "Ray", found, f"the details are in {log}")]
    shutil.rmtree(folder, ignore_errors=True)
    return checks


def _nodes(found: Mapping[str, Machine]) -> Check:
    lines = hardware.differing({name: node.versions for name, node in found.items()})
    if lines:
        return Check(FAULT, "nodes", "; ".join(lines), "install constraints.txt on all of them")
    return Check(OK, "nodes", f"the same versions on all {len(found)}")


def _in_worker() -> dict[str, Any]:
    import keras
    import tensorflow as tf

    return {
        "keras": keras.__version__,
        "backend": keras.config.backend(),
        "gpus": len(tf.config.list_physical_devices("GPU")),
    }


def keras_flavour(found: Mapping[str, Any], *, gpu: bool) -> Check:
    """Keras as a worker sees it: 3, on TensorFlow, with the GPU where there is one."""
    told = f"Keras {found['keras']} on {found['backend']} in a Ray worker"
    if int(found["keras"].split(".")[0]) < 3:
        return Check(FAULT, "Keras", told, "pip install --constraint constraints.txt keras")
    if found["backend"] != "tensorflow":
        return Check(
            FAULT, "Keras", told, "unset KERAS_BACKEND, and remove backend from ~/.keras/keras.json"
        )
    if gpu and not found["gpus"]:
        return Check(
            FAULT,
            "Keras",
            f"{told}, which sees no GPU",
            "pip install 'leafnet[gpu]', or --gpu false",
        )
    return Check(OK, "Keras", told)


# What the jobs read and write


def weights() -> Check:
    """Whether the ImageNet weights are in Keras's cache."""
    path = imagenet_path()
    if not path.exists():
        return Check(
            WARNING,
            "weights",
            f"the ImageNet weights are not in {path.parent}; the first job downloads 95 MB",
            f"where it cannot, copy {path.name} there, or give --weights FILE",
        )
    if not is_imagenet(path.read_bytes()):
        return Check(FAULT, "weights", f"{path} is damaged", "delete it; the next job downloads it")
    return Check(OK, "weights", f"the ImageNet weights are in {path}")


def rights(url: str) -> Check:
    """Whether a file below `url` can be written, read, listed and deleted."""
    try:
        storage.try_rights(url)
    except UserError as error:
        return Check(FAULT, "storage", f"[{error.reason}] {error}", "see the message")
    return Check(OK, "storage", f"wrote, read, listed and deleted a file below {url}")


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
