"""The published model: what is saved is what is loaded, and damage is found before it is used."""

import dataclasses
import functools
import hashlib
import io
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.special
from PIL import Image

from leafnet.core import hardware, storage
from leafnet.core.errors import UserError
from leafnet.data import synthetic
from leafnet.data.images import DECODER_VERSION
from leafnet.metrics import novelty
from leafnet.metrics.thresholds import Review
from leafnet.models import bundle, document, resnet, runtime, weights
from leafnet.models.classifier import Head, initial_head
from leafnet.models.openvino import Int8

CLASSES = ("early_blight", "healthy", "late_blight")
REVIEW = Review(confidence=0.75, precision_target=0.95, novelty=60.5)
INT8 = Int8(b"<net/>", bytes(range(256)))


def made_head(seed: int = 0) -> Head:
    return initial_head((8,), len(CLASSES), inputs=weights.FEATURES, seed=seed)


@functools.cache
def made_novelty() -> novelty.Novelty:
    features = np.random.default_rng(0).lognormal(size=(24, weights.FEATURES))
    return novelty.fit(features.astype(np.float32))


def made_convolutions(
    *, changed_kernel: float = 0.0, changed_bias: float = 0.0, name: str = "conv1_conv"
) -> dict[str, Any]:
    kernel = np.random.default_rng(1).normal(size=(3, 3, 3, 4)).astype(np.float32)
    bias = np.arange(4, dtype=np.float32)
    kernel[2, 1, 0, 3] += changed_kernel
    bias[2] += changed_bias
    return {name: (kernel, bias)}


def save(root: Path, **changes: Any) -> str:
    """A model whose network is one small convolution, unless it is given another."""
    arguments: dict[str, Any] = {
        "convolutions": made_convolutions(),
        "head": made_head(),
        "class_names": CLASSES,
        "image_size": 32,
        "provenance": {},
    }
    return bundle.save(str(root), **{**arguments, **changes})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    distance = made_novelty()
    model_id = save(
        tmp_path,
        novelty=distance,
        review=REVIEW,
        int8=INT8,
        int8_review=Review(0.8, 0.95, 99.0),
        provenance={
            "review": {"share_reviewed": 0.25},
            "int8": {"valid_accuracy": 0.9, "valid_accuracy_float": 0.9},
        },
    )
    model = bundle.load(str(tmp_path))
    assert (model.model_id, model.class_names, model.image_size) == (model_id, CLASSES, 32)
    assert model.url == str(tmp_path)
    assert model.convolutions["conv1_conv"][0].shape == (3, 3, 3, 4)
    np.testing.assert_array_equal(model.convolutions["conv1_conv"][1], [0, 1, 2, 3])
    for (kernel, bias), (expected, _) in zip(model.head, made_head(), strict=True):
        np.testing.assert_array_equal(kernel, expected)
        assert bias.dtype == np.float32
    assert model.review == REVIEW
    assert model.int8 == INT8
    assert model.int8_review == Review(0.8, 0.95, 99.0)
    assert model.novelty is not None
    for name, array in distance.arrays().items():
        np.testing.assert_array_equal(model.novelty.arrays()[name], array)
    assert model.description["review"] == {
        "confidence": 0.75,
        "precision_target": 0.95,
        "novelty": 60.5,
        "share_reviewed": 0.25,
    }


def test_a_model_without_thresholds_loads(tmp_path: Path) -> None:
    save(tmp_path)
    model = bundle.load(str(tmp_path))
    assert (model.review, model.novelty, model.int8, model.int8_review) == (None,) * 4


WHOLE: dict[str, Any] = {
    "novelty": made_novelty(),
    "review": REVIEW,
    "int8": INT8,
    "int8_review": Review(0.8, 0.95, 99.0),
}


def changed_novelty() -> novelty.Novelty:
    spread = made_novelty().spread.copy()
    spread[0] *= 2
    return dataclasses.replace(made_novelty(), spread=spread)


def changed_bias() -> Head:
    (kernel, bias), *rest = made_head()
    return [(kernel, bias + np.float32(1)), *rest]


