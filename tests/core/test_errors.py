"""The error that a person is meant to read, and the codes that a job ends with."""

import pickle

import pytest

from leafnet.core import errors
from leafnet.core.errors import UserError


def test_codes_are_told_apart_by_a_script() -> None:
    codes = (
        errors.EXIT_USER_ERROR,
        errors.EXIT_IN_USE,
        errors.EXIT_TOO_MANY_FAILED,
        errors.EXIT_WORSE,
    )
    assert codes == (2, 3, 4, 5)


def test_a_mistake_of_the_caller_ends_with_code_2() -> None:
    error = UserError("no-such-folder", "a does not exist")
    assert (error.reason, str(error), error.exit_code) == ("no-such-folder", "a does not exist", 2)
    assert isinstance(error, ValueError)


@pytest.mark.parametrize("exit_code", [2, 5])
def test_reason_and_code_come_back_from_another_process(exit_code: int) -> None:
    error = pickle.loads(pickle.dumps(UserError("in-use", "wait for it", exit_code=exit_code)))
    assert type(error) is UserError
    assert (error.reason, str(error), error.exit_code) == ("in-use", "wait for it", exit_code)
