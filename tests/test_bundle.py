"""The published model: what is saved is what is loaded, and damage is found before it is used."""

import functools
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from leafnet import backbone, bundle, demo, novelty, storage
from leafnet.classifier import Head, initial_head
from leafnet.errors import UserError
from leafnet.openvino_graph import Int8
from leafnet.review import Review

CLASSES = ("early_blight", "healthy", "late_blight")
REVIEW = Review(confidence=0.75, precision_target=0.95, novelty=60.5)
INT8 = Int8(b"<net/>", bytes(range(256)))


def made_head(seed: int = 0) -> Head:
    return initial_head((8,), len(CLASSES), inputs=backbone.FEATURES, seed=seed)


@functools.cache
def made_novelty() -> novelty.Novelty:
    features = np.random.default_rng(0).lognormal(size=(24, backbone.FEATURES))
    return novelty.fit(features.astype(np.float32))


def save(root: Path, **changes: Any) -> str:
    """A model whose network is one small convolution, unless it is given another."""
    kernel = np.random.default_rng(1).normal(size=(3, 3, 3, 4)).astype(np.float32)
    arguments: dict[str, Any] = {
        "convolutions": {"conv1_conv": (kernel, np.arange(4, dtype=np.float32))},
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


@pytest.mark.parametrize(
    "changes",
    [
        {"head": made_head(1)},
        {"class_names": CLASSES[::-1]},
        {"image_size": 64},
        {"review": REVIEW},
        {"novelty": made_novelty()},
        {"int8": INT8},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_a_row_changes_the_id(tmp_path: Path, changes: dict[str, Any]) -> None:
    first, again = save(tmp_path / "a"), save(tmp_path / "b")
    assert first == again != save(tmp_path / "c", **changes)


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


def test_predictions_say_why_a_person_should_look(tmp_path: Path) -> None:
    features = np.zeros((2, backbone.FEATURES), np.float32)
    features[1] = 1e6
    distance = made_novelty()
    usual = Review(confidence=0.0, precision_target=0.5, novelty=1e9)
    save(tmp_path, novelty=distance, review=usual)
    model = bundle.load(str(tmp_path))
    photographs = [as_jpeg(demo.draw_leaf("healthy", seed=i, width=64, height=64)) for i in (0, 1)]
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
from leafnet import bundle
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
        convolutions=backbone.load_weights("random").convolutions,
        novelty=made_novelty(),
        review=Review(confidence=2.0, precision_target=0.95, novelty=1e9),
    )
    leaf = demo.draw_leaf("healthy", seed=0, width=64, height=64)
    (tmp_path / "leaf.jpg").write_bytes(as_jpeg(leaf))
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "seen\n", done.stderr
