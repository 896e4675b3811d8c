"""A run told to MLflow: to its own store, and to servers that are away."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leafnet.core.errors import UserError
from leafnet.core.settings import validate
from leafnet.metrics.scores import Tally, scores
from leafnet.training import mlflow
from leafnet.training.mlflow import Tracker
from leafnet.training.settings import MlflowSettings, TrainSettings

NAMES = ("healthy", "rust")
SCORES = {"test": scores(Tally(np.array([[3, 0], [1, 4]]), 1.2, *np.zeros((3, 15))), NAMES)}
TAGS = {"model_id": "0123abc"}
# A folder that MLflow serves without a server; the server's own packages are not needed to develop.
ALLOW = "MLFLOW_ALLOW_FILE_STORE"


def row(epoch: int) -> dict[str, float]:
    return {"epoch": epoch, "train_loss": 1 / epoch, "valid_accuracy": 0.5, "step": 7.0 * epoch}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(ALLOW, "true")
    monkeypatch.setattr(mlflow, "_EVERY_S", 0.0)
    monkeypatch.setattr(mlflow, "_AWAY_S", 0.0)
    return f"file://{tmp_path}/mlflow"


def tracker(uri: str, run: Path, **parameters: Any) -> Tracker:
    settings = validate(MlflowSettings, {"tracking_uri": uri})
    made = Tracker(settings, str(run), name="potato", parameters={"seed": 0} | parameters)
    made.begin()
    return made


def runs(uri: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("leafnet")
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def steps(uri: str, key: str) -> list[int]:
    from mlflow import MlflowClient

    (run,) = runs(uri)
    history = MlflowClient(tracking_uri=uri).get_metric_history(run.info.run_id, key)
    return [metric.step for metric in history]


def finish(made: Tracker, epochs: int, tuned: int = 0, *, parameters: Any = None) -> None:
    history, fine_tune = ([row(epoch) for epoch in range(1, n + 1)] for n in (epochs, tuned))
    made.results(
        history, SCORES, tags=TAGS, parameters={"seed": 0} | (parameters or {}), fine_tune=fine_tune
    )


def test_a_run_with_all_that_belongs_to_it(store: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "potato"
    run.mkdir(parents=True)
    for name in ("metrics.json", "curves.png", "other.bin"):
        (run / name).write_bytes(b"{}")
    made = tracker(store, run, **{"head.units": [512, 64]})
    for epoch in (1, 2):
        made.epoch(row(epoch))
    finish(made, 2, parameters={"head.units": [256]})
    (found,) = runs(store)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "potato"
    assert found.data.params == {"seed": "0", "head.units": "512,64", "chosen.head.units": "256"}
    assert found.data.tags["model_id"] == "0123abc"
    assert found.data.metrics["final/test/accuracy"] == 7 / 8
    assert steps(store, "train_loss") == [1, 2]
    artifacts = Path(found.info.artifact_uri.removeprefix("file://"))
    assert {path.name for path in artifacts.iterdir()} == {"metrics.json", "curves.png"}


def test_a_run_that_goes_on_is_the_same_run(store: str, tmp_path: Path) -> None:
    first = tracker(store, tmp_path / "run", workers=1)
    for epoch in (1, 2, 3):
        first.epoch(row(epoch))
    first.end("FAILED")
    assert [run.info.status for run in runs(store)] == ["FAILED"]
    # From the checkpoint of epoch 2, on other workers, which MLflow would refuse to change.
    second = tracker(store, tmp_path / "run", workers=2)
    assert [run.info.status for run in runs(store)] == ["RUNNING"]
    for epoch in (3, 4):
        second.epoch(row(epoch))
    finish(second, 4, parameters={"workers": 1})
    assert steps(store, "train_loss") == [1, 2, 3, 4]
    assert [run.info.status for run in runs(store)] == ["FINISHED"]


def test_fine_tuning_counts_its_epochs_anew(store: str, tmp_path: Path) -> None:
    first = tracker(store, tmp_path / "run")
    for epoch in (1, 2, 3):
        first.epoch(row(epoch))
    for epoch in (1, 2):
        first.fine_tune_epoch(row(epoch) | {"waited": 0.01})
    first.end("FAILED")
    # From the checkpoint of epoch 1; of epoch 3 the driver never heard.
    second = tracker(store, tmp_path / "run")
    for epoch in (2, 4):
        second.fine_tune_epoch(row(epoch))
    finish(second, 3, tuned=4)
    assert steps(store, "train_loss") == [1, 2, 3]
    assert sorted(steps(store, "fine_tune/train_loss")) == [1, 2, 3, 4]
    assert steps(store, "fine_tune/waited") == [1, 2]


def test_the_end_of_a_block_is_told(store: str, tmp_path: Path) -> None:
    settings = validate(MlflowSettings, {"tracking_uri": store})

    def follow() -> Any:
        return mlflow.follow(settings, str(tmp_path / "run"), name="a", parameters={})

    with pytest.raises(KeyboardInterrupt), follow():
        raise KeyboardInterrupt
    assert [run.info.status for run in runs(store)] == ["KILLED"]
    with pytest.raises(ZeroDivisionError), follow():
        print(1 / 0)
    assert [run.info.status for run in runs(store)] == ["FAILED"]


def test_a_server_that_is_away_costs_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    away = tracker("http://127.0.0.1:9", tmp_path / "run")  # nothing listens there
    for epoch in (1, 2, 3):
        away.epoch(row(epoch))
    finish(away, 3)
    away.end("FAILED")
    assert time.monotonic() - began < 20
    told = capsys.readouterr().out
    assert told.count("warning   MLflow at http://127.0.0.1:9 does not take it") == 1
    assert "training goes on" in told


def test_a_server_that_comes_back_misses_nothing(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "mlflow"
    blocked.write_text("a file where MLflow wants its folder")
    made = tracker(store, tmp_path / "run")
    made.epoch(row(1))
    made.epoch(row(2))
    blocked.unlink()
    made.epoch(row(3))
    assert steps(store, "train_loss") == [1, 2, 3]
    told = capsys.readouterr().out
    assert told.count("warning") == 1
    assert "mlflow    answers again" in told


def test_off_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Tracker(MlflowSettings(), str(tmp_path / "run"), name="a", parameters={})
    made.begin()
    made.epoch(row(1))
    finish(made, 1)
    made.end("FAILED")
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "enabled"),
    [
        (True, True),
        (False, False),
        ({"tracking_uri": "http://a"}, True),
        ({"tracking_uri": "http://a", "enabled": False}, False),
    ],
)
def test_how_it_is_turned_on(value: Any, enabled: bool) -> None:
    values = {"shards": "s", "name": "n", "mlflow": value}
    assert validate(TrainSettings, values).mlflow.enabled is enabled


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (True, "no-tracking-uri"),
        ({"tracking_uri": "http://ann:secret@mlflow"}, "secret-in-url"),
    ],
)
def test_what_cannot_work_is_refused(value: Any, reason: str, no_server: None) -> None:
    with pytest.raises(UserError) as caught:
        mlflow.check(validate(MlflowSettings, value))
    assert caught.value.reason == reason
    assert "secret" not in str(caught.value).replace("secret-in-url", "")


def test_no_name_or_password_is_kept(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:secret@127.0.0.1:9")
    settings = MlflowSettings(enabled=True)
    mlflow.check(settings)
    made = Tracker(settings, str(tmp_path / "run"), name="a", parameters={})
    made.begin()
    told = capsys.readouterr().out
    assert "warning   MLflow at http://127.0.0.1:9 " in told
    assert "secret" not in told


def test_the_run_of_mlflow_is_kept_beside_the_run(store: str, tmp_path: Path) -> None:
    tracker(store, tmp_path / "run")
    (found,) = runs(store)
    stored = json.loads((tmp_path / "run" / mlflow.FILE).read_text())
    assert stored == {
        "tracking_uri": store,
        "experiment": "leafnet",
        "run_id": found.info.run_id,
    }


@pytest.mark.parametrize("place", ["sqlite:///{0}/mlflow.db", "file://{0}/runs", "nonsense://x"])
def test_a_store_that_is_not_to_be_opened_is_refused_at_the_start(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is installed: where it opens, it is not refused."""
    from mlflow import MlflowClient

    monkeypatch.delenv(ALLOW, raising=False)
    uri = place.format(tmp_path)
    settings = validate(MlflowSettings, {"tracking_uri": uri})
    try:
        MlflowClient(tracking_uri=uri)
    except Exception:
        with pytest.raises(UserError, match=r"the installed MLflow cannot write to .*http://HOST"):
            mlflow.check(settings)
    else:
        mlflow.check(settings)


def test_a_refused_store_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://ann:secret@host/d")
    with pytest.raises(UserError) as caught:
        mlflow.check(validate(MlflowSettings, {"enabled": True}))
    assert "secret" not in str(caught.value)
