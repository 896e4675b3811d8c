"""What a machine lacks: the tests that need it are left out and named at the end; in CI they fail.

A run on a machine without a browser is of use; a green one of CI that had none would be a lie.
"""

import os
from collections import Counter
from collections.abc import Iterable
from typing import NoReturn

import pytest


def leave_out(reason: str) -> NoReturn:
    """Leave out the tests that ask for this, with the `reason` and what to install."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI leaves nothing out: {reason}", pytrace=False)
    pytest.skip(reason)


def summary(reports: Iterable[pytest.TestReport]) -> list[str]:
    """A line for each reason, with the number of tests."""
    reasons: Counter[str] = Counter()
    for report in reports:
        told = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[told.removeprefix("Skipped: ")] += 1
    return [
        f"{count} {'test' if count == 1 else 'tests'}: {reason}"
        for reason, count in reasons.most_common()
    ]
