"""Thumbnails: their size, which photographs get one, and which are kept where there are many."""

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from leafnet.data import synthetic
from leafnet.data import thumbnails as data_thumbnails
from leafnet.scoring import thumbnails as scoring_thumbnails


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
    leaf = synthetic.draw_leaf("late_blight", seed=1, width=256, height=256)
    with Image.open(io.BytesIO(data_thumbnails.jpeg(leaf, width=width, height=height))) as picture:
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
    found = scoring_thumbnails.Maker().attach(table, pixels, decoded)["thumbnail"].to_pylist()
    assert [data is not None for data in found] == [False, True, False, True]
    red, blue = (np.asarray(Image.open(io.BytesIO(found[i]))).mean(axis=(0, 1)) for i in (1, 3))
    assert red[0] > 200 > 50 > red[2]
    assert blue[2] > 200 > 50 > blue[0]


def test_what_the_network_saw_is_kept_of_those_alone_and_only_if_asked_for() -> None:
    table = rows([None, "low-confidence: x", "unlike-training: y"], [0.9, 0.5, 0.9], [1, 1, 70])
    pixels = np.stack(
        [synthetic.draw_leaf("healthy", seed=seed, width=96, height=96) for seed in range(3)]
    )
    found = scoring_thumbnails.Maker(seen=True).attach(table, pixels, np.arange(3))
    small, seen = (found[name].to_pylist() for name in ("thumbnail", "seen"))
    assert [data is not None for data in seen] == [False, True, True]
    for square, data in zip(pixels[1:], seen[1:], strict=True):
        opened = np.asarray(Image.open(io.BytesIO(data)))
        assert opened.shape == square.shape
        assert np.abs(opened.astype(int) - square).mean() < 6  # of colours drawn with noise
    kept = scoring_thumbnails.keep_wanted(pa.concat_tables([found] * 2), limit=1)
    assert (kept["thumbnail"].null_count, kept["seen"].null_count) == (5, 5)
    plain = scoring_thumbnails.Maker().attach(table, pixels, np.arange(3))
    assert plain.column_names == [*table.column_names, "thumbnail"]
    assert plain["thumbnail"].to_pylist() == small


def test_the_two_reasons_take_turns() -> None:
    unlike, low = "unlike-training: x", "low-confidence: x"
    table = rows([low, unlike, low, unlike, None], [0.5, 0.9, 0.4, 0.9, 0.9], [1, 70, 1, 80, 1])
    # The least sure first, then the least like the training photographs, and so on.
    assert scoring_thumbnails.wanted(table).tolist() == [2, 3, 0, 1]
    assert scoring_thumbnails.wanted(table, limit=3).tolist() == [2, 3, 0]


def test_what_is_wanted_of_all_is_wanted_of_each_part() -> None:
    """So that parts can be cut on their own, however the rows come."""
    parts = [many(200, seed) for seed in range(5)]
    cut = [part.take(pa.array(scoring_thumbnails.wanted(part, limit=40))) for part in parts]
    whole, rest = pa.concat_tables(parts), pa.concat_tables(cut[::-1])
    first, again = (
        table["image"].take(pa.array(scoring_thumbnails.wanted(table, limit=40))).to_pylist()
        for table in (whole, rest)
    )
    assert first == again


def test_what_is_wanted_of_all_gets_one_and_few_others_do() -> None:
    """Ties, as of one photograph many times, and kinds that change from stack to stack too."""
    stacks = [many(100, seed) for seed in range(60)]
    stacks += [stacks[0]] * 5
    maker = scoring_thumbnails.Maker(limit=20)
    pixels, decoded = np.zeros((100, 16, 16, 3), np.uint8), np.arange(100)
    parts = [maker.attach(stack, pixels, decoded) for stack in stacks]
    np.random.default_rng(0).shuffle(parts)
    whole = pa.concat_tables(parts)
    first = scoring_thumbnails.wanted(whole, limit=20)
    assert whole.take(pa.array(first))["thumbnail"].null_count == 0
    made = whole.num_rows - whole["thumbnail"].null_count
    assert made < 0.1 * sum(status == "review" for status in whole["status"].to_pylist())


def test_more_than_the_limit_lose_theirs() -> None:
    table = many(400, seed=3)
    small = [b"x" if status == "review" else None for status in table["status"].to_pylist()]
    table = table.append_column("thumbnail", pa.array(small))
    kept = scoring_thumbnails.keep_wanted(table, limit=30)
    images = table["image"].to_pylist()
    assert {row["image"] for row in scoring_thumbnails.of(kept)} == {
        images[i] for i in scoring_thumbnails.wanted(table, limit=30)
    }
    assert kept.drop_columns("thumbnail").equals(table.drop_columns("thumbnail"))
    assert scoring_thumbnails.keep_wanted(table.drop_columns("thumbnail")).num_columns == 8


def test_a_thumbnail_s_sides_are_rounded_and_at_least_16_pixels() -> None:
    square = np.zeros((64, 64, 3), np.uint8)

    def size(width: int, height: int, side: int = 100) -> tuple[int, int]:
        encoded = data_thumbnails.jpeg(square, width=width, height=height, side=side)
        with Image.open(io.BytesIO(encoded)) as picture:
            return picture.size

    assert size(300, 200) == (100, 67)  # 66.7
    assert size(300, 199) == (100, 66)  # 66.3
    assert size(199, 300) == (66, 100)
    assert size(1000, 155) == (100, 16)  # 15.5, to the even one
    assert size(1000, 30) == (100, 16)
    assert size(30, 1000) == (16, 100)
    assert size(10, 10, side=8) == (16, 16)
    assert data_thumbnails.SIDE == 128


