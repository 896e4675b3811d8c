"""How well distances from the training photographs tell photographs of something else.

    python -m tests.benchmarks.novelty --data DIR --weights FILE

DIR holds train, valid and test with a folder for each class. Fitted on train, thresholds at the
99th percentile of valid, test as what should be let through, drawn things as what should be
caught. The first table has the area under the ROC curve of test against each kind, the second the
share of each kind over the threshold (for test: false alarms). Takes 3,600 forward passes.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.metrics import roc_auc_score

from leafnet.data import synthetic
from leafnet.data.images import decode
from leafnet.metrics import novelty
from leafnet.models import engine
from leafnet.models.bundle import Bundle
from leafnet.models.weights import load_weights

Pixels = NDArray[np.uint8]  # [S, S, 3]
Distance = Callable[[NDArray[np.float32]], NDArray[np.floating]]  # [B, D] -> [B]

SIZE = 256
COUNT = 200
WORDS = tuple(
    [
        "the",
        "of",
        "and",
        "to",
        "in",
        "is",
        "that",
        "for",
        "it",
        "as",
        "was",
        "with",
        "be",
        "by",
        "on",
        "not",
        "at",
        "are",
        "this",
    ]
)


# What should be caught


def noise(rng: np.random.Generator, i: int) -> Pixels:
    if i % 3 == 0:
        return rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    if i % 3 == 1:
        drawn = rng.normal(rng.uniform(60, 200, 3), rng.uniform(10, 60), (SIZE, SIZE, 3))
        return np.clip(drawn, 0, 255).astype(np.uint8)
    cells = SIZE // int(rng.integers(4, 64)) + 2
    small = rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
    return np.asarray(cv2.resize(small, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC), np.uint8)


def gradients(rng: np.random.Generator, i: int) -> Pixels:
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    angle, (a, b) = rng.uniform(0, 2 * np.pi), rng.uniform(-0.5, 0.5, 2)
    ramp = 0.5 + (x * np.cos(angle) + y * np.sin(angle)) / 3
    if i % 2:
        ramp = np.hypot(x - a, y - b) / 2
    start, end = rng.uniform(0, 255, (2, 3))
    return np.asarray(start + np.clip(ramp, 0, 1)[..., None] * (end - start), np.uint8)


def text(rng: np.random.Generator, i: int) -> Pixels:
    page = Image.new("RGB", (SIZE, SIZE), colour(rng, 200, 256))
    draw, size = ImageDraw.Draw(page), int(rng.integers(8, 24))
    font, left = ImageFont.load_default(size), int(rng.integers(4, 30))
    for top in range(int(rng.integers(0, 20)), SIZE, int(size * 1.4)):
        if rng.random() > 0.1:
            line = " ".join(rng.choice(WORDS, 40))
            draw.text((left, top), line, font=font, fill=colour(rng, 0, 80))
    return np.asarray(page)


def drawn_leaves(rng: np.random.Generator, i: int) -> Pixels:
    return synthetic.draw_leaf(synthetic.CLASS_NAMES[i % 3], seed=int(rng.integers(1 << 30)))


def photographs(rng: np.random.Generator, i: int) -> Pixels:
    """Parts of a temple, a flower and a person: what scikit-learn and matplotlib come with."""
    import matplotlib
    import sklearn.datasets

    samples = Path(sklearn.datasets.__file__).parent / "images"
    person = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open((samples / "china.jpg", samples / "flower.jpg", person)[i % 3]) as photo:
        side = int(rng.uniform(0.3, 0.9) * min(photo.size))
        left, top = (int(rng.integers(0, length - side)) for length in photo.size)
        part = photo.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(part.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def shapes(rng: np.random.Generator, i: int) -> Pixels:
    picture = Image.new("RGB", (SIZE, SIZE), colour(rng, 0, 256))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(1, 30))):
        x, y, a, b = (int(value) for value in (*rng.integers(0, SIZE, 2), *rng.integers(5, 120, 2)))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x - a, y - b, x + a, y + b), fill=colour(rng, 0, 256))
    return np.asarray(picture)


def covered_lens(rng: np.random.Generator, i: int) -> Pixels:
    level = rng.choice([0, 5, 20, 128, 235, 255]) + rng.normal(0, 4, 3)
    return np.clip(rng.normal(level, rng.uniform(0, 4), (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)


def colour(rng: np.random.Generator, low: int, high: int) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(low, high, 3))
    return red, green, blue


# The same leaves, spoiled: harder


def tiles(rng: np.random.Generator, leaf: Pixels) -> Pixels:
    """The leaf cut in 16 and put together anyhow."""
    part = SIZE // 4
    cut = leaf.reshape(4, part, 4, part, 3).transpose(0, 2, 1, 3, 4).reshape(16, part, part, 3)
    mixed = cut[rng.permutation(16)].reshape(4, 4, part, part, 3)
    return np.ascontiguousarray(mixed.transpose(0, 2, 1, 3, 4).reshape(SIZE, SIZE, 3))


def negatives(rng: np.random.Generator, leaf: Pixels) -> Pixels:
    return 255 - leaf


def blurred(rng: np.random.Generator, leaf: Pixels) -> Pixels:
    return np.asarray(cv2.GaussianBlur(leaf, (0, 0), 12), np.uint8)


def wrong_colours(rng: np.random.Generator, leaf: Pixels) -> Pixels:
    return np.ascontiguousarray(leaf[..., [2, 0, 1]])


DRAWN = (noise, gradients, text, drawn_leaves, photographs, shapes, covered_lens)
SPOILED = (tiles, negatives, blurred, wrong_colours)


# What is compared


def mahalanobis(train: NDArray[np.float32], shrinkage: float) -> Distance:
    """Lee et al. 2018, arXiv:1807.03888, one mean; covariance shrunk towards a multiple of one."""
    mean = train.mean(axis=0)
    covariance = np.cov(train, rowvar=False, bias=True)
    width = len(mean)
    covariance *= 1 - shrinkage
    covariance.flat[:: width + 1] += shrinkage * np.trace(covariance) / width / (1 - shrinkage)
    inverse = np.linalg.inv(covariance)
    return lambda x: np.einsum("nd,nd->n", (x - mean) @ inverse, x - mean)


def relative(train: NDArray[np.float32], labels: NDArray[np.int64], shrinkage: float) -> Distance:
    """Ren et al. 2021, arXiv:2106.09022: the nearest class's distance less that of all."""
    means = np.stack([train[labels == label].mean(axis=0) for label in np.unique(labels)])
    within = mahalanobis(train - means[labels], shrinkage)
    of_all = mahalanobis(train, shrinkage)
    return lambda x: np.min([within(x - mean) for mean in means], axis=0) - of_all(x)


