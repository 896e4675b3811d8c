"""Every way to run the network gives the same features, and impossible ways are refused."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from leafnet.core import hardware
from leafnet.core.errors import UserError
from leafnet.data import shards
from leafnet.data.images import decode
from leafnet.data.shards import ShardIndex
from leafnet.distributed.resources import Machines
from leafnet.metrics import novelty
from leafnet.metrics.thresholds import Review
from leafnet.models import bundle, engine, openvino, rates
from leafnet.models.bundle import Bundle
from leafnet.models.classifier import head_logits, initial_head
from leafnet.models.rates import Way
from leafnet.models.weights import FEATURES, load_weights
from leafnet.training import quantize, train
from leafnet.training.settings import TrainSettings

SIZE = 64


@pytest.fixture(scope="module")
def model(weights_file: str) -> Bundle:
    return Bundle(
        url="",
        model_id="",
        class_names=("a", "b"),
        image_size=SIZE,
        convolutions=load_weights(weights_file).convolutions,
        head=[],
        description={},
        review=Review(0.8, 0.95, 60.0),
        int8_review=Review(0.9, 0.95, 70.0),
    )


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Not square in any way that would hide an exchange of axes or colours."""
    y, x = np.mgrid[0 : 1 : SIZE * 1j, 0 : 1 : SIZE * 1j]
    generator = np.random.default_rng(1)
    colours = generator.uniform(0, 255, (9, 1, 1, 3))
    ramps = np.stack([x, y**2, np.sin(9 * x * y)], axis=-1)
    made = colours * ramps + generator.normal(0, 20, (9, SIZE, SIZE, 3))
    return np.array(np.clip(made, 0, 255), np.uint8)


@pytest.fixture(scope="module")
def expected(weights_file: str, pixels: np.ndarray) -> np.ndarray:
    """What stock Keras makes of the pixels, BatchNorms and all."""
    import keras

    stock = keras.applications.ResNet50(
        include_top=False, weights=None, input_shape=(SIZE, SIZE, 3), pooling="avg"
    )
    stock.load_weights(weights_file)
    scaled = keras.applications.resnet50.preprocess_input(pixels.astype(np.float32))
    return np.asarray(stock.predict_on_batch(scaled))


@pytest.fixture(scope="module")
def with_int8(model: Bundle, pixels: np.ndarray) -> Bundle:
    graph = openvino.build(model.convolutions, image_size=SIZE)
    int8 = openvino.quantize(graph, list(pixels))
    return Bundle(**{**vars(model), "int8": int8})


def opened(model: Bundle, name: str, precision: str) -> engine.Engine:
    return engine.open_engine(
        model, engine=name, precision=precision, threads=2, gpu=False, batch_size=4
    )


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("name", "precision", "allowed"),
    [
        ("tensorflow", "float32", 1e-5),
        ("tensorflow", "bfloat16", 0.05),
        ("openvino", "float32", 1e-5),
        ("openvino", "bfloat16", 0.05),
    ],
)
def test_features_are_those_of_stock_keras(
    model: Bundle,
    pixels: np.ndarray,
    expected: np.ndarray,
    name: str,
    precision: str,
    allowed: float,
) -> None:
    found = opened(model, name, precision)
    assert (found.name, found.precision, found.review) == (name, precision, model.review)
    features = found.features(pixels)
    assert features.dtype == np.float32
    assert relative_error(features, expected) < allowed
    # A batch that is cut elsewhere, and padded, gives every photograph the same features.
    assert relative_error(found.features(pixels[8:]), features[8:]) < allowed
    assert relative_error(found.features(pixels[1:6]), features[1:6]) < allowed
    assert found.features(pixels[:0]).shape == (0, FEATURES)


def test_int8_is_close_and_goes_through_a_published_model(
    with_int8: Bundle, pixels: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    bundle.save(
        str(tmp_path),
        convolutions=with_int8.convolutions,
        head=[(np.zeros((FEATURES, 2), np.float32), np.zeros(2, np.float32))],
        class_names=with_int8.class_names,
        image_size=SIZE,
        provenance={},
        review=with_int8.review,
        int8=with_int8.int8,
        int8_review=with_int8.int8_review,
    )
    found = opened(bundle.load(str(tmp_path)), "auto", "int8")
    assert (found.name, found.precision) == ("openvino", "int8")
    assert found.review == with_int8.int8_review
    assert 1e-4 < relative_error(found.features(pixels), expected) < 0.15


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 32, 32, 3), np.uint8), np.zeros((2, SIZE, SIZE, 3))]
)
def test_wrong_pixels_are_refused(wrong: np.ndarray) -> None:

    def forward(pixels: np.ndarray) -> np.ndarray:
        raise AssertionError("called")

    made = engine.Engine("tensorflow", "float32", "", SIZE, None, forward)
    with pytest.raises(ValueError, match=r"need uint8 pixels of shape \[B, 64, 64, 3\], got"):
        made.features(wrong)