@pytest.mark.parametrize(
    "changes",
    [
        {"convolutions": made_convolutions(changed_kernel=1.0)},
        {"convolutions": made_convolutions(changed_bias=1.0)},
        {"convolutions": made_convolutions(name="conv2_conv")},
        {"head": made_head(1)},
        {"head": changed_bias()},
        {"class_names": CLASSES[::-1]},
        {"class_names": (*CLASSES[:2], "rust")},
        {"image_size": 64},
        {"novelty": None},
        {"novelty": changed_novelty()},
        {"review": None},
        {"review": dataclasses.replace(REVIEW, confidence=0.7)},
        {"review": dataclasses.replace(REVIEW, precision_target=0.9)},
        {"review": dataclasses.replace(REVIEW, novelty=60.0)},
        {"int8": None},
        {"int8": Int8(INT8.xml, INT8.weights[::-1])},
        {"int8": Int8(b"<net />", INT8.weights)},
        {"int8_review": None},
        {"int8_review": Review(0.7, 0.95, 99.0)},
        {"int8_review": Review(0.8, 0.9, 99.0)},
        {"int8_review": Review(0.8, 0.95, 98.0)},
        {"review": WHOLE["int8_review"], "int8_review": REVIEW},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_changes_a_row_changes_the_id(tmp_path: Path, changes: dict[str, Any]) -> None:
    first = save(tmp_path / "a", **WHOLE)
    assert first != save(tmp_path / "b", **{**WHOLE, **changes})


def test_another_decoder_changes_the_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save(tmp_path / "a")
    monkeypatch.setattr(document, "DECODER_VERSION", 99)
    assert first != save(tmp_path / "b")


def test_what_is_only_told_of_a_model_does_not_change_its_id(tmp_path: Path) -> None:
    first = save(tmp_path / "a", **WHOLE)
    told = {"trained_at": "today", "review": {"splits": {}}, "int8": {"valid_accuracy": 0.9}}
    assert first == save(tmp_path / "b", **WHOLE, provenance=told)
    assert re.fullmatch("[0-9a-f]{16}", first)


def test_description_says_what_is_needed_and_what_is_told(tmp_path: Path) -> None:
    told = {
        "trained_at": "today",
        "review": {"share_reviewed": 0.25},
        "int8": {"valid_accuracy": 0.9, "review": {"share_reviewed": 0.5}},
    }
    model_id = save(tmp_path, **WHOLE, provenance=told)

    def entry(suffix: str) -> dict[str, Any]:
        (path,) = tmp_path.glob(f"*{suffix}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert path.name == f"model-{digest[:16]}{suffix}"
        return {"file": path.name, "sha256": digest, "bytes": path.stat().st_size}

    assert json.loads((tmp_path / "model.json").read_text()) == {
        "version": 1,
        "model_id": model_id,
        "class_names": ["early_blight", "healthy", "late_blight"],
        "image_size": 32,
        "input": bundle._INPUT,
        "decoder_version": DECODER_VERSION,
        "weights": entry(".weights.h5"),
        "trained_at": "today",
        "review": {
            **{"confidence": 0.75, "precision_target": 0.95, "novelty": 60.5},
            "share_reviewed": 0.25,
        },
        "int8": {
            "valid_accuracy": 0.9,
            "graph": entry(".int8.xml"),
            "weights": entry(".int8.bin"),
            "review": {
                **{"confidence": 0.8, "precision_target": 0.95, "novelty": 99.0},
                "share_reviewed": 0.5,
            },
        },
    }


def test_thresholds_of_an_int8_that_was_refused_are_not_loaded(tmp_path: Path) -> None:
    refused = {"accepted": False, "review": dataclasses.asdict(REVIEW)}
    save(tmp_path, provenance={"int8": refused})
    model = bundle.load(str(tmp_path))
    assert (model.int8, model.int8_review) == (None, None)


def test_a_model_that_takes_its_place_leaves_other_files_alone(tmp_path: Path) -> None:
    save(tmp_path, int8=INT8)
    for name in ("notes.txt", "mine.weights.h5", "model-0.int8.bin"):
        (tmp_path / name).write_text("mine")
    first = {path.name for path in tmp_path.iterdir()}
    save(tmp_path, int8=INT8)
    assert {path.name for path in tmp_path.iterdir()} == first
    save(tmp_path, int8=Int8(INT8.xml, b"other"), head=made_head(1))
    for name in ("notes.txt", "mine.weights.h5", "model-0.int8.bin"):
        assert (tmp_path / name).read_text() == "mine"
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == len(first)
    assert sorted(name.partition(".")[2] for name in first - left) == ["int8.bin", "weights.h5"]


@pytest.mark.parametrize("document", ["[]", "null", '{"version": 2}', '{"model_id": "a"}'])
def test_what_is_no_model_json_is_refused(tmp_path: Path, document: str) -> None:
    (tmp_path / "model.json").write_text(document)
    with pytest.raises(UserError, match="this leafnet reads 1") as caught:
        bundle.load(str(tmp_path))
    assert caught.value.reason == "other-version"


@pytest.mark.parametrize("suffix", [".weights.h5", ".int8.xml", ".int8.bin"])
def test_a_damaged_file_is_found(tmp_path: Path, suffix: str) -> None:
    save(tmp_path, int8=INT8)
    (path,) = tmp_path.glob(f"*{suffix}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{suffix} is damaged") as caught:
        bundle.load(str(tmp_path))
    assert caught.value.reason == "damaged-model"
    path.unlink()
    with pytest.raises(UserError, match="which is gone"):
        bundle.load(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "reason"), [("version", "other-version"), ("decoder_version", "other-decoder")]
)
def test_another_version_is_refused(tmp_path: Path, key: str, reason: str) -> None:
    save(tmp_path)
    pointer = tmp_path / "model.json"
    document = json.loads(pointer.read_text())
    pointer.write_text(json.dumps({**document, key: 99}))
    with pytest.raises(UserError, match="99") as caught:
        bundle.load(str(tmp_path))
    assert caught.value.reason == reason


# What somebody else may have written


@pytest.mark.parametrize(
    ("place", "value", "found"),
    [
        (("model_id",), "../../x", "model_id: String should match pattern"),
        (("model_id",), "0123456789abcdef", "was edited: its classes, thresholds and files are"),
        (("class_names",), CLASSES[::-1], "was edited"),
        (("class_names",), ["a", "b", "a"], "class_names: Value error, must be different"),
        (("class_names",), ["a", "b", "c\x1b[2J"], r"class_names\.2: .* no control characters"),
        (("class_names",), [], "class_names: Value should have at least 1 item"),
        (("image_size",), 64, "was edited"),
        (("image_size",), "32", "image_size: Input should be a valid integer"),
        (("image_size",), 10**9, "image_size: Input should be less than"),
        (("review", "confidence"), 0.1, "was edited"),
        (("review", "confidence"), float("nan"), "confidence: Input should be a finite number"),
        (("review",), [], "review: "),
        (("int8", "review", "novelty"), 1.0, "was edited"),
        (("int8", "graph"), None, "names one of two int8 files"),
        (("weights", "file"), "../../etc/passwd", r"weights\.file: .* without a folder"),
        (("weights", "file"), "..", r"weights\.file: .* without a folder"),
        (("weights", "sha256"), "../victim.txt", r"weights\.sha256: String should match"),
        (("weights",), None, "weights: "),
        (("weights", "bytes"), -1, r"weights\.bytes: Input should be greater"),
    ],
)
def test_a_model_json_that_was_edited_is_refused(
    tmp_path: Path, place: tuple[str, ...], value: Any, found: str
) -> None:
    save(tmp_path, review=REVIEW, int8=INT8, int8_review=REVIEW)
    pointer = tmp_path / "model.json"
    changed = json.loads(pointer.read_text())
    *parents, last = place
    inside = functools.reduce(lambda part, name: part[name], parents, changed)
    inside[last] = value
    pointer.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=found) as caught:
        bundle.load(str(tmp_path))
    assert caught.value.reason == "damaged-model"
    assert "train again with jobs/train.py" in str(caught.value)


@pytest.mark.parametrize("missing", ["model_id", "class_names", "image_size", "weights"])
def test_a_model_json_without_a_field_is_refused(tmp_path: Path, missing: str) -> None:
    save(tmp_path)
    pointer = tmp_path / "model.json"
    changed = json.loads(pointer.read_text())
    del changed[missing]
    pointer.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=f"{missing}: Field required") as caught:
        bundle.load(str(tmp_path))
    assert caught.value.reason == "damaged-model"


