import json
import math
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.special import softmax as scipy_softmax
from scipy.stats import binomtest
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
)

from leafnet.metrics.scores import (
    CALIBRATION_BINS,
    Tally,
    empty_tally,
    exact_interval,
    scores,
    softmax,
    tally,
)

NAMES = ("healthy", "rust", "blight", "mildew", "mosaic")


def random_batch(
    examples: int, num_classes: int, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=examples)
    logits = rng.normal(size=(examples, num_classes)).astype(np.float32)
    logits[np.arange(examples), labels] += 1
    return logits, labels


def logits_of(*probabilities: list[float]) -> NDArray[np.float32]:
    return np.log(np.array(probabilities, np.float32))


def test_as_scikit_learn() -> None:
    logits, labels = random_batch(500, 5)
    predicted, classes = logits.argmax(axis=1), list(range(5))
    found = scores(tally(logits, labels), NAMES)
    assert found["examples"] == 500
    assert found["confusion"] == confusion_matrix(labels, predicted, labels=classes).tolist()
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    exponents = np.exp(logits.astype(np.float64))
    expected_loss = log_loss(labels, exponents / exponents.sum(axis=1, keepdims=True))
    assert found["log_loss"] == pytest.approx(expected_loss)
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    expected = precision_recall_fscore_support(labels, predicted, labels=classes)
    for key, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [found["per_class"][name][key] for name in NAMES] == pytest.approx(values.tolist())


@pytest.mark.parametrize("absent", ["from labels", "from predictions", "from both"])
def test_absent_class_as_scikit_learn(absent: str) -> None:
    logits, labels = random_batch(80, 3)
    if absent != "from predictions":
        labels = labels % 2
    if absent != "from labels":
        logits[:, 2] = -50
    predicted = logits.argmax(axis=1)
    found = scores(tally(logits, labels), NAMES[:3])
    options = {"labels": [0, 1, 2], "zero_division": 0}
    assert found["macro_f1"] == pytest.approx(
        f1_score(labels, predicted, average="macro", **options)
    )
    expected = precision_recall_fscore_support(labels, predicted, **options)
    entry = found["per_class"]["blight"]
    for key, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert entry[key] == pytest.approx(values[2])
    if absent == "from both":
        assert (entry["recall_low"], entry["recall_high"]) == (0.0, 1.0)


def test_uneven_batches_add_up_to_the_whole() -> None:
    logits, labels = random_batch(100, 4)
    cuts = [0, 1, 1, 34, 97, 100]  # a batch of one and an empty one
    parts = [tally(logits[start:stop], labels[start:stop]) for start, stop in pairwise(cuts)]
    total, whole = sum(parts, empty_tally(4)), tally(logits, labels)
    assert total.examples == whole.examples == 100
    np.testing.assert_array_equal(total.confusion.toarray(), whole.confusion.toarray())
    np.testing.assert_array_equal(total.bin_count, whole.bin_count)
    np.testing.assert_array_equal(total.bin_correct, whole.bin_correct)
    np.testing.assert_allclose(total.bin_confidence, whole.bin_confidence)
    assert total.log_loss_sum == pytest.approx(whole.log_loss_sum)


def test_row_is_true_and_column_is_predicted() -> None:
    logits = np.array([[0, 0, 9], [0, 0, 9], [9, 0, 0]], np.float32)
    found = tally(logits, np.array([0, 0, 0], np.int32)).confusion.toarray()
    assert found.tolist() == [[1, 0, 2], [0, 0, 0], [0, 0, 0]]


def test_ece_by_hand() -> None:
    # Bins of 1/15: 0.70 and 0.72 are in (10, 11]/15, 0.90 in (13, 14]/15. By bin:
    #   |1 right - 1.42| = 0.42 and |1 right - 0.90| = 0.10, over 3 examples.
    logits = logits_of([0.70, 0.30], [0.28, 0.72], [0.90, 0.10])
    found = scores(tally(logits, np.array([0, 0, 0])), NAMES[:2])
    assert found["ece"] == pytest.approx((0.42 + 0.10) / 3)
    assert [row["count"] for row in found["calibration"]] == [2, 1]
    assert found["calibration"][0] == pytest.approx(
        {"confidence": 0.71, "accuracy": 0.5, "count": 2}
    )
    assert found["log_loss"] == pytest.approx(-math.log(0.70 * 0.28 * 0.90) / 3)