AUTO: dict[str, Any] = {
    "engine": "auto",
    "precision": "auto",
    "gpu": False,
    "has_int8": True,
    "installed": True,
}
FLOATS = ("float32", "bfloat16")
TENSORFLOW = [("tensorflow", precision) for precision in FLOATS]
OPENVINO = [("openvino", precision) for precision in FLOATS]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [*TENSORFLOW, *OPENVINO, ("openvino", "int8")]),
        ({"has_int8": False}, [*TENSORFLOW, *OPENVINO]),
        ({"installed": False}, TENSORFLOW),
        ({"gpu": True}, TENSORFLOW),
        ({"engine": "tensorflow"}, TENSORFLOW),
        ({"engine": "openvino"}, [*OPENVINO, ("openvino", "int8")]),
        ({"engine": "openvino", "has_int8": False}, OPENVINO),
        ({"precision": "float32"}, [("tensorflow", "float32"), ("openvino", "float32")]),
        ({"precision": "bfloat16", "engine": "openvino"}, [("openvino", "bfloat16")]),
        ({"precision": "float32", "gpu": True}, [("tensorflow", "float32")]),
        ({"precision": "int8"}, [("openvino", "int8")]),
        ({"precision": "int8", "engine": "openvino"}, [("openvino", "int8")]),
    ],
)
def test_the_ways_that_are_allowed(
    changes: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    assert engine.ways(**{**AUTO, **changes}) == expected


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        ({"engine": "openvino", "gpu": True}, "openvino-on-gpu", "--gpu false"),
        ({"engine": "openvino", "installed": False}, "no-openvino", r"pip install \"leafnet"),
        ({"precision": "int8", "has_int8": False}, "no-int8", "train it with --int8"),
        ({"precision": "int8", "installed": False}, "no-openvino", r"pip install \"leafnet"),
        ({"precision": "int8", "gpu": True}, "int8-on-gpu", "--gpu false"),
        ({"precision": "int8", "engine": "tensorflow"}, "int8-needs-openvino", "or auto"),
    ],
)
def test_impossible_choices_say_what_to_do(
    changes: dict[str, Any], reason: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        engine.ways(**{**AUTO, **changes})
    assert caught.value.reason == reason


ALONE = """
import sys
import numpy as np
from leafnet.models import openvino
from leafnet.models.weights import load_weights
weights = load_weights("random").convolutions
graph = openvino.build(weights, image_size=32)
forward = openvino.compile_model(graph, precision="float32", threads=1)
assert forward(np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 2048)
import nncf
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
assert sys.modules["openvino_telemetry"] is None
print("seen")
"""


def test_openvino_runs_without_tensorflow_and_reports_nothing_to_anybody() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE], capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("seen\n"), done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_quantizing_a_data_set_tries_int8_on_every_validation_photograph(
    local_ray: None, data_set: ShardIndex
) -> None:
    weights = load_weights("random").convolutions
    head = initial_head((), 3, inputs=FEATURES, seed=0)
    generator = np.random.default_rng(0)
    distance = novelty.fit(generator.lognormal(size=(8, FEATURES)))
    made = quantize.quantize(
        data_set,
        ray.put(weights),
        head,
        distance,
        image_size=32,
        machines=Machines(gpus=0, actors=1, threads_per_actor=2, cpus_per_actor=0.5),
    )
    assert made.calibration_examples == data_set.examples("train")
    (shard,) = data_set.of_split("valid")
    tables = list(shards.row_groups(data_set.root, shard))
    images = [image for table in tables for image in table.column("image").to_pylist()]
    labels = [label for table in tables for label in table.column("label").to_pylist()]
    graph = openvino.read(made.int8)
    forward = openvino.compile_model(graph, precision="float32", threads=1)
    features = forward(np.stack([decode(image, 32).pixels for image in images]))
    predicted = head_logits(head, features).argmax(axis=1)
    np.testing.assert_array_equal(made.outcomes.correct, predicted == labels)
    np.testing.assert_allclose(made.outcomes.novelty, distance.distance(features), rtol=0.02)


def settings_of(index: ShardIndex, out: Path) -> TrainSettings:
    return TrainSettings(
        shards=index.root, out=str(out), name="run", weights="random", image_size=32, int8=True
    )


def test_int8_without_the_extra_is_refused_at_once(
    data_set: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "installed", lambda *, quantizer=False: False)
    with pytest.raises(UserError, match=r'pip install "leafnet\[openvino\]"') as caught:
        train.run(settings_of(data_set, tmp_path))
    assert caught.value.reason == "no-openvino"
    assert not list(tmp_path.iterdir())


def test_int8_that_cannot_be_checked_is_refused_at_once(
    data_set: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardIndex, "examples", lambda self, split: 0 if split == "valid" else 36)
    with pytest.raises(UserError, match="checked on the validation split") as caught:
        train.run(settings_of(data_set, tmp_path))
    assert caught.value.reason == "int8-unchecked"


