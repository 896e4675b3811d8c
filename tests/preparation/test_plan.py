"""What becomes of each photograph: decisions on metadata alone."""

import dataclasses
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from leafnet.core.errors import UserError
from leafnet.data.groups import check_group, components, named_groups
from leafnet.preparation import duplicates, examples
from leafnet.preparation import plan as preparation_plan
from leafnet.preparation.examples import Policy
from leafnet.preparation.plan import Plan, _cut
from leafnet.preparation.splits import _crossing_note, _targets, stratify

POLICY = Policy(shares=(80, 10, 10))

Row = dict[str, Any]


def row(key: str, **values: Any) -> Row:
    """A readable photograph. The class is the key's last folder, the pixels are its own."""
    parts = key.split("/")
    return {
        "key": key,
        "label": parts[-2],
        "split": None,
        "bytes": 1000,
        "pixels_sha256": key,
        # Far from all others: two random hashes differ in 32 bits of 64, give or take 4.
        "perceptual_hash": int(np.random.default_rng(list(key.encode())).integers(2**63)),
        "turned_hashes": np.random.default_rng([*key.encode(), 1]).integers(2**63, size=7).tolist(),
        "reason": None,
        "message": None,
    } | values


def rows_of(counts: dict[str, int]) -> list[Row]:
    return [row(f"{name}/{i:04d}.jpg") for name, n in counts.items() for i in range(n)]


def decide(rows: list[Row], policy: Policy = POLICY, *, has_splits: bool = False) -> Plan:
    numbered = [values | {"number": 10 * i} for i, values in enumerate(rows)]
    table = pa.Table.from_pylist(numbered, examples.READ_SCHEMA)
    return preparation_plan.decide(table, policy, has_splits=has_splits, source="here")


