"""What the file of a job does: read the settings, and call the `run` that they are for."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

from leafnet.core import terminal
from leafnet.core.settings import SettingsT, parse


@dataclass(frozen=True)
class Job(Generic[SettingsT]):
    """A job by its settings and by what runs with them: a function, or a module with `run`.

    A module is imported once the settings are known to be right: Ray takes seconds to import, and
    a mistake in a flag should be told at once.
    """

    settings: type[SettingsT]
    work: str | Callable[[SettingsT], None]
    description: str | None
    examples: str

    def __call__(self, argv: Sequence[str]) -> None:
        """Run with the command line `argv`."""
        name = self.settings.__name__.removesuffix("Settings").lower()
        settings = parse(
            self.settings,
            argv,
            prog=f"jobs/{name}.py",
            description=self.description or "",
            examples=self.examples,
        )
        run = importlib.import_module(self.work).run if isinstance(self.work, str) else self.work
        run(settings)

    def main(self) -> None:
        """Run as a program, and end the process with the exit code."""
        terminal.leave(terminal.run_job(self))
