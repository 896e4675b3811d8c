"""How well the shares of a night, its expected accuracy and the verdicts of units hold.

    python -m tests.benchmarks.counts --data DIR --weights FILE

DIR holds train, valid and test with a folder for each class. A head is fitted on train; for each
night, what is held out is parted anew into photographs that calibrate and those that nights are
drawn from: 50 to 500, with shares of each class from 5 to 60 %. The first table has the mean
absolute error of the share beside counted labels, and how often the 95 % interval holds the drawn
share; the second the expected accuracy, also of nights that are blurred, lit otherwise or dark; the
third the verdicts of 200 units of six photographs, resampled within class, some of them copies.
`oracle` knows the true shares: no method does better with these probabilities. Takes 3,900 forward
passes.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from sklearn.linear_model import LogisticRegression

from leafnet.data.images import decode
from leafnet.metrics import drift, novelty, prevalence, thresholds, verdicts
from leafnet.metrics.calibration import fit_temperature
from leafnet.metrics.estimate import expected
from leafnet.metrics.scores import scores, softmax, tally
from leafnet.models import engine
from leafnet.models.bundle import Bundle
from leafnet.models.weights import load_weights

Pixels = NDArray[np.uint8]
Array = NDArray[np.float64]

SIZE = 256

SPOILED: dict[str, Callable[[Pixels], Pixels]] = {
    "as they are": lambda leaf: leaf,
    "blurred": lambda leaf: np.asarray(cv2.GaussianBlur(leaf, (0, 0), 1.5), np.uint8),
    "lit": lambda leaf: np.clip(1.35 * leaf, 0, 255).astype(np.uint8),
    "dark": lambda leaf: (0.6 * leaf).astype(np.uint8),
}


class HeldOut(NamedTuple):
    """What a head says of photographs that it was not fitted on."""

    logits: dict[str, NDArray[np.float32]]  # [N, C] of each way in which they are spoiled
    novelty: dict[str, NDArray[np.float32]]  # [N]
    labels: NDArray[np.int64]  # [N]


def features(data: Path, weights: str) -> dict[str, NDArray[np.float32]]:
    """Features of train, and of valid and test together in each way; labels of both."""
    model = Bundle(
        url="",
        model_id="",
        class_names=(),
        image_size=SIZE,
        convolutions=load_weights(weights).convolutions,
        head=[],
        description={},
    )
    threads = os.cpu_count() or 1
    network = engine.open_engine(
        model, engine="auto", precision="auto", threads=threads, gpu=False, batch_size=32
    )
    found = {}
    for name, splits in (("train", ("train",)), ("held out", ("valid", "test"))):
        files = [file for split in splits for file in sorted((data / split).rglob("*.jpg"))]
        leaves = [decode(file.read_bytes(), SIZE).pixels for file in files]
        _, labels = np.unique([file.parent.name for file in files], return_inverse=True)
        found[f"labels of {name}"] = labels.astype(np.float32)
        for kind, spoil in SPOILED.items() if name == "held out" else [("train", np.asarray)]:
            found[kind] = network.features(np.stack([spoil(leaf) for leaf in leaves]))
            print(f"{kind}: {len(files)}", flush=True)
    return found


def fit(found: dict[str, NDArray[np.float32]]) -> HeldOut:
    """The logits of a head on standardised features."""
    train = np.log1p(found["train"])
    mean, deviation = train.mean(axis=0), train.std(axis=0) + 1e-3
    head = LogisticRegression(C=0.5, max_iter=1000)
    head.fit((train - mean) / deviation, found["labels of train"])
    unlike = novelty.fit(found["train"])
    return HeldOut(
        {
            kind: head.decision_function((np.log1p(found[kind]) - mean) / deviation).astype("f4")
            for kind in SPOILED
        },
        {kind: unlike.distance(found[kind]) for kind in SPOILED},
        found["labels of held out"].astype(np.int64),
    )


class Night(NamedTuple):
    """Places of photographs that calibrate, and of those of a night, with the drawn shares."""

    calibrating: NDArray[np.int64]
    places: NDArray[np.int64]
    shares: Array


def nights(labels: NDArray[np.int64], count: int, rng: np.random.Generator) -> Iterator[Night]:
    """Nights, each of photographs none of which calibrates."""
    classes = int(labels.max()) + 1
    for _ in range(count):
        order = rng.permutation(len(labels))
        calibrating, pool = order[: len(order) // 2], order[len(order) // 2 :]
        shares = np.zeros(classes)
        while shares.min() < 0.05 or shares.max() > 0.6:
            shares = rng.dirichlet(np.full(classes, 1.5))
        drawn = rng.multinomial(int(rng.integers(50, 501)), shares)
        places = [rng.choice(pool[labels[pool] == c], n) for c, n in enumerate(drawn)]
        yield Night(calibrating, np.concatenate(places), shares)


def report_shares(held_out: HeldOut, count: int) -> None:
    logits, labels = held_out.logits["as they are"], held_out.labels
    classes = logits.shape[1]
    errors: dict[str, list[float]] = {}
    covered = []
    for night in nights(labels, count, np.random.default_rng(0)):
        cut = logits / fit_temperature(logits[night.calibrating], labels[night.calibrating])
        answers = labels[night.calibrating]
        bias = prevalence.fit_bias(cut[night.calibrating], answers)
        probabilities = softmax(cut[night.places]).astype(float)
        confusion = np.full((classes, classes), 0.5)
        np.add.at(confusion, (answers, cut[night.calibrating].argmax(axis=1)), 1)
        recalled = (confusion / confusion.sum(axis=1, keepdims=True)).T
        counted = np.bincount(probabilities.argmax(axis=1), minlength=classes) / len(probabilities)
        solved, _ = nnls(np.vstack([recalled, np.full(classes, 100)]), np.append(counted, 100))
        known = probabilities * night.shares
        found = prevalence.estimate(probabilities, bias)
        covered.append((found.low <= night.shares) & (night.shares <= found.high))
        happened = np.bincount(labels[night.places], minlength=classes) / len(night.places)
        for name, shares in {
            "counted": counted,
            "mean probability": probabilities.mean(axis=0),
            "adjusted count": solved / solved.sum(),
            "leafnet.metrics.prevalence": found.value,
            "oracle": (known / known.sum(axis=1, keepdims=True)).mean(axis=0),
        }.items():
            errors.setdefault(name, []).append(float(np.abs(shares - happened).mean()))
    print("\n| share of a class | mean absolute error | of counted |\n|---|--:|--:|")
    for name, found_errors in errors.items():
        ratio = np.mean(found_errors) / np.mean(errors["counted"])
        print(f"| {name} | {100 * np.mean(found_errors):.2f} points | {ratio:.2f} |")
    print(f"\nthe interval holds the drawn share in {np.mean(covered):.1%} of {count} nights")


def report_accuracy(held_out: HeldOut, count: int) -> None:
    labels = held_out.labels
    print("\n| expected accuracy | error | interval holds | said not to hold | error, not said |")
    print("|---|--:|--:|--:|--:|")
    for kind in SPOILED:
        errors, covered, said = [], [], []
        for night in nights(labels, count, np.random.default_rng(1)):
            plain, part = held_out.logits["as they are"], night.calibrating
            valid, test = part[: len(part) // 2], part[len(part) // 2 :]
            temperature = fit_temperature(plain[valid], labels[valid])
            reference = drift.reference(
                thresholds.outcomes(
                    plain[valid] / temperature,
                    labels[valid],
                    held_out.novelty["as they are"][valid],
                )
            )
            calibration = scores(tally(plain[test] / temperature, labels[test]), range(3))  # type: ignore[arg-type]
            probabilities = softmax(held_out.logits[kind][night.places] / temperature)
            sure = probabilities.max(axis=1).astype(float)
            found = expected(
                len(sure), sure.sum(), float((sure**2).sum()), calibration["calibration"]
            )
            assert found is not None
            right = (probabilities.argmax(axis=1) == labels[night.places]).mean()
            errors.append(abs(found.value - right))
            covered.append(found.low <= right <= found.high)
            of_night = {"confidence": sure, "novelty": held_out.novelty[kind][night.places]}
            said.append(any(_shifted(reference[name], of_night[name]) for name in of_night))
        unsaid = np.array(errors)[~np.array(said)]
        told = f"{100 * unsaid.mean():.1f} points" if len(unsaid) else "none"
        print(
            f"| {kind} | {100 * np.mean(errors):.1f} points | {np.mean(covered):.1%} | "
            f"{np.mean(said):.1%} | {told} |"
        )


def report_units(held_out: HeldOut, count: int) -> None:
    labels, each, units = held_out.labels, 6, 200
    plain, rng = held_out.logits["as they are"], np.random.default_rng(2)
    print("\n| copies of six | likeness | right: photographs | right: units | calibration error |")
    print("|--:|--:|--:|--:|--:|")
    for copies in (0, 2, 5):
        alike, single = [], []
        said: list[Array] = []
        true: list[NDArray[np.int64]] = []
        for night in nights(labels, count, rng):
            cut = plain / fit_temperature(plain[night.calibrating], labels[night.calibrating])
            pool = np.setdiff1d(np.arange(len(labels)), night.calibrating)
            of_unit = rng.integers(0, plain.shape[1], units)
            drawn = np.stack([rng.choice(pool[labels[pool] == c], each) for c in of_unit])
            drawn[:, : copies + 1] = drawn[:, :1]
            probabilities = softmax(cut[drawn.ravel()])
            of = np.repeat(np.arange(units), each)
            alike.append(verdicts.likeness(probabilities, of))
            shares = np.full(plain.shape[1], 1 / plain.shape[1])
            made = verdicts.combine(probabilities, of, likeness=alike[-1], shares=shares)
            single.append((probabilities.argmax(axis=1) == of_unit[of]).mean())
            said.append(made.probabilities)
            true.append(of_unit)
        logits = np.log(np.concatenate(said)).astype(np.float32)
        names = [str(c) for c in range(plain.shape[1])]
        found = scores(tally(logits, np.concatenate(true)), names)
        print(
            f"| {copies} | {np.mean(alike):.2f} | {np.mean(single):.1%} | "
            f"{found['accuracy']:.1%} | {found['ece']:.3f} |"
        )


def _shifted(reference: dict[str, object], values: NDArray[np.floating]) -> bool:
    histogram = drift.histogram(reference)
    none = histogram._replace(counts=np.zeros_like(histogram.counts))
    shift = drift.shift(histogram, none.counted(values))
    return shift is not None and shift.is_large


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--nights", type=int, default=1000)
    parser.add_argument("--features", type=Path, help=".npz to keep the features in")
    arguments = parser.parse_args()
    if arguments.features and arguments.features.exists():
        with np.load(arguments.features, allow_pickle=False) as file:
            found = dict(file)
    else:
        found = features(arguments.data, arguments.weights)
        if arguments.features:
            np.savez(arguments.features, **found)  # type: ignore[arg-type]
    held_out = fit(found)
    report_shares(held_out, arguments.nights)
    report_accuracy(held_out, arguments.nights)
    report_units(held_out, arguments.nights // 10)


if __name__ == "__main__":
    main()