def split_of(rows: list[Row], plan: Plan) -> dict[str, str]:
    """Key -> split of what is kept, told from the shards."""
    shard = np.searchsorted(np.cumsum(plan.shard_rows), plan.rows["place"], side="right")
    numbers = plan.rows["number"].tolist()
    return {
        rows[number // 10]["key"]: plan.shard_names[i].split("-")[0]
        for number, i in zip(numbers, shard, strict=True)
    }


def given_splits(**keys: list[str]) -> list[Row]:
    """Photographs of a source with splits; some of each class in each, beside the `keys`."""
    rows = [
        row(f"{split}/{name}/plain{i}.jpg", split=split)
        for split, name, i in itertools.product(("train", "valid", "test"), "ab", range(3))
    ]
    return rows + [row(f"{split}/{key}", split=split) for split in keys for key in keys[split]]


def alike(rows: list[Row], pixels: str, *keys: str) -> list[Row]:
    """The rows, with the same picture for all `keys`."""
    same = {"pixels_sha256": pixels, "perceptual_hash": 1}
    return [values | same if values["key"] in keys else values for values in rows]


# Duplicates


@pytest.mark.parametrize(
    ("splits", "keeps"),
    [
        (("train", "test"), {"test"}),
        (("train", "valid"), {"valid"}),
        (("valid", "test"), {"test"}),
        (("train", "valid", "test"), {"test"}),
    ],
)
def test_train_gives_way_to_valid_and_valid_to_test(
    splits: tuple[str, ...], keeps: set[str]
) -> None:
    keys = [f"{split}/a/twin.jpg" for split in splits]
    rows = alike(given_splits(**{split: ["a/twin.jpg"] for split in splits}), "twin", *keys)
    plan = decide(rows, has_splits=True)
    kept = split_of(rows, plan)
    assert {kept[key] for key in keys if key in kept} == keeps
    assert plan.dropped == {"other-label": 0, "other-split": len(splits) - 1}
    told = plan.duplicates.to_pylist()
    assert len(told) == len(splits) - 1
    assert all(pair["kind"] == "exact" for pair in told)
    assert {pair["key_a"] for pair in told} == {f"{next(iter(keeps))}/a/twin.jpg"}
    assert not any(pair["dropped_a"] for pair in told)
    assert all(pair["dropped_b"] for pair in told)


def test_copies_within_a_split_stay_and_are_told() -> None:
    keys = ("train/a/x.jpg", "train/a/y.jpg")
    rows = alike(given_splits(train=["a/x.jpg", "a/y.jpg"]), "twin", *keys)
    plan = decide(rows, has_splits=True)
    assert set(keys) <= set(split_of(rows, plan))
    (pair,) = plan.duplicates.to_pylist()
    assert (pair["key_a"], pair["key_b"], pair["distance"]) == (*keys, 0)
    assert not pair["dropped_a"]
    assert not pair["dropped_b"]


def test_one_picture_under_two_labels_is_dropped_on_both_sides() -> None:
    rows = rows_of({"a": 10, "b": 10})
    rows = alike(rows, "twin", "a/0003.jpg", "a/0004.jpg", "b/0007.jpg")
    plan = decide(rows)
    assert set(split_of(rows, plan)) == {r["key"] for r in rows} - {
        "a/0003.jpg",
        "a/0004.jpg",
        "b/0007.jpg",
    }
    assert plan.dropped == {"other-label": 3, "other-split": 0}
    told = plan.duplicates.to_pylist()
    assert {pair["key_b"] for pair in told} == {"a/0004.jpg", "b/0007.jpg"}
    assert all(pair["dropped_a"] and pair["dropped_b"] for pair in told)
    assert {pair["split_a"] for pair in told} == {None}


def test_a_conflict_of_labels_comes_before_one_of_splits() -> None:
    """Test keeps nothing of a picture whose label is in doubt."""
    rows = given_splits(train=["a/x.jpg"], test=["b/x.jpg"])
    rows = alike(rows, "twin", "train/a/x.jpg", "test/b/x.jpg")
    plan = decide(rows, has_splits=True)
    assert {"train/a/x.jpg", "test/b/x.jpg"}.isdisjoint(split_of(rows, plan))
    assert plan.dropped == {"other-label": 2, "other-split": 0}


def test_duplicates_are_only_reported_by_setting() -> None:
    rows = given_splits(train=["a/x.jpg"], test=["b/x.jpg"])
    rows = alike(rows, "twin", "train/a/x.jpg", "test/b/x.jpg")
    plan = decide(rows, POLICY._replace(drop_exact=False), has_splits=True)
    assert len(split_of(rows, plan)) == len(rows)
    (pair,) = plan.duplicates.to_pylist()
    assert {(pair["split_a"], pair["label_a"]), (pair["split_b"], pair["label_b"])} == {
        ("train", "a"),
        ("test", "b"),
    }


def near_rows() -> list[Row]:
    """train/a/x is 3 bits from test/a/x, and train/a/far 4 bits."""
    rows = given_splits(train=["a/x.jpg", "a/far.jpg"], test=["a/x.jpg"])
    hashes = {"train/a/x.jpg": 0b111 << 20, "train/a/far.jpg": 0b1111, "test/a/x.jpg": 0}
    return [r | {"perceptual_hash": hashes.get(r["key"], r["perceptual_hash"])} for r in rows]


def test_near_duplicates_are_told_and_stay() -> None:
    rows = near_rows()
    plan = decide(rows, has_splits=True)
    assert len(split_of(rows, plan)) == len(rows)
    (pair,) = plan.duplicates.to_pylist()
    assert (pair["kind"], pair["distance"]) == ("near", 3)
    assert {pair["key_a"], pair["key_b"]} == {"train/a/x.jpg", "test/a/x.jpg"}


def test_near_duplicates_are_dropped_by_setting() -> None:
    rows = near_rows()
    plan = decide(rows, POLICY._replace(drop_near=True), has_splits=True)
    assert {r["key"] for r in rows} - set(split_of(rows, plan)) == {"train/a/x.jpg"}
    assert plan.dropped == {"other-label": 0, "other-split": 1}


def test_what_valid_gives_up_drops_nothing_from_train() -> None:
    """Train is near valid, valid near test, and train not near test."""
    rows = given_splits(train=["a/x.jpg"], valid=["a/x.jpg"], test=["a/x.jpg"])
    hashes = {"train/a/x.jpg": 0b111, "valid/a/x.jpg": 0, "test/a/x.jpg": 0b111000}
    rows = [r | {"perceptual_hash": hashes.get(r["key"], r["perceptual_hash"])} for r in rows]
    plan = decide(rows, POLICY._replace(drop_near=True), has_splits=True)
    assert {r["key"] for r in rows} - set(split_of(rows, plan)) == {"valid/a/x.jpg"}


def test_near_distance_is_a_setting() -> None:
    assert not decide(near_rows(), POLICY._replace(near_distance=2)).duplicates.num_rows
    rows = [r | {"perceptual_hash": 5} if "/a/x" in r["key"] else r for r in near_rows()]
    (pair,) = decide(rows, POLICY._replace(near_distance=0)).duplicates.to_pylist()
    assert (pair["kind"], pair["distance"]) == ("near", 0)


def test_near_duplicates_without_splits_are_put_into_one_split() -> None:
    rows = rows_of({"a": 40, "b": 40})
    # A chain, each one bit from the next: its ends are four bits apart, and still go together.
    chain = [f"a/{i:04d}.jpg" for i in range(5)]
    rows = [
        r | {"perceptual_hash": (1 << chain.index(r["key"])) - 1} if r["key"] in chain else r
        for r in rows
    ]
    for seed in range(5):
        policy = POLICY._replace(drop_near=True, seed=seed)
        kept = split_of(rows, decide(rows, policy))
        assert len({kept[key] for key in chain}) == 1


def test_copies_without_splits_are_put_into_one_split() -> None:
    rows = rows_of({"a": 40, "b": 40})
    copies = ["a/0001.jpg", "a/0012.jpg", "a/0039.jpg"]
    rows = alike(rows, "twin", *copies)
    for seed in range(5):
        plan = decide(rows, POLICY._replace(seed=seed))
        assert len({split_of(rows, plan)[key] for key in copies}) == 1
        assert plan.dropped == {"other-label": 0, "other-split": 0}


def test_pairs_that_cross_a_border_come_first() -> None:
    rows = given_splits(train=["a/x.jpg", "a/y.jpg", "a/z.jpg"], valid=["a/z.jpg"])
    rows = alike(rows, "inside", "train/a/x.jpg", "train/a/y.jpg")
    rows = [
        r | {"pixels_sha256": "across", "perceptual_hash": 0xFFFF} if "/a/z" in r["key"] else r
        for r in rows
    ]
    plan = decide(rows, POLICY._replace(drop_exact=False), has_splits=True)
    assert [pair["key_a"][-5:] for pair in plan.duplicates.to_pylist()] == ["z.jpg", "x.jpg"]


def brute_force(hashes: list[int], distance: int) -> set[tuple[int, int]]:
    pairs = itertools.combinations(sorted(set(hashes)), 2)
    return {(a, b) for a, b in pairs if (a ^ b).bit_count() <= distance}


def found_pairs(hashes: list[int], distance: int) -> list[tuple[int, int]]:
    array = np.array(hashes, np.uint64)
    pairs = duplicates.near_pairs(array, distance)
    distinct = np.unique(array)
    assert np.array_equal(distinct[pairs.inverse], array)
    assert pairs.distance.tolist() == [
        int(distinct[a] ^ distinct[b]).bit_count() for a, b in zip(pairs.a, pairs.b, strict=True)
    ]
    return [(int(distinct[a]), int(distinct[b])) for a, b in zip(pairs.a, pairs.b, strict=True)]


@st.composite
def crowded_hashes(draw: st.DrawFn) -> list[int]:
    """A few hashes, and others that differ from them in few bits."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    flips = st.sets(st.integers(0, 63), max_size=5)
    near = draw(st.lists(st.tuples(st.sampled_from(centres), flips), max_size=60))
    return centres + [centre ^ sum(1 << bit for bit in bits) for centre, bits in near]


@pytest.mark.parametrize("bits", range(65))
def test_parts_cover_the_free_bits_once_and_none_is_empty(bits: int) -> None:
    fixed = (1 << bits) - 1
    parts = [mask ^ fixed for mask in duplicates._parts(fixed)]
    assert sum(parts) == fixed ^ (2**64 - 1)
    assert sum(part.bit_count() for part in parts) == 64 - bits
    assert sum(part > 0 for part in parts) == min(4, 64 - bits)


@settings(max_examples=60, deadline=None)
@given(hashes=crowded_hashes(), distance=st.integers(0, 3))
def test_near_pairs_are_those_of_brute_force(hashes: list[int], distance: int) -> None:
    found = found_pairs(hashes, distance)
    assert len(found) == len(set(found))
    assert set(found) == brute_force(hashes, distance)


@pytest.mark.parametrize("distance", [0, 1, 3])
def test_near_pairs_of_turned_pictures_are_those_of_brute_force(distance: int) -> None:
    generator = np.random.default_rng(distance)
    hashes = generator.integers(2**64, size=40, dtype=np.uint64)
    turned = generator.integers(2**64, size=(40, 7), dtype=np.uint64)
    for i in range(12):  # a copy of picture i, turned in way i % 7 and changed in few bits
        bits = generator.choice(64, i % 5, replace=False)
        hashes[20 + i] = turned[i, i % 7] ^ np.uint64(sum(1 << int(bit) for bit in bits))
    found = duplicates.near_pairs(hashes, distance, turned)
    distinct = np.unique(hashes)
    expected: dict[tuple[int, int], int] = {}
    for i, j in itertools.product(range(40), repeat=2):
        ways = [hashes[j], *turned[j]]
        least = min(int(hashes[i] ^ way).bit_count() for way in ways)
        a, b = sorted(int(np.searchsorted(distinct, hashes[k])) for k in (i, j))
        if a != b and least <= distance:
            expected[a, b] = min(least, expected.get((a, b), 64))
    pairs = zip(found.a.tolist(), found.b.tolist(), found.distance.tolist(), strict=True)
    assert {(a, b): d for a, b, d in pairs} == expected
    assert len(expected) >= 3


def test_a_flipped_copy_in_another_split_is_told_and_dropped_by_setting() -> None:
    rows = given_splits(train=["a/x.jpg"], test=["a/y.jpg"])
    (x,) = (r for r in rows if r["key"] == "train/a/x.jpg")
    (y,) = (r for r in rows if r["key"] == "test/a/y.jpg")
    y["turned_hashes"][4] = x["perceptual_hash"]
    plan = decide(rows, has_splits=True)
    (pair,) = plan.duplicates.to_pylist()
    assert (pair["kind"], pair["key_a"], pair["key_b"]) == ("near", "test/a/y.jpg", "train/a/x.jpg")
    assert pair["distance"] == 0
    plan = decide(rows, POLICY._replace(drop_near=True), has_splits=True)
    assert plan.dropped == {"other-label": 0, "other-split": 1}


def test_near_pairs_in_long_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are cut into smaller ones, and pairs that do not fit at once."""
    monkeypatch.setattr(duplicates, "_LONG_RUN", 24)
    monkeypatch.setattr(duplicates, "_PAIRS_AT_ONCE", 7)
    draw = np.random.default_rng(0)
    # Bits in few places only: every band has long runs.
    hashes = [
        int(sum(1 << int(bit) for bit in draw.choice([0, 17, 18, 33, 50, 51, 63], size, False)))
        for size in draw.integers(0, 6, 300)
    ]
    for distance in range(4):
        found = found_pairs(hashes, distance)
        assert len(found) == len(set(found))
        assert set(found) == brute_force(hashes, distance)


def test_too_many_near_pairs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_MAX_PAIRS", 100)
    hashes = np.array([1 << a | 1 << b for a in range(30) for b in range(30)], np.uint64)
    with pytest.raises(UserError, match="more than 100 pairs") as caught:
        duplicates.near_pairs(hashes, 3)
    assert caught.value.reason == "too-many-near-duplicates"


# Splits


def test_each_class_is_divided_by_the_shares_exactly() -> None:
    rows = rows_of({"a": 300, "b": 50, "c": 17})
    plan = decide(rows)
    assert plan.counts == {
        "train": {"a": 240, "b": 40, "c": 13},
        "valid": {"a": 30, "b": 5, "c": 2},
        "test": {"a": 30, "b": 5, "c": 2},
    }
    assert sum(plan.shard_rows) == 367


def test_shares_of_nothing_give_no_split() -> None:
    plan = decide(rows_of({"a": 20, "b": 20}), POLICY._replace(shares=(90, 0, 10)))
    assert plan.counts["valid"] == {"a": 0, "b": 0}
    assert plan.counts["test"] == {"a": 2, "b": 2}
    assert {name.split("-")[0] for name in plan.shard_names} == {"train", "test"}


def test_a_class_of_three_is_in_every_split_and_one_of_two_in_train() -> None:
    plan = decide(rows_of({"a": 100, "few": 3, "two": 2}))
    assert [plan.counts[split]["few"] for split in ("train", "valid", "test")] == [1, 1, 1]
    assert [plan.counts[split]["two"] for split in ("train", "valid", "test")] == [2, 0, 0]
    assert "warning: valid has no example of two" in plan.notes


@settings(max_examples=50, deadline=None)
@given(
    cells=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 25)), min_size=1, max_size=120),
    shares=st.sampled_from([(80, 10, 10), (34, 33, 33), (100, 0, 0), (60, 0, 40)]),
    seed=st.integers(0, 3),
)
def test_no_group_is_in_two_splits(
    cells: list[tuple[int, int]], shares: tuple[int, int, int], seed: int
) -> None:
    label, group = np.array(cells, np.int64).T
    split = stratify(label, group, shares, seed=seed)
    for name in np.unique(group):
        assert len(set(split[group == name].tolist())) == 1
    assert set(split.tolist()) <= {i for i, share in enumerate(shares) if share}


