"""A run as MLflow shows it: settings, metrics as they come, and what the run made.

One run of leafnet is one run of MLflow, also when it goes on later. A server that does not answer
costs a line of warning and no more: what it has missed is sent when it answers again, at the
latest at the end.
"""

import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.core.terminal import say
from leafnet.training.settings import MlflowSettings

FILE = "mlflow.json"  # in the run's folder: which run of MLflow it is
ARTIFACTS = (
    *("config.yaml", "history.csv", "metrics.json", "run.json", "search.json"),
    *("cross_validation.json", "curves.png", "confusion.png", "report.html"),
    *("fine_tune.csv", "metrics_head.json"),
)
_EPOCH = (
    *("train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "learning_rate"),
    *("images_per_s", "waited"),  # of fine-tuning
)
# Before the names of what is of fine-tuning, which counts its epochs anew.
_TUNED = "fine_tune/"
_FINAL = ("accuracy", "accuracy_low", "accuracy_high", "macro_f1", "log_loss", "ece")
_EVERY_S = 2.0  # metrics are sent this often
_AWAY_S = 60.0  # a server that did not answer is asked again after so long
_METRICS, _PARAMS = 1000, 100  # that MLflow takes in one request
# MLflow would try for minutes, and a run must not wait for it; it also prints links of its own.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def check(settings: MlflowSettings) -> None:
    """Refuse what cannot work, before a machine is taken.

    Raises:
        UserError: MLflow is not installed, no server is named, or its URL holds a password.
    """
    if not settings.enabled:
        return
    if importlib.util.find_spec("mlflow") is None:
        raise UserError(
            "no-mlflow", 'mlflow is on but not installed: pip install "leafnet[mlflow]"'
        )
    uri = _uri(settings)
    if not uri:
        raise UserError(
            "no-tracking-uri",
            "mlflow is on, and no server is named: give --mlflow.tracking_uri, or set "
            "MLFLOW_TRACKING_URI",
        )
    if settings.tracking_uri and "@" in urlsplit(settings.tracking_uri).netloc:
        raise UserError(
            "secret-in-url",
            "--mlflow.tracking_uri holds a name or password, which would end up in config.yaml; "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead",
        )
    _try_to_open(uri)


def _try_to_open(uri: str) -> None:
    """Refuse a store that the installed client has no code for, whether or not a server answers."""
    _set_environment()
    from mlflow import MlflowClient

    try:
        MlflowClient(tracking_uri=uri)
    except Exception as error:  # of MLflow, or of a package that it lacks
        raise UserError(
            "no-such-store",
            f"the installed MLflow cannot write to {_told(uri)} ({type(error).__name__}: "
            f"{_first_line(error)}); name a tracking server, http://HOST:5000, or pip install "
            "mlflow in place of mlflow-skinny for sqlite:///FILE",
        ) from None


def _uri(settings: MlflowSettings) -> str | None:
    return settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")


@contextmanager
def follow(
    settings: MlflowSettings, run: str, *, name: str, parameters: Mapping[str, Any]
) -> Iterator["Tracker"]:
    """What happens to `run` in the block, told to MLflow; nothing where it is not enabled.

    Args:
        settings: which server.
        run: folder or URL of the run.
        name: of the run in MLflow.
        parameters: the run's settings, flat.
    """
    tracker = Tracker(settings, run, name=name, parameters=parameters)
    tracker.begin()
    try:
        yield tracker
    except KeyboardInterrupt:
        tracker.end("KILLED")
        raise
    except BaseException:
        tracker.end("FAILED")
        raise


class Tracker:
    """One run of MLflow. No method raises."""

    def __init__(
        self, settings: MlflowSettings, run: str, *, name: str, parameters: Mapping[str, Any]
    ) -> None:
        self._uri = str(_uri(settings)) if settings.enabled else None
        self._experiment = settings.experiment
        self._run, self._name = run, name
        self._parameters = {key: _text(value) for key, value in parameters.items()}
        self._client: Any = None
        self._id: str | None = None
        self._known: set[tuple[str, int]] = set()  # (prefix, epoch) that MLflow has
        # (time [ms], prefix, row)
        self._waiting: list[tuple[int, str, Mapping[str, float]]] = []
        self._next = 0.0
        self._away = False

    def begin(self) -> None:
        """Find or make the run in MLflow, and say where it is."""
        if self._uri and self._try(self._connect):
            say(f"mlflow    run {self._id} of experiment {self._experiment} at {_told(self._uri)}")

    def epoch(self, row: Mapping[str, float]) -> None:
        """Take a row of the head's history."""
        self._take("", row)

    def fine_tune_epoch(self, row: Mapping[str, float]) -> None:
        """Take a row of the history of fine-tuning."""
        self._take(_TUNED, row)

    def _take(self, prefix: str, row: Mapping[str, float]) -> None:
        if not self._uri:
            return
        self._waiting.append((_now_ms(), prefix, row))
        if time.monotonic() >= self._next:
            self._try(self._send)

    def results(
        self,
        history: Sequence[Mapping[str, float]],
        scores: Mapping[str, Any],
        *,
        tags: Mapping[str, str],
        parameters: Mapping[str, Any],
        fine_tune: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Send what the run came to, with its files, and close it.

        Args:
            history: of the whole fit of the head; of it goes what MLflow does not have.
            scores: `scores.scores` of each split.
            tags: such as the model's id.
            parameters: the settings as they were in the end; those that a search changed.
            fine_tune: history of the whole fine-tuning, if there was one.
        """
        if not self._uri:
            return
        waiting = {(prefix, row["epoch"]) for _, prefix, row in self._waiting}
        self._waiting += [
            (_now_ms(), prefix, row)
            for prefix, rows in (("", history), (_TUNED, fine_tune))
            for row in rows
            if (prefix, row["epoch"]) not in waiting
        ]
        found = {
            f"chosen.{key}": _text(value)
            for key, value in parameters.items()
            if self._parameters.get(key) != _text(value)
        }

        def send() -> None:
            from mlflow.entities import Metric

            self._send()
            self._log_parameters(found)
            step, now = int(history[-1]["epoch"]), _now_ms()
            final = [
                Metric(f"final/{split}/{name}", float(of_split[name]), now, step)
                for split, of_split in scores.items()
                for name in _FINAL
            ]
            self._client.log_batch(self._id, metrics=final)
            for key, value in tags.items():
                self._client.set_tag(self._id, key, value)
            there = set(storage.list_names(self._run))
            for name in ARTIFACTS:
                if name in there:
                    with storage.local_copy(storage.join(self._run, name)) as path:
                        self._client.log_artifact(self._id, path)
            self._client.set_terminated(self._id, "FINISHED")

        if not self._try(send):
            say("          the run is complete without it; MLflow lacks what came since")

    def end(self, status: str) -> None:
        """Close the run with what came to be known, after an error."""

        def close() -> None:
            self._send()
            self._client.set_terminated(self._id, status)

        if self._uri and not self._away:
            self._try(close)

    def _try(self, action: Callable[[], Any]) -> bool:
        """Do it, connected; what goes wrong is said once until something works again."""
        try:
            self._connect()
            action()
        except Exception as error:  # of requests, of MLflow, of a plugin for its artefacts
            if not self._away:
                line = _first_line(error)
                say(
                    f"warning   MLflow at {_told(str(self._uri))} does not take it: "
                    f"{type(error).__name__}: {line}"
                )
                say("          training goes on, and what MLflow misses is sent later")
            self._away, self._next = True, time.monotonic() + _AWAY_S
            return False
        if self._away:
            say("mlflow    answers again")
        self._away, self._next = False, time.monotonic() + _EVERY_S
        return True

    def _connect(self) -> None:
        if self._id is not None:
            return
        _set_environment()
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=self._uri)
        run = self._found()
        if run is None:
            experiment = self._client.get_experiment_by_name(self._experiment)
            experiment_id = (
                experiment.experiment_id
                if experiment
                else self._client.create_experiment(self._experiment)
            )
            run = self._client.create_run(experiment_id, run_name=self._name)
            storage.write_json(
                storage.join(self._run, FILE),
                {
                    "tracking_uri": _told(str(self._uri)),
                    "experiment": self._experiment,
                    "run_id": run.info.run_id,
                },
            )
        else:
            self._client.update_run(run.info.run_id, status="RUNNING")
            self._known = {
                (prefix, metric.step)
                for prefix in ("", _TUNED)
                for metric in self._client.get_metric_history(run.info.run_id, prefix + _EPOCH[0])
            }
        self._id = run.info.run_id
        self._client.set_tag(self._id, "leafnet.run", self._run)
        self._log_parameters(
            {key: text for key, text in self._parameters.items() if key not in run.data.params}
        )

    def _found(self) -> Any:
        """The run that an earlier start made, None where there is none."""
        from mlflow.exceptions import MlflowException

        with suppress(FileNotFoundError):
            stored = storage.read_json(storage.join(self._run, FILE))
            if stored["tracking_uri"] == _told(str(self._uri)):
                try:
                    run = self._client.get_run(stored["run_id"])
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise
                    return None
                return run if run.info.lifecycle_stage == "active" else None
        return None

    def _send(self) -> None:
        from mlflow.entities import Metric

        new = {(prefix, int(row["epoch"])): (at_ms, row) for at_ms, prefix, row in self._waiting}
        metrics = [
            Metric(prefix + name, float(row[name]), at_ms, epoch)
            for (prefix, epoch), (at_ms, row) in new.items()
            if (prefix, epoch) not in self._known
            for name in _EPOCH
            if name in row
        ]
        for at in range(0, len(metrics), _METRICS):
            self._client.log_batch(self._id, metrics=metrics[at : at + _METRICS])
        self._known |= set(new)
        self._waiting.clear()

    def _log_parameters(self, parameters: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        params = [Param(key, text) for key, text in parameters.items()]
        for at in range(0, len(params), _PARAMS):
            self._client.log_batch(self._id, params=params[at : at + _PARAMS])


def _set_environment() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _first_line(error: Exception) -> str:
    """Of what MLflow says, without a password: MLFLOW_TRACKING_URI may hold one."""
    line = (str(error).strip().splitlines() or [""])[0]
    return re.sub(r"//[^/\s]*@", "//", line)[:160]


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _told(uri: str) -> str:
    """`uri` without name and password, which MLFLOW_TRACKING_URI may hold.

    >>> _told("https://ann:secret@mlflow.example/"), _told("sqlite:////tmp/mlflow.db")
    ('https://mlflow.example/', 'sqlite:////tmp/mlflow.db')
    """
    scheme, separator, rest = uri.partition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}{separator}{place.rpartition('@')[2]}{slash}{path}"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
