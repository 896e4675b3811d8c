"""Thumbnails: their size, which photographs get one, and which are kept where there are many."""

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from leafnet import demo, thumbnails


def rows(reasons: list[str | None], confidence: list[float], novelty: list[float]) -> pa.Table:
    return pa.table(
        {
            "image": [f"{i}.jpg" for i in range(len(reasons))],
            "version": ["1"] * len(reasons),
            "status": ["ok" if reason is None else "review" for reason in reasons],
            "reason": pa.array(reasons, pa.string()),
            "confidence": pa.array(confidence, pa.float32()),
            "novelty": pa.array(novelty, pa.float32()),
            "width": pa.array([4000] * len(reasons), pa.int32()),
            "height": pa.array([3000] * len(reasons), pa.int32()),
        }
    )


def many(count: int, seed: int) -> pa.Table:
    """Rows of which some have equal values."""
    rng = np.random.default_rng(seed)
    kinds = ["unlike-training: x", "low-confidence: x", "unlike-training: x; low-confidence: x"]
    reasons = [[*kinds, None][i] for i in rng.choice(4, count, p=[0.1, 0.5, 0.1, 0.3])]
    table = rows(
        reasons,
        rng.random(count).round(2).tolist(),
        (60 + 9 * rng.random(count)).round(1).tolist(),
    )
    images = pa.array([f"{seed}/{i}.jpg" for i in rng.permutation(count)])
    return table.set_column(0, "image", images)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (4000, 3000, (128, 96)),
        (3000, 4000, (96, 128)),
        (256, 256, (128, 128)),
        (40, 30, (128, 96)),
        (9000, 10, (128, 16)),
    ],
)
def test_a_thumbnail_has_the_shape_of_its_photograph(
    width: int, height: int, expected: tuple[int, int]
) -> None:
    leaf = demo.draw_leaf("late_blight", seed=1, width=256, height=256)
    with Image.open(io.BytesIO(thumbnails.jpeg(leaf, width=width, height=height))) as picture:
        assert picture.format == "JPEG"
        assert picture.size == expected
        # Red and blue are where they were.
        colour = np.asarray(picture).reshape(-1, 3).mean(axis=0)
    np.testing.assert_allclose(colour, leaf.reshape(-1, 3).mean(axis=0), atol=3)


def test_only_what_is_for_review_gets_one_and_its_own() -> None:
    table = rows([None, "low-confidence: x", None, "unlike-training: y"], [0.9] * 4, [1.0] * 4)
    decoded = np.array([0, 1, 3])  # the third has no pixels
    pixels = np.zeros((3, 64, 64, 3), np.uint8)
    pixels[1, ..., 0], pixels[2, ..., 2] = 255, 255
    found = thumbnails.Maker().attach(table, pixels, decoded)["thumbnail"].to_pylist()
    assert [data is not None for data in found] == [False, True, False, True]
    red, blue = (np.asarray(Image.open(io.BytesIO(found[i]))).mean(axis=(0, 1)) for i in (1, 3))
    assert red[0] > 200 > 50 > red[2]
    assert blue[2] > 200 > 50 > blue[0]


def test_what_the_network_saw_is_kept_of_those_alone_and_only_if_asked_for() -> None:
    table = rows([None, "low-confidence: x", "unlike-training: y"], [0.9, 0.5, 0.9], [1, 1, 70])
    pixels = np.stack(
        [demo.draw_leaf("healthy", seed=seed, width=96, height=96) for seed in range(3)]
    )
    found = thumbnails.Maker(seen=True).attach(table, pixels, np.arange(3))
    small, seen = (found[name].to_pylist() for name in ("thumbnail", "seen"))
    assert [data is not None for data in seen] == [False, True, True]
    for square, data in zip(pixels[1:], seen[1:], strict=True):
        opened = np.asarray(Image.open(io.BytesIO(data)))
        assert opened.shape == square.shape
        assert np.abs(opened.astype(int) - square).mean() < 6  # of colours drawn with noise
    kept = thumbnails.keep_wanted(pa.concat_tables([found] * 2), limit=1)
    assert (kept["thumbnail"].null_count, kept["seen"].null_count) == (5, 5)
    plain = thumbnails.Maker().attach(table, pixels, np.arange(3))
    assert plain.column_names == [*table.column_names, "thumbnail"]
    assert plain["thumbnail"].to_pylist() == small


def test_the_two_reasons_take_turns() -> None:
    unlike, low = "unlike-training: x", "low-confidence: x"
    table = rows([low, unlike, low, unlike, None], [0.5, 0.9, 0.4, 0.9, 0.9], [1, 70, 1, 80, 1])
    # The least sure first, then the least like the training photographs, and so on.
    assert thumbnails.wanted(table).tolist() == [2, 3, 0, 1]
    assert thumbnails.wanted(table, limit=3).tolist() == [2, 3, 0]


def test_what_is_wanted_of_all_is_wanted_of_each_part() -> None:
    """So that parts can be cut on their own, however the rows come."""
    parts = [many(200, seed) for seed in range(5)]
    cut = [part.take(pa.array(thumbnails.wanted(part, limit=40))) for part in parts]
    whole, rest = pa.concat_tables(parts), pa.concat_tables(cut[::-1])
    first, again = (
        table["image"].take(pa.array(thumbnails.wanted(table, limit=40))).to_pylist()
        for table in (whole, rest)
    )
    assert first == again


def test_what_is_wanted_of_all_gets_one_and_few_others_do() -> None:
    """Ties, as of one photograph many times, and kinds that change from stack to stack too."""
    stacks = [many(100, seed) for seed in range(60)]
    stacks += [stacks[0]] * 5
    maker = thumbnails.Maker(limit=20)
    pixels, decoded = np.zeros((100, 16, 16, 3), np.uint8), np.arange(100)
    parts = [maker.attach(stack, pixels, decoded) for stack in stacks]
    np.random.default_rng(0).shuffle(parts)
    whole = pa.concat_tables(parts)
    first = thumbnails.wanted(whole, limit=20)
    assert whole.take(pa.array(first))["thumbnail"].null_count == 0
    made = whole.num_rows - whole["thumbnail"].null_count
    assert made < 0.1 * sum(status == "review" for status in whole["status"].to_pylist())


def test_more_than_the_limit_lose_theirs() -> None:
    table = many(400, seed=3)
    small = [b"x" if status == "review" else None for status in table["status"].to_pylist()]
    table = table.append_column("thumbnail", pa.array(small))
    kept = thumbnails.keep_wanted(table, limit=30)
    images = table["image"].to_pylist()
    assert {row["image"] for row in thumbnails.of(kept)} == {
        images[i] for i in thumbnails.wanted(table, limit=30)
    }
    assert kept.drop_columns("thumbnail").equals(table.drop_columns("thumbnail"))
    assert thumbnails.keep_wanted(table.drop_columns("thumbnail")).num_columns == 8