def test_confidence_of_one_is_in_the_last_bin() -> None:
    found = tally(np.array([[1000, 0]], np.float32), np.array([1]))
    assert found.bin_count.tolist() == [0] * (CALIBRATION_BINS - 1) + [1]
    assert found.log_loss_sum == 1000


def test_scores_are_plain_json() -> None:
    for examples in (1, 50):
        found = scores(tally(*random_batch(examples, 3)), NAMES[:3])
        assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_softmax_is_stable_and_keeps_float32() -> None:
    found = softmax(np.array([[3e38, -3e38, 0], [1, 1, 1]], np.float32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.array([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]]), rtol=1e-6)
    assert softmax(np.zeros((0, 3), np.float32)).shape == (0, 3)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (81, 263, 0.2527, 0.3676),
        (15, 148, 0.0578, 0.1617),
        (0, 20, 0, 0.1684),
        (1, 29, 0.0009, 0.1776),
    ],
)
def test_exact_intervals_as_published(successes: int, trials: int, low: float, high: float) -> None:
    # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 5.
    assert exact_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    mirrored = exact_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_edges_of_intervals_are_exact() -> None:
    for trials in range(1, 200):
        assert exact_interval(0, trials)[0] == 0.0
        assert exact_interval(trials, trials)[1] == 1.0
    for successes, of in ((3, 2), (-1, 3)):
        with pytest.raises(ValueError, match="need 0 <= successes <= trials, got"):
            exact_interval(successes, of)


