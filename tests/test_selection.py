import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from leafnet import selection


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