def neighbour(train: NDArray[np.float32], k: int) -> Distance:
    """Sun et al. 2022, arXiv:2204.06507: distance of the k-th nearest, features of length 1."""

    def unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
        scaled: NDArray[np.float32] = x / np.linalg.norm(x, axis=1, keepdims=True)
        return scaled

    bank = unit(train)
    return lambda x: -np.partition(unit(x) @ bank.T, -k, axis=1)[:, -k]


def methods(
    train: NDArray[np.float32], labels: NDArray[np.int64]
) -> Iterator[tuple[str, Distance]]:
    kept = novelty.fit(train)
    yield "leafnet.metrics.novelty", kept.distance

    def compressed(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(np.log1p(x / kept.unit), np.float32)

    plain = mahalanobis(train, 1e-3)
    yield "Mahalanobis", plain
    of_logs = mahalanobis(compressed(train), 1e-3)
    yield "Mahalanobis, compressed", lambda x: of_logs(compressed(x))
    yield "relative Mahalanobis", relative(train, labels, 1e-2)
    for k in (1, 10):
        yield f"neighbour {k}", neighbour(train, k)
    nearest = neighbour(compressed(train), 1)
    yield "neighbour 1, compressed", lambda x: nearest(compressed(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--count", type=int, default=COUNT, help="pictures of each drawn kind")
    parser.add_argument("--features", type=Path, help=".npz to keep the features in")
    arguments = parser.parse_args()
    if arguments.features and arguments.features.exists():
        with np.load(arguments.features, allow_pickle=False) as file:
            found = dict(file)
    else:
        found = compute(arguments.data, arguments.weights, arguments.count)
        if arguments.features:
            np.savez(arguments.features, **found)  # type: ignore[arg-type]
    report(found)


def compute(data: Path, weights: str, count: int) -> dict[str, NDArray[np.float32]]:
    """Features [N, D] of the splits and of each kind; labels of train under `labels`."""
    model = Bundle(
        url="",
        model_id="",
        class_names=(),
        image_size=SIZE,
        convolutions=load_weights(weights).convolutions,
        head=[],
        description={},
    )
    network = engine.open_engine(
        model,
        engine="auto",
        precision="auto",
        threads=os.cpu_count() or 1,
        gpu=False,
        batch_size=32,
    )
    print(f"{network.name} {network.precision}", flush=True)
    found, leaves = {}, []
    for split in ("train", "valid", "test"):
        files = sorted(data.joinpath(split).rglob("*.jpg"))
        leaves = [decode(file.read_bytes(), SIZE).pixels for file in files]
        found[split] = network.features(np.stack(leaves))
        if split == "train":
            _, labels = np.unique([file.parent.name for file in files], return_inverse=True)
            found["labels"] = labels.astype(np.float32)
        print(f"{split}: {len(files)}", flush=True)
    rng = np.random.default_rng(0)
    for draw in DRAWN:
        found[draw.__name__] = network.features(np.stack([draw(rng, i) for i in range(count)]))
        print(draw.__name__, flush=True)
    for spoil in SPOILED:
        found[spoil.__name__] = network.features(np.stack([spoil(rng, leaf) for leaf in leaves]))
        print(spoil.__name__, flush=True)
    return found


def report(found: dict[str, NDArray[np.float32]]) -> None:
    """Print the two tables."""
    kinds = [kind for kind in found if kind not in ("train", "labels", "valid", "test")]
    areas, shares = [], []
    for name, distance in methods(found["train"], found["labels"].astype(np.int64)):
        threshold = np.quantile(distance(found["valid"]), 0.99, method="higher")
        test = distance(found["test"])
        of_kinds = [distance(found[kind]) for kind in kinds]
        area = [
            float(
                roc_auc_score(
                    np.repeat([0, 1], [len(test), len(of_kind)]), np.concatenate([test, of_kind])
                )
            )
            for of_kind in of_kinds
        ]
        share = [float((values > threshold).mean()) for values in (test, *of_kinds)]
        areas.append([name, *(f"{value:.3f}" for value in area), f"{np.mean(area):.3f}"])
        shares.append([name, *(f"{value:.1%}" for value in share)])
        print(f"measured {name}", flush=True)
    for heading, columns, rows in (
        ("AUROC against test", [*kinds, "mean"], areas),
        ("over the threshold", ["test", *kinds], shares),
    ):
        print(f"\n| {heading} | " + " | ".join(columns) + " |")
        print("|---" * (len(columns) + 1) + "|")
        for row in rows:
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
