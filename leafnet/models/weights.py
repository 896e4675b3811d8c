"""ResNet50 without its top: weights from anywhere, BatchNorm folded in, float32 or bfloat16.

Weights are read and folded with numpy alone, so that the process that hands them out needs no
TensorFlow; Keras is imported where the network is built.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.models import hdf5

FEATURES = 2048
# Residual blocks of each stage; the stem before them is stage 1.
BLOCKS = {2: 3, 3: 4, 4: 6, 5: 3}
# What Keras's ResNet50 adds to the variance (keras/src/applications/resnet.py).
_EPSILON = 1.001e-5
# keras.applications.resnet50.preprocess_input, "caffe" mode: BGR minus the ImageNet mean, 0..255.
MEAN_BGR = (103.939, 116.779, 123.68)

_IMAGENET_URL = (
    "https://storage.googleapis.com/tensorflow/keras-applications/resnet/"
    "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
)
_IMAGENET_MD5 = "4d473c1dd8becc155b73f8504c6f6626"  # keras/src/applications/resnet.py

_FIRST = (7, 7, 3, 64)  # kernel of the first convolution
_MOST_NESTED = 4  # groups; a model inside another is in the second

Array = NDArray[np.float32]
# Folded weights: convolution -> (kernel [h, w, in, out], bias [out]).
Convolutions = dict[str, tuple[Array, Array]]


class Weights(NamedTuple):
    """Folded weights and where they come from."""

    convolutions: Convolutions
    fingerprint: str  # sha256 over the names and numbers before folding
    source: str


def convolutions() -> Iterator[tuple[str, str, tuple[int, int, int, int]]]:
    """(convolution, its BatchNorm, kernel shape), in the order of Keras's layers.

    The architecture is He et al. 2015, arXiv:1512.03385, table 1, with the stride in the first
    1x1 convolution of a stage, as Keras has it.
    """
    yield "conv1_conv", "conv1_bn", (7, 7, 3, 64)
    inputs = 64
    for stage, blocks in BLOCKS.items():
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
    try:
        with file:
            return _raw(file, shown)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            "bad-weights", f"--weights {shown}: {error}; give a file with the weights itself"
        ) from None


def _raw(file: h5py.File, shown: str) -> dict[str, Array]:
    inner = hdf5.item(file, "model_weights")
    root = _holder(inner if isinstance(inner, h5py.Group) else file)
    keras_3 = "layers" in root.keys()  # noqa: SIM118
    raw: dict[str, Array] = {}
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


def _holder(root: "h5py.Group") -> "h5py.Group":
    """The group of the ResNet50: `root`, or of a model inside a Sequential or functional one."""
    groups = deque([(root, 0)])
    while groups:
        group, depth = groups.popleft()
        for place in ("layers/conv2d/vars/0", "conv1_conv"):
            found = hdf5.item(group, place)
            # A convolution of somebody's own beside it has another shape.
            if found is not None and getattr(found, "shape", _FIRST) == _FIRST:
                return group
        for name in group if depth < _MOST_NESTED else ():
            inside = hdf5.item(group, name)
            if isinstance(inside, h5py.Group):
                groups.append((inside, depth + 1))
    return root


def _keras_2_place(root: "h5py.Group", layer: str, variable: str) -> str:
    """Where Keras's older HDF5 layout keeps a variable: its group lists the names."""
    group = hdf5.item(root, layer)
    if group is None:
        return f"{layer}/{variable}"
    for name in group.attrs.get("weight_names", ()):
        text = name.decode() if isinstance(name, bytes) else str(name)
        if text.rsplit("/", 1)[-1].split(":")[0] == variable:
            return f"{layer}/{text}"
    # Inside another model the names stand with that model's group, and older ones end with `:0`.
    older = f"{layer}/{variable}:0"
    return older if hdf5.item(root, older) is not None else f"{layer}/{variable}"


def _checked(
    root: "h5py.Group", place: str, expected: tuple[int, ...], layer: str, shown: str
) -> Array:
    found = hdf5.item(root, place)
    if not isinstance(found, h5py.Dataset) or found.shape != expected:
        has = "nothing" if found is None else f"shape {getattr(found, 'shape', 'of a group')}"
        raise UserError(
            "other-architecture",
            f"--weights {shown} is not a ResNet50: layer {layer} should hold {place} of shape "
            f"{expected}, the file has {has}",
        )
    return np.asarray(found[()], dtype=np.float32)


def _fold(raw: dict[str, Array]) -> Convolutions:
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


def stage_of(convolution: str) -> int:
    """The stage that a convolution belongs to, 1 (the stem) to 5.

    >>> stage_of("conv1_conv"), stage_of("conv5_block3_2_conv")
    (1, 5)
    """
    return int(convolution[len("conv")])


def fingerprint(weights: Convolutions) -> str:
    """sha256 over the names and numbers of folded weights."""
    digest = hashlib.sha256()
    for name, arrays in sorted(weights.items()):
        digest.update(name.encode())
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
