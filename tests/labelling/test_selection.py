import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from leafnet.labelling import selection


def test_the_centres_are_one_of_each_kind() -> None:
    generator = np.random.default_rng(0)
    kinds = generator.normal(size=(5, 40))
    of_kind = generator.integers(0, 5, 200)
    features = kinds[of_kind] * generator.uniform(1, 9, (200, 1))  # of any length
    features += 0.05 * generator.normal(size=features.shape)
    places, distances = selection.k_center(features, 5)
    assert places[0] == 0
    assert sorted(of_kind[places]) == [0, 1, 2, 3, 4]
    places, distances = selection.k_center(features, 6)
    assert distances[5] < 0.2 * distances[4]  # the sixth is of a kind that is there


@given(
    arrays.arrays(
        np.float32, st.tuples(st.integers(1, 12), st.just(3)), elements=st.integers(0, 3)
    ),
    st.integers(1, 12),
)
def test_each_centre_is_farther_than_what_is_left(features: np.ndarray, count: int) -> None:
    places, distances = selection.k_center(features, count)
    assert len(set(places.tolist())) == len(places) <= count
    assert (np.diff(distances[1:]) <= 1e-6).all()
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    nearest = np.linalg.norm(unit[:, None] - unit[places][None], axis=2).min(axis=1)
    if len(places) < count:
        assert (nearest < 1e-3).all()  # only copies are left
    assert nearest.max() <= distances[-1] + 1e-5


@given(
    st.lists(
        st.tuples(st.floats(0, 1, width=32), st.one_of(st.just(np.nan), st.floats(0, 9, width=32))),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 15),
)
def test_a_pool_holds_the_most_uncertain_and_the_most_novel(
    photographs: list[tuple[float, float]], size: int
) -> None:
    margins, novelty = np.array(photographs, np.float32).T
    found = selection.pool(margins, novelty, size)
    assert len(set(found.tolist())) == len(found) == min(size, len(margins))
    assert margins[found[0]] == margins.min()
    if size > 1 and np.isfinite(novelty).any():
        assert novelty[found].max(initial=-1, where=np.isfinite(novelty[found])) == np.nanmax(
            novelty
        )


def test_the_margin_is_that_of_the_two_best() -> None:
    probabilities = np.array([[0.125, 0.5, 0.375], [0.75, 0.25, 0.0], [0.25, 0.25, 0.5]])
    found = selection.margin(np.asarray(probabilities, np.float32))
    assert found.tolist() == [0.125, 0.5, 0.25]


@pytest.mark.parametrize(
    ("novelty", "size", "expected"),
    [
        ([9, 1, 2, 5, 7], 5, [1, 0, 2, 4, 3]),
        ([9, 1, 2, 5, 7], 4, [1, 0, 2, 4]),
        ([9, 1, 2, 5, 7], 1, [1]),
        ([9, 1, 2, 5, 7], 0, []),
        ([9, 1, 2, 5, 7], 99, [1, 0, 2, 4, 3]),
        ([1, 9, 7, 5, 2], 3, [1, 2, 4]),  # the most novel is the most uncertain too
        ([np.nan, 1, np.nan, 5, np.nan], 5, [1, 3, 2, 4, 0]),
        ([2, np.nan, 2, 2, 2], 4, [1, 0, 2, 3]),  # ties go to the earlier
        ([np.nan] * 5, 3, [1, 2, 4]),
        ([np.nan, 3, np.nan, 0, np.nan], 4, [1, 3, 2, 4]),  # as novel as training is known to be so
        (None, 3, [1, 2, 4]),
    ],
)
def test_a_pool_by_hand(novelty: list[float] | None, size: int, expected: list[int]) -> None:
    margins = np.array([0.9, 0.1, 0.5, 0.8, 0.5], np.float32)
    given = None if novelty is None else np.array(novelty, np.float32)
    assert selection.pool(margins, given, size).tolist() == expected


def test_centres_by_hand() -> None:
    """On a circle, at these degrees, with lengths that do not count."""
    degrees = np.radians([0, 10, 90, 180, 250])
    features = np.stack([np.cos(degrees), np.sin(degrees)], axis=1) * [[1], [9], [0.1], [3], [2]]
    places, distances = selection.k_center(features, 4)
    # 180 is opposite; then 90 is 90 from both, 250 is 70 from 180; 10 is 10 from 0.
    assert places.tolist() == [0, 3, 2, 4]
    chords = [2, 2 * np.sin(np.radians(45)), 2 * np.sin(np.radians(35))]
    np.testing.assert_allclose(distances, [np.inf, *chords], rtol=1e-6)
    assert selection.k_center(features, 1)[0].tolist() == [0]
    assert selection.k_center(features, 9)[0].tolist() == [0, 3, 2, 4, 1]


@pytest.mark.parametrize(("apart", "expected"), [(0.99e-4, [0]), (1.01e-4, [0, 1])])
def test_what_is_closer_than_a_ten_thousandth_is_a_copy(apart: float, expected: list[int]) -> None:
    features = np.array([[1.0, 0.0], [np.cos(apart), np.sin(apart)]])
    assert selection.k_center(features, 2)[0].tolist() == expected


def test_a_photograph_without_features_is_a_place_of_its_own() -> None:
    places, distances = selection.k_center(np.array([[0.0, 0.0], [0.0, 1e-9], [3.0, 4.0]]), 3)
    assert places.tolist() == [0, 1, 2]
    np.testing.assert_allclose(distances, [np.inf, 1, np.sqrt(0.6**2 + 0.2**2)], rtol=1e-6)


def test_equal_novelty_leaves_the_order_as_it_is() -> None:
    """More of them than a sort takes by insertion, which would keep their order by itself."""
    count = 400
    margins = np.linspace(1.0, 0.1, count, dtype=np.float32)  # the last is the most uncertain
    novelty = np.tile(np.array([1, 2], np.float32), count // 2)
    chosen = selection.pool(margins, novelty, 10)
    assert chosen.tolist() == [399, 1, 398, 3, 397, 5, 396, 7, 395, 9]
