"""What a wheel would have in it; tests/test_jobs.py installs one."""

import runpy
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]


def sources() -> dict[str, Path]:
    """Each file of leafnet/ and jobs/ that is needed to run, by its place in a wheel."""
    return {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}": path.relative_to(ROOT)
        for folder, package in (("leafnet", "leafnet"), ("jobs", "leafnet/jobs"))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".md" and "__pycache__" not in path.parts
    }


def test_the_sources_are_found() -> None:
    places = set(sources())
    assert len(places) > 90
    assert {"leafnet/__init__.py", "leafnet/jobs/train.py", "leafnet/jobs/train.yaml"} < places
    assert len([name for name in places if "/templates/" in name]) == 7


def test_a_wheel_has_every_source_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {"script_name": "setup.py"}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    build = setuptools.Distribution(given).get_command_obj("build_py")
    build.ensure_finalized()
    build.build_lib = "wheel"
    packed = [Path(name).as_posix() for name in build.get_outputs(include_bytecode=False)]
    assert sorted(packed) == sorted(f"wheel/{name}" for name in sources())
