import numpy as np

from leafnet import metrics, mistakes
from tests.test_calibration import simulated


def test_planted_wrong_labels_are_ranked_first() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 400)
    logits = generator.normal(size=(400, 4)).astype(np.float32)
    logits[np.arange(400), labels] += 10
    planted = generator.choice(400, 15, replace=False)
    given = labels.copy()
    given[planted] = (given[planted] + 1) % 4
    found = mistakes.likely_wrong_labels(metrics.softmax(logits), given)
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
    probabilities = metrics.softmax(logits)
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
