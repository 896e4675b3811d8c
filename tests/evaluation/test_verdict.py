import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from leafnet.evaluation.verdict import (
    Check,
    Interval,
    Rule,
    Verdict,
    accuracy_difference,
    compare,
    document,
)
from leafnet.metrics import scores

NAMES = ("a", "b", "c")
LABELS = np.arange(300) % 3


def logits(wrong: int, *, sure: float = 5.0, first: int = 0) -> NDArray[np.float32]:
    """Logits for LABELS of which `wrong`, from `first` on, are of the next class."""
    predicted = LABELS.copy()
    predicted[first : first + wrong] = (predicted[first : first + wrong] + 1) % 3
    return np.array(sure * np.eye(3)[predicted], np.float32)


def judged(
    candidate: NDArray[np.float32], champion: NDArray[np.float32] | None, **changes: object
) -> Verdict:
    values = {
        "margin": 1.0,
        "min_recall": 0.5,
        "recall": {},
        "max_ece_rise": 0.02,
        "resamples": 2000,
        "seed": 0,
    }
    rule = Rule(**(values | changes))  # type: ignore[arg-type]
    return compare(candidate, champion, LABELS, class_names=NAMES, rule=rule)


def names(verdict: Verdict) -> list[str]:
    return [check.name for check in verdict.failed]


def test_better_worse_and_a_tie() -> None:
    champion = logits(30)
    assert judged(logits(0), champion).outcome == "better"
    assert judged(champion, champion).outcome == "tie"
    # Fifteen more are wrong and no other is right.
    worse = judged(logits(45), champion)
    assert (worse.outcome, names(worse)) == ("worse", ["lead [points]", "ECE"])
    # The one that is right instead of another does not make it better, nor surely not worse.
    assert judged(logits(30, first=1), champion, margin=2.0).outcome == "tie"
    # As many right, but others: too little is known to call it not worse by a point.
    assert names(judged(logits(30, first=150), champion)) == ["lead [points]"]
    assert judged(logits(30, first=150), champion).outcome == "unclear"
    assert judged(logits(30, first=150), champion, margin=10.0).outcome == "tie"


def test_a_class_below_its_floor() -> None:
    champion = logits(150)
    few = logits(0)
    few[LABELS == 2, :] = few[LABELS == 1][:1]  # no example of c is found
    assert names(judged(few, champion)) == ["recall of c"]
    assert judged(few, champion, recall={"c": 0.0}).outcome == "better"
    assert names(judged(logits(3), champion, recall={"b": 1.0})) == ["recall of b"]
    assert judged(few, None).outcome == "worse"
    assert judged(logits(0), None).outcome == "better"


def test_a_calibration_that_got_worse() -> None:
    unsure = logits(0, sure=1.0)  # right, and says 58 %
    assert names(judged(unsure, logits(10))) == ["ECE"]
    assert judged(unsure, logits(10), max_ece_rise=0.5).outcome == "better"


def test_interval_is_that_of_resampling_pairs() -> None:
    """Against the plain bootstrap, which draws examples; of 3,000 the unseen one is nothing."""
    generator = np.random.default_rng(1)
    candidate, champion = generator.random(3000) < 0.8, generator.random(3000) < 0.7
    found = accuracy_difference(candidate, champion, resamples=4000, seed=0)
    drawn = generator.integers(0, 3000, (2000, 3000))
    plain = 100 * (candidate[drawn].mean(axis=1) - champion[drawn].mean(axis=1))
    assert found.difference == pytest.approx(100 * (candidate.mean() - champion.mean()))
    assert (found.low, found.high) == pytest.approx(
        tuple(np.quantile(plain, [0.05, 0.95])), abs=0.2
    )