@settings(max_examples=50, deadline=None)
@given(
    label=st.lists(st.integers(0, 4), min_size=1, max_size=200),
    shares=st.sampled_from([(80, 10, 10), (34, 33, 33), (70, 15, 15), (60, 0, 40)]),
)
def test_single_photographs_come_within_one_of_their_share(
    label: list[int], shares: tuple[int, int, int]
) -> None:
    split = stratify(np.array(label), np.arange(len(label)), shares, seed=0)
    for name, count in Counter(label).items():
        of_class = split[np.array(label) == name]
        for i, share in enumerate(shares):
            assert abs(int(np.sum(of_class == i)) - count * share / 100) <= 1 + (count < 10)


def test_a_group_stays_together_whatever_its_labels_are() -> None:
    rows = [
        row(f"{name}/plant{plant:02d}_{i}.jpg")
        for name, plant, i in itertools.product("ab", range(20), range(3))
    ]
    plan = decide(rows, POLICY._replace(group=r"plant(\d+)"))
    kept = split_of(rows, plan)
    of_plant: dict[str, set[str]] = {}
    for key, split in kept.items():
        of_plant.setdefault(key.split("plant")[1][:2], set()).add(split)
    assert all(len(splits) == 1 for splits in of_plant.values())
    assert Counter(kept.values()) == {"train": 96, "valid": 12, "test": 12}
    assert "--group makes 20 groups of 120 photographs" in plan.notes


