import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from leafnet import backbone
from leafnet.errors import UserError

SIZE = 64


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (4, SIZE, SIZE, 3)).astype(np.uint8)


def stock_features(stock: Any, images: np.ndarray) -> np.ndarray:
    from keras.applications.resnet50 import preprocess_input

    return np.asarray(stock(preprocess_input(images.astype(np.float32))))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_folded_equals_stock_keras(stock: Any, weights_file: str, images: np.ndarray) -> None:
    weights = backbone.load_weights(weights_file)
    folded = backbone.build(weights.convolutions, image_size=SIZE, precision="float32")
    found = np.asarray(folded(images))
    assert found.shape == (4, backbone.FEATURES)
    assert relative_error(found, stock_features(stock, images)) < 1e-5
    assert not any("bn" in layer.name for layer in folded.get_layer("resnet50").layers)


def test_bfloat16_is_close(stock: Any, weights_file: str, images: np.ndarray) -> None:
    weights = backbone.load_weights(weights_file)
    folded = backbone.build(weights.convolutions, image_size=SIZE, precision="bfloat16")
    found = np.asarray(folded(images))
    assert found.dtype == np.float32
    assert 1e-5 < relative_error(found, stock_features(stock, images)) < 0.05


def test_older_keras_layout_gives_the_same_weights(
    stock: Any, weights_file: str, tmp_path: Path
) -> None:
    """The layout of Keras's ImageNet file: a group a layer, its variables in `weight_names`."""
    path = tmp_path / "resnet50_notop.h5"
    with h5py.File(path, "w") as file:
        for layer in stock.layers:
            group = file.create_group(layer.name)
            names = [f"{layer.name}/{weight.name}:0" for weight in layer.weights]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, weight in zip(names, layer.weights, strict=True):
                group[name] = np.asarray(weight)
    old, new = backbone.load_weights(str(path)), backbone.load_weights(weights_file)
    assert old.fingerprint == new.fingerprint
    for name, (kernel, _) in new.convolutions.items():
        np.testing.assert_array_equal(old.convolutions[name][0], kernel)


def test_random_weights_follow_the_seed() -> None:
    first, again, other = (backbone.load_weights("random", seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    kernel, bias = first.convolutions["conv1_conv"]
    assert kernel.shape == (7, 7, 3, 64)
    # Glorot and Bengio 2010: a uniform distribution of variance 2 / (fan in + fan out); the
    # BatchNorm divides by sqrt(1 + 1.001e-5).
    assert kernel.var() == pytest.approx(2 / (49 * (3 + 64)), rel=0.05)
    assert not bias.any()


def test_other_architecture_is_refused_by_layer(tmp_path: Path) -> None:
    import keras

    path = tmp_path / "v2.weights.h5"
    other = keras.applications.ResNet50V2(include_top=False, weights=None)
    other.save_weights(path)
    with pytest.raises(UserError, match="is not a ResNet50: layer conv2_block1_1_conv") as caught:
        backbone.load_weights(str(path))
    assert caught.value.reason == "other-architecture"


def test_no_such_weights() -> None:
    with pytest.raises(UserError, match=r"--weights none\.h5 does not exist"):
        backbone.load_weights("none.h5")


def test_weights_that_are_no_hdf5(tmp_path: Path) -> None:
    path = tmp_path / "w.h5"
    path.write_text("hello")
    with pytest.raises(UserError, match="is not an HDF5 file"):
        backbone.load_weights(str(path))


def test_imagenet_without_network_says_the_ways_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(backbone, "_IMAGENET_URL", "http://127.0.0.1:9/resnet50_notop.h5")
    with pytest.raises(UserError, match="--weights random") as caught:
        backbone.load_weights("imagenet")
    assert caught.value.reason == "no-imagenet-weights"
    assert str(tmp_path / "models") in str(caught.value)


def test_imagenet_takes_the_file_in_keras_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights_file: str
) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    cached = tmp_path / "models" / backbone._IMAGENET_URL.rsplit("/", 1)[-1]
    cached.parent.mkdir()
    cached.write_bytes(Path(weights_file).read_bytes())
    weights = backbone.load_weights("imagenet")
    assert weights.fingerprint == backbone.load_weights(weights_file).fingerprint


@pytest.mark.parametrize(
    ("wanted", "capability", "expected"),
    [
        ("float32", (9, 0), "float32"),
        ("bfloat16", None, "bfloat16"),
        ("auto", (9, 0), "bfloat16"),
        ("auto", (7, 5), "float32"),
    ],
)
def test_precision(wanted: str, capability: tuple[int, int] | None, expected: str) -> None:
    assert backbone.choose_precision(wanted, compute_capability=capability)[0] == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512_bf16", "bfloat16"),
        ("fpu amx_bf16", "bfloat16"),
        ("fpu avx2", "float32"),
    ],
)
def test_precision_of_a_processor(
    monkeypatch: pytest.MonkeyPatch, flags: str, expected: str
) -> None:
    monkeypatch.setattr(backbone, "_cpu_flags", lambda: frozenset(flags.split()))
    precision, why = backbone.choose_precision("auto", compute_capability=None)
    assert precision == expected
    assert why


