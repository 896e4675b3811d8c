"""ResNet50 without its top: weights from anywhere, BatchNorm folded in, float32 or bfloat16.

Weights are read and folded with numpy alone, so that the process that hands them out needs no
TensorFlow; Keras is imported where the network is built.
"""

import contextlib
import hashlib
import os
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from leafnet import storage
from leafnet.errors import UserError

if TYPE_CHECKING:
    import keras

Batch = TypeVar("Batch")

FEATURES = 2048
# Residual blocks of each stage; the stem before them is stage 1.
_BLOCKS = {2: 3, 3: 4, 4: 6, 5: 3}
_AT_ONCE = 2  # batches that are in the network at a time, see `run`
# What Keras's ResNet50 adds to the variance (keras/src/applications/resnet.py).
_EPSILON = 1.001e-5
# keras.applications.resnet50.preprocess_input, "caffe" mode: BGR minus the ImageNet mean, 0..255.
MEAN_BGR = (103.939, 116.779, 123.68)

_IMAGENET_URL = (
    "https://storage.googleapis.com/tensorflow/keras-applications/resnet/"
    "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
)
_IMAGENET_MD5 = "4d473c1dd8becc155b73f8504c6f6626"  # keras/src/applications/resnet.py

Array = NDArray[np.float32]


class Weights(NamedTuple):
    """Folded weights: convolution name -> (kernel [h, w, in, out], bias [out]), float32."""

    convolutions: dict[str, tuple[Array, Array]]
    fingerprint: str  # sha256 over the names and numbers before folding
    source: str


def convolutions() -> Iterator[tuple[str, str, tuple[int, int, int, int]]]:
    """(convolution, its BatchNorm, kernel shape), in the order of Keras's layers.

    The architecture is He et al. 2015, arXiv:1512.03385, table 1, with the stride in the first
    1x1 convolution of a stage, as Keras has it.
    """
    yield "conv1_conv", "conv1_bn", (7, 7, 3, 64)
    inputs = 64
    for stage, blocks in _BLOCKS.items():
        width = 16 * 2**stage
        for block in range(1, blocks + 1):
            shapes = {
                1: (1, 1, inputs, width),
                2: (3, 3, width, width),
                0: (1, 1, inputs, 4 * width),
                3: (1, 1, width, 4 * width),
            }
            for number, shape in shapes.items():
                if number != 0 or block == 1:
                    name = f"conv{stage}_block{block}_{number}"
                    yield f"{name}_conv", f"{name}_bn", shape
            inputs = 4 * width


def load_weights(source: str, *, seed: int = 0) -> Weights:
    """The weights named `source`, checked against the architecture and folded.

    Args:
        source: `imagenet` (downloaded once into Keras's cache), `random` (Glorot uniform from
            `seed`), or the path or URL of an HDF5 file that Keras wrote, `.h5` or `.weights.h5`,
            with or without the classification top.
        seed: for `random` only.

    Raises:
        UserError: the file is missing, no HDF5, or of another architecture (the first layer that
            differs is named), or ImageNet weights cannot be downloaded.
    """
    if source == "random":
        raw = _random(seed)
    elif source == "imagenet":
        raw = _read_hdf5(_imagenet_file())
    else:
        try:
            with storage.local_copy(source) as path:
                raw = _read_hdf5(path, shown=source)
        except FileNotFoundError:
            raise UserError(
                "no-weights", f"--weights {source} does not exist; give imagenet, random or a file"
            ) from None
    digest = hashlib.sha256()
    for name, array in raw.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return Weights(_fold(raw), digest.hexdigest(), source)


def imagenet_path() -> Path:
    """Where Keras keeps the ImageNet weights, whether they are there or not."""
    home = os.environ.get("KERAS_HOME", os.path.join(os.path.expanduser("~"), ".keras"))
    return Path(home) / "models" / _IMAGENET_URL.rsplit("/", 1)[-1]


def is_imagenet(data: bytes) -> bool:
    """True for the file of the ImageNet weights, whole and unchanged."""
    return hashlib.md5(data).hexdigest() == _IMAGENET_MD5