def test_group_without_a_group_in_it_and_keys_without_a_match() -> None:
    rows = [row(f"{name}/p{i // 2}.{i}.jpg") for name in "ab" for i in range(20)]
    rows += [row("a/other.jpg")]
    plan = decide(rows, POLICY._replace(group=r"p\d+"))
    assert plan.notes == (
        "--group makes 10 groups of 40 photographs",
        "warning: --group does not match 1 keys; each stands alone",
    )


def test_group_that_matches_nothing_or_is_no_expression() -> None:
    with pytest.raises(UserError, match=r"matches no key; the first is a/0000\.jpg") as caught:
        decide(rows_of({"a": 3, "b": 3}), POLICY._replace(group="plant"))
    assert caught.value.reason == "group-without-match"
    with pytest.raises(UserError, match="is not a regular expression") as caught:
        check_group("plant(")
    assert caught.value.reason == "bad-group"


def test_groups_that_the_source_s_splits_tear_apart_are_told() -> None:
    rows = given_splits(train=["a/p1_0.jpg", "a/p2_0.jpg"], test=["a/p1_1.jpg", "a/p2_1.jpg"])
    plan = decide(rows, POLICY._replace(group=r"p(\d)_"), has_splits=True)
    assert "warning: 2 groups of --group are in more than one split of the source" in plan.notes
    assert split_of(rows, plan)["test/a/p1_1.jpg"] == "test"


def test_a_source_without_valid_gets_one_from_train() -> None:
    rows = [row(f"train/{name}/{i}.jpg", split="train") for name in "ab" for i in range(90)]
    rows += [row(f"test/{name}/{i}.jpg", split="test") for name in "ab" for i in range(7)]
    plan = decide(rows, has_splits=True)
    assert plan.counts["test"] == {"a": 7, "b": 7}
    assert plan.counts["valid"] == {"a": 10, "b": 10}  # 10 of 80 + 10
    assert plan.notes == ("the source has no valid split: 20 photographs of train become it",)
    kept = split_of(rows, plan)
    assert {split for key, split in kept.items() if key.startswith("test/")} == {"test"}


# Order and shards


def test_every_photograph_is_there_once_with_its_label() -> None:
    rows = rows_of({"a": 60, "b": 41})
    rows[5] |= {"reason": "truncated", "message": "ends early"}
    plan = decide(rows, POLICY._replace(shard_bytes=9000))
    assert sorted(plan.rows["place"].tolist()) == list(range(100))
    assert sum(plan.shard_rows) == 100
    assert plan.rows["number"].tolist() == [10 * i for i in range(101) if i != 5]
    expected = [plan.class_names.index(r["label"]) for i, r in enumerate(rows) if i != 5]
    assert plan.rows["label"].tolist() == expected
    assert plan.rejected.to_pylist() == [
        {"key": rows[5]["key"], "reason": "truncated", "message": "ends early"}
    ]
    assert plan.shard_names[:9] == tuple(f"train-{i:05d}.parquet" for i in range(9))
    assert set(plan.shard_rows[:9].tolist()) <= {8, 9}
    assert len(plan.shard_names) == 11


def test_the_plan_does_not_depend_on_the_order_of_reading() -> None:
    rows = alike(rows_of({"a": 50, "b": 50}), "twin", "a/0003.jpg", "b/0004.jpg")
    rows = alike(rows, "other", "b/0033.jpg", "b/0044.jpg")
    numbered = pa.Table.from_pylist(
        [r | {"number": i} for i, r in enumerate(rows)], examples.READ_SCHEMA
    )
    mixed = numbered.take(np.random.default_rng(1).permutation(len(rows)))
    first, second = (
        preparation_plan.decide(table, POLICY, has_splits=False, source="here")
        for table in (numbered, mixed)
    )
    for name, column in first.rows.items():
        assert np.array_equal(column, second.rows[name])
    plain = ("shard_names", "counts", "rejected", "duplicates", "dropped", "notes")
    for field in plain:
        assert getattr(first, field) == getattr(second, field)
    assert {field.name for field in dataclasses.fields(Plan)} == {
        *plain,
        "class_names",
        "shard_rows",
        "rows",
    }


