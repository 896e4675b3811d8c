"""A test that is left out is named, and CI leaves none out."""

import pytest

from tests.left_out import leave_out, summary


def test_left_out_on_a_machine_that_lacks_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"no browser: apt-get install chromium"):
        leave_out("no browser: apt-get install chromium")


def test_never_left_out_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"no browser: apt-get install chromium"):
        leave_out("no browser: apt-get install chromium")


def test_the_end_of_a_run_has_every_reason_with_its_tests() -> None:
    reports = [
        pytest.TestReport(
            *("tests/test_x.py::test", ("tests/test_x.py", 1, "test"), {}, "skipped"),
            longrepr=("tests/test_x.py", 1, f"Skipped: {reason}"),
            when="setup",
        )
        for reason in ("no browser", "no server", "no browser")
    ]
    assert summary(reports) == ["2 tests: no browser", "1 test: no server"]