def put_weights(root: Path, change: Callable[[h5py.File], None]) -> None:
    """Change the weights of the model at `root`, and its model.json so that all fits."""
    (path,) = root.glob("*.weights.h5")
    with h5py.File(path, "r+") as file:
        change(file)
    pointer = root / "model.json"
    told = json.loads(pointer.read_text())
    told["weights"]["sha256"] = storage.sha256(path.read_bytes())
    told["model_id"] = document.model_id(
        digests=[told["weights"]["sha256"]],
        class_names=told["class_names"],
        image_size=told["image_size"],
        reviews=[],
    )
    pointer.write_text(json.dumps(told))


def test_weights_bring_nothing_in_from_other_files(tmp_path: Path) -> None:
    """HDF5 can name any file of the machine that reads it."""
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["bias"] = np.zeros(4, np.float32)
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(16))

    def external(file: h5py.File) -> None:
        file.create_dataset("x", (4,), "f4", external=[(str(raw), 0, 16)])
        file.move("x", "backbone/conv1_conv/bias")

    def virtual(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((4,), "f4")
        layout[:] = h5py.VirtualSource(other, "bias", (4,))
        file.create_virtual_dataset("backbone/conv1_conv/bias", layout)

    def linked(file: h5py.File) -> None:
        file["backbone/conv1_conv/bias"] = h5py.ExternalLink(other, "bias")

    def soft(file: h5py.File) -> None:
        file["elsewhere"] = np.zeros(4, np.float32)
        file["backbone/conv1_conv/bias"] = h5py.SoftLink("/elsewhere")

    def group(file: h5py.File) -> None:
        del file["backbone"]
        file["backbone"] = h5py.ExternalLink(other, "/")

    for change in (external, virtual, linked, soft, group):
        root = tmp_path / change.__name__
        save(root)

        def without_bias(file: h5py.File, change: Any = change) -> None:
            del file["backbone/conv1_conv/bias"]
            change(file)

        put_weights(root, without_bias)
        with pytest.raises(UserError, match=r"is a link|are in another file") as caught:
            bundle.load(str(root))
        assert caught.value.reason == "damaged-model"


@pytest.mark.parametrize(
    ("shape", "kind", "found"),
    [
        ((1 << 40,), "f4", "bytes"),  # four terabytes of zeros in a file of a few kilobytes
        ((4,), "i4", "is int32"),
        ((5,), "f4", r"kernel \(3, 3, 3, 4\) and a bias \(5,\)"),
        (None, "f4", "there is no array backbone/conv1_conv/bias"),
    ],
)
def test_arrays_that_cannot_be_weights_are_refused_before_they_are_read(
    tmp_path: Path, shape: tuple[int, ...] | None, kind: str, found: str
) -> None:
    def change(file: h5py.File) -> None:
        del file["backbone/conv1_conv/bias"]
        if shape:
            file.create_dataset("backbone/conv1_conv/bias", shape, kind, chunks=(4,))

    save(tmp_path)
    put_weights(tmp_path, change)
    with pytest.raises(UserError, match=found) as caught:
        bundle.load(str(tmp_path))
    assert caught.value.reason == "damaged-model"


def test_a_head_of_other_classes_is_refused(tmp_path: Path) -> None:
    save(tmp_path, head=initial_head((8,), 2, inputs=weights.FEATURES, seed=0))
    with pytest.raises(UserError, match="not for the classes") as caught:
        bundle.load(str(tmp_path))
    assert caught.value.reason == "damaged-model"


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train a model") as caught:
        bundle.load(str(tmp_path / "none"))
    assert caught.value.reason == "no-model"


def test_a_model_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(tmp_path, int8=INT8)
    with monkeypatch.context() as patch:

        def fail(url: str, document: Any) -> None:
            raise OSError("no space left")

        patch.setattr(storage, "write_json", fail)
        with pytest.raises(OSError, match="no space"):
            save(tmp_path, head=made_head(1))
    assert bundle.load(str(tmp_path)).model_id == first
    second = save(tmp_path, head=made_head(1))
    assert bundle.load(str(tmp_path)).model_id == second != first
    # Nothing of the first is left, of which int8 was a part.
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".h5", ".json", ".md"]


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, novelty=made_novelty(), review=REVIEW, int8=INT8)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert bundle.load(str(tmp_path)).novelty is not None
    (path,) = tmp_path.glob("*.weights.h5")
    with h5py.File(path) as file:
        kinds: list[str] = []
        file.visititems(lambda _, item: kinds.append(getattr(item, "dtype", np.dtype("f4")).kind))
    assert set(kinds) == {"f"}