def test_the_order_depends_on_the_seed_only() -> None:
    rows = rows_of({"a": 50, "b": 50})
    first, again, other = (
        decide(rows, POLICY._replace(seed=seed)).rows["place"].tolist() for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_the_order_of_splits_that_are_given_depends_on_the_seed_too() -> None:
    first, other = (
        decide(given_splits(), POLICY._replace(seed=seed), has_splits=True) for seed in (0, 1)
    )
    assert first.counts == other.counts
    assert first.rows["place"].tolist() != other.rows["place"].tolist()


def test_the_order_is_a_shuffle() -> None:
    """A run of rows is a fair sample: in each quarter of train, each class has its share."""
    plan = decide(rows_of({"a": 500, "b": 500}))
    order = np.argsort(plan.rows["place"])
    labels = plan.rows["label"][order][:800]
    quarters = labels.reshape(4, 200).mean(axis=1)
    assert np.all(np.abs(quarters - 0.5) < 0.13)  # four deviations of 200 throws of a coin


# What cannot be trained on


def test_nothing_readable() -> None:
    rows = [r | {"reason": "empty", "message": ""} for r in rows_of({"a": 2, "b": 1})]
    with pytest.raises(UserError, match="none of the 3 photographs can be used: 3 empty") as caught:
        decide(rows)
    assert caught.value.reason == "nothing-readable"


def test_the_commonest_reason_is_told_with_a_photograph() -> None:
    rows = rows_of({"a": 4, "b": 1})
    for i, (reason, message) in enumerate([("cut", "1"), ("bad", "x"), ("bad", "y"), ("cut", "2")]):
        rows[i] |= {"reason": reason, "message": message}
    rows[4] |= {"reason": "bad", "message": "z"}
    told = r"5 photographs can be used: 3 bad, 2 cut; such as a/0001.jpg: x$"
    with pytest.raises(UserError, match=told):
        decide(rows)


def test_a_photograph_without_a_split_is_never_lost_without_a_word() -> None:
    rows = [*given_splits(), row("more/a/1.jpg"), row("more/b/1.jpg")]
    with pytest.raises(RuntimeError, match="20 photographs were read, and 18 kept"):
        decide(rows, has_splits=True)


def test_a_data_set_for_evaluation_alone() -> None:
    """By the shares, or since the source has a test split only; one class is enough."""
    for_evaluation = Policy(shares=(0, 0, 100))
    of_test = [row(f"test/a/{i}.jpg", split="test") for i in range(4)]
    for rows, plan in (
        (two := rows_of({"a": 5, "b": 3}), decide(two, for_evaluation)),
        (one := rows_of({"a": 5}), decide(one, for_evaluation)),
        (of_test, decide(of_test, has_splits=True)),
    ):
        assert set(split_of(rows, plan).values()) == {"test"}
        assert len(plan.rows["number"]) == len(rows)
        assert not [note for note in plan.notes if "become it" in note]


def test_a_class_that_is_there_twice_is_told_with_a_pair() -> None:
    rows = rows_of({"a": 9, "b": 1, "c": 3})
    rows = alike(rows, "twin", "a/0000.jpg", "b/0000.jpg")
    told = (
        "class b of here has no training example left .1 readable.; 1 were dropped since the same "
        "picture is under another label, such as b/0000.jpg and a/0000.jpg: remove one"
    )
    with pytest.raises(UserError, match=told):
        decide(rows)


def test_a_class_whose_training_photographs_are_all_in_test_is_told_with_a_pair() -> None:
    rows = given_splits(train=["c/x.jpg"], test=["c/y.jpg"])
    rows = alike(rows, "twin", "train/c/x.jpg", "test/c/y.jpg")
    told = "same picture is in another split, such as train/c/x.jpg and test/c/y.jpg: remove"
    with pytest.raises(UserError, match=told):
        decide(rows, has_splits=True)


def test_classes_that_differ_in_case_alone_are_refused_when_they_are_read() -> None:
    """Tars tell their classes only then."""
    with pytest.raises(UserError, match="the classes A and a, which differ in case") as caught:
        decide(rows_of({"A": 4, "a": 4}))
    assert caught.value.reason == "class-twice"


def test_a_class_that_cannot_be_read() -> None:
    rows = rows_of({"a": 4, "b": 4, "c": 1})
    rows[-1] |= {"reason": "empty", "message": ""}
    with pytest.raises(UserError, match="no photograph of the class c of here") as caught:
        decide(rows)
    assert caught.value.reason == "class-unreadable"


def test_one_class() -> None:
    with pytest.raises(UserError, match="one class only, a") as caught:
        decide(rows_of({"a": 4}))
    assert caught.value.reason == "one-class"


def test_a_class_of_which_train_keeps_nothing() -> None:
    rows = alike(rows_of({"a": 9, "b": 1}), "twin", "a/0000.jpg", "b/0000.jpg")
    with pytest.raises(UserError, match="class b of here has no training example") as caught:
        decide(rows)
    assert caught.value.reason == "class-without-training"


def test_number_labels_are_in_the_order_of_their_values() -> None:
    rows = [row(f"x/{i}.jpg", label=str(i % 11)) for i in range(110)]
    assert decide(rows).class_names == tuple(str(i) for i in range(11))


# Shares, groups and shards by their definition


def targets(count: int, groups: int | None = None, shares: Any = (80, 10, 10)) -> list[int]:
    return _targets(count, count if groups is None else groups, shares)


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [
        (0, (80, 10, 10), [0, 0, 0]),
        (1, (80, 10, 10), [1, 0, 0]),
        (2, (80, 10, 10), [2, 0, 0]),
        (3, (80, 10, 10), [1, 1, 1]),
        (4, (80, 10, 10), [2, 1, 1]),  # 3.2, 0.4, 0.4: each split has one of them first
        (14, (80, 10, 10), [11, 2, 1]),  # 11.2, 1.4, 1.4: of equal remainders the earlier split
        (16, (80, 10, 10), [13, 2, 1]),  # 12.8, 1.6, 1.6
        (17, (80, 10, 10), [13, 2, 2]),  # 13.6, 1.7, 1.7
        (25, (80, 10, 10), [20, 3, 2]),  # 20, 2.5, 2.5
        (7, (50, 30, 20), [4, 2, 1]),  # 3.5, 2.1, 1.4
        (10, (34, 33, 33), [4, 3, 3]),
        (90, (80, 10, 0), [80, 10, 0]),  # of 90, since that is their sum
        (9, (20, 40, 40), [2, 4, 3]),  # 1.8, 3.6, 3.6
        (3, (90, 0, 10), [2, 0, 1]),
    ],
)
def test_the_shares_of_a_class_are_by_largest_remainder(
    count: int, shares: tuple[int, int, int], expected: list[int]
) -> None:
    assert targets(count, shares=shares) == expected


