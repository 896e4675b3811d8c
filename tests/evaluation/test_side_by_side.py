"""Models over the same examples in this process, with networks whose answers are known."""

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import ray
from numpy.typing import NDArray

from leafnet.data import shards
from leafnet.data.images import decode, fingerprint
from leafnet.data.isolated import Decoder
from leafnet.data.shards import ShardIndex
from leafnet.distributed import pipeline
from leafnet.distributed.resources import Machines
from leafnet.evaluation import predict as evaluation_predict
from leafnet.models import resnet
from leafnet.models.bundle import Bundle
from tests.conftest import write_data_set

NAMES = ("early_blight", "healthy", "late_blight")
MACHINES = Machines(gpus=0, actors=1, threads_per_actor=3, cpus_per_actor=1)
FIRST: NDArray[np.float32] = (np.arange(12).reshape(3, 4) / 256).astype(np.float32)
HEADS = [np.random.default_rng(i).normal(size=(4, 3)).astype(np.float32) for i in range(4)]


def model(kernel: NDArray[np.float32], head: int, *, size: int = 32, bias: float = 0.0) -> Bundle:
    """A network that weights the mean colour of a photograph, and a linear head."""
    convolutions = {"conv": (kernel, np.full(4, bias, np.float32))}
    layer = (HEADS[head], np.full(3, head, np.float32))
    return Bundle("url", "id", NAMES, size, convolutions, [layer], {})


