"""What this machine is and has: processor, memory, disk, GPUs, versions. Without Ray and models."""

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("leafnet", "tensorflow", "keras", "ray", "numpy", "pillow", "pyarrow")
# What the processor has to have for bfloat16 and int8 to be fast.
ABILITIES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


class Gpu(NamedTuple):
    """What nvidia-smi says of a GPU."""

    name: str
    compute_capability: str
    memory: int  # bytes
    driver: str


class Machine(NamedTuple):
    """A machine, or the container that this process is in."""

    host: str
    processor: str
    cores: int  # that this process may use
    abilities: tuple[str, ...]  # of ABILITIES
    memory: int  # bytes
    memory_free: int
    shm: int  # bytes of /dev/shm; 0: there is none
    folder: str  # for temporary files
    disk: int  # bytes of its disk
    disk_free: int
    gpus: tuple[Gpu, ...]
    versions: dict[str, str]  # of Python and PACKAGES; empty: not installed


def look() -> Machine:
    """This machine as it is now."""
    memory, free = _memory()
    folder = tempfile.gettempdir()
    disk = shutil.disk_usage(folder)
    shm = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    processor, flags = _processor()
    return Machine(
        host=socket.gethostname(),
        processor=processor,
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        abilities=tuple(flag for flag in ABILITIES if flag in flags),
        memory=memory,
        memory_free=free,
        shm=shm,
        folder=folder,
        disk=disk.total,
        disk_free=disk.free,
        gpus=_gpus(),
        versions={"python": platform.python_version(), **versions(PACKAGES)},
    )


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The installed version of each of `packages`; empty: it is not."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ""
    return found


def differing(versions: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What differs between nodes, a line each.

    >>> differing({"a": {"keras": "3.15.1"}, "b": {"keras": "3.14.0"}})
    ['keras is 3.14.0 on b and 3.15.1 on a']
    """
    lines = []
    for package in next(iter(versions.values())):
        nodes: dict[str, list[str]] = {}
        for node, found in versions.items():
            nodes.setdefault(found[package] or "not installed", []).append(node)
        if len(nodes) > 1:
            told = [f"{version} on {', '.join(names)}" for version, names in sorted(nodes.items())]
            lines.append(f"{package} is {' and '.join(told)}")
    return lines


def _processor() -> tuple[str, frozenset[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.machine(), frozenset()
    values = dict(reversed([line.split(":", 1) for line in lines if ":" in line]))
    fields = {name.strip(): value.strip() for name, value in values.items()}
    return (
        fields.get("model name", platform.machine()),
        frozenset(fields.get("flags", fields.get("Features", "")).split()),
    )


def _memory() -> tuple[int, int]:
    """(total, free) [bytes], of the container where it has a limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    fields = {name: int(value.split()[0]) * 1024 for name, value in (x.split(":") for x in lines)}
    total, free = fields["MemTotal"], fields["MemAvailable"]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            allowed = Path("/sys/fs/cgroup", limit).read_text().strip()
            taken = Path("/sys/fs/cgroup", used).read_text().strip()
        except OSError:
            continue
        if allowed.isdigit() and int(allowed) < total:  # else `max`, or a number without meaning
            total = int(allowed)
            free = min(free, total - int(taken))
    return total, free


def _gpus() -> tuple[Gpu, ...]:
    query = [
        "--query-gpu=name,compute_cap,memory.total,driver_version",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(
            ["nvidia-smi", *query], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    found = []
    for line in done.stdout.splitlines():
        name, capability, mebibytes, driver = (part.strip() for part in line.split(","))
        found.append(Gpu(name, capability, int(mebibytes) * 2**20, driver))
    return tuple(found)


def gpu_precision() -> tuple[str, str]:
    """(precision, why) of the GPUs of this machine: what all of them have."""
    # Not TensorFlow: it would take the GPU's memory to answer.
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    text = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    found = [tuple(map(int, line.strip().split("."))) for line in text.splitlines()]
    major, minor = min(found)
    return choose_precision("auto", compute_capability=(major, minor))


def limit_threads(threads: int, *, gpu: bool) -> None:
    """Set TensorFlow up in this process: as many threads as Ray gave it, GPU memory as needed.

    TensorFlow keeps the number of threads with which it ran its first operation.
    """
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    for device in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(device, True)
    if not gpu:
        tf.config.set_visible_devices([], "GPU")


def choose_precision(wanted: str, *, compute_capability: tuple[int, int] | None) -> tuple[str, str]:
    """(precision, why) on this machine, for `wanted` one of auto, float32, bfloat16.

    Args:
        wanted: a precision that is named is taken.
        compute_capability: of the GPU that is used, or None on a CPU.
    """
    if wanted != "auto":
        return wanted, "as set"
    if compute_capability is not None:
        shown = ".".join(map(str, compute_capability))
        if compute_capability >= (8, 0):
            return "bfloat16", f"GPU of compute capability {shown} has it"
        return "float32", f"GPU of compute capability {shown} lacks bfloat16"
    flag = bfloat16_instructions()
    if flag:
        return "bfloat16", f"the processor has {flag}"
    return "float32", "the processor lacks bfloat16 instructions"


def bfloat16_instructions() -> str:
    """The processor's fastest instructions for bfloat16; "" where it would only imitate it."""
    flags = _processor()[1]
    return next((flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags), "")


def processor() -> str:
    """The name of the processor."""
    return _processor()[0]
