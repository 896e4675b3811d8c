from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

from leafnet.metrics import background
from leafnet.metrics.background import STATISTICS, probe


def photographs(border_of: NDArray[np.int64], *, seed: int = 0) -> NDArray[np.uint8]:
    """Noise of 32 pixels, the border of each a little brighter by 20 x `border_of`."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(60, 160, (len(border_of), 32, 32, 3))
    frame = np.ones((32, 32, 1), np.int64)
    frame[8:-8, 8:-8] = 0
    return np.asarray(pixels + frame * (20 * border_of[:, None, None, None]), np.uint8)


def test_a_planted_border_is_found() -> None:
    labels = np.arange(150) % 3
    found = background.probe(background.border(photographs(labels)), labels, model_accuracy=0.95)
    assert found is not None
    assert found["accuracy"] > 0.95
    assert found["majority"] == pytest.approx(1 / 3)
    assert found["high_warning"]


def test_an_innocent_border_is_not() -> None:
    labels = np.arange(150) % 3
    elsewhere = np.random.default_rng(1).integers(0, 3, 150)
    found = background.probe(background.border(photographs(elsewhere)), labels, model_accuracy=0.95)
    assert found is not None
    assert found["low"] < found["majority"] < found["high"]
    assert not found["high_warning"]


def test_some_of_the_lead_is_told_without_a_warning() -> None:
    """Four of ten borders give the class away."""
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 3
    shown = np.where(generator.random(300) < 0.4, labels, generator.integers(0, 3, 300))
    found = background.probe(background.border(photographs(shown)), labels, model_accuracy=0.95)
    assert found is not None
    assert found["low"] > found["majority"]
    assert 0.1 < found["share_of_lead"] < 0.5
    assert not found["high_warning"]


def test_the_inside_is_not_seen() -> None:
    pixels = photographs(np.array([0, 1]))
    inside = pixels.copy()
    inside[:, 8:-8, 8:-8] = 0
    np.testing.assert_array_equal(background.border(pixels), background.border(inside))


def test_statistics_by_hand() -> None:
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    pixels[0, :8, :, 0] = 255  # the upper half is red
    found = background.border(pixels)[0].reshape(4, 2, 3)  # sides, (mean, deviation), colours
    np.testing.assert_allclose(found[:, 0, 0], [1.0, 0.0, 0.5, 0.5])
    np.testing.assert_allclose(found[:, 1, 0], [0.0, 0.0, 0.5, 0.5])
    assert not found[:, :, 1:].any()


@pytest.mark.parametrize("labels", [[0] * 20, [0] * 18 + [1, 1], []])
def test_too_little_to_tell(labels: list[int]) -> None:
    pixels = photographs(np.zeros(len(labels), np.int64))
    found = background.probe(
        background.border(pixels), np.array(labels, np.int64), model_accuracy=0.9
    )
    assert found is None


def test_each_side_is_eight_pixels_deep() -> None:
    """Red is the row, green the column and blue twice the row, so that no two sides are alike."""
    pixels = np.zeros((1, 32, 40, 3), np.uint8)
    pixels[0, :, :, 0] = np.arange(32)[:, None]
    pixels[0, :, :, 1] = np.arange(40)[None]
    pixels[0, :, :, 2] = 2 * np.arange(32)[:, None]
    found = 255 * background.border(pixels)[0].reshape(4, 2, 3)
    # Of n whole numbers in a row the variance is (n^2 - 1) / 12.
    eight, rows, columns = (np.sqrt((n**2 - 1) / 12) for n in (8, 32, 40))
    means = [[3.5, 19.5, 7], [27.5, 19.5, 55], [15.5, 3.5, 31], [15.5, 35.5, 31]]
    deviations = [[eight, columns, 2 * eight]] * 2 + [[rows, eight, 2 * rows]] * 2
    np.testing.assert_allclose(found[:, 0], means, rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], deviations, rtol=1e-5)


def told(sizes: list[int], alike: list[int], *, model_accuracy: float) -> dict[str, Any]:
    """The probe of classes of these sizes; those of the same number in `alike` look the same."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    seen = np.eye(max(alike) + 1)[np.array(alike)[labels]]
    # And one that differs, but not between the classes.
    seen = np.column_stack([seen, np.arange(len(labels)) % 2])
    found = background.probe(seen, labels, model_accuracy=model_accuracy)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("sizes", "model_accuracy", "right", "share", "warned"),
    [
        ([64, 32, 32], 1.0, 96, 0.5, True),  # (3/4 - 1/2) / (1 - 1/2)
        ([64, 24, 40], 1.0, 88, 0.375, False),
        ([64, 24, 40], 0.75, 88, 0.75, True),
        ([64, 24, 40], 0.5, 88, None, True),
        ([64, 24, 40], 0.25, 88, None, True),
    ],
)
def test_what_the_border_tells_by_hand(
    sizes: list[int], model_accuracy: float, right: int, share: float | None, warned: bool
) -> None:
    """The last class looks as the first does, which has more examples, and is taken for it."""
    found = told(sizes, [0, 1, 0], model_accuracy=model_accuracy)
    expected = binomtest(right, 128).proportion_ci(method="exact")
    assert found["examples"] == 128
    assert found["accuracy"] == right / 128
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), rel=1e-6)
    assert found["majority"] == 0.5
    assert found["share_of_lead"] == (share if share is None else pytest.approx(share))
    assert found["high_warning"] is warned


