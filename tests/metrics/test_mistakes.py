import numpy as np
import pytest

from leafnet.metrics import mistakes, scores
from tests.metrics.test_calibration import simulated


def test_planted_wrong_labels_are_ranked_first() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 400)
    logits = generator.normal(size=(400, 4)).astype(np.float32)
    logits[np.arange(400), labels] += 10
    planted = generator.choice(400, 15, replace=False)
    given = labels.copy()
    given[planted] = (given[planted] + 1) % 4
    found = mistakes.likely_wrong_labels(scores.softmax(logits), given)
    assert set(found.rows[:15]) == set(planted)
    np.testing.assert_array_equal(found.suggested[:15], labels[found.rows[:15]])
    assert (np.diff(found.self_confidence) >= 0).all()


def test_confident_learning_by_hand() -> None:
    # Thresholds: class 0 (0.9 + 0.3 + 0.6) / 3 = 0.6, class 1 (0.5 + 0.7) / 2 = 0.6.
    p_of_0 = np.array([0.9, 0.3, 0.6, 0.5, 0.3])
    labels = np.array([0, 0, 0, 1, 1])
    found = mistakes.likely_wrong_labels(np.stack([p_of_0, 1 - p_of_0], axis=1), labels)
    # Row 1 passes class 1's threshold with 0.7; row 3 passes neither, and is not suspected.
    assert found.rows.tolist() == [1]
    assert found.suggested.tolist() == [1]
    assert found.self_confidence.tolist() == [0.3]


def test_a_class_without_labels_is_never_suggested() -> None:
    probabilities = np.array([[0.1, 0.9], [0.2, 0.8]])
    assert mistakes.likely_wrong_labels(probabilities, np.array([0, 0])).rows.size == 0


def test_errors_come_with_the_surest_first() -> None:
    logits, labels = simulated(200, times=1.0)
    probabilities = scores.softmax(logits)
    found = mistakes.confident_errors(probabilities, labels)
    assert (probabilities.argmax(axis=1)[found] != labels[found]).all()
    assert len(found) == (probabilities.argmax(axis=1) != labels).sum() > 10
    assert (np.diff(probabilities.max(axis=1)[found]) <= 0).all()


def test_pairs_without_a_mistake_are_left_out() -> None:
    confusion = np.array([[8, 2, 0], [0, 5, 0], [4, 1, 5]])
    found = mistakes.confused_pairs(confusion, ["a", "b", "c"])
    assert [(p["label"], p["predicted"], p["count"], p["share"]) for p in found] == [
        ("c", "a", 4, 0.4),
        ("a", "b", 2, 0.2),
        ("c", "b", 1, 0.1),
    ]
    assert confusion[0, 0] == 8, "the caller's counts are left alone"


def test_the_ten_most_frequent_pairs_are_told() -> None:
    confusion = np.array([[50, 4, 3, 9], [3, 40, 7, 2], [6, 1, 30, 8], [5, 3, 2, 20]])
    found = mistakes.confused_pairs(confusion, "abcd")
    told = [f"{pair['label']}{pair['predicted']}{pair['count']}" for pair in found]
    # Of as many, the earlier class's come first.
    assert told == ["ad9", "cd8", "bc7", "ca6", "da5", "ab4", "ac3", "ba3", "db3", "bd2"]
    assert [pair["share"] for pair in found[:3]] == pytest.approx([9 / 66, 8 / 45, 7 / 52])
    assert mistakes.confused_pairs(confusion, "abcd", limit=3) == found[:3]
    whole = mistakes.confused_pairs(confusion, "abcd", limit=99)
    assert [pair["count"] for pair in whole[9:]] == [2, 2, 1]


def test_the_surest_errors_by_hand() -> None:
    probabilities = np.array([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.3, 0.7]])
    found = mistakes.confident_errors(probabilities, np.array([1, 0, 0, 0, 1]))
    # Rows 0 and 3 are both at 0.6: the earlier first.
    assert found.tolist() == [2, 0, 3]


def test_a_probability_on_the_threshold_is_over_it() -> None:
    # Thresholds: class 0 (0.75 + 0.25) / 2, class 1 (0.75 + 0.75) / 2; row 1 is at 0.75 of it.
    p_of_0 = np.array([0.75, 0.25, 0.25, 0.25])
    found = mistakes.likely_wrong_labels(
        np.stack([p_of_0, 1 - p_of_0], axis=1), np.array([0, 0, 1, 1])
    )
    assert (found.rows.tolist(), found.suggested.tolist()) == ([1], [1])


def test_the_likeliest_of_the_classes_over_their_thresholds_is_suggested() -> None:
    probabilities = np.array(
        [
            [0.50, 0.30, 0.20],  # class 0 twice: threshold 0.375
            [0.25, 0.35, 0.40],  # over 0.25 of class 1 and 0.3125 of class 2: the likelier
            [0.10, 0.30, 0.60],  # class 1 twice: threshold 0.25
            [0.50, 0.20, 0.30],  # over 0.375 of class 0
            [0.20, 0.30, 0.50],  # class 2 twice: threshold 0.3125
            [0.75, 0.125, 0.125],
        ]
    )
    found = mistakes.likely_wrong_labels(probabilities, np.array([0, 0, 1, 1, 2, 2]))
    # By the probability of the label that is given, the lowest first.
    assert found.rows.tolist() == [5, 3, 1, 2]
    assert found.suggested.tolist() == [0, 0, 2, 2]
    assert found.self_confidence.tolist() == [0.125, 0.2, 0.25, 0.3]


def test_suspects_of_the_same_confidence_stay_in_order() -> None:
    probabilities = np.tile([[0.9, 0.1], [0.1, 0.9]], (20, 1))
    labels = np.tile([0, 1], 20)
    labels[[6, 31, 12, 3]] ^= 1
    found = mistakes.likely_wrong_labels(probabilities, labels)
    assert found.rows.tolist() == [3, 6, 12, 31]
    assert found.self_confidence.tolist() == pytest.approx([0.1] * 4)


def test_errors_of_the_same_confidence_stay_in_order() -> None:
    """More than a sort that loses the order can hold in one piece."""
    probabilities = np.tile(np.array([0.75, 0.25], np.float32), (40, 1))
    probabilities[30] = [0.8, 0.2]
    labels = np.array([1, 0] * 20)
    found = mistakes.confident_errors(probabilities, labels)
    assert found.tolist() == [30, *(row for row in range(0, 40, 2) if row != 30)]


def test_the_last_class_may_have_no_label() -> None:
    probabilities = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.85, 0.1, 0.05]], np.float32)
    found = mistakes.likely_wrong_labels(probabilities, np.array([0, 1, 1]))
    # Thresholds: (0.9) of class 0, (0.8 + 0.1) / 2 = 0.45 of class 1, none of class 2.
    assert found.rows.tolist() == []
    probabilities[2] = [0.95, 0.05, 0.0]
    found = mistakes.likely_wrong_labels(probabilities, np.array([0, 1, 1]))
    assert (found.rows.tolist(), found.suggested.tolist()) == ([2], [0])