def drawn_pair(
    generator: np.random.Generator, examples: int, *, worse: float, sure: float = 0.9
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Two models that are as often right as they say, less `worse` of the first one's answers."""
    labels = generator.integers(0, 3, examples)
    made = []
    for lost, mean in ((worse, sure), (0.0, 0.9)):
        confidence = np.clip(generator.beta(30 * mean, 30 * (1 - mean), examples), 0.4, 0.999)
        right = generator.random(examples) < confidence - lost
        table = np.repeat((1 - confidence)[:, None] / 2, 3, axis=1)
        table[np.arange(examples), np.where(right, labels, (labels + 1) % 3)] = confidence
        made.append(np.log(table).astype(np.float32))
    return made[0], made[1], labels


def rarely(count: int, draws: int, share: float = 0.05) -> bool:
    """False where what comes in `share` of draws would do so this often once in a thousand."""
    return bool(binom.sf(count - 1, draws, share) > 1e-3)


@pytest.mark.parametrize("examples", [5, 20, 100, 300, 2000])
@pytest.mark.parametrize("margin", [0.0, 1.0, 5.0])
def test_a_candidate_that_is_5_points_worse_passes_in_5_of_100(
    examples: int, margin: float
) -> None:
    """One that differs in no more than that, and one that differs on many examples."""
    generator = np.random.default_rng(examples)
    for lost, won in ((0.05, 0.0), (0.15, 0.1)):
        passed = 0
        for seed in range(150):
            chance = generator.random(examples)
            ours, theirs = chance >= lost, (chance < lost) | (chance >= lost + won)
            found = accuracy_difference(ours, theirs, resamples=300, seed=seed)
            passed += found.low >= -margin
        assert rarely(passed, 150), (lost, won)


@pytest.mark.parametrize("examples", [10, 30, 100, 300])
@pytest.mark.parametrize("sure", [0.9, 0.8])
def test_a_candidate_as_well_calibrated_is_refused_for_that_in_5_of_100(
    examples: int, sure: float
) -> None:
    """Also one that is less sure, and right as much less often."""
    generator = np.random.default_rng(examples)
    refused = 0
    for seed in range(120):
        candidate, champion, labels = drawn_pair(generator, examples, worse=0.0, sure=sure)
        by = rule(max_ece_rise=0.02, resamples=300, seed=seed)
        verdict = compare(candidate, champion, labels, class_names=NAMES, rule=by)
        refused += "ECE" in names(verdict)
    assert rarely(refused, 120)


@pytest.mark.parametrize("examples", [20, 100, 2000])
def test_a_candidate_that_is_as_good_is_called_worse_in_5_of_100(examples: int) -> None:
    """Where its lead fails all the same, the split is said to be too small."""
    generator = np.random.default_rng(examples)
    worse = 0
    for seed in range(120):
        candidate, champion, labels = drawn_pair(generator, examples, worse=0.0)
        by = rule(margin=1.0, max_ece_rise=0.02, resamples=300, seed=seed)
        verdict = compare(candidate, champion, labels, class_names=NAMES, rule=by)
        lead = verdict.checks[1]
        worse += not lead.passed and not lead.unclear
        if lead.unclear and not lead.passed:
            assert "too few to tell" in lead.told
    assert rarely(worse, 120)


def test_a_calibration_that_is_surely_worse_is_refused_at_100_photographs() -> None:
    generator = np.random.default_rng(4)
    refused = 0
    for seed in range(30):
        candidate, champion, labels = drawn_pair(generator, 100, worse=0.25)
        by = rule(max_ece_rise=0.02, resamples=300, seed=seed)
        refused += "ECE" in names(compare(candidate, champion, labels, class_names=NAMES, rule=by))
    assert refused > 25


def test_two_plants_say_less_than_their_photographs() -> None:
    """All of one plant are lost: of 300 photographs fifteen, of 20 plants one."""
    champion = of_classes(LABELS)
    candidate = champion.copy()
    candidate[:15] = np.roll(candidate[:15], 1, axis=1)
    by = rule(margin=10.0)
    alone = compare(candidate, champion, LABELS, class_names=NAMES, rule=by)
    plants = np.arange(300) // 15
    found = compare(candidate, champion, LABELS, class_names=NAMES, rule=by, groups=plants)
    assert (alone.outcome, found.outcome) == ("tie", "unclear")
    assert found.difference is not None
    assert found.difference.low < -15


def some(values: str) -> NDArray[np.int64]:
    return np.array(["abc".index(value) for value in values])


def of_classes(predicted: NDArray[np.int64], *, sure: float = 5.0) -> NDArray[np.float32]:
    return np.array(sure * np.eye(3)[predicted], np.float32)


def rule(**changes: object) -> Rule:
    values = {
        "margin": 100.0,
        "min_recall": 0.0,
        "recall": {},
        "max_ece_rise": 1.0,
        "resamples": 200,
        "seed": 0,
    }
    return Rule(**(values | changes))  # type: ignore[arg-type]


def test_a_class_without_examples_is_not_judged() -> None:
    labels = some("aabbb")
    for champion in (of_classes(some("abbbb")), None):
        verdict = compare(
            of_classes(labels), champion, labels, class_names=NAMES, rule=rule(min_recall=0.9)
        )
        assert verdict.outcome == "better"
        recalls = [check.name for check in verdict.checks if check.name.startswith("recall")]
        assert recalls == ["recall of a", "recall of b"]


def test_the_figures_of_a_verdict_by_hand() -> None:
    labels, candidate, champion = some("aaaabbbbbc"), some("aaabbbbbbc"), some("aabcbbbaac")
    verdict = compare(
        of_classes(candidate, sure=4.0),
        of_classes(champion, sure=2.0),
        labels,
        class_names=NAMES,
        rule=rule(min_recall=0.5, recall={"b": 1.0}, max_ece_rise=0.125),
    )
    # Nine of ten against six of ten; softmax of one logit over two zeros.
    sure, less_sure = (np.exp(x) / (np.exp(x) + 2) for x in (4, 2))
    ours, theirs = abs(0.9 - sure), abs(0.6 - less_sure)
    assert [(c.name, c.candidate, c.champion, c.wanted, c.passed) for c in verdict.checks] == [
        ("accuracy", 0.9, 0.6, "", True),
        ("lead [points]", pytest.approx(30.0), None, verdict.checks[1].wanted, True),
        ("recall of a", 0.75, 0.5, "at least 0.500", True),
        ("recall of b", 1.0, 0.6, "at least 1.000", True),
        ("recall of c", 1.0, 1.0, "at least 0.500", True),
        (
            "ECE",
            pytest.approx(ours, rel=1e-5),
            pytest.approx(theirs, rel=1e-5),
            verdict.checks[-1].wanted,
            True,
        ),
    ]
    # Of ten photographs chance is more than what is allowed.
    limit, by_chance = (float(part.split()[0]) for part in verdict.checks[-1].wanted[8:].split(","))
    assert limit - theirs == pytest.approx(by_chance, abs=2e-3)
    assert 0.125 < by_chance < 0.3
    difference = verdict.difference
    assert difference is not None
    told = f"{difference.low:+.1f} to {difference.high:+.1f}, over -100.0"
    assert verdict.checks[1].wanted == told


def test_the_first_model_has_figures_and_floors_alone() -> None:
    verdict = compare(
        of_classes(some("abca"), sure=2.0),
        None,
        some("abcb"),
        class_names=NAMES,
        rule=rule(min_recall=0.6),
    )
    assert [(c.name, c.champion, c.passed) for c in verdict.checks] == [
        ("accuracy", None, True),
        ("recall of a", None, True),
        ("recall of b", None, False),
        ("recall of c", None, True),
        ("ECE", None, True),
    ]
    told = "it finds 0.500 of b, wanted at least 0.600 (of 2 photographs: 95 % interval "
    # One of two: 1 - 0.975 ** 0.5, and its mirror.
    told += "0.013 to 0.987)"
    assert [check.told for check in verdict.failed] == [told]
    assert (verdict.outcome, verdict.difference) == ("worse", None)
    ece = abs(0.75 - np.exp(2) / (np.exp(2) + 2))
    assert verdict.checks[-1].candidate == pytest.approx(ece, rel=1e-5)


# What a floor, margin or limit may be off by where it is the same number, and where it is not.
SAME, OTHER = 5e-10, 2e-9


@pytest.mark.parametrize(
    ("floor", "outcome"), [(0.7, "better"), (0.7 + SAME, "better"), (0.7 + OTHER, "worse")]
)
def test_a_recall_on_its_floor_is_enough(floor: float, outcome: str) -> None:
    labels = np.zeros(10, np.int64)
    verdict = compare(
        of_classes(some("aaaaaaabbb")), None, labels, class_names=NAMES, rule=rule(min_recall=floor)
    )
    assert verdict.outcome == outcome


@pytest.mark.parametrize(
    ("margin", "failed"),
    [(100.0, []), (100 - SAME, []), (100 - OTHER, ["lead [points]"]), (99.9, ["lead [points]"])],
)
def test_a_lead_on_the_margin_is_enough(margin: float, failed: list[str]) -> None:
    """Where one is right on all and the other on none, the interval ends at 100 points."""
    right, wrong = of_classes(some("aaaa")), of_classes(some("bbbb"))
    verdict = compare(wrong, right, some("aaaa"), class_names=NAMES, rule=rule(margin=margin))
    assert verdict.difference is not None
    assert verdict.difference[:2] == (-100.0, -100.0)
    assert names(verdict) == failed
    other = compare(right, wrong, some("aaaa"), class_names=NAMES, rule=rule(margin=margin))
    assert other.difference is not None
    assert (other.difference.difference, other.difference.high) == (100.0, 100.0)
    assert other.outcome == ("better" if margin == 100 else other.outcome)


@pytest.mark.parametrize(("off", "failed"), [(0.0, []), (SAME, []), (OTHER, ["ECE"])])
def test_a_calibration_error_on_its_limit_is_enough(off: float, failed: list[str]) -> None:
    labels, found = some("aabb" * 200), some("aaba" * 200)
    candidate, champion = of_classes(found, sure=0.0), of_classes(found, sure=1.0)
    candidate[:, 0] += 1e-6  # of a third, where three of four are right; nothing is a tie
    candidate[2::4, 1] += 2e-6
    (mine, theirs) = (
        scores.scores(scores.tally(each, labels), NAMES)["ece"] for each in (candidate, champion)
    )
    assert mine == pytest.approx(3 / 4 - 1 / 3, abs=1e-5)
    assert theirs == pytest.approx(3 / 4 - np.e / (np.e + 2), abs=1e-5)
    verdict = compare(
        candidate, champion, labels, class_names=NAMES, rule=rule(max_ece_rise=mine - theirs - off)
    )
    assert names(verdict) == failed


def test_what_is_told_of_a_worse_model() -> None:
    verdict = judged(logits(45), logits(30), min_recall=0.9, max_ece_rise=0.02)
    found = verdict.difference
    assert found is not None
    interval = f"{found.low:+.1f} to {found.high:+.1f}"
    ece = 0.85 - np.exp(5) / (np.exp(5) + 2)
    assert [check.told for check in verdict.failed] == [
        f"it may be {-found.low:.1f} points less accurate than the champion, more than 1.0 "
        f"(lead -5.0, 90 % interval {interval})",
        *(
            f"it finds 0.850 of {name}, wanted at least 0.900 (of 100 photographs: 95 % interval "
            "0.765 to 0.914)"
            for name in NAMES
        ),
        verdict.failed[-1].told,
    ]
    told = f"its calibration error is {-ece:.3f}, wanted at most "
    assert verdict.failed[-1].told.startswith(told)
    # A fall of 5 points; of 15 changes 9 or more one way is chance in 30 %, 12 or more in 2 %.
    limit = float(verdict.failed[-1].told.removeprefix(told)) - (-ece - 0.05)
    assert 0.02 < limit < 0.04
    # Of 300 pairs 15 are lost: the deviation of their count is sqrt(15 x 285 / 300).
    half = 1.645 * np.sqrt(15 * 285 / 300) / 3
    np.testing.assert_allclose(found, [-5, -5 - half, -5 + half], atol=0.7)


def test_the_rule_sets_the_draws() -> None:
    champion, candidate = logits(30), logits(30, first=100)
    found = {
        (resamples, seed): judged(candidate, champion, resamples=resamples, seed=seed).difference
        for resamples in (50, 60)
        for seed in (0, 1)
    }
    assert len(set(found.values())) == 4
    right = [each.argmax(axis=1) == LABELS for each in (candidate, champion)]
    assert found[60, 1] == accuracy_difference(*right, resamples=60, seed=1)


def test_a_verdict_as_a_document() -> None:
    check = Check("ECE", 0.25, None, "at most", False, "too much")
    verdict = Verdict("worse", (check,), Interval(-1.0, -2.0, 0.5))
    assert document(verdict) == {
        "outcome": "worse",
        "difference_points": {"difference": -1.0, "low": -2.0, "high": 0.5},
        "checks": [
            {
                "name": "ECE",
                "candidate": 0.25,
                "champion": None,
                "wanted": "at most",
                "passed": False,
                "told": "too much",
                "unclear": False,
            }
        ],
    }
    assert document(Verdict("better", (), None))["difference_points"] is None