def test_a_class_of_two_groups_is_for_training_first() -> None:
    assert targets(30, groups=2) == [24, 3, 3]
    assert targets(1, groups=1, shares=(20, 40, 40)) == [1, 0, 0]
    assert targets(2, groups=2, shares=(20, 40, 40)) == [1, 0, 1]
    assert targets(2, groups=2, shares=(10, 80, 10)) == [1, 1, 0]


def test_the_rarest_class_chooses_its_groups_first() -> None:
    """Three groups have both classes; the rare one has no others, and needs each in another."""
    label = np.array([0] * 30 + [0, 1] * 3)
    group = np.array([*range(30), 30, 30, 31, 31, 32, 32])
    for seed in range(4):
        split = stratify(label, group, (80, 10, 10), seed=seed)
        assert sorted(split[label == 1].tolist()) == [0, 1, 2]


def test_large_groups_leave_room_for_every_split() -> None:
    """Groups of 8, 1, 1 and 1 of one class: the large one trains, whatever the seed."""
    group = np.array([0] * 8 + [1, 2, 3])
    for seed in range(6):
        split = stratify(np.zeros(11, np.int64), group, (80, 10, 10), seed=seed)
        assert split[:8].tolist() == [0] * 8
        assert np.bincount(split, minlength=3).tolist() == [9, 1, 1]


def test_groups_of_two_classes_go_where_more_is_missing_of_both() -> None:
    label = np.array([0, 0, 0, 1] * 20)
    group = np.repeat(np.arange(20), 4)
    split = stratify(label, group, (80, 10, 10), seed=3)
    assert np.bincount(split[label == 0]).tolist() == [48, 6, 6]
    assert np.bincount(split[label == 1]).tolist() == [16, 2, 2]


def test_nothing_is_divided_into_nothing() -> None:
    none = np.empty(0, np.int64)
    assert stratify(none, none, (80, 10, 10), seed=0).tolist() == []


def test_which_photographs_are_held_out_depends_on_the_seed() -> None:
    label, group = np.zeros(100, np.int64), np.arange(100)
    first, again, other = (
        stratify(label, group, (80, 10, 10), seed=seed).tolist() for seed in (7, 7, 8)
    )
    assert first == again
    assert first != other
    rows = rows_of({"a": 100, "b": 100})
    held_out = [
        {
            key
            for key, split in split_of(rows, decide(rows, POLICY._replace(seed=seed))).items()
            if split != "train"
        }
        for seed in (0, 1)
    ]
    assert held_out[0] != held_out[1]


def test_a_group_is_what_the_first_parentheses_match() -> None:
    """Not the whole match: each photograph of a plant has a number of its own in it."""
    keys = ["a/p1_1.jpg", "a/p1_2.jpg", "b/p2_1.jpg", "b/p1_9.jpg", "b/other.jpg", "b/other2.jpg"]
    group, notes = named_groups(keys, r"p(\d)_(\d)")
    assert group is not None
    assert group.tolist() == [0, 0, 1, 0, 2, 3]
    assert notes[0] == "--group makes 2 groups of 4 photographs"
    assert notes[1] == "warning: --group does not match 2 keys; each stands alone"
    without, _ = named_groups(keys, r"p\d")
    assert without is not None
    assert without.tolist() == [0, 0, 1, 0, 2, 3]
    assert named_groups(keys, None) == (None, [])
    assert len(named_groups(keys[:4], r"p(\d)")[1]) == 1


def test_a_key_like_the_name_of_a_group_is_not_in_it() -> None:
    group, _ = named_groups(["x", "a/x1", "b/x2"], r"/(x)\d")
    assert group is not None
    assert group.tolist() == [0, 1, 1]


def test_photographs_of_one_plant_are_in_one_split() -> None:
    rows = [row(f"{c}/plant{i // 4}_{i}.jpg") for c in "ab" for i in range(80)]
    for seed in range(3):
        plan = decide(rows, POLICY._replace(group=r"plant(\d+)_(\d+)", seed=seed))
        splits: dict[str, set[str]] = {}
        for key, split in split_of(rows, plan).items():
            splits.setdefault(key.split("plant")[1].split("_")[0], set()).add(split)
        assert {len(found) for found in splits.values()} == {1}
        assert "--group makes 20 groups of 160 photographs" in plan.notes


def test_no_group_is_a_good_group_pattern() -> None:
    check_group(None)
    check_group(r"plant(\d+)")


def test_groups_in_one_split_of_the_source_are_no_cause_for_a_warning() -> None:
    group, split = np.array([0, 0, 1, 1, 2]), np.array([0, 0, 2, 1, 2])
    assert _crossing_note(group, split) == [
        "warning: 1 groups of --group are in more than one split of the source"
    ]
    assert _crossing_note(group, np.array([0, 0, 2, 2, 1])) == []


@pytest.mark.parametrize("seed", range(5))
def test_what_hangs_together_is_what_scipy_finds(seed: int) -> None:
    draw = np.random.default_rng(seed)
    a, b = draw.integers(0, 60, (2, 40))
    matrix = coo_array((np.ones(40), (a, b)), shape=(60, 60))
    _, of = connected_components(matrix, directed=False)
    lowest = [int(np.flatnonzero(of == of[place])[0]) for place in range(60)]
    assert components(60, a, b).tolist() == lowest


def test_what_a_source_lacks_is_its_share_of_the_shares_that_are_left() -> None:
    """Valid stays, test has 15 of 75 + 15: of 45 photographs 7.5, and of halves train gets it."""
    rows = [row(f"train/{name}/{i}.jpg", split="train") for name in "ab" for i in range(45)]
    rows += [row(f"valid/{name}/{i}.jpg", split="valid") for name in "ab" for i in range(3)]
    plan = decide(rows, POLICY._replace(shares=(75, 10, 15)), has_splits=True)
    assert [plan.counts[split] for split in ("train", "valid", "test")] == [
        {"a": 38, "b": 38},
        {"a": 3, "b": 3},
        {"a": 7, "b": 7},
    ]
    assert plan.notes == ("the source has no test split: 14 photographs of train become it",)