def _imagenet_file() -> str:
    """The path of Keras's own cached file, downloaded when it is not there."""
    path = imagenet_path()
    if not path.exists():
        try:
            data = storage.read_bytes(_IMAGENET_URL)
        except Exception as error:  # whatever the network, a proxy or a certificate can do
            raise UserError(
                "no-imagenet-weights",
                f"cannot download the ImageNet weights ({type(error).__name__}: {error}); copy "
                f"{path.name} from a machine that can into {path.parent}, or give its path or URL "
                "with --weights, or check the pipeline with --weights random",
            ) from None
        if not is_imagenet(data):
            raise UserError("bad-download", f"{_IMAGENET_URL} came damaged; try again")
        storage.write_bytes(str(path), data)
    return str(path)


def _random(seed: int) -> dict[str, Array]:
    """Keras's own initial values: Glorot uniform kernels, BatchNorm that changes nothing."""
    generator = np.random.default_rng(seed)
    raw: dict[str, Array] = {}
    for conv, norm, shape in convolutions():
        area = shape[0] * shape[1]
        limit = np.sqrt(6.0 / (area * (shape[2] + shape[3])))
        raw[f"{conv}/kernel"] = generator.uniform(-limit, limit, shape).astype(np.float32)
        zeros, ones = np.zeros(shape[3], np.float32), np.ones(shape[3], np.float32)
        raw[f"{conv}/bias"] = zeros
        raw[f"{norm}/gamma"], raw[f"{norm}/beta"] = ones, zeros
        raw[f"{norm}/moving_mean"], raw[f"{norm}/moving_variance"] = zeros, ones
    return raw


def _read_hdf5(path: str, *, shown: str | None = None) -> dict[str, Array]:
    """`layer/variable` -> array, for every layer of the architecture, from either Keras format."""
    shown = shown or path
    try:
        file = h5py.File(path, "r")
    except OSError:
        if not os.path.exists(path):
            raise FileNotFoundError(path) from None
        raise UserError(
            "bad-weights", f"--weights {shown} is not an HDF5 file that Keras wrote"
        ) from None
    raw: dict[str, Array] = {}
    with file:
        root = file.get("model_weights", file)
        keras_3 = "layers" in root
        for i, (conv, norm, shape) in enumerate(convolutions()):
            suffix = f"_{i}" if i else ""
            places = {
                conv: (f"layers/conv2d{suffix}/vars", ("kernel", "bias")),
                norm: (
                    f"layers/batch_normalization{suffix}/vars",
                    ("gamma", "beta", "moving_mean", "moving_variance"),
                ),
            }
            for layer, (place, variables) in places.items():
                for j, variable in enumerate(variables):
                    expected = shape if variable == "kernel" else shape[3:]
                    inside = f"{place}/{j}" if keras_3 else _keras_2_place(root, layer, variable)
                    raw[f"{layer}/{variable}"] = _checked(root, inside, expected, layer, shown)
    return raw


def _keras_2_place(root: "h5py.Group", layer: str, variable: str) -> str:
    """Where Keras's older HDF5 layout keeps a variable: its group lists the names."""
    if layer not in root:
        return f"{layer}/{variable}"
    for name in root[layer].attrs.get("weight_names", ()):
        text = name.decode() if isinstance(name, bytes) else str(name)
        if text.rsplit("/", 1)[-1].split(":")[0] == variable:
            return f"{layer}/{text}"
    return f"{layer}/{variable}"


def _checked(
    root: "h5py.Group", place: str, expected: tuple[int, ...], layer: str, shown: str
) -> Array:
    found = root.get(place, None)
    if not isinstance(found, h5py.Dataset) or found.shape != expected:
        has = "nothing" if found is None else f"shape {getattr(found, 'shape', 'of a group')}"
        raise UserError(
            "other-architecture",
            f"--weights {shown} is not a ResNet50: layer {layer} should hold {place} of shape "
            f"{expected}, the file has {has}",
        )
    return np.asarray(found[()], dtype=np.float32)


