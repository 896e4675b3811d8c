"""What README.md and the pages behind it say: commands, tables, defaults.

Every command in a code block is checked: the local ones run in order, the others are parsed.
"""

import importlib.util
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pytest
from ray.scripts.scripts import cli as ray_cli

from leafnet.core import errors, s3, terminal
from leafnet.core.errors import UserError
from leafnet.core.settings import leaves, parse
from leafnet.data import shards, synthetic
from leafnet.evaluation.settings import PromoteSettings
from leafnet.metrics import scores
from leafnet.preparation.settings import PrepareSettings
from leafnet.scoring import rows
from leafnet.training.settings import TrainSettings
from tests import docs
from tests.docs import load

ROOT = Path(__file__).parents[1]
JOBS = ROOT / "jobs" / "README.md"
OUTPUTS = ROOT / "jobs" / "OUTPUTS.md"
STORAGE = ROOT / "cluster" / "STORAGE.md"
# In the order in which a newcomer reads them; test_manifests.py checks the rest of cluster/.
PAGES = [
    *(ROOT / "README.md", JOBS, OUTPUTS, ROOT / "leafnet" / "README.md"),
    *(STORAGE, ROOT / "cluster" / "FAULTS.md", ROOT / "tests" / "benchmarks" / "README.md"),
]
# What makes a command one for a cluster or a bucket, or leaves something for the reader to fill in.
ELSEWHERE = re.compile(r"…|://|\b[A-Z]{4,}\b")
# Beside what the pages say, so that it takes seconds: a small network on small pictures.
QUICK = {
    "train": [
        *("--weights", "random", "--image_size", "48", "--views", "2"),
        *("--head.epochs", "3", "--head.units", "8", "--head.batch_size", "16"),
    ],
    "score": ["--max_failed", "100"],
}
TIGHTER = {"--head.search": "2", "--cross_validate": "2", "--views": "2"}
PROGRAMS = {"python", "make", "ray", "pip", "source", "tensorboard", "export", "git", "cd"}


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every code block of all pages."""
    return [
        block
        for page in PAGES
        for block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    ]


def commands() -> list[list[str]]:
    """The commands of all blocks that hold some, comments taken away, in order."""
    found = []
    for language, text in blocks():
        lines = [line for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line.strip()]
        is_shell = language in ("sh", "bash", "console")
        if is_shell or (not language and lines[0].split()[0] in PROGRAMS):
            for line in lines:
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words:
                    found.append(words)
    return found


def test_commands_were_found() -> None:
    found = commands()
    assert {words[0] for words in found} <= PROGRAMS
    ours = [words[1] for words in found if words[0] == "python"]
    for job in ("prepare", "train", "evaluate", "score"):
        assert any(word in (f"jobs/{job}.py", "-m") for word in ours), job


def job_of(words: list[str]) -> str | None:
    match = re.fullmatch(r"jobs/(\w+)\.py", words[1]) if words[0] == "python" else None
    return match[1] if match else None


def runs_here(words: list[str]) -> bool:
    return job_of(words) in docs.jobs() and not ELSEWHERE.search(" ".join(words))


@pytest.mark.parametrize(
    "words", [w for w in commands() if not runs_here(w)], ids=lambda words: " ".join(words)
)
def test_commands_that_are_not_run_are_right(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    check(words)


def inline() -> list[str]:
    """The commands in the text and the tables of the pages, without repetitions."""
    text = "\n".join(re.sub(r"^```.*?^```", "", p.read_text(), flags=re.M | re.S) for p in PAGES)
    return sorted(set(re.findall(r"`((?:python|make|ray|pip|tensorboard) [^`\n]+)`", text)))


@pytest.mark.parametrize("command", inline())
def test_commands_in_the_text_are_right(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of jobs only the names of the settings: the text may leave out what is always given."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    job = job_of(words)
    if job is None:
        check(words)
    else:
        known = {name for name, _ in leaves(docs.jobs()[job])}
        assert {word[2:] for word in words if word.startswith("--")} <= known | {"help", "config"}


def check(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        (target, *_) = [word for word in rest if "=" not in word]
        assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), f"there is no module {rest[1]}"
    elif program == "python":
        job = job_of(words)
        assert job, words
        check_job(job, rest[1:])
    elif program == "ray":
        check_ray(rest)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for names in re.findall(r"\[(.*?)\]", " ".join(rest)):
            assert set(names.split(",")) <= set(extras["optional-dependencies"])
    elif program == "source":
        assert rest == [".venv/bin/activate"]
        assert "VENV := .venv" in (ROOT / "Makefile").read_text()
    elif program == "tensorboard":
        assert Path(sys.executable).with_name("tensorboard").exists()
        assert {word for word in rest if word.startswith("--")} <= {"--logdir", "--port"}


def check_job(job: str, arguments: list[str]) -> None:
    if job not in docs.jobs():
        assert (ROOT / "jobs" / f"{job}.py").exists()
        return
    known = {name for name, _ in leaves(docs.jobs()[job])}
    if "…" in " ".join(arguments) or "--help" in arguments:
        given = {w[2:].split("=")[0] for w in arguments if w.startswith("--")}
        assert given - {"help", "config", "json", "verbose"} <= known
        return
    parse(docs.jobs()[job], arguments, prog=job, description="")


def check_ray(words: list[str]) -> None:
    command: Any = ray_cli
    words = list(words)
    while isinstance(command, click.Group):
        assert words[0] in command.commands, f"ray has no {words[0]}"
        command = command.commands[words.pop(0)]
    if "--" in words:
        submitted = words[words.index("--") + 1 :]
        words = words[: words.index("--")]
        check(submitted)
    options = {option for parameter in command.params for option in parameter.opts}
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    assert given <= options, f"ray {command.name} has no {given - options}"


def test_what_is_wrong_is_found() -> None:
    for words, kind in (
        ("python jobs/train.py --shard s3://a --name b", UserError),
        ("ray start --heads", AssertionError),
        ("ray job submit -- python jobs/score.py --modle s3://…", AssertionError),
        ("make demos", AssertionError),
        ("pip install 'leafnet[gpus]'", AssertionError),
    ):
        with pytest.raises(kind):
            check(shlex.split(words))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_local_commands_in_order(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with drawn leaves where the pages have photographs, and what the commands make."""
    synthetic.write_photographs(tmp_path / "photos", per_class=16)
    synthetic.write_photographs(tmp_path / "labelled", per_class=2, seed=1)
    (tmp_path / "incoming").mkdir()
    for path in (tmp_path / "labelled").rglob("*.jpg"):
        shutil.copy(path, tmp_path / "incoming" / f"{path.parent.name}-{path.name}")
    shutil.copy(next((tmp_path / "incoming").iterdir()), tmp_path / "leaf.jpg")
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    monkeypatch.chdir(tmp_path)
    done = []
    for words in filter(runs_here, commands()):
        job = job_of(words)
        assert job
        arguments = list(words[2:])
        for flag, value in TIGHTER.items():
            if flag in arguments:
                arguments[arguments.index(flag) + 1] = value
        code = terminal.run_job(load(job).job, [*arguments, *QUICK.get(job, [])])
        assert code == 0, " ".join(words)
        done.append(job)
    assert done[:4] == ["prepare", "train", "evaluate", "score"]
    for language, text in blocks():
        if language == "python":
            exec(compile(text, "page", "exec"), {"__name__": "__main__"})
    assert list(tmp_path.glob("predictions/date=*/*.parquet"))
    assert (tmp_path / "runs" / "potato" / "tensorboard" / "train").is_dir()


