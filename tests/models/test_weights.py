import hashlib
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import h5py
import numpy as np
import pytest

from leafnet.core import hardware, storage
from leafnet.core.errors import UserError
from leafnet.models import resnet as models_resnet
from leafnet.models import runtime
from leafnet.models import weights as models_weights
from leafnet.models.weights import (
    FEATURES,
    fingerprint,
    imagenet_path,
    is_imagenet,
    load_weights,
    stage_of,
)

SIZE = 64


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (4, SIZE, SIZE, 3)).astype(np.uint8)


def stock_features(stock: Any, images: np.ndarray) -> np.ndarray:
    from keras.applications.resnet50 import preprocess_input

    return np.asarray(stock(preprocess_input(images.astype(np.float32))))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture
def one_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """The file of an architecture of one convolution with its BatchNorm, and what is in it."""
    only = ("conv1_conv", "conv1_bn", (7, 7, 3, 5))
    monkeypatch.setattr(models_weights, "convolutions", lambda: iter([only]))
    generator = np.random.default_rng(3)
    values = {
        "conv1_conv/kernel": generator.normal(0, 1, (7, 7, 3, 5)),
        "conv1_conv/bias": generator.normal(0, 1, 5),
        "conv1_bn/gamma": generator.uniform(0.5, 2, 5),
        "conv1_bn/beta": generator.normal(0, 1, 5),
        "conv1_bn/moving_mean": generator.normal(0, 1, 5),
        "conv1_bn/moving_variance": np.array([2.0, 0.1, 1e-5, 1e-6, 0.0]),
    }
    raw = {name: array.astype(np.float32) for name, array in values.items()}
    write_older_layout(tmp_path / "one.h5", raw)
    return tmp_path / "one.h5", raw


def write_older_layout(path: Path, raw: dict[str, Any], *, under: str = "") -> None:
    with h5py.File(path, "w") as file:
        for name, array in raw.items():
            file[f"{under}{name}"] = array


def test_the_fingerprint_is_over_names_and_numbers_before_folding(
    one_layer: tuple[Path, dict[str, Any]],
) -> None:
    path, raw = one_layer
    content = b"".join(name.encode() + array.tobytes() for name, array in raw.items())
    weights = load_weights(str(path))
    assert weights.fingerprint == hashlib.sha256(content).hexdigest()
    assert weights.source == str(path)


def test_a_whole_model_in_double_precision_has_the_same_weights(
    one_layer: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, raw = one_layer
    doubles = {name: array.astype(np.float64) for name, array in raw.items()}
    doubles["predictions/kernel"] = np.zeros((5, 2))
    write_older_layout(tmp_path / "whole.h5", doubles, under="model_weights/")
    whole = load_weights(str(tmp_path / "whole.h5"))
    assert whole.fingerprint == load_weights(str(path)).fingerprint


def test_the_variable_is_found_by_its_name_in_the_layer(
    one_layer: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, raw = one_layer
    with h5py.File(tmp_path / "named.h5", "w") as file:
        for name, array in raw.items():
            layer, variable = name.split("/")
            file[f"{layer}/scope/{layer}/{variable}:0"] = array
        for layer, group in file.items():
            names = [name.split("/")[1] for name in raw if name.startswith(f"{layer}/")]
            group.attrs["weight_names"] = [f"scope/{layer}/{name}:0" for name in names[::-1]]
    named = load_weights(str(tmp_path / "named.h5"))
    assert named.fingerprint == load_weights(str(path)).fingerprint


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ({"conv1_conv/kernel": np.zeros((7, 7, 4, 5))}, r"conv1_conv .* has shape \(7, 7, 4, 5\)"),
        ({"conv1_bn/beta": np.zeros(4)}, r"conv1_bn .* shape \(5,\), the file has shape \(4,\)"),
        ({"conv1_conv/bias": None}, "conv1_conv/bias of shape .* the file has nothing"),
        (
            {"conv1_conv/bias": None, "conv1_conv/bias/deeper": np.zeros(5)},
            "conv1_conv/bias of shape .* has shape of a group",
        ),
    ],
)
def test_weights_of_another_shape_are_refused(
    one_layer: tuple[Path, dict[str, Any]], tmp_path: Path, harm: dict[str, Any], message: str
) -> None:
    harmed = {name: array for name, array in (one_layer[1] | harm).items() if array is not None}
    write_older_layout(tmp_path / "harmed.h5", harmed)
    with pytest.raises(UserError, match=message) as caught:
        load_weights(str(tmp_path / "harmed.h5"))
    assert caught.value.reason == "other-architecture"