def answers(of: Bundle, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    kernel, bias = of.convolutions["conv"]
    ((head_kernel, head_bias),) = of.head
    colours = pixels.mean(axis=(1, 2)).astype(np.float32)
    logits: NDArray[np.float32] = (colours @ kernel + bias) @ head_kernel + head_bias
    return logits


class Here:
    """What stands in for Ray: actors and their posts in this process."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.built: list[tuple[int, str]] = []
        self.limits: list[tuple[int, bool]] = []
        self.decoded = 0
        self.lost = 0  # row groups that do not come back
        self.cut = 0  # examples that are missing in each
        patch.setattr(resnet, "build", self.build)
        patch.setattr(pipeline, "over_shards", self.over_shards)
        patch.setattr(evaluation_predict, "limit_threads", self.limit_threads)
        patch.setattr(evaluation_predict, "Board", self.board)
        patch.setattr(ray, "put", lambda value: value)

    def limit_threads(self, threads: int, *, gpu: bool) -> None:
        self.limits.append((threads, gpu))

    def build(self, weights: Any, *, image_size: int, precision: str) -> Any:
        self.built.append((image_size, precision))
        kernel, bias = weights["conv"]

        def predict(stack: NDArray[np.uint8]) -> NDArray[np.float32]:
            assert stack.shape == (4, image_size, image_size, 3)
            return np.asarray(stack.mean(axis=(1, 2)) @ kernel + bias, np.float32)

        return types.SimpleNamespace(make_predict_function=lambda: None, predict_on_batch=predict)

    def board(self) -> Any:
        posted: list[int] = []

        @contextmanager
        def follow(advance: Callable[[int], None]) -> Iterator[None]:
            yield
            for count in posted:
                advance(count)

        post = types.SimpleNamespace(remote=posted.append)
        return types.SimpleNamespace(handle=types.SimpleNamespace(post=post), follow=follow)

    def over_shards(
        self,
        index: ShardIndex,
        wanted_shards: Sequence[shards.Shard],
        *,
        wanted: Any,
        image_size: int,
        actor: Callable[..., Any],
        actor_args: tuple[Any, ...],
        machines: Machines,
    ) -> Any:
        """Row groups in the opposite order, as they may come from a cluster."""
        assert wanted is None
        made = actor(*actor_args, machines.threads_per_actor, machines.gpus > 0)
        rows = []
        for shard in wanted_shards:
            groups = pipeline._decoded_groups(
                index, shard, None, image_size, Decoder(decode, fingerprint)
            )
            for batch in groups:
                self.decoded += batch["pixels"].shape[1]
                row = {name: value[0] for name, value in made(batch).items()}
                if self.cut:  # of one model with three classes
                    row["labels"] = row["labels"][: -8 * self.cut]
                    row["logits"] = row["logits"][: -3 * 4 * self.cut]
                rows.append(row)
        return types.SimpleNamespace(iter_rows=lambda: iter(rows[::-1][self.lost :]))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    return Here(monkeypatch)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """A test split of 15 in row groups of 8 and 7, twice: in two shards."""
    root = str(tmp_path_factory.mktemp("side_by_side"))
    made = write_data_set(root, {"train": 1, "valid": 5, "test": 5})
    valid, test = made.of_split("valid")[0], made.of_split("test")[0]
    again = shards.Shard(**{**vars(valid), "split": "test"})
    return ShardIndex(**{**vars(made), "shards": (test, again)})


def logits_of(
    models: Sequence[Bundle], index: ShardIndex
) -> tuple[list[NDArray[np.float32]], NDArray[np.int64], int]:
    """(logits, labels, and how many answers were told of)."""
    told: list[int] = []
    logits, labels = evaluation_predict.logits_of(
        models,
        index,
        "test",
        precision="float32",
        batch_size=4,
        machines=MACHINES,
        advance=told.append,
    )
    return logits, labels, sum(told)


def examples(index: ShardIndex, size: int) -> tuple[NDArray[np.uint8], list[int]]:
    """Pixels and labels in the order of the index."""
    tables = [t for s in index.of_split("test") for t in shards.row_groups(index.root, s)]
    assert [table.num_rows for table in tables] == [8, 7, 8, 7]
    images = [image for table in tables for image in table["image"].to_pylist()]
    labels = [label for table in tables for label in table["label"].to_pylist()]
    return np.stack([decode(image, size).pixels for image in images]), labels


def test_each_model_gives_its_logits_in_the_order_of_the_index(
    here: Here, index: ShardIndex
) -> None:
    """Of other heads, weights, biases and sizes, which are not sorted."""
    models = [
        model(FIRST, 0, size=48),
        model(FIRST, 1),
        model(FIRST[::-1], 2),
        model(FIRST, 3, bias=1.5),
        model(FIRST, 0, size=16),
    ]
    logits, labels, told = logits_of(models, index)
    for of, found in zip(models, logits, strict=True):
        pixels, expected_labels = examples(index, of.image_size)
        np.testing.assert_allclose(found, answers(of, pixels), rtol=1e-4, atol=1e-4)
        assert labels.tolist() == expected_labels
    assert told == 5 * 30


def test_models_of_one_backbone_share_its_pass_and_of_one_size_the_decoding(
    here: Here, index: ShardIndex
) -> None:
    """Equal numbers make it the same, not that they lie in the same place."""
    models = [
        model(FIRST, 0),
        model(FIRST.copy(), 1),
        model(FIRST + 1, 2),
        model(FIRST, 3, bias=0.5),
        model(FIRST, 0, size=16),
    ]
    logits_of(models, index)
    assert here.built == [(16, "float32"), *[(32, "float32")] * 3]
    assert here.decoded == 2 * 30
    assert here.limits == [(3, False)] * 2


def test_backbones_with_other_layers_are_others(here: Here, index: ShardIndex) -> None:
    more = model(FIRST, 0)
    more.convolutions["another"] = more.convolutions["conv"]
    logits, _, _ = logits_of([model(FIRST, 0), more], index)
    assert len(here.built) == 2
    np.testing.assert_array_equal(logits[0], logits[1])


def test_what_does_not_come_back_is_noticed(here: Here, index: ShardIndex) -> None:
    """An example of each row group, and a whole one."""
    here.cut = 1
    with pytest.raises(RuntimeError, match="26 examples of test came back, which has 30"):
        logits_of([model(FIRST, 0)], index)
    here.cut, here.lost = 0, 1
    with pytest.raises(KeyError):
        logits_of([model(FIRST, 0)], index)
