"""Promotion on drawn leaves, with models that are as good as they are made."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from leafnet.core import lock, terminal
from leafnet.core.errors import EXIT_WORSE, UserError
from leafnet.core.settings import validate
from leafnet.data import shards, synthetic
from leafnet.data.images import decode
from leafnet.data.shards import ShardIndex
from leafnet.evaluation import promote
from leafnet.evaluation.settings import PromoteSettings
from leafnet.evaluation.verdict import Check, Outcome, Rule, Verdict
from leafnet.models import bundle, registry, resnet, runtime
from leafnet.models.weights import load_weights
from tests.conftest import leaf_jpeg, write_data_set

SIZE = 32
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Thirty leaves to judge by."""
    return write_data_set(str(tmp_path_factory.mktemp("judged")), {"train": 2, "test": 10})


@pytest.fixture(scope="module")
def make(index: ShardIndex, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Publishes a model that has exactly so many of the test leaves wrong."""
    weights = load_weights("random").convolutions
    (table,) = [
        shards.read_columns(index.root, s, ["image", "label"]) for s in index.of_split("test")
    ]
    pixels = np.stack([decode(image, SIZE).pixels for image in table["image"].to_pylist()])
    network = resnet.build(weights, image_size=SIZE, precision="float32")
    features = runtime.forward(network, pixels, batch_size=32)
    labels = table["label"].to_numpy()

    def publish(name: str, *, wrong: int, sure: float = 6.0) -> str:
        predicted = labels.copy()
        predicted[:wrong] = (predicted[:wrong] + 1) % 3
        # Of the many kernels that give these logits for thirty photographs, the smallest.
        targets: NDArray[np.float32] = np.array(sure * np.eye(3)[predicted], np.float32)
        kernel = np.linalg.lstsq(features, targets, rcond=None)[0].astype(np.float32)
        url = str(tmp_path_factory.mktemp(name))
        bundle.save(
            url,
            convolutions=weights,
            head=[(kernel, np.zeros(3, np.float32))],
            class_names=synthetic.CLASS_NAMES,
            image_size=SIZE,
            provenance={},
        )
        return url

    return publish


def settings(root: Path, index: ShardIndex, model: str, **changes: object) -> PromoteSettings:
    values = {
        "registry": str(root),
        "shards": index.root,
        "candidate": model,
        "precision": "float32",
    }
    return validate(PromoteSettings, values | changes)


def back(root: Path | str, **changes: object) -> PromoteSettings:
    return validate(PromoteSettings, {"registry": str(root), "rollback": True, **changes})


def champion(root: Path | str) -> str:
    return bundle.load(f"{root}/champion").model_id


@pytest.mark.ray
@pytest.mark.slow
def test_worse_better_tie_and_rollback_while_a_scoring_job_runs(
    local_ray: None,
    index: ShardIndex,
    make: Callable[..., str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    root, images, out = tmp_path / "registry", tmp_path / "in", tmp_path / "out"
    fair, good, same = make("fair", wrong=6), make("good", wrong=0), make("same", wrong=0, sure=7.0)
    poor = make("poor", wrong=12)
    promote.run(settings(root, index, fair))
    first = champion(root)
    assert first == bundle.load(fair).model_id

    images.mkdir()
    for i in range(80):
        (images / f"{i}.jpg").write_bytes(
            leaf_jpeg(synthetic.CLASS_NAMES[i % 3], seed=i % 9, size=48)
        )
    words = [f"--model={root}/champion", f"--images={images}", f"--out={out}", "--ray.cpus=2"]
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(
            [sys.executable, ROOT / "jobs/score.py", *words, "--batch-size=2", "--keep-every=0"],
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        while not list(out.glob("_staging/*/part-*")):
            assert job.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        # It waits in the middle of its work for all that follows.
        os.kill(job.pid, signal.SIGSTOP)

        with pytest.raises(
            UserError, match=r"more than 1\.0 \(lead -20\.0, 90 % interval"
        ) as caught:
            promote.run(settings(root, index, poor))
        assert caught.value.exit_code == EXIT_WORSE
        assert champion(root) == first
        capfd.readouterr()
        promote.run(settings(root, index, good))
        assert champion(root) == bundle.load(good).model_id
        # Of thirty photographs that neither model has wrong up to a tenth may be lost.
        with pytest.raises(UserError, match="30 test photographs are too few to tell") as caught:
            promote.run(settings(root, index, same))
        assert (caught.value.reason, caught.value.exit_code) == ("unclear", EXIT_WORSE)
        promote.run(settings(root, index, same, margin=12.0))
        assert "stays champion (--tie promote" in capfd.readouterr().out
        assert champion(root) == bundle.load(good).model_id
        promote.run(settings(root, index, good))
        assert "nothing to do" in capfd.readouterr().out
        promote.run(back(root))
        assert champion(root) == first

        os.kill(job.pid, signal.SIGCONT)
        assert job.wait(300) == 0, (tmp_path / "log").read_text()
    finally:
        job.kill()
        job.wait()
    rows = pd.read_parquet(out)
    assert len(rows) == 80
    assert set(rows.model_id) == {first}
    actions = [decision.action for decision in registry.decisions(str(root))]
    assert actions == ["promoted", "refused", "promoted", "refused", "kept", "rolled-back"]
    told = registry.decisions(str(root))[2].comparison
    assert told["difference_points"]["difference"] == pytest.approx(20.0)
    assert told["split"]["fingerprint"] == shards.split_fingerprint(index, "test")
    (held,) = root.glob("_lock/*")
    assert json.loads(held.read_text())["released"]


@pytest.mark.parametrize(
    ("outcome", "tie", "action"),
    [
        ("better", "keep", "promoted"),
        ("tie", "keep", "kept"),
        ("tie", "promote", "promoted"),
        ("worse", "promote", "refused"),
        ("unclear", "promote", "refused"),
    ],
)
def test_what_a_verdict_leads_to(outcome: Outcome, tie: str, action: str) -> None:
    assert promote._action(Verdict(outcome, (), None), tie) == action


def test_rollback_needs_a_champion_before(make: Callable[..., str], tmp_path: Path) -> None:
    root = tmp_path / "registry"
    with pytest.raises(UserError, match="has no champion"):
        promote.run(back(root, dry_run=True))
    assert not root.exists()
    for url in (make("a", wrong=1), make("b", wrong=2)):
        model = bundle.load(url)
        named = {
            "model_id": model.model_id,
            "digest": registry.add(str(root), url, model.description),
        }
        registry.decide(
            str(root), "promoted", candidate=model.model_id, champion=named, comparison={}
        )
    promote.run(back(root, dry_run=True))
    assert champion(root) == model.model_id
    promote.run(back(root))
    assert champion(root) != model.model_id
    with pytest.raises(UserError, match="is the first champion of"):
        promote.run(back(root))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recall": ("rust=0.5",)}, "has no class rust, only early_blight, healthy"),
        ({"recall": ("healthy",)}, "must be CLASS=SHARE with a share from 0 to 1, got healthy"),
        ({"shards": None}, "give --candidate MODEL and --shards DATA, or --rollback"),
        ({"rollback": True}, "--rollback takes no --candidate"),
        ({"candidate": "nowhere"}, "nowhere/model.json does not exist"),
    ],
)
def test_what_is_refused(
    changes: dict[str, object], message: str, index: ShardIndex, random_model: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        promote.run(settings(tmp_path / "registry", index, random_model, **changes))
    assert not (tmp_path / "registry").exists()


def run(chosen: PromoteSettings, _: object) -> None:
    promote.run(chosen)


def test_a_registry_that_another_job_holds_ends_with_code_3(
    index: ShardIndex, random_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dry run of the same, which writes nothing, does not ask for it."""
    root = tmp_path / "registry"
    for chosen in (settings(root, index, random_model), back(root)):
        with lock.hold(str(root), timeout_s=60):
            assert terminal.run_job(functools.partial(run, chosen), []) == 3
        assert f"{root} is in use by process {os.getpid()} on" in capsys.readouterr().err
    with (
        lock.hold(str(root), timeout_s=60),
        pytest.raises(UserError, match="has no champion") as caught,
    ):
        promote.run(back(root, dry_run=True))
    assert caught.value.exit_code == 2
    assert not registry.decisions(str(root))


def test_a_split_is_known_by_its_photographs(index: ShardIndex, tmp_path: Path) -> None:
    found = shards.split_fingerprint(index, "test")
    assert found != shards.split_fingerprint(index, "train")
    other = write_data_set(str(tmp_path / "other"), {"valid": 1, "test": 10}, seed=0)
    assert shards.split_fingerprint(other, "test") == found


def verdict(outcome: Outcome, *told: str) -> Verdict:
    """A verdict whose checks fail with these words."""
    checks = [Check(name, 0.5, 0.75, "more", False, name) for name in told]
    return Verdict(outcome, (Check("fine", 0.5, None, "any", True, "unsaid"), *checks), None)


def decide(
    root: Path,
    chosen: PromoteSettings,
    candidate: str,
    champion: str | None,
    found: Verdict,
) -> None:
    """What follows from a verdict, in a registry that is held as in the job."""
    with promote._held(chosen, str(root)) as held:
        model, other = bundle.load(candidate), bundle.load(champion) if champion else None
        facts: dict[str, Any] = {"checks": [], "why": "seen"}
        promote._conclude(chosen, str(root), held, model, other, found, facts)


def test_what_is_decided_is_written_and_told(
    index: ShardIndex,
    random_model: str,
    make: Callable[..., str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    root, first, second = tmp_path / "registry", random_model, make("second", wrong=0)
    ids = [bundle.load(url).model_id for url in (first, second)]
    chosen = settings(root, index, second)
    decide(root, settings(root, index, first), first, None, verdict("better"))
    assert f"promoted  {ids[0]}: {root}/champion" in capfd.readouterr().out
    decide(root, chosen, second, first, verdict("tie"))
    assert (
        f"tie       {ids[1]} is not worse, and no better; {ids[0]} stays" in capfd.readouterr().out
    )
    told = f"{ids[1]} is refused: too low; too late; {ids[0]} stays champion"
    refused: tuple[Outcome, ...] = ("worse", "unclear")
    for outcome in refused:
        with pytest.raises(UserError) as caught:
            decide(root, chosen, second, first, verdict(outcome, "too low", "too late"))
        assert (caught.value.reason, caught.value.exit_code) == (outcome, EXIT_WORSE)
        assert str(caught.value) == told
    assert champion(root) == ids[0]
    decide(root, settings(root, index, second, tie="promote"), second, first, verdict("tie"))
    assert champion(root) == ids[1]
    # A model alone in its registry that fails leaves no champion to speak of.
    with pytest.raises(UserError, match=r"is refused: too low$"):
        decide(tmp_path / "other", chosen, second, None, verdict("worse", "too low"))
    decisions = registry.decisions(str(root))
    assert [decision.action for decision in decisions] == [
        *("promoted", "kept", "refused", "refused", "promoted"),
    ]
    assert [decision.candidate for decision in decisions] == [ids[0], *[ids[1]] * 4]
    assert [bool(decision.champion) for decision in decisions] == [True, *[False] * 3, True]
    assert all(decision.comparison["why"] == "seen" for decision in decisions)


def test_a_dry_run_refuses_and_promotes_nothing(
    index: ShardIndex, random_model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "registry"
    chosen = settings(root, index, random_model, dry_run=True)
    decide(root, chosen, random_model, None, verdict("better"))
    assert capfd.readouterr().out == ""
    with pytest.raises(UserError, match="is refused: too low"):
        decide(root, chosen, random_model, None, verdict("worse", "too low"))
    assert not root.exists()


def test_the_rule_is_that_of_the_settings(
    index: ShardIndex, random_model: str, tmp_path: Path
) -> None:
    values: dict[str, Any] = {
        "margin": 2.0,
        "min_recall": 0.25,
        "max_ece_rise": 0.125,
        "resamples": 300,
        "seed": 7,
    }
    chosen = settings(
        tmp_path, index, random_model, recall=("healthy=0.75", "late_blight=1"), **values
    )
    recall = {"healthy": 0.75, "late_blight": 1.0}
    assert promote._rule(chosen, index) == Rule(recall=recall, **values)


def test_models_are_compared_on_a_test_split_of_their_classes(
    index: ShardIndex, random_model: str, tmp_path: Path
) -> None:
    without = write_data_set(str(tmp_path / "without"), {"train": 2})
    other = shards.write_index(
        str(tmp_path / "other"),
        class_names=("a", "b", "c"),
        shards=index.shards,
        counts={split: dict.fromkeys("abc", 10) for split in index.counts},
        prepared={},
    )
    with pytest.raises(UserError, match="has no test split"):
        promote.run(settings(tmp_path / "registry", without, random_model))
    model = bundle.load(random_model)
    with pytest.raises(UserError, match="need a registry of their own"):
        promote._check_classes(model, other, "candidate")
    promote._check_classes(model, index, "candidate")


def test_a_champion_that_changed_meanwhile_is_not_compared(
    random_model: str, make: Callable[..., str], tmp_path: Path
) -> None:
    root = str(tmp_path)
    for url in (random_model, make("later", wrong=0)):
        model = bundle.load(url)
        digest = registry.add(root, url, model.description)
        named = {"model_id": model.model_id, "digest": digest}
        registry.decide(root, "promoted", candidate=model.model_id, champion=named, comparison={})
        found = registry.champion(root)
        assert found is not None
        assert promote._load(root, found).model_id == model.model_id
    before = registry.previous(root)
    assert before is not None
    assert found is not None
    earlier = found.model_copy(update={"model_id": before["model_id"]})
    with pytest.raises(UserError, match="changed meanwhile; run the same command again"):
        promote._load(root, earlier)


def test_the_candidate_that_is_champion_already(
    index: ShardIndex, random_model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen = settings(tmp_path / "registry", index, random_model)
    decide(tmp_path / "registry", chosen, random_model, None, verdict("better"))
    promote.run(chosen)
    assert "already; nothing to do" in capfd.readouterr().out
    assert len(registry.decisions(str(tmp_path / "registry"))) == 1


def test_a_verdict_is_a_row_for_each_check(capfd: pytest.CaptureFixture[str]) -> None:
    promote._say_verdict(verdict("worse", "recall"))
    rows = [line.split() for line in capfd.readouterr().out.splitlines() if line]
    assert rows[1:] == [
        ["fine", "0.500", "any"],
        ["recall", "0.500", "0.750", "more", "not", "met"],
    ]
