"""Templates: what comes from strangers stays text, and all of them are shipped."""

import fnmatch
import tomllib
from pathlib import Path

from leafnet import pages

LEAFNET = Path(pages.__file__).parent
EVIL = "\"'><script>alert(1)</script>{{ 7 * 7 }}\u202e\ud800\0"


def test_what_is_put_in_is_escaped_and_what_cannot_be_seen_is_written_out() -> None:
    template = pages._environment().from_string('<a title="{{ x }}">{{ x|name }}</a>')
    page = template.render(x=EVIL)
    assert "<script" not in page
    assert "{{ 7 * 7 }}" in page
    assert "\\u202e\\ud800\\x00</a>" in page


def test_templates_are_package_data() -> None:
    """What is not named there is missing from a wheel."""
    project = tomllib.loads((LEAFNET.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["leafnet"]
    files = [path.relative_to(LEAFNET).as_posix() for path in LEAFNET.glob("templates/**/*.*")]
    assert len(files) == 5
    for name in files:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name