def test_a_thumbnail_is_the_mean_over_areas() -> None:
    """Half the side: of each four pixels the mean, where a grid of points would see one."""
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[::2, ::2] = 240
    encoded = data_thumbnails.jpeg(pixels, width=64, height=64, side=64)
    small = np.asarray(Image.open(io.BytesIO(encoded)))
    np.testing.assert_allclose(small, 60, atol=2)


@pytest.mark.parametrize(("quality", "step"), [(50, 16), (78, 7), (95, 2)])
def test_the_quality_is_the_one_that_is_asked_for(quality: int, step: int) -> None:
    """The mean is stored in steps of 16 (ITU T.81, annex K), by libjpeg times 2 - quality / 50."""
    square = np.zeros((16, 16, 3), np.uint8)
    encoded = data_thumbnails.jpeg(square, width=1, height=1, quality=quality)
    with Image.open(io.BytesIO(encoded)) as picture:
        assert isinstance(picture, JpegImageFile)
        assert picture.quantization[0][0] == step


def test_thumbnails_are_of_quality_78_and_what_was_seen_of_95() -> None:
    table = rows(["low-confidence"], [0.1], [1.0])
    found = scoring_thumbnails.Maker(seen=True).attach(
        table, np.zeros((1, 64, 64, 3), np.uint8), np.array([0])
    )
    for name, step, size in (("thumbnail", 7, (128, 96)), ("seen", 2, (64, 64))):
        with Image.open(io.BytesIO(found[name][0].as_py())) as picture:
            assert isinstance(picture, JpegImageFile)
            assert (picture.quantization[0][0], picture.size) == (step, size)


def test_the_first_for_review_are_by_value_and_then_by_name() -> None:
    unlike, low, both = "unlike-training: x", "low-confidence: x", "low-confidence; unlike-training"
    table = rows([low, low, low, unlike, both], [0.5, 0.2, 0.2, 0.1, 0.9], [9, 9, 9, 70, 80])
    # Sure of 0.2 twice, then 0.5; novelty of 80, which is unlike in spite of its other reason.
    assert scoring_thumbnails.wanted(table).tolist() == [1, 4, 2, 3, 0]
    table = table.set_column(0, "image", pa.array(["e", "d", "c", "b", "a"]))
    assert scoring_thumbnails.wanted(table).tolist() == [2, 4, 1, 3, 0]
    assert scoring_thumbnails.wanted(table, limit=0).tolist() == []


def test_what_has_no_value_counts_as_zero() -> None:
    """Of no confidence at all: first of the unsure; of no novelty: last of the unlike."""
    low, unlike = "low-confidence", "unlike-training"
    table = rows([low, low, unlike, unlike], [0.3, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0])
    for place, name, missing in ((4, "confidence", 1), (5, "novelty", 2)):
        values = [None if i == missing else v for i, v in enumerate(table[name].to_pylist())]
        table = table.set_column(place, name, pa.array(values, pa.float32()))
    assert scoring_thumbnails.wanted(table).tolist() == [1, 3, 0, 2]


def test_a_review_without_a_reason_is_one_of_the_unsure() -> None:
    table = rows(["low-confidence", "unlike-training"], [0.3, 0.1], [1.0, 2.0])
    table = table.set_column(3, "reason", pa.array([None, "unlike-training"], pa.string()))
    assert scoring_thumbnails.wanted(table).tolist() == [0, 1]


def test_no_more_are_made_than_may_still_be_first() -> None:
    """With room for two, the third stack brings nothing surer, one like the second, one new."""
    low = "low-confidence"
    maker = scoring_thumbnails.Maker(limit=2)
    pixels = np.zeros((2, 16, 16, 3), np.uint8)

    def made(*confidence: float) -> list[bool]:
        table = rows([low] * 2, list(confidence), [1.0] * 2)
        found = maker.attach(table, pixels, np.arange(2))["thumbnail"].to_pylist()
        return [data is not None for data in found]

    assert made(0.5, 0.25) == [True, True]
    assert made(0.75, 0.5) == [False, True]  # equal ones may come first by their names
    assert made(0.125, 0.375) == [True, True]
    assert made(0.375, 0.25) == [False, True]


def test_thumbnails_stay_where_there_are_no_more_than_the_limit() -> None:
    table = rows(["low-confidence"] * 3 + [None], [0.1, 0.2, 0.3, 0.4], [1.0] * 4)
    table = table.append_column("thumbnail", pa.array([b"0", b"1", b"2", None]))
    assert scoring_thumbnails.keep_wanted(table, limit=3)["thumbnail"].to_pylist() == [
        b"0",
        b"1",
        b"2",
        None,
    ]
    assert scoring_thumbnails.keep_wanted(table, limit=2)["thumbnail"].to_pylist() == [
        b"0",
        b"1",
        None,
        None,
    ]
    assert scoring_thumbnails.of(table)[1] == {"image": "1.jpg", "version": "1", "thumbnail": b"1"}
    explained = table.append_column("explained", pa.array([b"x"] * 4))
    assert [row["explained"] for row in scoring_thumbnails.of(explained)] == [b"x"] * 3


def test_the_first_is_made_where_there_is_room_for_one() -> None:
    assert scoring_thumbnails.LIMIT == 500  # a page of 3 MB
    maker = scoring_thumbnails.Maker(limit=1)
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    for confidence, makes in ((0.5, True), (0.75, False), (0.25, True), (0.5, False)):
        table = rows(["low-confidence"], [confidence], [1.0])
        found = maker.attach(table, pixels, np.array([0]))["thumbnail"]
        assert (found.null_count == 0) == makes
