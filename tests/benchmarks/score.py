"""jobs/score.py against the bare forward loop and against stock Keras, and its peak memory.

    python -m tests.benchmarks.score                         # 5,000 drawn photographs, 256 pixels
    python -m tests.benchmarks.score --images DIR --model runs/potato/model
    python -m tests.benchmarks.score --photographs 300 --megapixels 12 --names 4
    python -m tests.benchmarks.score --memory 2000,20000     # MiB of the whole process tree

Every part runs in a process of its own, one after the other: leave the machine alone meanwhile.
Targets: steady state 85 % of the bare loop of the same engine; the whole job, with its start, 1.8
times stock Keras in TensorFlow's bfloat16 and 3 times in int8; with 12 megapixels the steady state
1.6 and 2.2 times, and the same label as after full decoding on 99 %; 20,000 photographs within
10 % of the memory of 2,000.
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
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
from PIL import Image

from leafnet.data import synthetic
from leafnet.models import bundle, engine, openvino, weights
from leafnet.models.classifier import head_logits, initial_head
from tests.benchmarks.rows import process_tree, pss_mib

JOB = Path(__file__).parents[2] / "jobs" / "score.py"
BATCH = 32
ENGINES = [("tensorflow", "bfloat16"), ("openvino", "bfloat16"), ("openvino", "int8")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--photographs", type=int, default=5000)
    parser.add_argument("--megapixels", type=float, help="enlarge them, with a sensor's noise")
    parser.add_argument("--names", type=int, default=1, help="of each of the enlarged ones")
    parser.add_argument("--work", type=Path, help="keeps the photographs; temporary if none")
    parser.add_argument("--memory", help="counts of photographs, with commas between them")
    parser.add_argument("--part", choices=["bare", "stock", "full"], help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part == "bare":
        bare(given.model, given.engine, given.precision)
    elif given.part == "stock":
        stock(given.images)
    elif given.part == "full":
        full(given.images, given.model)
    else:
        with tempfile.TemporaryDirectory(prefix="leafnet-bench-") as folder:
            work = given.work or Path(folder)
            if given.memory:
                memory(Path(folder), [int(count) for count in given.memory.split(",")])
            else:
                images = photographs(
                    work, given.images, given.photographs, given.megapixels, given.names
                )
                speed(Path(folder), images, given.model, compare=given.megapixels is not None)


def photographs(
    work: Path, given: Path | None, count: int, megapixels: float | None, names: int
) -> Path:
    """The folder below `work` with what is scored, made if it is not there."""
    images = work / f"images-{count}-{megapixels or 'small'}-{names}"
    if images.exists():
        return images
    partial = work / "partial"
    if megapixels:
        enlarge(given, partial, count, megapixels)
        # Enough of a night for its steady state, without a day of enlarging.
        for i, path in enumerate(sorted(partial.iterdir())):
            for more in range(1, names):
                os.link(path, partial / f"photo_{i + more * count:06d}.jpg")
    elif given:
        repeat(given, partial, count)
    else:
        write_photographs(partial, count)
    return partial.rename(images)


def speed(folder: Path, images: Path, model: str | None, *, compare: bool) -> None:
    model = model or write_model(folder / "model", image_size=256)
    of_stock = part("stock", "--images", images)
    columns = ("bare loop", "steady", "share", "to stock", "whole", "to stock")
    print(" " * 22 + "".join(f"{column:>10}" for column in columns))
    steady, whole = of_stock["steady"], of_stock["whole"]
    print(
        f"{'stock Keras float32':22}{'':10}{steady:10.1f}{'':10}{1:10.2f}{whole:10.1f}{1:10.2f}",
        flush=True,
    )
    with_int8 = bundle.load(model).int8 is not None
    truth = part("full", "--images", images, "--model", model)["labels"] if compare else {}
    for name, precision in ENGINES:
        if precision == "int8" and not with_int8:
            continue
        flags = ["--engine", name, "--precision", precision]
        alone = part("bare", "--model", model, *flags)["rate"]
        out = folder / f"out-{name}-{precision}"
        began = time.perf_counter()
        summary = job(out, images, model, *flags)[0]
        whole = summary["scored"] / (time.perf_counter() - began)
        steady = summary["images_per_second"]["after_the_first_stack"]
        print(
            f"{name + ' ' + precision:22}{alone:10.1f}{steady:10.1f}{steady / alone:10.0%}"
            f"{steady / of_stock['steady']:10.2f}{whole:10.1f}{whole / of_stock['whole']:10.2f}",
            end="",
        )
        if truth:
            same = [truth[Path(row["image"]).name] == row["label"] for row in rows(out)]
            print(f"   same label after full decoding: {np.mean(same):.1%} of {len(same)}", end="")
        print(flush=True)


def rows(out: Path) -> list[dict[str, Any]]:
    """The predictions of a job."""
    table = ds.dataset(out, partitioning="hive", exclude_invalid_files=True).to_table()
    found: list[dict[str, Any]] = table.select(["image", "label"]).to_pylist()
    return found


def memory(folder: Path, counts: list[int]) -> None:
    # Small pictures in the network, so that it takes minutes: what could grow are the lists, the
    # rows and what waits in the object store.
    model = write_model(folder / "model", image_size=64)
    for count in counts:
        images = write_photographs(folder / f"images-{count}", count)
        _, peak = job(folder / f"out-{count}", images, model)
        print(f"{count:9,} photographs   peak {peak:,.0f} MiB (PSS of all processes)", flush=True)


def job(out: Path, images: Path, model: str, *flags: str) -> tuple[dict[str, Any], float]:
    """The summary of a job and its peak memory [MiB]."""
    command = [sys.executable, str(JOB), "--model", model, "--images", str(images), *flags]
    process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL)
    peak = 0.0
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(2):
            peak = max(peak, sum(map(pss_mib, process_tree(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    over.set()
    watcher.join()
    if code:
        raise SystemExit(f"jobs/score.py ended with code {code}")
    (path,) = (out / "_runs").glob("*.json")
    return json.loads(path.read_text()), peak


def part(name: str, *arguments: str | Path) -> dict[str, Any]:
    """What a part prints last, from a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.score", "--part", name]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=os.environ
    )
    if done.returncode:
        raise SystemExit(f"{name} failed\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def bare(model: str, name: str, precision: str) -> None:
    """Images/s of the forward pass alone, on noise that is in memory already."""
    network = open_network(model, name, precision)
    shape = (BATCH, network.image_size, network.image_size, 3)
    pixels = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    for _ in range(3):
        network.features(pixels)
    began, passes = time.perf_counter(), 0
    while passes < 10 or time.perf_counter() - began < 30:
        network.features(pixels)
        passes += 1
    print(json.dumps({"rate": passes * BATCH / (time.perf_counter() - began)}))


def open_network(model: str, name: str, precision: str) -> engine.Engine:
    return engine.open_engine(
        bundle.load(model),
        engine=name,
        precision=precision,
        threads=os.cpu_count() or 1,
        gpu=False,
        batch_size=BATCH,
    )


def full(images: Path, model: str) -> None:
    """The label of each photograph after full decoding by Pillow."""
    loaded = bundle.load(model)
    network = open_network(model, "tensorflow", "float32")
    paths = sorted(images.iterdir())
    labels: dict[str, str] = {}
    size = (loaded.image_size, loaded.image_size)
    for start in range(0, len(paths), BATCH):
        stack = []
        for path in paths[start : start + BATCH]:
            with Image.open(path) as picture:
                small = picture.convert("RGB").resize(size, Image.Resampling.BILINEAR)
            stack.append(np.asarray(small))
        logits = head_logits(loaded.head, network.features(np.stack(stack)))
        for path, best in zip(paths[start:], logits.argmax(1), strict=False):
            labels[path.name] = loaded.class_names[int(best)]
    print(json.dumps({"labels": labels}))


def stock(images: Path) -> None:
    """ResNet50 and a Dense layer with `keras.Model.predict` on the same files."""
    began = time.perf_counter()
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

    paths = sorted(map(str, images.iterdir()))
    dataset = tf.data.Dataset.from_tensor_slices(paths).map(read, tf.data.AUTOTUNE)
    ends: list[float] = []
    keep = keras.callbacks.LambdaCallback()
    keep.on_predict_batch_end = lambda batch, logs=None: ends.append(time.perf_counter())
    model.predict(dataset.batch(BATCH).prefetch(2), verbose=0, callbacks=[keep])
    steady = (len(paths) - BATCH) / (ends[-1] - ends[0])
    # Not to the return of `predict`: it is idle for 45 s after these 280 s (Keras 3.15, TensorFlow
    # 2.21) while the iterator of tf.data ends, and that is no work to be compared with.
    print(json.dumps({"steady": steady, "whole": len(paths) / (ends[-1] - began)}))


def repeat(source: Path, folder: Path, count: int) -> None:
    """`count` names for the photographs below `source`."""
    folder.mkdir(parents=True)
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    for i in range(count):
        os.link(_copied(found[i % len(found)], folder.parent), folder / f"photo_{i:06d}.jpg")


def _copied(path: Path, root: Path) -> Path:
    # Links to one copy each: the source may lie on another disk, where nothing may be written.
    copy = root / "copies" / f"{abs(hash(path))}.jpg"
    if not copy.exists():
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return copy


def enlarge(source: Path | None, folder: Path, count: int, megapixels: float) -> None:
    """`count` photographs as a phone of so many megapixels stores them: with a sensor's noise."""
    folder.mkdir(parents=True)
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    width = round(height * 4 / 3)
    found = sorted(source.rglob("*.jpg")) if source else []
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 6, (height, width, 3)).astype(np.int16)
    for i in range(count):
        if source:
            small = Image.open(found[i * len(found) // count]).convert("RGB")
        else:
            name = synthetic.CLASS_NAMES[i % 3]
            small = Image.fromarray(synthetic.draw_leaf(name, seed=i, width=1000, height=750))
        pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        shift = generator.integers(0, (height, width))
        noisy = np.clip(pixels + np.roll(noise, shift, (0, 1)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"photo_{i:06d}.jpg", quality=90)


def write_photographs(folder: Path, count: int) -> Path:
    """Drawn leaves of 256 x 256 pixels; forty pictures under as many names as are asked for."""
    folder.mkdir(parents=True)
    pictures = []
    for seed in range(40):
        sink = io.BytesIO()
        label = synthetic.CLASS_NAMES[seed % 3]
        Image.fromarray(synthetic.draw_leaf(label, seed=seed)).save(sink, "JPEG", quality=90)
        pictures.append(sink.getvalue())
    for i in range(count):
        (folder / f"leaf_{i:06d}.jpg").write_bytes(pictures[i % len(pictures)])
    return folder


def write_model(folder: Path, *, image_size: int) -> str:
    convolutions = weights.load_weights("random").convolutions
    int8 = None
    if openvino.installed(quantizer=True):
        leaves = [
            np.asarray(
                Image.fromarray(synthetic.draw_leaf(synthetic.CLASS_NAMES[i % 3], seed=i)).resize(
                    (image_size, image_size)
                )
            )
            for i in range(60)
        ]
        int8 = openvino.quantize(openvino.build(convolutions, image_size=image_size), leaves)
    bundle.save(
        str(folder),
        convolutions=convolutions,
        head=initial_head([512], 3, inputs=weights.FEATURES, seed=0),
        class_names=synthetic.CLASS_NAMES,
        image_size=image_size,
        provenance={},
        int8=int8,
    )
    return str(folder)


if __name__ == "__main__":
    main()
