import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from leafnet import novelty
from leafnet.novelty import Novelty

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