def card(path: Path, **changes: Any) -> str:
    save(path, **changes)
    return (path / "MODEL_CARD.md").read_text()


def scores(accuracy: float, **recalls: float) -> dict[str, Any]:
    return {
        **{"examples": 40, "accuracy": accuracy, "accuracy_low": 0.7, "accuracy_high": 0.95},
        **{"macro_f1": 0.8, "log_loss": 0.5, "ece": 0.0625},
        "per_class": {name: {"recall": recall} for name, recall in recalls.items()},
    }


def test_card_tells_where_the_model_comes_from(tmp_path: Path) -> None:
    told = {
        "backbone": {"source": "imagenet", "fingerprint": "0123456789abcdef01"},
        "data": {"shards": "s3://shards", "fingerprint": "fedcba9876543210ff"},
    }
    page = card(tmp_path / "a", provenance=told)
    assert "one of 3 classes: `early_blight`, `healthy`, `late_blight`." in page
    assert "| backbone weights | imagenet, 0123456789abcdef |" in page
    assert "| trained on | s3://shards, fedcba9876543210 |" in page
    assert "| input | 32 x 32 pixels, uint8 RGB" in page
    assert "random weights" not in page
    assert "It knows nothing but these classes" in page
    told["backbone"]["source"] = "random"
    assert "has random weights: a check" in card(tmp_path / "b", provenance=told)