def table(page: Path, title: str) -> list[list[str]]:
    """The cells of the last table of a section, without its head."""
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", page.read_text(), re.M | re.S)
    lines = re.findall(r"(?:^\|.*\n)+", text, re.M)[-1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_table_of_predictions_is_their_schema() -> None:
    """Names, types and order."""
    types = {
        "string": pa.string(),
        "int32": pa.int32(),
        "float32": pa.float32(),
        "float64": pa.float64(),
        "timestamp(us)": pa.timestamp("us"),
        "timestamp(us, UTC)": pa.timestamp("us", tz="UTC"),
        "struct, a float32 for each class": pa.struct({"a": pa.float32(), "b": pa.float32()}),
    }
    told = [
        (name, types[kind])
        for names, kind, _ in table(OUTPUTS, "Predictions")
        for name in re.findall("`(.+?)`", names)
    ]
    assert told == [(field.name, field.type) for field in rows.schema(("a", "b"))]


def test_the_table_of_exit_codes_is_the_code() -> None:
    told = {int(code): meaning for code, meaning in table(JOBS, "Exit codes")}
    named = {
        errors.EXIT_USER_ERROR: "a setting or an input is wrong",
        errors.EXIT_IN_USE: "another job is using `--out`, the run `--name` or the registry",
        errors.EXIT_TOO_MANY_FAILED: "more than `--max_failed` percent of the night failed",
        errors.EXIT_WORSE: "the candidate is worse",
        terminal.EXIT_TERMINATED: "terminated by SIGTERM",
        terminal.EXIT_INTERRUPTED: "interrupted",
    }
    assert told.keys() == {0, 1, *named}
    for code, words in named.items():
        assert words in told[code]


def test_shards_have_the_columns_that_are_told() -> None:
    (told,) = re.findall(r"data/shards/ +\*\.parquet +(.*)", OUTPUTS.read_text())
    names = re.sub(r" \(.*?\)", "", told).split(", ")
    assert names == shards.SCHEMA.names


def test_metrics_json_has_the_figures_that_are_told() -> None:
    (told,) = re.findall(
        r"`metrics\.json` has, for each split, (.*?), from every", OUTPUTS.read_text(), re.S
    )
    tally = scores.tally(np.eye(2, dtype=np.float32), np.array([0, 1]))
    names = re.findall("`(.+?)`", told)
    assert len(names) == 9
    assert set(names) <= scores.scores(tally, ["a", "b"]).keys()


def test_the_table_of_variables_is_what_the_client_reads() -> None:
    """But for the two that only old servers need, which stand in the module alone."""
    told = set(re.findall(r"AWS_\w+", STORAGE.read_text()))
    assert s3.__doc__
    known = set(re.findall(r"AWS_\w+", s3.__doc__))
    assert known - told == {
        "AWS_REQUEST_CHECKSUM_CALCULATION",
        "AWS_RESPONSE_CHECKSUM_VALIDATION",
    }
    assert told <= known


def test_defaults_in_the_text_are_those_of_the_settings() -> None:
    text = " ".join(" ".join(page.read_text() for page in PAGES).split())
    for model, name, words in (
        (PromoteSettings, "margin", "below `--margin` ({:g} point)"),
        (PrepareSettings, "shard_mb", "A shard is about {:g} MB"),
        (PrepareSettings, "row_group", "in row groups of {:g}."),
    ):
        assert words.format(model.model_fields[name].default) in text
    assert TrainSettings.model_fields["views"].default == 8
    assert "over eight views of each photograph" in text
    target = TrainSettings.model_fields["precision_target"].default
    assert f"was right in {target:.0%}".replace("%", " %") in text