def test_what_is_refused_is_named_as_it_was_given(tmp_path: Path) -> None:
    """Not by the copy that is read."""
    fs = fsspec.filesystem("memory")
    for name, reason in [("text", "bad-weights"), ("empty", "other-architecture")]:
        path = tmp_path / name
        path.write_text("hello") if name == "text" else h5py.File(path, "w").close()
        fs.pipe_file(f"/weights/{name}.h5", path.read_bytes())
        with pytest.raises(UserError, match=f"--weights memory://weights/{name}.h5 ") as caught:
            load_weights(f"memory://weights/{name}.h5")
        assert caught.value.reason == reason


def test_fingerprint_of_folded_weights_is_over_names_and_all_numbers() -> None:
    one, two = np.arange(3, dtype=np.float32), np.arange(2, dtype=np.float32)
    found = fingerprint({"a": (one, two), "b": (two, one)})
    numbers = one.tobytes() + two.tobytes(), two.tobytes() + one.tobytes()
    assert found == hashlib.sha256(b"a" + numbers[0] + b"b" + numbers[1]).hexdigest()
    assert found == fingerprint({"b": (two, one), "a": (one, two)})


def test_layers_are_those_of_keras_in_its_order(stock: Any) -> None:
    import keras

    kinds = (keras.layers.Conv2D, keras.layers.BatchNormalization)
    layers = [layer for layer in stock.layers if isinstance(layer, kinds)]
    convolutions = [layer for layer in layers if isinstance(layer, keras.layers.Conv2D)]
    norms = [layer.name for layer in layers if layer not in convolutions]
    found = list(models_weights.convolutions())
    assert [(conv, shape) for conv, _, shape in found] == [
        (layer.name, tuple(layer.kernel.shape)) for layer in convolutions
    ]
    assert [norm for _, norm, _ in found] == norms
    assert stock.output_shape == (None, FEATURES)


def test_folding_does_what_keras_does_in_two_layers(
    stock: Any, one_layer: tuple[Path, dict[str, Any]]
) -> None:
    """With the small variances of real weights, to which Keras adds its epsilon."""
    import keras

    path, raw = one_layer
    epsilon = stock.get_layer("conv1_bn").epsilon
    assert {
        layer.epsilon
        for layer in stock.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    } == {epsilon}
    two = keras.Sequential(
        [
            keras.Input((9, 9, 3)),
            keras.layers.Conv2D(5, 7),
            keras.layers.BatchNormalization(epsilon=epsilon),
        ]
    )
    two.set_weights(list(raw.values()))
    images = np.random.default_rng(4).normal(size=(2, 9, 9, 3)).astype(np.float32)
    kernel, bias = load_weights(str(path)).convolutions["conv1_conv"]
    assert kernel.dtype == bias.dtype == np.float32
    found = keras.ops.conv(images, kernel) + bias
    np.testing.assert_allclose(found, two(images), rtol=1e-4, atol=1e-4)


def test_folded_equals_stock_keras(stock: Any, weights_file: str, images: np.ndarray) -> None:
    weights = load_weights(weights_file)
    folded = models_resnet.build(weights.convolutions, image_size=SIZE, precision="float32")
    found = np.asarray(folded(images))
    assert found.shape == (4, FEATURES)
    assert relative_error(found, stock_features(stock, images)) < 1e-5
    assert not any("bn" in layer.name for layer in folded.get_layer("resnet50").layers)


def test_bfloat16_is_close(stock: Any, weights_file: str, images: np.ndarray) -> None:
    weights = load_weights(weights_file)
    folded = models_resnet.build(weights.convolutions, image_size=SIZE, precision="bfloat16")
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
    old, new = load_weights(str(path)), load_weights(weights_file)
    assert old.fingerprint == new.fingerprint
    for name, (kernel, bias) in new.convolutions.items():
        np.testing.assert_array_equal(old.convolutions[name][0], kernel)
        np.testing.assert_array_equal(old.convolutions[name][1], bias)