def test_five_examples_of_a_class_are_enough() -> None:
    assert told([5, 20, 30], [0, 1, 2], model_accuracy=1.0)["examples"] == 55
    assert told([4, 20, 30], [0, 1, 2], model_accuracy=1.0)["examples"] == 50
    # Of six alike among five folds none is left without an example to learn from.
    assert told([5, 6], [0, 1], model_accuracy=1.0)["accuracy"] == 1.0


def test_a_border_that_is_no_better_than_the_majority_is_no_warning() -> None:
    found = told([20, 10], [0, 0], model_accuracy=0.1)
    assert (found["accuracy"], found["share_of_lead"]) == (pytest.approx(2 / 3), None)
    assert found["high_warning"] is False


def test_one_statistic_that_differs_is_something_and_none_is_nothing() -> None:
    labels = np.arange(40) % 2
    statistics = np.full((40, 3), 0.5)
    assert background.probe(statistics, labels, model_accuracy=0.9) is None
    statistics[:, 1] += labels
    found = background.probe(statistics, labels, model_accuracy=0.9)
    assert found is not None
    assert found["accuracy"] == 1.0


def test_the_probe_looks_at_a_fair_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.repeat([0, 1], [600, 200])  # in order: the first are all of one class
    statistics = labels[:, None].astype(float)
    monkeypatch.setattr(background, "_SAMPLE", 200)
    found = background.probe(statistics, labels, model_accuracy=1.0)
    assert found is not None
    assert (found["examples"], found["accuracy"]) == (200, 1.0)
    assert 0.65 < found["majority"] < 0.85
    other = background.probe(statistics, labels, model_accuracy=1.0, seed=1)
    assert other is not None
    assert other["majority"] != found["majority"]
    assert background.probe(statistics, labels, model_accuracy=1.0, seed=0) == found
    whole = background.probe(statistics[:200], labels[:200], model_accuracy=1.0)
    assert whole is None, "all of 200 are looked at, which are of one class"


def test_a_probe_is_of_ten_thousand_at_most() -> None:
    labels = np.repeat([0, 1], [7501, 2500])
    found = background.probe(labels[:, None].astype(float), labels, model_accuracy=1.0)
    assert found is not None
    assert found["examples"] == 10_000


def test_a_probe_weighs_statistics_of_any_scale() -> None:
    """As scikit-learn does when they are standardized, and over folds that are shuffled."""
    generator = np.random.default_rng(0)
    labels = np.sort(generator.integers(0, 2, 200))
    statistics = generator.normal(size=(200, 2)) * [1000, 1e-4]
    statistics[:, 1] += 1e-4 * labels
    found = background.probe(statistics, labels, model_accuracy=0.9)
    assert found is not None
    # Two Gaussians one deviation apart are told from each other in 69 % of the cases.
    assert found["low"] < norm.cdf(0.5) < found["high"]
    same = background.probe(statistics / [1000, 1e-4], labels, model_accuracy=0.9)
    assert same is not None
    assert same["accuracy"] == found["accuracy"]


def test_a_border_that_knows_the_plant_knows_nothing_of_the_class() -> None:
    """Ten photographs of each plant before its own wall, the walls drawn whatever the class is."""
    warned = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        plants = np.repeat(np.arange(30), 10)
        walls = generator.random((30, STATISTICS))
        statistics = walls[plants] + 0.02 * generator.random((300, STATISTICS))
        labels = plants % 3
        found = probe(statistics, labels, model_accuracy=0.9, groups=plants, seed=seed)
        assert found is not None
        warned += found["high_warning"]
        naive = probe(statistics, labels, model_accuracy=0.9, seed=seed)
        assert naive is not None
        assert naive["accuracy"] > found["accuracy"] + 0.2
    assert warned <= 1


def test_a_border_that_tells_the_class_of_other_plants_is_found() -> None:
    generator = np.random.default_rng(1)
    plants = np.repeat(np.arange(60), 5)
    statistics = generator.random((300, STATISTICS)) + (plants % 3)[:, None] * 0.5
    found = probe(statistics, plants % 3, model_accuracy=0.95, groups=plants)
    assert found is not None
    assert found["high_warning"]
    few = probe(statistics[:60], plants[:60] % 3, model_accuracy=0.95, groups=plants[:60])
    assert few is None, "four plants of each class are too few for five folds"
