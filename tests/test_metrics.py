import json
import math
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
)

from leafnet.metrics import (
    CALIBRATION_BINS,
    Tally,
    empty_tally,
    scores,
    softmax,
    tally,
    wilson_interval,
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
    np.testing.assert_array_equal(total.confusion, whole.confusion)
    np.testing.assert_array_equal(total.bin_count, whole.bin_count)
    np.testing.assert_array_equal(total.bin_correct, whole.bin_correct)
    np.testing.assert_allclose(total.bin_confidence, whole.bin_confidence)
    assert total.log_loss_sum == pytest.approx(whole.log_loss_sum)


def test_row_is_true_and_column_is_predicted() -> None:
    logits = np.array([[0, 0, 9], [0, 0, 9], [9, 0, 0]], np.float32)
    found = tally(logits, np.array([0, 0, 0], np.int32)).confusion
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
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(successes: int, trials: int, low: float, high: float) -> None:
    # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3.
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_edges_are_exact() -> None:
    for trials in range(1, 200):
        assert wilson_interval(0, trials)[0] == 0.0
        assert wilson_interval(trials, trials)[1] == 1.0
    with pytest.raises(ValueError, match="need 0 <= successes <= trials, got 3 and 2"):
        wilson_interval(3, 2)


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
