import re

import numpy as np
import pytest
from scipy.stats import binomtest

from leafnet.core.errors import UserError
from leafnet.core.settings import compile_pattern
from leafnet.metrics import slices

KEYS = ["test/rust/farm_a-2024.jpg", "test/rust/farm_b-2025.jpg", "test/healthy/old.jpg"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("farm_.", {"key": ["farm_a", "farm_b", "(no match)"]}),
        ("farm_(.)", {"key": ["a", "b", "(no match)"]}),
        (
            "(?P<farm>farm_.)-(?P<year>[0-9]+)",
            {"farm": ["farm_a", "farm_b", "(no match)"], "year": ["2024", "2025", "(no match)"]},
        ),
        ("farm_(a)?", {"key": ["a", "(no match)", "(no match)"]}),
    ],
)
def test_columns_of_a_pattern(pattern: str, expected: dict[str, list[str]]) -> None:
    found = slices.by_pattern(KEYS, re.compile(pattern))
    assert {name: column.tolist() for name, column in found.items()} == expected


def test_patterns_that_are_none_or_find_nothing() -> None:
    with pytest.raises(UserError, match=r"--slice_by '\(' is not a regular expression: missing"):
        compile_pattern("(", flag="--slice_by")
    with pytest.raises(
        ValueError, match="matches none of 3 keys, of which the first is 'test/rust"
    ):
        slices.by_pattern(KEYS, re.compile("field"))


def test_sizes_are_told_by_the_shorter_side() -> None:
    found = slices.by_size(np.array([127, 128, 4000, 2047]), np.array([900, 255, 3000, 2047]))
    assert found.tolist() == ["under 128", "128 to 255", "2048 and more", "1024 to 2047"]


def test_accuracy_of_each_slice_the_worst_first() -> None:
    column = np.array(["a", "b", "a", "b", "b", "c"])
    found = slices.accuracies(column, np.array([True, False, True, True, False, False]))
    assert [(row["value"], row["examples"]) for row in found] == [("c", 1), ("b", 3), ("a", 2)]
    assert [row["accuracy"] for row in found] == [0.0, pytest.approx(1 / 3), 1.0]
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in found)


def test_columns_that_tell_nothing_apart_are_left_out() -> None:
    sides = np.array([256, 256, 256, 256])
    keys = ["rust/1.jpg", "rust/2.jpg", "healthy/1.jpg", "healthy/2.jpg"]
    known = {"rust", "healthy"}
    assert slices.columns_of(keys, sides, sides, known=known, pattern=None) == {}
    folders = [f"farm_{i % 2}/{key}" for i, key in enumerate(keys)]
    found = slices.columns_of(folders, sides, sides * [1, 1, 4, 4], known=known, pattern=None)
    assert list(found) == ["folder"], "the shorter side is the same"
    one_each = [f"{i}/{key}" for i, key in enumerate(keys)]
    pattern = re.compile("rust|healthy")
    found = slices.columns_of(one_each, sides, sides, known=known, pattern=pattern)
    assert list(found) == ["key"], "a folder for each photograph is no slice"


def test_the_interval_of_a_slice_is_scipys() -> None:
    column = np.repeat(["b", "a", "d", "c", "e"], [4, 4, 8, 2, 10])
    right = np.concatenate([np.arange(n) < hits for n, hits in ((4, 2), (4, 2), (8, 4), (2, 2))])
    right = np.concatenate([right, np.arange(10) < 3])
    found = slices.accuracies(column, right)
    # Of the same accuracy the larger is first, then in the order of names.
    assert [row["value"] for row in found] == ["e", "d", "a", "b", "c"]
    assert [row["accuracy"] for row in found] == [0.3, 0.5, 0.5, 0.5, 1.0]
    for row, (hits, of) in zip(found, [(3, 10), (4, 8), (2, 4), (2, 4), (2, 2)], strict=True):
        expected = binomtest(hits, of).proportion_ci(method="exact")
        assert row["examples"] == of
        assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high), rel=1e-6)


def test_sizes_on_every_border() -> None:
    sides = np.array([1, 127, 128, 255, 256, 511, 512, 1023, 1024, 2047, 2048, 9000])
    found = slices.by_size(sides, np.full(12, 9999))
    names = ["under 128", "128 to 255", "256 to 511", "512 to 1023", "1024 to 2047"]
    assert found.tolist() == [name for name in (*names, "2048 and more") for _ in range(2)]
    assert found.tolist() == slices.by_size(np.full(12, 9999), sides).tolist()


def test_folders_without_what_is_known() -> None:
    keys = ["train/rust/farm_a/day_2/1.jpg", "rust/1.jpg", "1.jpg", "farm_b/rust/2.jpg"]
    found = slices.by_folder(keys, {"train", "rust", "1.jpg"})
    assert found.tolist() == ["farm_a/day_2", ".", ".", "farm_b"]


@pytest.mark.parametrize(("folders", "told"), [(1, False), (2, True), (3, True), (4, False)])
def test_a_column_tells_of_two_to_half_as_many_as_there_are(folders: int, told: bool) -> None:
    keys = [f"farm_{i % folders}/{i}.jpg" for i in range(7)]
    sides = np.full(7, 300)
    found = slices.columns_of(keys, sides, sides, known=(), pattern=None)
    assert list(found) == (["folder"] if told else [])


def test_two_slices_of_two_or_three_examples_are_told() -> None:
    for count in (2, 3):
        sides = np.array([100, 300, 300][:count])
        keys = [f"{i}.jpg" for i in range(count)]
        found = slices.columns_of(keys, sides, sides, known=(), pattern=None)
        assert {name: column.tolist()[:2] for name, column in found.items()} == {
            "shorter side [pixels]": ["under 128", "256 to 511"]
        }


def test_the_columns_of_a_pattern_come_first_and_are_told_in_any_case() -> None:
    keys = [f"farm_{i % 2}/plant_{i}.jpg" for i in range(6)]
    widths, heights = np.full(6, 900), np.array([100, 300] * 3)
    found = slices.columns_of(
        keys, widths, heights, known=(), pattern=re.compile("(?P<plant>[0-9]+)[.]|(?P<one>farm)")
    )
    assert list(found) == ["plant", "one", "shorter side [pixels]", "folder"]
    assert found["one"].tolist() == ["farm"] * 6
    assert found["plant"].tolist() == ["(no match)"] * 6
    assert found["folder"].tolist() == ["farm_0", "farm_1"] * 3