def _fold(raw: dict[str, Array]) -> dict[str, tuple[Array, Array]]:
    """Each BatchNorm, a fixed affine map, multiplied into the convolution before it.

    In float64 and rounded once: the folded network then differs from the stock one by the
    rounding of a forward pass alone.
    """
    folded = {}
    for conv, norm, _ in convolutions():
        gamma, beta, mean, variance = (
            raw[f"{norm}/{name}"].astype(np.float64)
            for name in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        scale = gamma / np.sqrt(variance + _EPSILON)
        kernel = raw[f"{conv}/kernel"] * scale
        bias = (raw[f"{conv}/bias"] - mean) * scale + beta
        folded[conv] = (kernel.astype(np.float32), bias.astype(np.float32))
    return folded


def build(
    weights: dict[str, tuple[Array, Array]],
    *,
    image_size: int,
    precision: str,
    pooled: bool = True,
) -> "keras.Model":
    """The folded network: RGB in 0..255, [B, image_size, image_size, 3] -> [B, 2048] float32.

    Input scaling is inside, so that training, evaluation and scoring cannot drift apart. The
    average over the last feature map is taken in float32 also where the network runs in bfloat16.

    Args:
        weights: as `Weights.convolutions`.
        image_size: pixels; the network is built for squares of this size.
        precision: `float32` or `bfloat16`, of convolutions and their weights.
        pooled: False leaves the average out: the last feature map, [B, h, w, 2048].
    """
    import keras

    maps_in = keras.Input((image_size, image_size, 3), dtype=precision)
    folded = keras.Model(maps_in, _layers(maps_in, precision, range(1, 6)), name="resnet50")
    for name, (kernel, bias) in weights.items():
        # The weights are for BGR. To turn their channels round once is exact, and spares turning
        # every photograph's, which took 5 % of the forward pass on two cores.
        folded.get_layer(name).set_weights(
            [kernel[:, :, ::-1] if name == "conv1_conv" else kernel, bias]
        )

    images = keras.Input((image_size, image_size, 3), dtype="float32", name="rgb")
    centred = images - np.array(MEAN_BGR[::-1], np.float32)
    features = keras.ops.cast(folded(keras.ops.cast(centred, precision)), "float32")
    if pooled:
        features = keras.ops.mean(features, axis=(1, 2))
    model = keras.Model(images, features, name="backbone")
    model.trainable = False
    return model


class Parts(NamedTuple):
    """The network in two, for squares of any size."""

    frozen: "keras.Model"  # RGB in 0..255 [B, S, S, 3] float32 -> maps [B, h, w, c] in `precision`
    trained: "keras.Model"  # maps -> features [B, 2048] float32; its variables are float32


def build_parts(
    weights: dict[str, tuple[Array, Array]], *, precision: str, blocks: int | Literal["all"]
) -> Parts:
    """The folded network cut before its last `blocks` stages, which can be trained.

    One after the other they compute what `build` computes. The variables of the trained part are
    float32 in either precision, rounded to it as they are used: an update at a low rate is smaller
    than what bfloat16 tells apart.

    Args:
        weights: as `Weights.convolutions`.
        precision: `float32` or `bfloat16`, of convolutions.
        blocks: stages from the end, 1 to 4; `all`: these and the stem.
    """
    import keras

    first = 1 if blocks == "all" else 6 - blocks
    images = keras.Input((None, None, 3), dtype="float32", name="rgb")
    # Channels are turned as in `build`, but for a stem that is trained, whose kernel stays for BGR.
    turned = first > 1
    centred = (images if turned else images[..., ::-1]) - np.array(
        MEAN_BGR[::-1] if turned else MEAN_BGR, np.float32
    )
    below = _layers(keras.ops.cast(centred, precision), precision, range(1, first))
    frozen = keras.Model(images, below, name="frozen")
    frozen.trainable = False

    maps = keras.Input(tuple(below.shape[1:]), dtype=precision, name="maps")
    policy = "mixed_bfloat16" if precision == "bfloat16" else precision
    above = keras.ops.cast(_layers(maps, policy, range(first, 6)), "float32")
    trained = keras.Model(maps, keras.ops.mean(above, axis=(1, 2)), name="trained")
    for part in (frozen, trained):
        for layer in part.layers:
            if layer.weights:
                kernel, bias = weights[layer.name]
                if turned and layer.name == "conv1_conv":
                    kernel = kernel[:, :, ::-1]
                layer.set_weights([kernel, bias])
    return Parts(frozen, trained)


def stage_of(convolution: str) -> int:
    """The stage that a convolution belongs to, 1 (the stem) to 5.

    >>> stage_of("conv1_conv"), stage_of("conv5_block3_2_conv")
    (1, 5)
    """
    return int(convolution[len("conv")])


def fingerprint(weights: dict[str, tuple[Array, Array]]) -> str:
    """sha256 over the names and numbers of folded weights."""
    digest = hashlib.sha256()
    for name, arrays in sorted(weights.items()):
        digest.update(name.encode())
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _layers(x: "keras.KerasTensor", precision: str, stages: range) -> "keras.KerasTensor":
    """The `stages` of Keras's ResNet50 without BatchNorm, and without weights that matter.

    Built here and not cloned from `keras.applications`, whose random initial weights took three
    quarters of the time of building.
    """
    import keras

    shapes = {conv: shape for conv, _, shape in convolutions()}

    def conv(x: "keras.KerasTensor", name: str, stride: int = 1) -> "keras.KerasTensor":
        height, width, _, filters = shapes[f"{name}_conv"]
        return keras.layers.Conv2D(
            filters,
            (height, width),
            strides=stride,
            padding="valid" if name == "conv1" else "same",
            kernel_initializer="zeros",
            dtype=precision,
            name=f"{name}_conv",
        )(x)

    def relu(x: "keras.KerasTensor") -> "keras.KerasTensor":
        return keras.layers.Activation("relu", dtype=precision)(x)

    if 1 in stages:
        x = relu(conv(keras.layers.ZeroPadding2D(3, dtype=precision)(x), "conv1", stride=2))
        x = keras.layers.ZeroPadding2D(1, dtype=precision)(x)
        x = keras.layers.MaxPooling2D(3, strides=2, dtype=precision)(x)
    for stage, blocks in _BLOCKS.items():
        if stage not in stages:
            continue
        for block in range(1, blocks + 1):
            name = f"conv{stage}_block{block}"
            stride = 2 if block == 1 and stage > 2 else 1
            shortcut = conv(x, f"{name}_0", stride) if block == 1 else x
            x = relu(conv(x, f"{name}_1", stride))
            x = conv(relu(conv(x, f"{name}_2")), f"{name}_3")
            x = relu(keras.layers.Add(dtype=precision)([shortcut, x]))
    return x


def run(network: "keras.Model", batches: Iterable[NDArray[np.uint8]]) -> Iterator[Array]:
    """Outputs of `network` for each of `batches`, all of one shape, in their order.

    Two are on their way at a time. In each operation threads wait for the slowest of them, longest
    where something else runs on the machine, and another batch gives them work: on two cores, with
    Ray beside it, the same network gives 12 % more features.
    """
    network.make_predict_function()  # else the first two batches would both make it
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        on_their_way: deque[Future[Array]] = deque()
        for batch in batches:
            on_their_way.append(pool.submit(network.predict_on_batch, batch))
            # One more than is worked on, so that nothing waits while an output is put away.
            if len(on_their_way) > _AT_ONCE:
                yield on_their_way.popleft().result()
        while on_their_way:
            yield on_their_way.popleft().result()


def ahead(batches: Iterator[Batch], *, depth: int = 2) -> Generator[Batch, None, None]:
    """`batches`, made by a thread, `depth` of them, while the network works on those before.

    Close it where not all are taken: the thread ends then.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.2)
                return

    def make() -> None:
        try:
            for batch in batches:
                put(batch)
                if closed.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=make, daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()


def limit_threads(threads: int, *, gpu: bool) -> None:
    """Set TensorFlow up in this process: as many threads as Ray gave it, GPU memory as needed.

    TensorFlow keeps the number of threads with which it ran its first operation.
    """
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    for device in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(device, True)
    if not gpu:
        tf.config.set_visible_devices([], "GPU")


def choose_precision(wanted: str, *, compute_capability: tuple[int, int] | None) -> tuple[str, str]:
    """(precision, why) on this machine, for `wanted` one of auto, float32, bfloat16.

    Args:
        wanted: a precision that is named is taken.
        compute_capability: of the GPU that is used, or None on a CPU.
    """
    if wanted != "auto":
        return wanted, "as set"
    if compute_capability is not None:
        shown = ".".join(map(str, compute_capability))
        if compute_capability >= (8, 0):
            return "bfloat16", f"GPU of compute capability {shown} has it"
        return "float32", f"GPU of compute capability {shown} lacks bfloat16"
    flags = _cpu_flags()
    for flag in ("amx_bf16", "avx512_bf16"):
        if flag in flags:
            return "bfloat16", f"the processor has {flag}"
    return "float32", "the processor lacks bfloat16 instructions"


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())