@pytest.mark.parametrize("label", [-1, 3])
def test_label_outside_the_classes(label: int) -> None:
    with pytest.raises(ValueError, match=rf"label {label} is outside \[0, 3\) of this model"):
        tally(np.zeros((2, 3), np.float32), np.array([0, label]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(value: float) -> None:
    logits = np.zeros((4, 3), np.float32)
    logits[2:, 1] = value
    with pytest.raises(ValueError, match=r"logits of row 2 are not finite: .*; 2 of 4 rows"):
        tally(logits, np.array([0, 1, 2, 0]))


def test_lengths_that_differ() -> None:
    with pytest.raises(ValueError, match="4 rows of logits for 3 labels"):
        tally(np.zeros((4, 3), np.float32), np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="cannot add tallies of 3 and 4 classes"):
        empty_tally(3) + empty_tally(4)
    one = empty_tally(3)
    other = Tally(one.confusion, 0.0, *np.zeros((3, 10)))
    with pytest.raises(ValueError, match="cannot add tallies of 15 and 10 bins"):
        one + other
    with pytest.raises(ValueError, match="2 class names for a tally of 3 classes"):
        scores(one, ["rust", "healthy"])


def test_empty_split() -> None:
    with pytest.raises(ValueError, match="no examples to score: the split is empty"):
        scores(tally(np.zeros((0, 3), np.float32), np.zeros(0, np.int64)), NAMES[:3])


@pytest.mark.parametrize(("classes", "place"), [(15, 0), (5, 2), (4, 3), (3, 4), (2, 7)])
def test_a_confidence_on_the_edge_belongs_to_the_bin_below_it(classes: int, place: int) -> None:
    # 1/15, 3/15, 3.75/15, 5/15 and 7.5/15: bin b holds (b, b + 1] fifteenths.
    found = tally(np.zeros((1, classes), np.float32), np.array([0]))
    assert found.bin_count.tolist() == [int(b == place) for b in range(15)]
    assert found.bin_correct.tolist() == found.bin_count.tolist()
    assert found.bin_confidence[place] == pytest.approx(1 / classes)


def test_all_shares_of_a_tally_by_hand() -> None:
    bins = np.zeros(15, np.int64)
    right, sure = bins.copy(), np.zeros(15)
    bins[[9, 13]], right[[9, 13]], sure[[9, 13]] = (6, 11), (5, 5), (3.75, 9.9)
    confusion = np.array([[7, 2, 0], [1, 3, 0], [0, 4, 0]])
    found = scores(Tally(confusion, 8.5, bins, right, sure), NAMES[:3])
    assert found["accuracy"] == pytest.approx(10 / 17)
    assert found["log_loss"] == 0.5
    assert found["ece"] == pytest.approx((1.25 + 4.9) / 17)
    assert found["macro_f1"] == pytest.approx((14 / 17 + 6 / 13 + 0) / 3)
    rust = {"precision": 3 / 9, "recall": 3 / 4, "f1": 6 / 13, "support": 4, "predicted": 9}
    assert {name: found["per_class"]["rust"][name] for name in rust} == pytest.approx(rust)
    assert found["calibration"] == [
        pytest.approx({"confidence": 0.625, "accuracy": 5 / 6, "count": 6}),
        pytest.approx({"confidence": 0.9, "accuracy": 5 / 11, "count": 11}),
    ]


def test_the_intervals_of_a_tally_are_scipys() -> None:
    confusion = np.array([[7, 2, 0], [1, 3, 0], [0, 4, 0]])
    found = scores(Tally(confusion, 1.0, *np.zeros((3, 15))), NAMES[:3])
    told = [(found["accuracy_low"], found["accuracy_high"])]
    told += [(row["recall_low"], row["recall_high"]) for row in found["per_class"].values()]
    for interval, (hits, of) in zip(told, [(10, 17), (7, 9), (3, 4), (0, 4)], strict=True):
        expected = binomtest(hits, of).proportion_ci(method="exact")
        assert interval == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-12)


def test_log_loss_and_softmax_are_scipys() -> None:
    logits, labels = random_batch(40, 4, seed=3)
    exact = logits.astype(np.float64)
    expected = logsumexp(exact, axis=1) - exact[np.arange(40), labels]
    assert tally(logits, labels).log_loss_sum == pytest.approx(expected.sum(), rel=1e-12)
    np.testing.assert_allclose(softmax(logits), scipy_softmax(exact, axis=1), rtol=1e-6)


def test_tallies_add_each_count() -> None:
    places = np.arange(15)
    one = Tally(np.arange(9).reshape(3, 3), 1.5, places, places + 1, np.array(places / 4))
    two = Tally(np.eye(3, dtype=np.int64), 2.25, 0 * places + 1, 0 * places + 2, np.full(15, 0.5))
    found = one + two
    assert found.confusion.toarray().tolist() == [[1, 1, 2], [3, 5, 5], [6, 7, 9]]
    assert found.log_loss_sum == 3.75
    assert found.bin_count.tolist() == list(range(1, 16))
    assert found.bin_correct.tolist() == list(range(3, 18))
    assert found.bin_confidence.tolist() == [0.25 * place + 0.5 for place in range(15)]


def test_scores_of_ten_thousand_classes_are_of_bounded_size() -> None:
    """A dense table of them would have 800 MB, and its text 300."""
    generator = np.random.default_rng(0)
    names = [f"species {i}" for i in range(10_000)]
    total = empty_tally(10_000)
    for _ in range(4):
        labels = generator.integers(0, 10_000, 250)
        logits = generator.random((250, 10_000), np.float32)
        logits[np.arange(250), np.where(generator.random(250) < 0.5, labels, labels // 2)] += 9
        total += tally(logits, labels)
    found = scores(total, names)
    assert found["examples"] == 1000
    assert len(found["confusion"]) == len(found["confusion_classes"]) == 200
    assert len(json.dumps(found)) < 4_000_000
    assert len(found["confused_pairs"]) == 30


def test_the_classes_with_the_most_errors_are_kept() -> None:
    confusion = np.diag(np.full(300, 5))
    confusion[7, 290], confusion[250, 3] = 4, 1
    names = [str(i) for i in range(300)]
    found = scores(Tally(confusion, 1.0, *np.zeros((3, 15))), names)
    assert {"7", "290", "250", "3"} <= set(found["confusion_classes"])
    place = found["confusion_classes"].index
    assert found["confusion"][place("7")][place("290")] == 4
    assert [pair["count"] for pair in found["confused_pairs"]] == [4, 1]
