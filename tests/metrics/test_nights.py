import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from leafnet.metrics.nights import RATE, number_falls, share_differs


def drawn(
    generator: np.random.Generator, photographs: int, nights: int, shares: list[float], alike: float
) -> NDArray[np.int64]:
    """Counts [nights, classes]; the photographs of a night are alike as much as `alike` says."""
    sizes = np.maximum(generator.poisson(photographs, nights), 1)
    of_night = np.tile(shares, (nights, 1))
    if alike:
        of_night = generator.dirichlet(np.array(shares) * (1 / alike - 1), nights)
    return np.array([generator.multinomial(n, p) for n, p in zip(sizes, of_night, strict=True)])


@pytest.mark.parametrize("photographs", [5, 12, 20, 100, 1000])
@pytest.mark.parametrize("alike", [0.0, 0.05, 0.2])
def test_an_ordinary_night_is_called_unusual_once_in_a_hundred(
    photographs: int, alike: float
) -> None:
    """Of three classes, one of them rare, and of ten; after a week and after four."""
    generator, alarms, draws = np.random.default_rng(photographs), 0, 0
    for shares in ([0.9, 0.07, 0.03], [0.1] * 10):
        for before in (7, 28):
            for _ in range(30):
                counts = drawn(generator, photographs, before + 1, shares, alike)
                sizes = counts.sum(axis=1)
                rate, draws = RATE / (len(shares) + 2), draws + 1
                odd = [
                    share_differs(
                        int(of_class[-1]),
                        int(sizes[-1]),
                        list(zip(of_class[:-1].tolist(), sizes[:-1].tolist(), strict=True)),
                    )
                    for of_class in counts.T
                ]
                alarms += min([*odd, number_falls(int(sizes[-1]), sizes[:-1].tolist())]) < rate
    assert binom.sf(alarms - 1, draws, 0.01) > 1e-3, f"{alarms} of {draws}"


@pytest.mark.parametrize(
    ("tonight", "before"),
    [((150, 300), (21, 300)), ((0, 300), (60, 300)), ((40, 50), (1, 50)), ((2500, 5000), (0, 300))],
)
def test_an_outbreak_is_called_unusual(tonight: tuple[int, int], before: tuple[int, int]) -> None:
    assert share_differs(*tonight, [before] * 14) < RATE / 5


def test_what_varied_before_may_vary() -> None:
    """Most are of the class tonight; that is usual where nights had none or most."""
    steady, wild = [(30, 100)] * 14, [(0, 100), (60, 100)] * 7
    assert share_differs(60, 100, steady) < RATE / 5
    assert share_differs(60, 100, wild) > 0.1


def test_a_camera_that_stays_away_is_told_and_a_quiet_night_is_not() -> None:
    assert number_falls(20, [100, 110, 95, 90, 105, 99, 101]) < RATE / 5
    assert number_falls(2, [5, 6, 4, 5, 7, 3, 5]) > 0.05
    assert number_falls(20, [100, 10, 300, 15, 200, 99, 30]) > 0.05