def test_splits_that_are_given_stay_as_they_are() -> None:
    rows = given_splits()
    plan = decide(rows, has_splits=True)
    assert split_of(rows, plan) == {r["key"]: r["split"] for r in rows}
    assert plan.notes == ()


def test_the_splits_of_a_source_that_has_none_are_not_looked_at() -> None:
    rows = rows_of({"a": 20, "b": 20})
    assert decide(rows).notes == ()
    assert decide(rows).counts["train"] == {"a": 16, "b": 16}


def test_classes_that_a_split_lacks_are_named() -> None:
    rows = given_splits(train=["c/1.jpg", "d/1.jpg"], test=["c/1.jpg"])
    assert decide(rows, has_splits=True).notes == (
        "warning: valid has no example of c, d",
        "warning: test has no example of d",
    )
    nothing = decide(rows_of({"a": 9, "b": 9}), POLICY._replace(shares=(100, 0, 0)))
    assert nothing.notes == ()


def test_shards_have_like_sizes_and_each_photograph_lies_by_its_middle() -> None:
    # 100 bytes in two shards of 50: the middles are at 20, 45, 55, 80.
    assert _cut(np.array([40, 10, 10, 40]), 50).tolist() == [2, 2]
    assert _cut(np.array([60, 20, 20]), 50).tolist() == [1, 2]  # at 30, 70, 90
    assert _cut(np.array([20, 20, 60]), 50).tolist() == [2, 1]  # at 10, 30, 70
    assert _cut(np.array([5, 5, 5]), 1000).tolist() == [3]
    assert _cut(np.array([700]), 10).tolist() == [1]  # a photograph is never cut
    assert _cut(np.full(12, 100), 300).tolist() == [3, 3, 3, 3]
    assert _cut(np.full(7, 100), 300).tolist() == [3, 4]  # 2.33 are 2
    assert _cut(np.full(8, 100), 300).tolist() == [3, 2, 3]  # 2.67 are 3


def test_places_follow_the_shards_of_each_split() -> None:
    rows = [r | {"bytes": 100 + 50 * (i % 5)} for i, r in enumerate(rows_of({"a": 60, "b": 40}))]
    plan = decide(rows, POLICY._replace(shard_bytes=4000))
    size = {10 * i: r["bytes"] for i, r in enumerate(rows)}
    order = np.argsort(plan.rows["place"])
    sizes = [size[number] for number in plan.rows["number"][order].tolist()]
    ends = np.cumsum(plan.shard_rows)
    of_shard = [sum(sizes[end - n : end]) for end, n in zip(ends, plan.shard_rows, strict=True)]
    assert plan.shard_names == (
        *(f"train-0000{i}.parquet" for i in range(4)),
        "valid-00000.parquet",
        "test-00000.parquet",
    )
    assert sum(of_shard) == sum(size.values())
    assert all(abs(total - sum(of_shard[:4]) / 4) <= 300 for total in of_shard[:4])
    assert [int(n) for n in plan.shard_rows[4:]] == [10, 10]


def test_class_numbers_are_numbers_only_where_all_are() -> None:
    assert examples.sort_names(["10", "9", "2"]) == ["2", "9", "10"]
    assert examples.sort_names(["10", "9", "2", "a"]) == ["10", "2", "9", "a"]
    assert examples.sort_names(["rust", "healthy"]) == ["healthy", "rust"]


def test_the_refusals_count_what_they_speak_of() -> None:
    rows = [r | {"reason": "empty"} for r in rows_of({"a": 2, "b": 1})]
    rows[0]["reason"] = "corrupt"
    with pytest.raises(UserError, match=r"none of the 3 .*: 1 corrupt, 2 empty"):
        decide(rows)
    rows = alike(rows_of({"a": 9, "b": 2, "c": 5}), "twin", "a/0000.jpg", "b/0000.jpg")
    rows = alike(rows, "other", "a/0001.jpg", "b/0001.jpg")
    with pytest.raises(UserError, match=r"class b of here .* \(2 readable\)"):
        decide(rows)


def test_a_class_whose_split_is_only_test_has_nothing_to_train_on() -> None:
    rows = [*given_splits(), row("test/z/1.jpg", split="test")]
    with pytest.raises(UserError, match="class z of here has no training example") as caught:
        decide(rows, has_splits=True)
    assert caught.value.reason == "class-without-training"


def test_the_settings_as_the_pages_give_them() -> None:
    policy = Policy(shares=(80, 10, 10))
    assert (policy.drop_exact, policy.drop_near, policy.near_distance) == (True, False, 3)
    assert (policy.group, policy.shard_bytes, policy.seed) == (None, 64_000_000, 0)


# What is alike, against a comparison of each with each


@pytest.mark.parametrize("distance", range(4))
def test_hashes_at_the_distance_are_near_and_those_one_bit_further_are_not(distance: int) -> None:
    """Bits from each band, and several of one band."""
    for bits in ([0, 16, 32, 48], [15, 31, 47, 63], [1, 2, 3, 4], [60, 61, 62, 63], [0, 1, 62, 63]):
        near = sum(1 << bit for bit in bits[:distance])
        far = sum(1 << bit for bit in bits[: distance + 1])
        expected = [(0, near)] if distance else []
        assert found_pairs([0, near, 0], distance) == expected
        assert found_pairs([0, far], distance) == []


def test_a_distance_that_the_bands_do_not_cover_is_refused() -> None:
    for distance in (-1, 4):
        with pytest.raises(ValueError, match=f"need 0 <= distance < 4, got {distance}"):
            duplicates.near_pairs(np.array([1, 2], np.uint64), distance)