@pytest.mark.parametrize("blocks", [1, 4, "all"])
def test_the_two_parts_together_are_the_network(
    weights_file: str, images: np.ndarray, blocks: Any
) -> None:
    weights = backbone.load_weights(weights_file).convolutions
    parts = backbone.build_parts(weights, precision="float32", blocks=blocks)
    whole = backbone.build(weights, image_size=SIZE, precision="float32")
    found = np.asarray(parts.trained(parts.frozen(images.astype(np.float32))))
    assert relative_error(found, np.asarray(whole(images))) < 1e-5
    stages = {backbone.stage_of(layer.name) for layer in parts.trained.layers if layer.weights}
    assert stages == {1: {5}, 4: {2, 3, 4, 5}, "all": {1, 2, 3, 4, 5}}[blocks]
    assert not parts.frozen.trainable_variables


def test_trained_weights_are_float32_in_bfloat16(weights_file: str, images: np.ndarray) -> None:
    weights = backbone.load_weights(weights_file).convolutions
    parts = backbone.build_parts(weights, precision="bfloat16", blocks=1)
    maps = parts.frozen(images.astype(np.float32))
    assert maps.dtype == "bfloat16"
    assert {variable.dtype for variable in parts.trained.trainable_variables} == {"float32"}
    whole = backbone.build(weights, image_size=SIZE, precision="bfloat16")
    assert relative_error(np.asarray(parts.trained(maps)), np.asarray(whole(images))) < 0.01


def test_a_network_gives_batch_after_batch_in_their_order() -> None:
    weights = backbone.load_weights("random").convolutions
    network = backbone.build(weights, image_size=32, precision="float32")
    batches = np.random.default_rng(0).integers(0, 256, (7, 2, 32, 32, 3)).astype(np.uint8)
    expected = [network.predict_on_batch(batch) for batch in batches]
    assert list(backbone.run(network, iter([]))) == []
    np.testing.assert_array_equal(list(backbone.run(network, iter(batches))), expected)


def test_two_batches_are_in_a_network_at_a_time() -> None:
    import keras
    import tensorflow as tf

    both = threading.Barrier(2)

    def wait(batch: tf.Tensor) -> tf.Tensor:
        both.wait(timeout=20)  # breaks, which is an error, where the other does not come
        return batch

    inputs = keras.Input((3,), dtype="uint8")
    waiting = keras.layers.Lambda(
        lambda x: tf.ensure_shape(tf.numpy_function(wait, [x], tf.uint8), x.shape), dtype="uint8"
    )
    network = keras.Model(inputs, waiting(inputs))
    batches = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    np.testing.assert_array_equal(list(backbone.run(network, iter(batches))), batches)


def test_what_goes_wrong_with_a_batch_is_met_in_its_place() -> None:
    import keras

    inputs = keras.Input((3,))
    network = keras.Model(inputs, keras.layers.Rescaling(2.0)(inputs))

    def batches() -> Iterator[np.ndarray]:
        yield np.ones((2, 3), np.float32)
        raise ValueError("the second")

    with pytest.raises(ValueError, match="the second"):
        list(backbone.run(network, batches()))


def test_batches_are_made_ahead_until_nobody_takes_them() -> None:
    made: list[int] = []

    def batches() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            yield number

    before = threading.active_count()
    with closing(backbone.ahead(batches(), depth=2)) as taken:
        assert list(itertools.islice(taken, 3)) == [0, 1, 2]
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline, "the thread goes on"
        time.sleep(0.01)
    assert len(made) <= 3 + 2 + 1


def test_what_goes_wrong_ahead_is_met_in_its_place() -> None:
    def batches() -> Iterator[int]:
        yield 1
        raise ValueError("the second")

    taken = backbone.ahead(batches())
    assert next(taken) == 1
    with pytest.raises(ValueError, match="the second"):
        next(taken)
    assert list(backbone.ahead(iter([1, 2, 3]), depth=1)) == [1, 2, 3]
