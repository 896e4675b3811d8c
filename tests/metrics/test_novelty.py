import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis

from leafnet.metrics import novelty
from leafnet.metrics.novelty import Novelty

WIDTH = 40


def made_features(count: int, *, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Positive [count, width] that vary along three directions, and a little beside them."""
    directions = np.random.default_rng(99).normal(size=(3, width))
    generator = np.random.default_rng(seed)
    logs = generator.normal(size=(count, 3)) @ directions
    logs += 0.1 * generator.normal(size=(count, width))
    return np.exp(0.3 * logs).astype(np.float32)


def test_distance_is_mahalanobis_of_the_stated_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(novelty, "_DIRECTIONS", 5)
    fitted = novelty.fit(made_features(500))
    features = made_features(20, seed=1)
    along, rest = fitted.directions, float(fitted.rest) ** 2
    covariance = (along * fitted.spread**2) @ along.T + rest * (np.eye(WIDTH) - along @ along.T)
    centred = np.log1p(features / fitted.unit) - fitted.mean
    expected = np.sqrt(np.einsum("nd,dn->n", centred, np.linalg.solve(covariance, centred.T)))
    np.testing.assert_allclose(fitted.distance(features), expected, rtol=1e-3)
    # A Gaussian's squared distance is D on average.
    assert expected.mean() == pytest.approx(np.sqrt(WIDTH), rel=0.2)


def test_what_breaks_the_pattern_is_farther_than_what_goes_far_along_it() -> None:
    fitted = novelty.fit(made_features(500))
    usual = fitted.distance(made_features(200, seed=1))
    shuffled = made_features(200, seed=1)[:, np.random.default_rng(2).permutation(WIDTH)]
    assert np.quantile(usual, 0.99) < np.quantile(fitted.distance(shuffled), 0.01)


def test_a_few_wild_photographs_in_training_do_not_hide_others() -> None:
    training = made_features(500)
    training[:5] *= 300  # as with some weights, where norms span a factor of 400
    fitted = novelty.fit(training)
    usual = fitted.distance(made_features(200, seed=1))
    shuffled = made_features(200, seed=1)[:, np.random.default_rng(2).permutation(WIDTH)]
    assert np.quantile(usual, 0.9) < np.quantile(fitted.distance(shuffled), 0.1)


@pytest.mark.parametrize("count", [1, 2, 24, 100])
def test_few_examples_give_finite_distances(count: int) -> None:
    fitted = novelty.fit(made_features(count, width=2048))
    distances = fitted.distance(made_features(8, width=2048, seed=1))
    assert distances.dtype == np.float32
    assert distances.shape == (8,)
    assert np.isfinite(distances).all()


def test_features_that_never_change_are_at_no_distance_until_they_do() -> None:
    constant = np.full((24, WIDTH), 0.5, np.float32)
    constant[:, :10] = 0.0
    fitted = novelty.fit(constant)
    assert fitted.distance(constant).max() < 1
    assert fitted.distance(constant * 2).min() > 10


def test_many_examples_are_sampled_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(novelty, "_SAMPLE", 100)
    path = tmp_path / "features.npy"
    np.save(path, made_features(1050).astype(np.float16)[:, None])
    mapped = np.load(path, mmap_mode="r")
    # 1,050 rows in strides of 11.
    fitted, expected = novelty.fit(mapped[:, 0]), novelty.fit(np.array(mapped[::11, 0]))
    np.testing.assert_array_equal(fitted.mean, expected.mean)
    assert len(range(0, 1050, 11)) <= 100


@pytest.mark.parametrize("count", [30, 100])  # fewer than there are features, and more
def test_it_does_not_matter_how_many_are_taken_at_a_time(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = made_features(count)
    expected = novelty.fit(features).distance(made_features(20, seed=1))
    monkeypatch.setattr(novelty, "_ROWS", 7)
    monkeypatch.setattr(novelty, "_COLUMNS", 9)
    found = novelty.fit(features).distance(made_features(20, seed=1))
    # The smallest variances are float32's rounding of the largest.
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_more_examples_cost_less_memory_than_they_take_in_float32() -> None:
    def peak(count: int) -> int:
        features = made_features(count, width=512).astype(np.float16)
        tracemalloc.start()
        novelty.fit(features)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(12_000) - peak(6_000) < 6_000 * 512 * 4


def test_arrays_make_the_same_again_and_are_small() -> None:
    fitted = novelty.fit(made_features(100, width=2048))
    arrays = fitted.arrays()
    assert sum(array.nbytes for array in arrays.values()) < 2_000_000
    again = Novelty(**arrays)
    features = made_features(5, width=2048, seed=1)
    np.testing.assert_array_equal(again.distance(features), fitted.distance(features))


@pytest.mark.parametrize(("count", "directions"), [(30, 7), (200, 39)])
def test_the_fit_is_probabilistic_pca_of_compressed_features(count: int, directions: int) -> None:
    """With fewer examples than features, and with more."""
    features = made_features(count)
    features[:, 0] *= features[:, 0] > 1.5  # mostly 0, so its mean is its scale
    exact = features.astype(np.float64)
    unit = np.maximum(np.median(exact, axis=0), exact.mean(axis=0) / 10) + 1e-6
    compressed = np.log(1 + exact / unit)
    values, vectors = np.linalg.eigh(np.cov(compressed.T, bias=True))
    fitted = novelty.fit(features)
    np.testing.assert_allclose(fitted.unit, unit, rtol=1e-5)
    np.testing.assert_allclose(fitted.mean, compressed.mean(axis=0), rtol=1e-4)
    assert fitted.directions.shape == (WIDTH, directions)
    np.testing.assert_allclose(np.sort(fitted.spread) ** 2, values[-directions:], rtol=5e-3)
    assert float(fitted.rest) ** 2 == pytest.approx(values[:-directions].mean(), rel=1e-2)
    leading = vectors[:, -directions:]
    found = fitted.directions @ fitted.directions.T
    np.testing.assert_allclose(found, leading @ leading.T, atol=5e-3)


def test_the_distance_is_scipys_mahalanobis() -> None:
    identity = np.eye(4, dtype=np.float32)
    fitted = Novelty(
        unit=np.array([1, 2, 0.5, 4], np.float32),
        mean=np.array([0.1, 0.2, 0.3, 0.4], np.float32),
        directions=identity[:, [2, 0]],
        spread=np.array([0.5, 3.0], np.float32),
        rest=np.float32(0.25),  # type: ignore[arg-type]
    )
    features = np.array([[1, 0, 2, 3], [0, 5, 0.1, -7]], np.float32)
    inverse = np.diag(1 / np.array([3.0, 0.25, 0.5, 0.25]) ** 2)
    compressed = np.log([[2, 1, 5, 1.75], [1, 3.5, 1.2, 1]])  # what is under 0 counts as 0
    expected = [mahalanobis(each, fitted.mean, inverse) for each in compressed]
    np.testing.assert_allclose(fitted.distance(features), expected, rtol=1e-5)


def test_scales_by_hand() -> None:
    columns = np.array([[0, 1, 5, 0], [0, 2, 5, 0], [0, 4, 5, 0], [8, 97, 5, 0]], np.float32)
    # A tenth of the mean 2, of 26 less than the median 3, the median 5, and nothing at all.
    np.testing.assert_allclose(novelty._units(columns), [0.2, 3.0, 5.0, 1e-6], rtol=1e-5)
    assert novelty._units(columns * 0.1)[0] == pytest.approx(0.02 + 1e-6, rel=1e-6)


@pytest.mark.parametrize(
    ("count", "width", "directions"),
    [(3, 20, 0), (4, 20, 1), (7, 20, 1), (8, 20, 2), (60, 3, 2), (1028, 258, 256)],
)
def test_how_many_directions_are_kept(count: int, width: int, directions: int) -> None:
    features = np.random.default_rng(0).uniform(1, 9, (count, width))
    fitted = novelty.fit(features)
    assert fitted.spread.shape == (directions,)
    assert fitted.directions.shape == (width, directions)
    compressed = np.log1p(features / fitted.unit)
    total = compressed.var(axis=0).sum()
    # Whatever the directions do not hold is spread over the others.
    found = (fitted.spread**2).sum() + (width - directions) * float(fitted.rest) ** 2
    assert found == pytest.approx(total, rel=1e-3)


def test_directions_without_variance_are_left_out() -> None:
    features = np.ones((100, WIDTH))
    generator = np.random.default_rng(0)
    features[:, :2] = generator.uniform(1, 9, (100, 2))
    features[:, 2] += generator.uniform(0, 1e-4, 100)  # of less than the floor
    fitted = novelty.fit(features)
    assert fitted.directions.shape == (WIDTH, 2)
    np.testing.assert_allclose(fitted.directions[2:], 0, atol=1e-4)
    total = np.log1p(features / fitted.unit).var(axis=0).sum()
    # A millionth of one and of the mean variance is the least that is believed.
    assert float(fitted.rest) ** 2 == pytest.approx(1e-6 * (1 + total / WIDTH), rel=1e-3)


def test_the_sample_is_every_row_up_to_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    features = made_features(101)
    features[1::2] *= 7
    whole = novelty.fit(features[:100])
    monkeypatch.setattr(novelty, "_SAMPLE", 100)
    np.testing.assert_array_equal(novelty.fit(features[:100]).unit, whole.unit)
    np.testing.assert_allclose(
        novelty.fit(features).unit, np.median(features[::2], axis=0) + 1e-6, rtol=1e-5
    )
