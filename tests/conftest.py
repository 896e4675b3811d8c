"""What tests of several modules share."""

import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from leafnet.core import storage
from leafnet.data import shards, synthetic
from leafnet.data.images import fingerprint
from leafnet.data.shards import Shard, ShardIndex
from leafnet.metrics.thresholds import Review
from leafnet.models import bundle, weights
from leafnet.models.classifier import initial_head
from tests.left_out import leave_out, summary
from tests.support import s3_server
from tests.support.s3_server import Server

# Of a test with this mark and no limit of its own.
LIMITS_S = {"faults": 1800, "road": 900, "slow": 900, "ray": 900}


def pytest_configure() -> None:
    """Let Ctrl-C be sent to the tests and what they start, also in the background of a shell.

    There it is ignored, by children too.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests that are known to take long more than the time limit of pyproject.toml."""
    for item in items:
        for mark, limit_s in LIMITS_S.items():
            if item.get_closest_marker(mark) and not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(limit_s))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out, and why."""
    if lines := summary(terminalreporter.stats.get("skipped", [])):
        terminalreporter.section("left out")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray with two logical CPUs, the same for all tests that use it."""
    from leafnet.core.settings import RaySettings
    from leafnet.distributed import session

    with session.session(RaySettings(cpus=2)):
        yield


@pytest.fixture(scope="session")
def stock() -> Any:
    """Keras's own ResNet50 for 64 pixels whose biases and BatchNorms do something."""
    import keras

    keras.utils.set_random_seed(0)
    model = keras.applications.ResNet50(
        include_top=False, weights=None, input_shape=(64, 64, 3), pooling="avg"
    )
    generator, biases = np.random.default_rng(0), np.random.default_rng(1)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            gamma, beta, mean, variance = layer.get_weights()
            layer.set_weights(
                [
                    generator.uniform(0.5, 1.0, gamma.shape),
                    generator.normal(0, 0.1, beta.shape),
                    generator.normal(0, 0.1, mean.shape),
                    generator.uniform(0.5, 2.0, variance.shape),
                ]
            )
        elif isinstance(layer, keras.layers.Conv2D):
            kernel, bias = layer.get_weights()
            layer.set_weights([kernel, biases.normal(0, 0.1, bias.shape)])
    return model


@pytest.fixture(scope="session")
def weights_file(stock: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of `stock` in a file."""
    path = tmp_path_factory.mktemp("weights") / "resnet50.weights.h5"
    stock.save_weights(path)
    return str(path)


@pytest.fixture(scope="session")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Drawn leaves of 64 pixels in shards: 36 to train on, 9 in each of the other splits."""
    root = str(tmp_path_factory.mktemp("data_set"))
    return write_data_set(root, {"train": 12, "valid": 3, "test": 3})


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """moto's S3 server: quick to start, and takes any key."""
    with s3_server.moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def radosgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real S3 server; what needs it is left out where it is not installed, but not in CI."""
    if not s3_server.has_radosgw():
        leave_out(s3_server.LEFT_OUT)
    with s3_server.radosgw(tmp_path_factory.mktemp("radosgw")) as server:
        yield server


def use_server(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Set the variables of an S3 client, and nothing that this machine may have beside."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # A client has read its keys when it was made.
    storage._filesystem.cache_clear()


def make_bucket(name: str) -> str:
    """The URL of a new bucket on the server that is in use."""
    fs, _ = storage.filesystem(f"s3://{name}")
    fs.call_s3("create_bucket", Bucket=name)
    return f"s3://{name}"


def leaf_jpeg(label: str, *, seed: int, size: int = 64) -> bytes:
    """A drawn leaf as a JPEG file."""
    sink = io.BytesIO()
    leaf = synthetic.draw_leaf(label, seed=seed, width=size, height=size)
    Image.fromarray(leaf).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def write_data_set(root: str, per_class: dict[str, int], *, seed: int = 0) -> ShardIndex:
    """A data set of drawn leaves at `root`, two row groups a shard, written without Ray."""
    written: list[Shard] = []
    for place, (split, count) in enumerate(per_class.items()):
        rows = []
        for number in range(count * len(synthetic.CLASS_NAMES)):
            label = number % len(synthetic.CLASS_NAMES)
            image = leaf_jpeg(synthetic.CLASS_NAMES[label], seed=1000 * (seed + place) + number)
            found = fingerprint(image)
            rows.append(
                {
                    "key": f"{split}/{number}.jpg",
                    "image": image,
                    "label": label,
                    "split": split,
                    "width": found.width,
                    "height": found.height,
                    "sha256": storage.sha256(image),
                }
            )
        table = pa.Table.from_pylist(rows, shards.SCHEMA)
        half = -(-table.num_rows // 2)
        written.append(shards.write_shard(root, f"{split}-00000.parquet", table, row_group=half))
    counts = {
        split: dict.fromkeys(synthetic.CLASS_NAMES, count) for split, count in per_class.items()
    }
    return shards.write_index(
        root, class_names=synthetic.CLASS_NAMES, shards=written, counts=counts, prepared={}
    )


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A published model with random weights for pictures of 32 pixels, which costs little."""
    url = str(tmp_path_factory.mktemp("model"))
    publish_random_model(url)
    return url


def publish_random_model(url: str, review: Review | None = None) -> None:
    """Publish a model with random weights for pictures of 32 pixels, without a measure of novelty.

    Args:
        url: folder of the model.
        review: its thresholds; None: nothing is for review.
    """
    bundle.save(
        url,
        convolutions=weights.load_weights("random").convolutions,
        head=initial_head([8], 3, inputs=weights.FEATURES, seed=0),
        class_names=("early_blight", "healthy", "late_blight"),
        image_size=32,
        provenance={},
        review=review,
    )


def write_deadly_decoder(
    folder: Path, *, death: str = "import ctypes; ctypes.string_at(0)"
) -> bytes:
    """A photograph that runs `death` in each process that decodes it and has `folder` on its path.

    A file that crashes a C library of today is mended tomorrow: what Pillow calls is replaced.
    """
    mark = b"kills its decoder"
    code = f"""
from PIL import Image

_open = Image.open

def _deadly(file, *args, **kwargs):
    if {mark!r} in file.getvalue():
        {death}
    return _open(file, *args, **kwargs)

Image.open = _deadly
"""
    (folder / "sitecustomize.py").write_text(code)
    return leaf_jpeg("healthy", seed=0) + mark
