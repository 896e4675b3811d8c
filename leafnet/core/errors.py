"""The one error that a person who runs a job is meant to read."""

from collections.abc import Sequence
from typing import Any

EXIT_USER_ERROR = 2
EXIT_IN_USE = 3
EXIT_TOO_MANY_FAILED = 4
EXIT_WORSE = 5


class UserError(ValueError):
    """Something that the caller gave, or a file, is wrong; nothing is the matter with leafnet.

    `reason` is a stable slug for machines (`no-such-folder`), the message is for people: what was
    found, where, and what to do, in one or two lines. Jobs print both and exit with `exit_code`.
    """

    def __init__(self, reason: str, message: str, *, exit_code: int = EXIT_USER_ERROR) -> None:
        super().__init__(message)
        self.reason = reason
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray pickles errors from worker to driver; the default would call UserError(message).
        return UserError, (self.reason, str(self)), {"exit_code": self.exit_code}


class DamagedParts(Exception):
    """Parts that were planned as present and cannot be read; they have to be computed again."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"{len(names)} damaged or missing parts, the first: {names[0]}")
        self.names = tuple(names)

    def __reduce__(self) -> tuple[type["DamagedParts"], tuple[tuple[str, ...]]]:
        return DamagedParts, (self.names,)
