import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from leafnet import gallery, metrics, shards, storage
from leafnet.errors import UserError
from leafnet.gallery import Choice, Item
from leafnet.shards import ShardIndex
from tests.conftest import leaf_jpeg
from tests.test_calibration import simulated


def opened(jpeg: bytes | None) -> NDArray[np.uint8]:
    assert jpeg is not None
    with Image.open(io.BytesIO(jpeg)) as picture:
        assert picture.format == "JPEG"
        return np.asarray(picture.convert("RGB"))


def test_what_is_chosen() -> None:
    logits, labels = simulated(600, times=2.0)
    probabilities = metrics.softmax(logits)
    chosen = gallery.choose(logits, labels)
    by_kind: dict[str, list[Choice]] = {}
    for choice in chosen:
        by_kind.setdefault(choice.kind, []).append(choice)
        assert choice.label == labels[choice.row]
        assert choice.confidence == pytest.approx(probabilities[choice.row, choice.predicted])
    assert {kind: len(of_kind) for kind, of_kind in by_kind.items()} == {
        "likely-wrong-label": 12,
        "confident-error": 12,
        "confused-pair": 12,
        "sample": 12,
    }
    errors = [choice.confidence for choice in by_kind["confident-error"]]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == probabilities.max(axis=1)[probabilities.argmax(axis=1) != labels].max()
    assert len({(choice.label, choice.predicted) for choice in by_kind["confused-pair"]}) == 3
    samples = [choice.label for choice in by_kind["sample"]]
    assert samples == [0, 1, 2, 3] * 3, "the classes in turn"


def test_a_model_without_a_mistake_has_samples_alone() -> None:
    labels = np.array([0, 1, 1])
    chosen = gallery.choose(np.eye(2, dtype=np.float32)[labels] * 9, labels)
    assert [choice.kind for choice in chosen] == ["sample"] * 3
    assert sorted(choice.row for choice in chosen) == [0, 1, 2]


def test_items_show_their_photographs_and_only_what_is_needed_is_read(
    data_set: ShardIndex, tmp_path: Path
) -> None:
    """Row 20 is in the second row group of the training shard; the first is damaged."""
    root = tmp_path / "shards"
    storage.upload_folder(data_set.root, str(root))
    file = root / "train-00000.parquet"
    data = bytearray(file.read_bytes())
    data[9000:9100] = bytes(100)
    file.write_bytes(data)
    index = shards.read_index(str(root))
    chosen = [Choice("sample", 20, 2, 0, 0.75), Choice("confident-error", 35, 2, 2, 0.5)]

    def explain(pixels: NDArray[np.uint8], classes: NDArray[np.int64]) -> NDArray[np.float32]:
        assert pixels.shape == (1, 64, 64, 3)
        heat = np.zeros((1, 2, 2), np.float32)
        heat[0, 0, classes[0] // 2] = 1
        return heat

    first, second = gallery.make(index, "train", chosen, image_size=64, explain=explain)
    assert (first.key, first.label, first.predicted) == (
        "train/20.jpg",
        "late_blight",
        "early_blight",
    )
    drawn = opened(leaf_jpeg("late_blight", seed=20)).astype(int)
    enlarged = Image.fromarray(drawn.astype(np.uint8)).resize((160, 160))
    assert np.abs(opened(first.jpeg).astype(int) - np.asarray(enlarged)).mean() < 6
    # Where the map is, and nowhere else, the second picture is another.
    for item, hot in ((first, np.s_[:40, :40]), (second, np.s_[:40, -40:])):
        difference = np.abs(opened(item.cam_jpeg).astype(int) - opened(item.jpeg)).mean(axis=2)
        assert difference[hot].mean() > 30
        assert difference[-40:].mean() < 6
    (plain,) = gallery.make(index, "train", chosen[:1], image_size=64, explain=None)
    assert plain.cam_jpeg is None
    with pytest.raises(UserError, match=r"train/[0-9]+.jpg in .* is not the photograph that was"):
        gallery.make(
            index,
            "train",
            [Choice("sample", row, 0, 0, 1.0) for row in range(18)],
            image_size=64,
            explain=None,
        )


def test_thumbnails_keep_the_proportions() -> None:
    sink = io.BytesIO()
    Image.new("RGB", (600, 200), (10, 200, 10)).save(sink, "PNG")
    jpeg, heated = gallery.thumbnails(sink.getvalue(), np.ones((2, 2), np.float32))
    assert opened(jpeg).shape == opened(heated).shape == (53, 160, 3)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    items = [
        Item("confident-error", f"test/{i}.jpg", "rust", "healthy", 0.5, b"%d" % i, maps)
        for i, maps in enumerate([b"map", None, b"map"])
    ]
    rows = gallery.write(str(tmp_path), items)
    assert gallery.read(str(tmp_path), rows) == items
    (tmp_path / "gallery" / "mine.jpg").write_bytes(b"")
    rows = gallery.write(str(tmp_path), items[1:2])
    assert gallery.read(str(tmp_path), rows) == items[1:2]
    assert sorted(path.name for path in (tmp_path / "gallery").iterdir()) == ["000.jpg", "mine.jpg"]