def measured(way: Way, times: dict[Way, float]) -> Any:
    """A backbone that takes so long [s] for a pass."""
    return lambda pixels: time.sleep(times[way])


def test_the_fastest_way_is_measured_once_and_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """bfloat16 is left out where the processor would imitate it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hardware, "bfloat16_instructions", lambda: "avx512_bf16")
    allowed = engine.ways(**AUTO)
    times = dict(zip(allowed, (0.03, 0.05, 0.02, 0.04, 0.01), strict=True))
    opened: list[Way] = []

    def forward(way: Way, *_: Any, **given: Any) -> Any:
        assert given["threads"] == 2
        opened.append(way)
        return measured(way, times)

    monkeypatch.setattr(engine, "_forward", forward)

    def fastest(among: list[Any], image_size: int = 64) -> tuple[str, str]:
        return engine.fastest(among, {}, None, image_size=image_size, threads=2)[0]

    assert fastest(allowed) == ("openvino", "int8")
    assert opened == allowed
    # Kept: the same question, and one among fewer, costs nothing.
    assert fastest(allowed[:4]) == ("openvino", "float32")
    assert fastest(allowed[:2]) == ("tensorflow", "float32")
    assert opened == allowed
    # What was kept of another image size says nothing of this.
    assert fastest(allowed[:2], 32) == ("tensorflow", "float32")
    assert len(opened) == 7
    # A wrong entry is corrected once it is forgotten.
    times[allowed[1]] = 0.001
    rates.forget(image_size=32, threads=2)
    assert fastest(allowed[:2], 32) == ("tensorflow", "bfloat16")
    monkeypatch.setattr(hardware, "bfloat16_instructions", lambda: "")
    rates.forget(image_size=32, threads=2)
    assert fastest(allowed[:2], 32) == ("tensorflow", "float32")
    assert len(opened) == 9, "nothing to compare it with"


def test_one_way_needs_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "measure", None)
    only = [Way("openvino", "bfloat16")]
    assert engine.fastest(only, {}, None, image_size=64, threads=2) == (only[0], "as set")


def test_features_are_what_the_network_gives_for_the_pixels() -> None:
    seen = []

    def forward(pixels: np.ndarray) -> np.ndarray:
        seen.append(pixels)
        return np.full((len(pixels), FEATURES), 7, np.float32)

    made = engine.Engine("tensorflow", "float32", "", 4, None, forward)
    pixels = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    np.testing.assert_array_equal(made.features(pixels), np.full((3, 2048), 7))
    (given,) = seen
    np.testing.assert_array_equal(given, pixels)
    # Of no photographs there are no features, and no network is run.
    none = made.features(pixels[:0])
    assert (none.shape, str(none.dtype), len(seen)) == ((0, 2048), "float32", 1)
    wrong: Any
    for wrong in (pixels.astype(np.int16), pixels[..., :1], pixels[:, :3], pixels[:, :, :3]):
        with pytest.raises(ValueError, match=r"need uint8 pixels of shape \[B, 4, 4, 3\], got"):
            made.features(wrong)
        with pytest.raises(ValueError, match="need uint8 pixels"):
            made.features(wrong[:0])


@pytest.mark.parametrize(
    ("precision", "int8", "expected"),
    [("int8", b"x", "of int8"), ("float32", b"x", "of floats"), ("auto", None, "of floats")],
)
def test_thresholds_are_those_of_the_precision(
    precision: str, int8: bytes | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the network is made of what was asked for."""
    reviews = {"of floats": Review(0.8, 0.95, 60.0), "of int8": Review(0.9, 0.95, 70.0)}
    made: dict[str, Any] = {
        **{"url": "", "model_id": "", "class_names": ("a",), "image_size": 48},
        **{"convolutions": {}, "head": [], "description": {}, "int8": int8},
    }
    model = Bundle(**made, review=reviews["of floats"], int8_review=reviews["of int8"])
    asked = []
    monkeypatch.setattr(openvino, "installed", lambda: True)
    monkeypatch.setattr(hardware, "bfloat16_instructions", lambda: "")
    kept = {"openvino float32": 3.0, "openvino bfloat16": 0.0}
    monkeypatch.setattr(rates, "kept", lambda **_: ("", kept))
    monkeypatch.setattr(engine, "_forward", lambda *given, **more: asked.append((*given, more)))
    found = engine.open_engine(
        model, engine="openvino", precision=precision, threads=3, gpu=False, batch_size=4
    )
    chosen = "float32" if precision == "auto" else precision
    more = {"image_size": 48, "threads": 3, "gpu": False, "batch_size": 4}
    assert asked == [(("openvino", chosen), {}, int8, more)]
    assert (found.name, found.precision, found.image_size) == ("openvino", chosen, 48)
    assert found.why == ("measured as the fastest here" if precision == "auto" else "as set")
    assert found.review == reviews[expected]
