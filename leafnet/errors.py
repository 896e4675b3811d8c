"""The one error that a person who runs a job is meant to read."""


class UserError(ValueError):
    """Something that the caller gave, or a file, is wrong; nothing is the matter with leafnet.

    `reason` is a stable slug for machines (`no-such-folder`), the message is for people: what was
    found, where, and what to do, in one or two lines. Jobs print both and exit with code 2.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str]]:
        # Ray pickles errors from worker to driver; the default would call UserError(message).
        return UserError, (self.reason, str(self))
