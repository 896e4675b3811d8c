"""jobs/score.py against the bare forward loop and against stock Keras, and its peak memory.

    python -m tests.benchmarks.score                         # 5,000 drawn photographs, 256 pixels
    python -m tests.benchmarks.score --images DIR --model runs/potato/model
    python -m tests.benchmarks.score --memory 2000,20000     # MiB of the whole process tree

Every part runs in a process of its own, one after the other: leave the machine alone meanwhile.
Targets: steady state 85 % of the bare loop, the whole job 1.8 times stock Keras with its start,
20,000 photographs within 10 % of the memory of 2,000.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from leafnet import backbone, bundle, demo
from leafnet.classifier import initial_head

JOB = Path(__file__).parents[2] / "jobs" / "score.py"
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--photographs", type=int, default=5000)
    parser.add_argument("--memory", help="counts of photographs, with commas between them")
    parser.add_argument("--part", choices=["bare", "stock"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part == "bare":
        bare(given.model)
    elif given.part == "stock":
        stock(given.images)
    else:
        with tempfile.TemporaryDirectory(prefix="leafnet-bench-") as folder:
            if given.memory:
                memory(Path(folder), [int(count) for count in given.memory.split(",")])
            else:
                speed(Path(folder), given.images, given.model, given.photographs)


def speed(folder: Path, images: Path | None, model: str | None, count: int) -> None:
    images = images or write_photographs(folder / "images", count)
    model = model or write_model(folder / "model", image_size=256)
    alone = float(part("bare", "--model", model))
    began = time.perf_counter()
    summary = job(folder / "out", images, model)[0]
    whole = summary["scored"] / (time.perf_counter() - began)
    steady = summary["images_per_second"]["after_the_first_stack"]
    began = time.perf_counter()
    scored = int(part("stock", "--images", str(images)))
    keras = scored / (time.perf_counter() - began)
    print(f"bare forward loop   {alone:7.1f} images/s ({summary['precision']})")
    print(f"steady state        {steady:7.1f} images/s = {100 * steady / alone:.0f} % of it")
    print(f"stock Keras         {keras:7.1f} images/s, with its start")
    print(f"whole job           {whole:7.1f} images/s, with its start = {whole / keras:.2f} times")


def memory(folder: Path, counts: list[int]) -> None:
    # Small pictures in the network, so that it takes minutes: what could grow are the lists, the
    # rows and what waits in the object store.
    model = write_model(folder / "model", image_size=64)
    for count in counts:
        images = write_photographs(folder / f"images-{count}", count)
        _, peak = job(folder / f"out-{count}", images, model)
        print(f"{count:9,} photographs   peak {peak:,.0f} MiB (PSS of all processes)", flush=True)


def job(out: Path, images: Path, model: str) -> tuple[dict, float]:  # type: ignore[type-arg]
    """The summary of a job and its peak memory [MiB]."""
    command = [sys.executable, str(JOB), "--model", model, "--images", str(images)]
    process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL)
    peak = 0.0
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(2):
            peak = max(peak, sum(map(proportional_mib, descendants(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    over.set()
    watcher.join()
    if code:
        raise SystemExit(f"jobs/score.py ended with code {code}")
    (path,) = (out / "_runs").glob("*.json")
    return json.loads(path.read_text()), peak


def descendants(pid: int) -> list[int]:
    children = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # gone meanwhile
            continue
        children[parent].append(int(path.parent.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children[found[-1]]
    return found


def proportional_mib(pid: int) -> float:
    """Its memory, with pages that others share (the object store) counted by parts."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def part(name: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "tests.benchmarks.score", "--part", name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return done.stdout.strip().splitlines()[-1]


def bare(model: str) -> None:
    """Images/s of the forward pass alone, on noise that is in memory already."""
    loaded = bundle.load(model)
    precision, _ = backbone.choose_precision("auto", compute_capability=None)
    network = backbone.build(loaded.convolutions, image_size=loaded.image_size, precision=precision)
    shape = (BATCH, loaded.image_size, loaded.image_size, 3)
    pixels = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    for _ in range(3):
        network.predict_on_batch(pixels)
    began, passes = time.perf_counter(), 0
    while passes < 10 or time.perf_counter() - began < 30:
        network.predict_on_batch(pixels)
        passes += 1
    print(passes * BATCH / (time.perf_counter() - began))


def stock(images: Path) -> None:
    """ResNet50 and a Dense layer with `keras.Model.predict` on the same files."""
    import keras
    import tensorflow as tf

    base = keras.applications.ResNet50(
        include_top=False, weights=None, pooling="avg", input_shape=(256, 256, 3)
    )
    model = keras.Sequential([base, keras.layers.Dense(3, activation="softmax")])

    def read(path: tf.Tensor) -> tf.Tensor:
        pixels = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        pixels = tf.image.resize(pixels, (256, 256))
        return keras.applications.resnet50.preprocess_input(pixels)

    paths = sorted(map(str, images.rglob("*.jpg")))
    dataset = tf.data.Dataset.from_tensor_slices(paths).map(read, tf.data.AUTOTUNE)
    print(len(model.predict(dataset.batch(BATCH).prefetch(2), verbose=0)))


def write_photographs(folder: Path, count: int) -> Path:
    """Drawn leaves of 256 x 256 pixels; forty pictures under as many names as are asked for."""
    folder.mkdir(parents=True)
    pictures = []
    for seed in range(40):
        sink = io.BytesIO()
        label = demo.CLASS_NAMES[seed % 3]
        Image.fromarray(demo.draw_leaf(label, seed=seed)).save(sink, "JPEG", quality=90)
        pictures.append(sink.getvalue())
    for i in range(count):
        (folder / f"leaf_{i:06d}.jpg").write_bytes(pictures[i % len(pictures)])
    return folder


def write_model(folder: Path, *, image_size: int) -> str:
    bundle.save(
        str(folder),
        convolutions=backbone.load_weights("random").convolutions,
        head=initial_head([512], 3, inputs=backbone.FEATURES, seed=0),
        class_names=demo.CLASS_NAMES,
        image_size=image_size,
        provenance={},
    )
    return str(folder)


if __name__ == "__main__":
    main()