def test_card_has_the_scores_and_the_class_that_the_test_split_misses(tmp_path: Path) -> None:
    metrics = {
        "valid": scores(0.9, healthy=0.1, rust=0.95),
        "test": scores(0.85, healthy=0.975, rust=0.81, scab=0.9),
    }
    page = card(tmp_path / "a", provenance={"metrics": metrics})
    assert "| valid | 40 | 0.900 (0.700 to 0.950) | 0.800 | 0.500 | 0.062 |" in page
    assert "| test | 40 | 0.850 (" in page
    assert "| split | images | accuracy (95 % interval) | macro F1 | log loss | ECE |" in page
    assert "Weakest class: `rust`, of which 81% are found." in page
    del metrics["test"]
    page = card(tmp_path / "b", provenance={"metrics": metrics})
    assert "Weakest class: `healthy`, of which 10% are found." in page
    page = card(tmp_path / "c")
    assert "Weakest" not in page
    assert "macro F1" not in page


def test_card_says_what_the_temperature_did(tmp_path: Path) -> None:
    ece = {"valid": {"before": 0.125, "after": 0.0625}, "test": {"before": 0.25, "after": 0.1}}
    told = {"value": 1.25, "examples": 1234, "ece": ece}
    page = card(tmp_path / "a", provenance={"temperature": told})
    assert "a temperature of 1.250, fitted on 1,234 validation photographs" in page
    assert "from 0.125 to 0.062 on valid and from 0.250 to 0.100 on test." in page
    assert "temperature" not in card(tmp_path / "b")


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (
            {"blocks": 2, "published": True, "best_epoch": 7},
            "The last 2 of 4 stages of the backbone were fine-tuned with the head, after it was "
            "fitted; the weights are the average over steps, as of epoch 7.",
        ),
        (
            {"blocks": "all", "published": False},
            "All stages were fine-tuned without a gain on validation, and left as they were.",
        ),
        (None, ""),
    ],
)
def test_card_says_what_was_fine_tuned(
    tmp_path: Path, told: dict[str, Any] | None, expected: str
) -> None:
    page = card(tmp_path, provenance={"fine_tune": told} if told else {})
    assert expected in page
    assert ("fine-tuned" in page) == bool(told)


@pytest.mark.parametrize(
    ("confidence", "expected"),
    [
        (
            0.75,
            "or a confidence under 0.750, chosen on validation so that 95% of the others are right",
        ),
        (
            2.0,
            ", and all others as well: no confidence gave 95% right predictions on validation.",
        ),
        (
            0.0,
            ", and none for its confidence: of all validation photographs at least 95% are right.",
        ),
        (1.0, "or a confidence under 1.000, chosen"),
    ],
)
def test_card_says_whom_confidence_sends_to_review(
    tmp_path: Path, confidence: float, expected: str
) -> None:
    page = card(tmp_path, review=dataclasses.replace(REVIEW, confidence=confidence))
    assert f"a novelty over 60.5 {expected}".replace(" ,", ",") in page
    assert "no thresholds" not in page


def test_card_says_that_nothing_is_for_review(tmp_path: Path) -> None:
    page = card(tmp_path, int8=INT8, provenance={"int8": {"valid_accuracy": 0.5}})
    assert "It has no thresholds for review: there was no validation split." in page
    assert "int8: validation accuracy 0.5000, nan in floating point." in page


