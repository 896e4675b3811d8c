import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.data import shards
from leafnet.data.shards import Shard, ShardIndex
from leafnet.evaluation import gallery
from leafnet.evaluation.gallery import Choice, Item
from leafnet.metrics import scores
from tests.conftest import leaf_jpeg
from tests.metrics.test_calibration import simulated


def opened(jpeg: bytes | None) -> NDArray[np.uint8]:
    assert jpeg is not None
    with Image.open(io.BytesIO(jpeg)) as picture:
        assert picture.format == "JPEG"
        return np.asarray(picture.convert("RGB"))


def test_what_is_chosen() -> None:
    logits, labels = simulated(600, times=2.0)
    probabilities = scores.softmax(logits)
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


def sure_of(classes: list[int], share: list[float], count: int) -> NDArray[np.float32]:
    """Logits [N, C] of a model that gives `share` to its class, and the others the rest alike."""
    probabilities = np.repeat((1 - np.array(share)) / (count - 1), count).reshape(-1, count)
    probabilities[np.arange(len(classes)), classes] = share
    return np.log(probabilities).astype(np.float32)


def test_pairs_are_the_most_frequent_and_their_photographs_the_most_confident() -> None:
    """Of four kinds of mistake the three most frequent, and of six photographs four."""
    labels = np.array([0] * 6 + [1] * 3 + [2] * 2 + [3])
    shown = [1] * 6 + [0] * 3 + [3] * 2 + [2]
    share = [0.6, 0.9, 0.7, 0.95, 0.8, 0.65, 0.5, 0.72, 0.55, 0.75, 0.85, 0.99]
    chosen = gallery.choose(sure_of(shown, share, 4), labels)
    pairs = [choice for choice in chosen if choice.kind == "confused-pair"]
    assert [(choice.row, choice.label, choice.predicted) for choice in pairs] == [
        *((row, 0, 1) for row in (3, 1, 4, 2)),
        *((row, 1, 0) for row in (7, 8, 6)),
        *((row, 2, 3) for row in (10, 9)),
    ]
    assert [choice.confidence for choice in pairs] == pytest.approx(
        [share[choice.row] for choice in pairs], abs=1e-6
    )
    errors = [choice for choice in chosen if choice.kind == "confident-error"]
    assert [choice.row for choice in errors] == np.argsort(-np.array(share)).tolist()


def test_samples_are_right_and_drawn_by_the_seed_with_the_classes_in_turn() -> None:
    labels = np.repeat([0, 1, 2], [40, 2, 10])
    logits = np.eye(3, dtype=np.float32)[labels] * 5
    logits[7] = (0, 9, 0)  # a mistake is no sample of what is right

    def rows(seed: int) -> list[int]:
        found = gallery.choose(logits, labels, seed=seed)
        return [choice.row for choice in found if choice.kind == "sample"]

    first, again, other = rows(0), rows(0), rows(1)
    assert first == again != other
    assert labels[first].tolist() == [0, 1, 2, 0, 1, 2, 0, 2, 0, 2, 0, 2]
    assert len(set(first)) == 12
    assert all(7 not in rows(seed) for seed in range(20))
    assert {row for seed in range(60) for row in rows(seed)} == set(range(52)) - {7}


def test_shards_are_in_the_order_of_their_names() -> None:
    parts = [
        Shard(f"{split}-{i:05d}.parquet", split, 3, (3,), 1, "")
        for split, i in (("train", 1), ("test", 0), ("train", 0))
    ]
    index = ShardIndex("/x", ("a", "b"), tuple(parts), {}, "")
    assert [shard.name for shard in gallery.ordered(index, "train")] == [
        "train-00000.parquet",
        "train-00001.parquet",
    ]


def test_a_photograph_is_found_by_its_place_in_all_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def read_rows(root: str, shard: Shard, rows: list[int]) -> pa.Table:
        asked.append((root, shard.name, rows))
        keys = [f"{shard.name}/{row}" for row in rows]
        return pa.table({"key": keys, "image": [key.encode() for key in keys]})

    monkeypatch.setattr(shards, "read_rows", read_rows)
    parts = tuple(Shard(name, "test", rows, (rows,), 1, "") for name, rows in (("b", 3), ("a", 5),
                  ("c", 4), ("d", 2)))  # fmt: skip
    found = gallery._read(ShardIndex("/x", (), parts, {}, ""), "test", [0, 4, 5, 7, 12])
    assert asked == [("/x", "a", [0, 4]), ("/x", "b", [0, 2]), ("/x", "d", [0])]
    assert {row: key for row, (key, _) in found.items()} == {
        0: "a/0", 4: "a/4", 5: "b/0", 7: "b/2", 12: "d/0"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(600, 200, (160, 53)), (200, 600, (53, 160)), (40, 30, (160, 120)), (2000, 3, (160, 16)),
     (3, 2000, (16, 160)), (256, 175, (160, 109))],
)  # fmt: skip
def test_the_longer_side_of_a_gallery_s_thumbnail_has_160_pixels(
    width: int, height: int, expected: tuple[int, int]
) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (width, height)).save(sink, "PNG")
    jpeg, heated = gallery.thumbnails(sink.getvalue(), None)
    assert opened(jpeg).shape[1::-1] == expected
    assert heated is None


def test_pictures_of_an_earlier_gallery_go_and_other_files_stay(tmp_path: Path) -> None:
    def items(count: int) -> list[Item]:
        return [Item("sample", f"{i}", "a", "b", 0.25, b"%d" % i, b"m%d" % i) for i in range(count)]

    folder = tmp_path / "gallery"
    gallery.write(str(tmp_path), items(3))
    for name in ("0001.jpg", "001-cam.jpg.txt", "x001.jpg"):
        (folder / name).write_bytes(b"")
    rows = gallery.write(str(tmp_path), items(1))
    assert rows == [
        {
            "kind": "sample",
            "key": "0",
            "label": "a",
            "predicted": "b",
            "confidence": 0.25,
            "jpeg": "gallery/000.jpg",
            "cam_jpeg": "gallery/000-cam.jpg",
        }
    ]
    assert sorted(path.name for path in folder.iterdir()) == [
        "000-cam.jpg",
        "000.jpg",
        "0001.jpg",
        "001-cam.jpg.txt",
        "x001.jpg",
    ]
    assert gallery.write(str(tmp_path), []) == []