def test_as_many_near_pairs_as_are_allowed_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = np.array([0, 1, 2, 4], np.uint64)  # six pairs, at 1 or 2 bits
    monkeypatch.setattr(duplicates, "_MAX_PAIRS", 6)
    assert duplicates.near_pairs(hashes, 3).a.size == 6
    monkeypatch.setattr(duplicates, "_MAX_PAIRS", 5)
    with pytest.raises(UserError):
        duplicates.near_pairs(hashes, 3)


def mixed_rows(seed: int) -> list[Row]:
    """Few pictures and few hashes, in three splits and under two labels."""
    draw = np.random.default_rng(seed)
    hashes = [0, 0b1, 0b111, 0b1111000, 1 << 40, 0b11 << 40]
    rows = given_splits()
    for i in range(24):
        split, label = draw.choice(["train", "valid", "test"]), draw.choice(["a", "b"])
        picture = int(draw.integers(0, 12))
        row_of_picture = {"pixels_sha256": f"p{picture}", "perceptual_hash": hashes[picture % 6]}
        rows.append(row(f"{split}/{label}/x{i:02d}.jpg", split=str(split)) | row_of_picture)
    return rows


def dropped_by_rule(rows: list[Row], like: list[set[int]]) -> tuple[set[int], set[int]]:
    """Places that two labels cost, and a higher split; `like` are those that each is like."""
    rank = {"train": 0, "valid": 1, "test": 2}
    label = {i for i, r in enumerate(rows) if {rows[j]["label"] for j in like[i]} != {r["label"]}}
    gone: set[int] = set()
    for split in ("valid", "train"):
        gone |= {
            i
            for i, r in enumerate(rows)
            if r["split"] == split
            and i not in label
            and any(rank[rows[j]["split"]] > rank[split] for j in like[i] - label - gone)
        }
    return label, gone


@pytest.mark.parametrize("seed", range(6))
def test_what_is_dropped_is_what_the_rules_say(seed: int) -> None:
    rows = mixed_rows(seed)
    plan = decide(rows, POLICY, has_splits=True)
    every = range(len(rows))
    same = [
        {j for j in every if rows[j]["pixels_sha256"] == rows[i]["pixels_sha256"]} for i in every
    ]
    label, gone = dropped_by_rule(rows, same)
    kept = {rows[i]["key"] for i in every if i not in label | gone}
    assert set(split_of(rows, plan)) == kept
    assert plan.dropped == {"other-label": len(label), "other-split": len(gone)}


@pytest.mark.parametrize("seed", range(6))
def test_near_ones_that_are_dropped_are_what_the_rules_say(seed: int) -> None:
    rows = mixed_rows(seed)
    policy = POLICY._replace(drop_exact=False, drop_near=True, near_distance=2)
    plan = decide(rows, policy, has_splits=True)
    every = range(len(rows))
    bits = [[(a["perceptual_hash"] ^ b["perceptual_hash"]).bit_count() for b in rows] for a in rows]
    near = [{j for j in every if bits[i][j] <= 2} for i in every]
    label, gone = dropped_by_rule(rows, near)
    assert set(split_of(rows, plan)) == {rows[i]["key"] for i in every if i not in label | gone}
    assert plan.dropped == {"other-label": len(label), "other-split": len(gone)}


@pytest.mark.parametrize("seed", range(6))
def test_pairs_that_are_told_are_pairs_and_none_is_missing(seed: int) -> None:
    """A star for each set of copies; of near pictures each combination of split and label."""
    rows = mixed_rows(seed)
    plan = decide(rows, POLICY._replace(drop_exact=False), has_splits=True)
    by_key = {r["key"]: r for r in rows}
    copies = Counter(r["pixels_sha256"] for r in rows)
    told = plan.duplicates.to_pylist()
    exact = [pair for pair in told if pair["kind"] == "exact"]
    assert len(exact) == sum(n - 1 for n in copies.values())
    met: set[frozenset[Any]] = set()
    for pair in told:
        a, b = by_key[pair["key_a"]], by_key[pair["key_b"]]
        distance = (a["perceptual_hash"] ^ b["perceptual_hash"]).bit_count()
        assert (pair["split_a"], pair["label_a"]) == (a["split"], a["label"])
        assert (pair["split_b"], pair["label_b"]) == (b["split"], b["label"])
        assert (pair["kind"] == "exact") == (a["pixels_sha256"] == b["pixels_sha256"])
        assert pair["distance"] == distance <= 3
        assert pair["key_a"] != pair["key_b"]
        assert not pair["dropped_a"]
        assert not pair["dropped_b"]
        if pair["kind"] == "near":
            met.add(frozenset((r["split"], r["label"], r["perceptual_hash"]) for r in (a, b)))
    wanted = {
        frozenset((r["split"], r["label"], r["perceptual_hash"]) for r in (a, b))
        for a, b in itertools.combinations(rows, 2)
        if a["pixels_sha256"] != b["pixels_sha256"]
        and 1 <= (a["perceptual_hash"] ^ b["perceptual_hash"]).bit_count() <= 3
    }
    assert wanted <= met
    crossing = [(p["split_a"], p["label_a"]) != (p["split_b"], p["label_b"]) for p in told]
    assert crossing == sorted(crossing, reverse=True)
    pairs = [frozenset((pair["key_a"], pair["key_b"])) for pair in told]
    assert len(pairs) == len(set(pairs))


def test_only_so_many_pairs_are_told_and_those_across_borders_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(duplicates, "_MAX_REPORTED", 2)
    rows = given_splits(train=["a/1.jpg", "a/2.jpg", "a/3.jpg", "a/4.jpg"], test=["a/1.jpg"])
    keys = [f"train/a/{i}.jpg" for i in (1, 2, 3, 4)]
    rows = alike(rows, "twin", *keys, "test/a/1.jpg")
    plan = decide(rows, POLICY._replace(drop_exact=False), has_splits=True)
    assert plan.duplicates.num_rows == 2
    assert plan.notes == ("2 more pairs of duplicates are not listed",)
    monkeypatch.setattr(duplicates, "_MAX_REPORTED", 4)
    assert decide(rows, POLICY._replace(drop_exact=False), has_splits=True).notes == ()