def test_card_says_when_a_person_has_to_look(tmp_path: Path) -> None:
    effect = {"examples": 300, "share_reviewed": 0.12, "accuracy": 0.96}
    save(tmp_path, review=REVIEW, provenance={"review": {"splits": {"valid": effect}}})
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "a novelty over 60.5 or a confidence under 0.750" in card
    assert "On valid, 12.0 % of 300 photographs are for review, 96.0 % of the others" in card


def test_card_says_that_int8_was_refused(tmp_path: Path) -> None:
    report = {"accepted": False, "valid_accuracy": 0.88, "valid_accuracy_float": 0.9}
    save(tmp_path, provenance={"int8": report})
    assert "0.8800, 0.9000 in floating point: refused" in (tmp_path / "MODEL_CARD.md").read_text()
    assert bundle.load(str(tmp_path)).int8 is None


def as_jpeg(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG")
    return sink.getvalue()


def test_predictions_are_softmax_of_the_head_on_each_photograph_in_its_place(
    tmp_path: Path,
) -> None:
    """Of five, one is damaged, and the features tell how green each of the others is."""
    kernel = np.zeros((weights.FEATURES, 3), np.float32)
    kernel[0] = [-3.0, 0.0, 1.0]
    head: Head = [(kernel, np.array([0.5, 0.25, -0.5], np.float32))]
    save(tmp_path, head=head)
    greens = [0, 60, 120, 180, 240]
    photographs = [as_jpeg(np.full((40, 40, 3), green, np.uint8)) for green in greens]
    photographs[1] = b"not a photograph"
    asked: list[int] = []

    def features(pixels: np.ndarray) -> np.ndarray:
        assert pixels.shape[1:] == (32, 32, 3)
        asked.append(len(pixels))
        made = np.zeros((len(pixels), weights.FEATURES), np.float32)
        made[:, 0] = pixels[:, 0, 0, 1] / 240
        return made

    found = bundle.load(str(tmp_path)).predict(photographs, batch_size=3, features=features)
    assert asked == [2, 2]
    assert found[1] == bundle.Prediction(None, None, {}, found[1].error)
    assert str(found[1].error).startswith("not-an-image: ")
    for green, prediction in zip(greens, found, strict=True):
        if prediction is found[1]:
            continue
        logits = np.array([0.5, 0.25, -0.5]) + green / 240 * np.array([-3.0, 0.0, 1.0])
        expected = scipy.special.softmax(logits)
        assert list(prediction.probabilities) == list(CLASSES)
        np.testing.assert_allclose([*prediction.probabilities.values()], expected, atol=0.01)
        assert prediction.label == CLASSES[int(expected.argmax())]
        assert prediction.confidence == max(prediction.probabilities.values())
        assert (prediction.error, prediction.novelty, prediction.review) == (None, None, None)
    assert [prediction.label for prediction in found] == [
        "early_blight", None, "healthy", "healthy", "late_blight",
    ]  # fmt: skip


def test_a_batch_without_a_photograph_asks_for_no_features(tmp_path: Path) -> None:
    save(tmp_path, review=REVIEW)  # without a measure of novelty, as in a night, by confidence

    def features(pixels: np.ndarray) -> np.ndarray:
        return np.zeros((len(pixels), weights.FEATURES), np.float32)

    found = bundle.load(str(tmp_path)).predict(
        [b"no", b"no", as_jpeg(np.zeros((8, 8, 3), np.uint8))], batch_size=2, features=features
    )
    assert [prediction.label is None for prediction in found] == [True, True, False]
    assert found[2].review == "low-confidence: 0.333 is under 0.750"


class Network:
    """Gives the first number of each picture, and notes what it was given."""

    def __init__(self) -> None:
        self.batches: list[np.ndarray] = []

    def make_predict_function(self) -> None:
        pass

    def predict_on_batch(self, batch: np.ndarray) -> np.ndarray:
        self.batches.append(batch)
        return batch[:, 0, 0, :1].astype(np.float64)


def test_a_network_gets_batches_of_one_shape() -> None:
    network = Network()
    pixels = np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * np.ones((2, 2, 3), np.uint8)
    found = runtime.forward(network, pixels, batch_size=2)
    assert found.tolist() == [[1], [2], [3], [4], [5]]
    assert found.dtype == np.float32
    given = sorted(batch[:, 1, 1, 2].tolist() for batch in network.batches)
    assert given == [[1, 2], [3, 4], [5, 0]]


def test_the_network_is_built_once_for_a_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path)
    model = bundle.load(str(tmp_path))
    built: list[Any] = []

    def build(convolutions: Any, **told: Any) -> Network:
        assert convolutions is model.convolutions
        built.append(told)
        return Network()

    monkeypatch.setattr(resnet, "build", build)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where nothing is measured
    monkeypatch.setattr(hardware, "bfloat16_instructions", lambda: "amx_bf16")
    photograph = as_jpeg(np.full((32, 32, 3), 9, np.uint8))
    pixels = np.full((3, 32, 32, 3), 9, np.uint8)
    for precision in ("float32", "float32", "auto", "bfloat16", "float32"):
        assert model.features(pixels, precision=precision, batch_size=4).tolist() == [[9]] * 3
    assert [told["precision"] for told in built] == ["float32", "bfloat16", "float32"]
    assert {told["image_size"] for told in built} == {32}
    wide = np.zeros((9, weights.FEATURES), np.float32)
    told: list[Any] = []

    def features(self: Any, of: np.ndarray, **how: Any) -> np.ndarray:
        told.append(how)
        return wide[: len(of)]

    monkeypatch.setattr(bundle.Bundle, "features", features)
    model.predict([photograph] * 5, batch_size=4, precision="float32")
    assert told == [{"batch_size": 4, "precision": "float32"}] * 2