def test_random_weights_follow_the_seed() -> None:
    first, again, other = (load_weights("random", seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    kernel, bias = first.convolutions["conv1_conv"]
    assert kernel.shape == (7, 7, 3, 64)
    # Glorot and Bengio 2010: a uniform distribution of variance 2 / (fan in + fan out); the
    # BatchNorm divides by sqrt(1 + 1.001e-5).
    assert kernel.var() == pytest.approx(2 / (49 * (3 + 64)), rel=0.05)
    assert not bias.any()
    for name, fans in {
        "conv2_block1_2_conv": 3 * 3 * (64 + 64),
        "conv3_block1_0_conv": 1 * 1 * (256 + 512),
    }.items():
        kernel, _ = first.convolutions[name]
        assert kernel.max() == pytest.approx(np.sqrt(6 / fans), rel=1e-3)
        assert kernel.min() == pytest.approx(-np.sqrt(6 / fans), rel=1e-3)
    assert load_weights("random").fingerprint == first.fingerprint


def test_other_architecture_is_refused_by_layer(tmp_path: Path) -> None:
    import keras

    path = tmp_path / "v2.weights.h5"
    other = keras.applications.ResNet50V2(include_top=False, weights=None)
    other.save_weights(path)
    with pytest.raises(UserError, match="is not a ResNet50: layer conv2_block1_1_conv") as caught:
        load_weights(str(path))
    assert caught.value.reason == "other-architecture"


@pytest.mark.parametrize("layout", ["layers", "model_weights", "conv1_conv"])
def test_weights_in_another_file_are_not_followed(tmp_path: Path, layout: str) -> None:
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["conv1_conv/kernel"] = np.zeros((7, 7, 3, 64), np.float32)
    path = tmp_path / "w.h5"
    with h5py.File(path, "w") as file:
        file[layout] = h5py.ExternalLink(other, "/")
    with pytest.raises(UserError, match=f"w.h5: {layout} of .* is a link; give a file") as caught:
        load_weights(str(path))
    assert caught.value.reason == "bad-weights"


def test_no_such_weights() -> None:
    with pytest.raises(UserError, match=r"--weights none\.h5 does not exist"):
        load_weights("none.h5")


def test_weights_that_are_no_hdf5(tmp_path: Path) -> None:
    path = tmp_path / "w.h5"
    path.write_text("hello")
    with pytest.raises(UserError, match="is not an HDF5 file"):
        load_weights(str(path))


def test_imagenet_without_network_says_the_ways_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(models_weights, "_IMAGENET_URL", "http://127.0.0.1:9/resnet50_notop.h5")
    with pytest.raises(UserError, match="--weights random") as caught:
        load_weights("imagenet")
    assert caught.value.reason == "no-imagenet-weights"
    assert str(tmp_path / "models") in str(caught.value)


def test_imagenet_takes_the_file_in_keras_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights_file: str
) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    cached = tmp_path / "models" / models_weights._IMAGENET_URL.rsplit("/", 1)[-1]
    cached.parent.mkdir()
    cached.write_bytes(Path(weights_file).read_bytes())
    weights = load_weights("imagenet")
    assert weights.fingerprint == load_weights(weights_file).fingerprint


def test_imagenet_is_the_file_that_keras_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    from keras.src.applications import resnet

    assert resnet.WEIGHTS_HASHES["resnet50"][1] == models_weights._IMAGENET_MD5
    name = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
    assert f"{resnet.BASE_WEIGHTS_PATH}{name}" == models_weights._IMAGENET_URL
    monkeypatch.delenv("KERAS_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert imagenet_path() == Path(f"/home/somebody/.keras/models/{name}")
    monkeypatch.setenv("KERAS_HOME", "/elsewhere")
    assert imagenet_path() == Path(f"/elsewhere/models/{name}")


def test_imagenet_is_downloaded_once_and_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one_layer: tuple[Path, dict[str, Any]]
) -> None:
    data = one_layer[0].read_bytes()
    come = [data[:-1], data]
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(storage, "read_bytes", lambda url: come.pop(0))
    monkeypatch.setattr(models_weights, "_IMAGENET_MD5", hashlib.md5(data).hexdigest())
    with pytest.raises(UserError, match="came damaged") as caught:
        load_weights("imagenet")
    assert caught.value.reason == "bad-download"
    assert not imagenet_path().exists()
    for _ in range(2):
        weights = load_weights("imagenet")
        assert weights.fingerprint == load_weights(str(one_layer[0])).fingerprint
        assert weights.source == "imagenet"
    assert is_imagenet(imagenet_path().read_bytes())
    assert come == []


@pytest.mark.parametrize(
    ("wanted", "capability", "expected"),
    [
        ("float32", (9, 0), "float32"),
        ("bfloat16", None, "bfloat16"),
        ("auto", (9, 0), "bfloat16"),
        ("auto", (8, 0), "bfloat16"),
        ("auto", (7, 5), "float32"),
    ],
)
def test_precision(wanted: str, capability: tuple[int, int] | None, expected: str) -> None:
    assert hardware.choose_precision(wanted, compute_capability=capability)[0] == expected


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
    monkeypatch.setattr(hardware, "_processor", lambda: ("", frozenset(flags.split())))
    precision, why = hardware.choose_precision("auto", compute_capability=None)
    assert precision == expected
    assert why


def test_a_processor_tells_its_name_and_flags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stated = tmp_path / "cpuinfo"
    stated.write_text(
        "processor\t: 0\nmodel name\t: Any 9\nflags\t\t: fpu avx512_bf16\nbugs\t\t: amx_bf16\n"
    )
    monkeypatch.setattr(hardware, "Path", {"/proc/cpuinfo": stated}.get)
    assert (hardware.processor(), hardware.bfloat16_instructions()) == ("Any 9", "avx512_bf16")
    stated.unlink()
    assert hardware.bfloat16_instructions() == ""


def test_the_precision_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = hardware.choose_precision
    assert choose("float32", compute_capability=(9, 0))[1] == "as set"
    assert "capability 8.6 has it" in choose("auto", compute_capability=(8, 6))[1]
    assert "capability 7.0 lacks bfloat16" in choose("auto", compute_capability=(7, 0))[1]
    monkeypatch.setattr(hardware, "_processor", lambda: ("", frozenset({"avx512_bf16"})))
    assert choose("auto", compute_capability=None)[1] == "the processor has avx512_bf16"


@pytest.mark.parametrize("gpu", [True, False])
def test_tensorflow_is_limited_to_the_threads_of_the_job(
    monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    import tensorflow as tf

    told: list[Any] = []

    def note(name: str) -> Any:
        return lambda *args: told.append((name, *args))

    for name in ("set_intra_op_parallelism_threads", "set_inter_op_parallelism_threads"):
        monkeypatch.setattr(tf.config.threading, name, note(name))
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", note("growth"))
    monkeypatch.setattr(tf.config, "set_visible_devices", note("visible"))
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [f"{kind} 0", f"{kind} 1"])
    hardware.limit_threads(3, gpu=gpu)
    assert sorted(told) == [
        ("growth", "GPU 0", True),
        ("growth", "GPU 1", True),
        ("set_inter_op_parallelism_threads", 3),
        ("set_intra_op_parallelism_threads", 3),
        *([] if gpu else [("visible", [], "GPU")]),
    ]


@pytest.fixture(scope="module")
def half_precision(weights_file: str) -> tuple[Any, Any]:
    """The network in bfloat16, with and without its last average."""
    weights = load_weights(weights_file).convolutions
    pooled, maps = (
        models_resnet.build(weights, image_size=SIZE, precision="bfloat16", pooled=pooled)
        for pooled in (True, False)
    )
    return pooled, maps


def test_the_last_average_is_taken_in_float32(
    half_precision: tuple[Any, Any], images: np.ndarray
) -> None:
    pooled, unpooled = half_precision
    maps = np.asarray(unpooled(images))
    assert maps.shape == (4, 2, 2, FEATURES)
    np.testing.assert_allclose(pooled(images), maps.mean(axis=(1, 2)), rtol=1e-5, atol=1e-7)


def test_bfloat16_is_the_precision_of_every_layer(half_precision: tuple[Any, Any]) -> None:
    network = half_precision[0].get_layer("resnet50")
    assert {layer.compute_dtype for layer in network.layers[1:]} == {"bfloat16"}
    assert network.inputs[0].dtype == "bfloat16"
    assert {str(weight.dtype) for weight in network.weights} == {"bfloat16"}
    assert not half_precision[0].trainable_variables


@pytest.mark.parametrize("blocks", [1, 4, "all"])
def test_the_two_parts_together_are_the_network(
    weights_file: str, images: np.ndarray, blocks: Any
) -> None:
    weights = load_weights(weights_file).convolutions
    parts = models_resnet.build_parts(weights, precision="float32", blocks=blocks)
    whole = models_resnet.build(weights, image_size=SIZE, precision="float32")
    found = np.asarray(parts.trained(parts.frozen(images.astype(np.float32))))
    assert relative_error(found, np.asarray(whole(images))) < 1e-5
    stages = {stage_of(layer.name) for layer in parts.trained.layers if layer.weights}
    assert stages == {1: {5}, 4: {2, 3, 4, 5}, "all": {1, 2, 3, 4, 5}}[blocks]
    assert not parts.frozen.trainable_variables


def test_trained_weights_are_float32_in_bfloat16(weights_file: str, images: np.ndarray) -> None:
    weights = load_weights(weights_file).convolutions
    parts = models_resnet.build_parts(weights, precision="bfloat16", blocks=1)
    maps = parts.frozen(images.astype(np.float32))
    assert maps.dtype == "bfloat16"
    assert {variable.dtype for variable in parts.trained.trainable_variables} == {"float32"}
    whole = models_resnet.build(weights, image_size=SIZE, precision="bfloat16")
    assert relative_error(np.asarray(parts.trained(maps)), np.asarray(whole(images))) < 0.01


def test_a_network_gives_batch_after_batch_in_their_order() -> None:
    weights = load_weights("random").convolutions
    network = models_resnet.build(weights, image_size=32, precision="float32")
    batches = np.random.default_rng(0).integers(0, 256, (7, 2, 32, 32, 3)).astype(np.uint8)
    expected = [network.predict_on_batch(batch) for batch in batches]
    assert list(runtime.run(network, iter([]))) == []
    np.testing.assert_array_equal(list(runtime.run(network, iter(batches))), expected)


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
    np.testing.assert_array_equal(list(runtime.run(network, iter(batches))), batches)


def test_what_goes_wrong_with_a_batch_is_met_in_its_place() -> None:
    import keras

    inputs = keras.Input((3,))
    network = keras.Model(inputs, keras.layers.Rescaling(2.0)(inputs))

    def batches() -> Iterator[np.ndarray]:
        yield np.ones((2, 3), np.float32)
        raise ValueError("the second")

    with pytest.raises(ValueError, match="the second"):
        list(runtime.run(network, batches()))


def test_batches_are_made_ahead_until_nobody_takes_them() -> None:
    made: list[int] = []

    def batches() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            yield number

    before = threading.active_count()
    with closing(runtime.ahead(batches(), depth=2)) as taken:
        assert list(itertools.islice(taken, 3)) == [0, 1, 2]
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline, "the thread goes on"
        time.sleep(0.01)
    assert len(made) <= 3 + 2 + 1


def test_two_batches_are_ready_beside_the_one_that_waits() -> None:
    made: list[int] = []

    def batches() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            yield number

    with closing(runtime.ahead(batches())) as taken:
        assert next(taken) == 0
        time.sleep(0.5)
        assert len(made) <= 1 + 2 + 1


def test_what_goes_wrong_ahead_is_met_in_its_place() -> None:
    def batches() -> Iterator[int]:
        yield 1
        raise ValueError("the second")

    taken = runtime.ahead(batches())
    assert next(taken) == 1
    with pytest.raises(ValueError, match="the second"):
        next(taken)
    assert list(runtime.ahead(iter([1, 2, 3]), depth=1)) == [1, 2, 3]


@pytest.mark.parametrize("suffix", [".weights.h5", ".h5"])
@pytest.mark.parametrize("kind", ["sequential", "functional"])
def test_a_resnet50_inside_another_model(
    kind: str, suffix: str, stock: Any, tmp_path: Path
) -> None:
    """As notebooks save it: the network, pooling and a head of their own, and a layer before it."""
    import keras

    before = keras.layers.Conv2D(3, 1, padding="same")
    head = keras.layers.Dense(3)
    if kind == "sequential":
        model = keras.Sequential([keras.Input((64, 64, 3)), before, stock, head])
    else:
        inputs = keras.Input((64, 64, 3))
        model = keras.Model(inputs, head(stock(before(inputs), training=False)))
    stock.save_weights(tmp_path / "alone.weights.h5")
    place = tmp_path / f"nested{suffix}"
    (model.save if suffix == ".h5" else model.save_weights)(place)
    found = models_weights.load_weights(str(place))
    alone = models_weights.load_weights(str(tmp_path / "alone.weights.h5"))
    assert found.fingerprint == alone.fingerprint
