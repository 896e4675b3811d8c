"""Write what a version stores, small and drawn, for tests/test_earlier_version.py.

    git worktree add ../leafnet-0.1 30e59ea
    PYTHONPATH=../leafnet-0.1 python tests/earlier/make.py ../leafnet-0.1 tests/earlier/0.1

This takes two minutes on two cores. Only command lines of jobs are used, no module of leafnet, so
that the script works for other versions as well. What is left out: logs, pictures and pages, which
no job reads, and a checkpoint of fine-tuning, whose arrays are the weights of a stage (tens of MB).
The backbone's weights are a pattern that xz packs from 94 MB into less than 100 kB.
"""

import io
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

CLASSES = ("blight", "healthy", "rust")
_COLOURS = {"blight": (90, 70, 40), "healthy": (60, 150, 60), "rust": (180, 90, 30)}
WORK = Path("/tmp/leafnet-earlier")  # stored documents name the folders of their job
BUCKET = "leafnet-earlier"
WEIGHTS = "pattern.weights.h5"  # in the folder that the job is started in
FINISHED, LISTED = 4, 40  # photographs of the finished night, and with those of the half one
TRAIN = {
    "name": "leaves",
    "image_size": 32,
    "precision": "float32",
    "views": 2,
    "workers": 1,
    "explain": False,
    "head": {"units": [2], "epochs": 20, "batch_size": 4, "learning_rate": 0.01},
    "checkpoint": {"every_steps": 2, "keep": 1},
}
SCORE = {"precision": "float32", "engine": "tensorflow", "batch_size": 2, "keep_every": 0}


def leaf(label: str, seed: int) -> bytes:
    """A leaf of 32 pixels, as a JPEG file."""
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(150, 250, (32, 32, 3), np.uint8))
    left, top, right, bottom = (int(value) for value in rng.integers(0, 10, 4))
    box = (left, top, 31 - right, 31 - bottom)
    colour = tuple(int(value + rng.integers(-20, 20)) for value in _COLOURS[label])
    ImageDraw.Draw(picture).ellipse(box, fill=colour)
    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=85)
    return sink.getvalue()


def write_weights(path: Path) -> None:
    """Weights of a ResNet50 whose kernels have one tap for each output channel."""
    import keras

    model = keras.applications.ResNet50(include_top=False, weights=None, input_shape=(32, 32, 3))
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            kernel, bias = layer.get_weights()
            layer.set_weights([_pattern(kernel.shape), np.zeros_like(bias)])
    model.save_weights(path)


def _pattern(shape: tuple[int, ...]) -> NDArray[np.float32]:
    height, width, inputs, outputs = shape
    kernel = np.zeros(shape, np.float32)
    j = np.arange(outputs)
    kernel[j % height, j // 3 % width, j % inputs, j] = (0.25 + 0.5 * (j * 7 % 16) / 16) * (
        1 - 2 * (j % 5 == 0)
    )
    return kernel


def words(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings as a command line has them."""
    line = []
    for name, value in settings.items():
        if isinstance(value, dict):
            line += words(value, f"{prefix}{name}.")
        else:
            told = ",".join(map(str, value)) if isinstance(value, list) else str(value).lower()
            line.append(f"--{prefix}{name}={told}")
    return line


class Job:
    """A job of the version, in a process group of its own."""

    def __init__(self, script: Path, **settings: Any) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
        self.process = subprocess.Popen(
            [sys.executable, script, *words(settings)],
            cwd=WORK,
            env=environment,
            start_new_session=True,
        )

    def end(self) -> None:
        """Wait for its end, which is a good one."""
        if code := self.process.wait():
            raise SystemExit(f"a job ended with code {code}")

    def kill_when(self, ready: Callable[[], bool]) -> None:
        """Kill it without warning once it is `ready`."""
        while not ready():
            if self.process.poll() is not None:
                raise SystemExit("a job ended before it was killed")
            time.sleep(0.01)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def make(checkout: Path, out: Path) -> None:
    """Run the jobs of the version in `checkout`, and keep what they stored in `out`."""
    jobs = checkout / "jobs"
    for folder in (WORK, out):
        shutil.rmtree(folder, ignore_errors=True)
    for number, label in enumerate(CLASSES * 7):
        place = WORK / "photographs" / label / f"{number:02d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(leaf(label, number))
    shards, runs, registry = WORK / "shards", WORK / "runs", WORK / "registry"
    write_weights(WORK / WEIGHTS)
    source = WORK / "photographs"
    Job(jobs / "prepare.py", source=source, out=shards, split="60/20/20", row_group=6).end()

    train = TRAIN | {"shards": shards, "out": runs, "weights": WEIGHTS}
    saved = "leaves/head/checkpoint_*/manifest.json"
    Job(jobs / "train.py", **train).kill_when(
        lambda: any(int(path.parent.name.split("_")[1]) > 5 for path in runs.glob(saved))
    )
    time.sleep(5)  # its Ray ends after it
    shutil.copytree(shards, out / "shards", ignore=_left_out)
    shutil.copytree(runs / "features", out / "features")
    shutil.copytree(runs / "leaves", out / "interrupted", ignore=_left_out)
    Job(jobs / "train.py", **train).end()
    shutil.copytree(runs / "leaves", out / "finished", ignore=_left_out)
    model = runs / "leaves" / "model"
    judged = {"candidate": model, "shards": shards, "min_recall": 0, "precision": "float32"}
    Job(jobs / "promote.py", registry=registry, **judged).end()
    shutil.copytree(registry, out / "registry", ignore=_left_out)
    (file,) = registry.rglob("*.weights.h5")
    (out / "weights.xz").write_bytes(lzma.compress(file.read_bytes(), preset=9))
    _nights(jobs / "score.py", registry / "champion", out / "night")


def _nights(script: Path, model: Path, out: Path) -> None:
    """A finished night, and one that is killed, in a bucket: its URLs are the same anywhere."""
    import boto3  # type: ignore[import-untyped]
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
    }
    bucket = boto3.resource("s3").create_bucket(Bucket=BUCKET)
    url = f"s3://{BUCKET}"
    score = SCORE | {"model": model, "images": f"{url}/images", "out": f"{url}/night"}
    photographs = [leaf(CLASSES[number % 3], 100 + number) for number in range(LISTED)]
    for number, photograph in enumerate(photographs):
        if number == FINISHED:
            Job(script, **score, date="2026-11-28").end()
        bucket.put_object(Key=f"images/{number:02d}.jpg", Body=photograph)
    job = Job(script, **score, date="2026-11-29")
    parts = "night/_staging/"
    job.kill_when(lambda: sum("part-" in o.key for o in bucket.objects.filter(Prefix=parts)) > 1)
    time.sleep(5)
    for stored in bucket.objects.all():
        if not _left_out("", [stored.key]):
            place = out / stored.key
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(stored.get()["Body"].read())
    server.stop()


def _left_out(folder: str, names: list[str]) -> set[str]:
    """What no job reads, and weights that are in the registry as well."""
    return {name for name in names if name.endswith((".log", ".png", ".html", ".weights.h5"))}


if __name__ == "__main__":
    make(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute())