def test_features_that_are_no_numbers_give_an_error_and_no_label(tmp_path: Path) -> None:
    save(tmp_path, review=REVIEW)
    features = np.zeros((2, weights.FEATURES), np.float32)
    features[0, 3] = np.nan
    photographs = [as_jpeg(np.zeros((8, 8, 3), np.uint8))] * 2
    bad, good = bundle.load(str(tmp_path)).predict(photographs, features=lambda pixels: features)
    assert bad == bundle.Prediction(None, None, {}, "not-finite: the network gave no number for it")
    assert good.label in CLASSES
    assert good.error is None


def test_predictions_say_why_a_person_should_look(tmp_path: Path) -> None:
    features = np.zeros((2, weights.FEATURES), np.float32)
    features[1] = 1e6
    distance = made_novelty()
    usual = Review(confidence=0.0, precision_target=0.5, novelty=1e9)
    save(tmp_path, novelty=distance, review=usual)
    model = bundle.load(str(tmp_path))
    photographs = [
        as_jpeg(synthetic.draw_leaf("healthy", seed=i, width=64, height=64)) for i in (0, 1)
    ]
    trusted = model.predict(photographs, features=lambda pixels: features)
    assert [prediction.review for prediction in trusted] == [None, None]
    novelties = np.array([prediction.novelty for prediction in trusted], np.float32)
    np.testing.assert_allclose(novelties, distance.distance(features))
    strict = Review(confidence=2.0, precision_target=0.95, novelty=1.0)
    told = model.predict(photographs, features=lambda pixels: features, review=strict)
    assert all("low-confidence" in str(prediction.review) for prediction in told)
    assert all("unlike-training" in str(prediction.review) for prediction in told)


PREDICT = """
import sys
from pathlib import Path
from leafnet.models import bundle
root = Path(sys.argv[1])
model = bundle.load(str(root / "model"))
bad, good = model.predict([b"not a photograph", (root / "leaf.jpg").read_bytes()])
assert bad.label is None and bad.confidence is None, bad
assert bad.error.startswith("not-an-image: "), bad
assert good.error is None and good.label in model.class_names, good
assert abs(sum(good.probabilities.values()) - 1) < 1e-5, good
assert good.novelty is not None and good.review.startswith("low-confidence"), good
assert "ray" not in sys.modules
print("seen")
"""


@pytest.mark.slow
def test_a_plain_process_predicts_also_beside_a_bad_photograph(tmp_path: Path) -> None:
    save(
        tmp_path / "model",
        convolutions=weights.load_weights("random").convolutions,
        novelty=made_novelty(),
        review=Review(confidence=2.0, precision_target=0.95, novelty=1e9),
    )
    leaf = synthetic.draw_leaf("healthy", seed=0, width=64, height=64)
    (tmp_path / "leaf.jpg").write_bytes(as_jpeg(leaf))
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "seen\n", done.stderr
