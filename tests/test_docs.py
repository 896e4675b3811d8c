"""The pages say what the code does: settings, modules, messages, examples, versions."""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from leafnet.core.settings import leaves, parse
from tests import docs

ROOT = Path(__file__).parents[1]
# What is written by hand on how to use leafnet, without what test_manifests.py checks too.
GUIDES = [
    *("README.md", "jobs/README.md", "jobs/OUTPUTS.md", "leafnet/README.md"),
    *("cluster/FAULTS.md", "cluster/STORAGE.md", "cluster/TROUBLESHOOTING.md"),
    "tests/benchmarks/README.md",
]
CLUSTER = [
    *("cluster/README.md", "cluster/kuberay/README.md", "cluster/SUBMITTING.md"),
    *("cluster/NIGHTLY.md", "cluster/COSTS.md", "cluster/SCALING.md"),
]
PAGES = [*GUIDES, *CLUSTER, "CONTRIBUTING.md", "CHANGELOG.md", "jobs/SETTINGS.md"]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))


def test_the_pages_that_are_written_are_fresh() -> None:
    assert set(docs.jobs()) == set(JOBS), "a job without settings"
    assert docs.missing() == [], "say in tests/docs.py when to change these settings"
    assert docs.SETTINGS.read_text() == docs.settings_page(), "run `make docs`"
    assert docs.MODULES.read_text() == docs.modules_page(), "run `make docs`"


def test_every_setting_is_on_the_page_with_its_default() -> None:
    page = docs.SETTINGS.read_text()
    sections = dict(zip(docs.jobs(), page.split("\n## ")[1:], strict=True))
    for job, settings_class in docs.jobs().items():
        assert sections[job].startswith(f"jobs/{job}.py")
        for name, field in leaves(settings_class):
            (row,) = re.findall(rf"^\| `{re.escape(name)}` .*$", sections[job], re.MULTILINE)
            assert field.is_required() == ("| required |" in row), name
            *_, when, _ = row.split(" |")
            assert when.strip(), f"{job}: when is {name} to be changed?"


# Messages


def said(root: Path) -> Iterator[str]:
    """Every text in the sources, with … for what is filled in."""
    for path in [*root.glob("leafnet/**/*.py"), *root.glob("jobs/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "…"
                    for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def is_said(message: str, texts: list[str]) -> bool:
    """True when the pieces between the … of `message` follow each other in one of the texts."""
    pieces = [re.escape(piece) for piece in message.split("…")]
    pattern = re.compile(".*".join(pieces), re.DOTALL)
    return any(pattern.search(text) for text in texts)


def test_quoted_messages_are_in_the_code() -> None:
    page = (ROOT / "cluster" / "TROUBLESHOOTING.md").read_text()
    messages = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(messages) > 30
    texts = list(said(ROOT))
    lost = [message for message in messages if not is_said(message, texts)]
    assert not lost, f"no message of leafnet reads so any more: {lost}"
    assert not is_said("no Ray cluster answers to …", texts)
    assert not is_said("start one with … no Ray cluster answers", texts)


# Examples of --help


@pytest.mark.parametrize("job", JOBS)
def test_help_ends_with_three_examples(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        docs.load(job).job(["--help"])
    assert caught.value.code == 0
    *_, examples = capsys.readouterr().out.split("examples:\n")
    shown = re.findall(r"^  ((?:python|make) .*)$", examples, re.MULTILINE)
    assert len(shown) == 3
    assert all(f"jobs/{job}.py" in line or line.startswith(f"make {job}") for line in shown)


@pytest.mark.parametrize("job", docs.jobs())
def test_examples_are_accepted(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for line in re.findall(r"^  python jobs/\w+\.py(.*)$", docs.load(job).EXAMPLES, re.MULTILINE):
        arguments = shlex.split(line)
        files = [after for flag, after in pairwise(arguments) if flag == "--config"]
        if not all(Path(file).exists() for file in files):  # one of the reader's own
            given = {word[2:] for word in arguments if word.startswith("--")} - {"config"}
            assert given <= {name for name, _ in leaves(docs.jobs()[job])}
            continue
        parse(docs.jobs()[job], arguments, prog=job, description="")


# Pages


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / link).exists(), f"{page} links to {link}"


@pytest.mark.parametrize("page", GUIDES)
def test_settings_in_the_text_exist(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    if page.endswith("TROUBLESHOOTING.md"):
        text = re.sub(r"^\| `.*?` \|", "", text, flags=re.MULTILINE)  # messages
    given = set(re.findall(r"`--([a-z][\w.]*)", text))
    known = {name for of_job in docs.jobs().values() for name, _ in leaves(of_job)}
    assert given
    assert given <= known | {"config", "help", "json", "verbose"}


def test_one_version_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert str(citation["version"]) == version
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] in (version, "Unreleased")


@pytest.mark.parametrize("page", [*GUIDES, *CLUSTER])
def test_guides_are_short(page: str) -> None:
    """Two screens for the README, three for each other page; a generated table does not count."""
    text = (ROOT / page).read_text()
    own = re.sub(r"<!-- modules -->.*<!-- /modules -->", "", text, flags=re.DOTALL)
    assert len(own.splitlines()) <= (110 if page == "README.md" else 130)


def test_links_from_the_front_page_lead_to_every_page() -> None:
    """At most two: a page that no link leads to is not read."""
    reached = {ROOT / "README.md"}
    for _ in range(2):
        reached |= {
            (path.parent / link).resolve()
            for path in reached
            for link in re.findall(r"\]\(([^)#:]+\.md)\)", path.read_text())
        }
    written = {
        path for folder in ("jobs", "leafnet", "cluster") for path in (ROOT / folder).rglob("*.md")
    }
    assert {ROOT / page for page in PAGES} == reached
    assert written <= reached


def test_contributing_fits_a_screen() -> None:
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 110


def test_make_targets_on_the_pages_exist() -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    for page in PAGES:
        for name in re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE):
            assert name in targets[1].split(), f"{page}: there is no `make {name}`"
