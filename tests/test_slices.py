import re

import numpy as np
import pytest

from leafnet import slices
from leafnet.errors import UserError

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
        slices.compile_pattern("(", flag="--slice_by")
    with pytest.raises(UserError, match="matches none of 3 keys, of which the first is 'test/rust"):
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
