import sys
from pathlib import Path

import pytest

from leafnet.core import terminal
from leafnet.core.job import Job
from leafnet.core.settings import Settings

Capture = pytest.CaptureFixture[str]


class LeafSettings(Settings):
    """Settings of a job that is here only."""

    leaves: int = 3


def write_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"work_of_{folder.name}"
    (folder / f"{name}.py").write_text("def run(settings):\n    print(settings.leaves, 'leaves')\n")
    monkeypatch.syspath_prepend(folder)
    return name


def test_a_module_runs_with_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    job = Job(LeafSettings, write_module(tmp_path, monkeypatch), "Count.", "  count")
    assert terminal.run_job(job, ["--leaves", "5"]) == 0
    assert capsys.readouterr().out == "5 leaves\n"


def test_a_module_is_imported_only_when_the_settings_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    name = write_module(tmp_path, monkeypatch)
    job = Job(LeafSettings, name, "Count.", "  count")
    assert terminal.run_job(job, ["--leaves", "many"]) == 2
    assert "--leaves cannot be 'many'" in capsys.readouterr().err
    assert name not in sys.modules


def test_a_function_runs_with_the_settings() -> None:
    given: list[LeafSettings] = []
    assert terminal.run_job(Job(LeafSettings, given.append, None, ""), []) == 0
    assert given == [LeafSettings(leaves=3)]


def test_the_help_has_the_name_of_the_job_and_its_examples(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        Job(LeafSettings, "nowhere", "Counts leaves.", "  count them")(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: jobs/leaf.py [--config FILE] [--SETTING VALUE …]\n")
    assert "\nCounts leaves.\n" in text
    assert text.endswith("examples:\n  count them\n")
