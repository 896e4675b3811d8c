"""YAML and command line into typed, frozen settings.

Flags override the file named by `--config`, which overrides the defaults. Unknown keys and invalid
values are refused by name before any machine is taken.
"""

import argparse
import datetime
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)
from pydantic.fields import FieldInfo

from leafnet.core import mistakes
from leafnet.core import storage as core_storage
from leafnet.core.errors import UserError
from leafnet.core.storage import absolute, is_local
from leafnet.core.urls import without_secret

Url = Annotated[str, AfterValidator(without_secret)]
Auto = Literal["auto"]


def _at_least_one(value: int | str) -> int | str:
    if isinstance(value, int) and value < 1:
        raise ValueError(f"must be auto or at least 1, got {value}")
    return value


def day(value: Any) -> Any:
    if isinstance(value, datetime.date):  # as YAML reads 2026-11-24
        return value.isoformat()
    if isinstance(value, str) and datetime.date.fromisoformat(value).isoformat() != value:
        raise ValueError(f"must be written YYYY-MM-DD, got {value}")
    return value


Count = Annotated[int | Auto, AfterValidator(_at_least_one)]


def _number(value: Any) -> Any:
    # Literals of numbers do not take the text of a command line.
    return int(value) if isinstance(value, str) and value.isdecimal() else value


Views = Annotated[
    Literal[1, 4, 8],
    BeforeValidator(_number),
    Field(
        description="test-time augmentation: average over the flips (4), or also over the quarter "
        "turns (8); takes that many times as long [views]"
    ),
]


def _workers(value: int | str) -> int | str:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if value == "auto" or (isinstance(value, int) and value >= 1):
        return value
    if worker_range(value) is None:
        raise ValueError("must be auto or at least 1, or a range such as 1..4")
    return value


def worker_range(workers: int | str) -> tuple[int, int] | None:
    """(fewest, most) where `workers` is a range.

    >>> worker_range("1..4"), worker_range(2), worker_range("auto")
    ((1, 4), None, None)
    """
    fewest, dots, most = str(workers).partition("..")
    if not dots or not fewest.isdecimal() or not most.isdecimal():
        return None
    return (int(fewest), int(most)) if 1 <= int(fewest) <= int(most) else None


Workers = Annotated[int | str, AfterValidator(_workers)]

# Settings that several jobs have.
Model = Annotated[Url, Field(description="published model: runs/NAME/model or REGISTRY/champion")]
Shards = Annotated[Url, Field(description="data set written by jobs/prepare.py")]
Gpu = Annotated[bool | Auto, Field(description="use GPUs; auto: if the cluster has any")]
BatchSize = Annotated[
    Count, Field(description="images per pass of the network; auto: 32 on CPUs, 256 on GPUs")
]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16"],
    Field(description="of the backbone; auto: bfloat16 where it is measured to be clearly faster"),
]
AnyPrecision = Annotated[
    Literal["auto", "float32", "bfloat16", "int8"],
    Field(description="of the backbone; auto: the fastest on this processor, measured once"),
]
Engine = Annotated[
    Literal["auto", "tensorflow", "openvino"],
    Field(description="library that runs the network; auto: the fastest here, measured once"),
]
MaxMegapixels = Annotated[
    int, Field(ge=1, description="refuse larger photographs before decoding them [megapixels]")
]
LockTimeout = Annotated[
    float,
    Field(
        ge=1,
        description="take over from a job on another machine that shows no sign of life for "
        "this long [s]",
    ),
]
Note = Annotated[str | None, Field(description="a line to show at the top of the report")]


class Settings(BaseModel):
    """Base of all settings: frozen, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Settings of earlier versions, and what to do now; such are refused as unknown ones are.
    retired: ClassVar[Mapping[str, str]] = {}


class RaySettings(Settings):
    """Where the work runs."""

    address: str | None = Field(
        None,
        description="running Ray cluster; none: that of RAY_ADDRESS or of `ray start` on this "
        "machine, or else a local one for this job",
    )
    cpus: int | None = Field(
        None, ge=1, description="logical CPUs of a local Ray [CPUs]; none: all of the machine"
    )
    wait: float = Field(
        900.0,
        ge=0,
        description="how long to wait for a cluster to start machines: with CPUs if it has none, "
        "with --gpu true also with GPUs [s]",
    )


class DataSettings(Settings):
    """How shards are read."""

    local_cache: str | None = Field(
        None,
        description="folder on a fast disk of each machine for copies of the shards that it reads, "
        "such as /mnt/nvme/leafnet; none: always read from the store",
    )
    local_cache_gb: float = Field(
        100.0,
        gt=0,
        description="size of the copies on each machine above which the least recently read are "
        "removed [GB]",
    )

    @field_validator("local_cache")
    @classmethod
    def _on_a_disk(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not is_local(value):
            raise ValueError("must be a folder on a disk, not a URL")
        return absolute(value)


class DoctorSettings(Settings):
    """Settings of jobs/doctor.py."""

    storage: Url | None = Field(
        None,
        description="folder or URL in which to try writing, reading and deleting a file; none: "
        "not checked",
    )
    gpu: bool | Auto = Field("auto", description="check GPUs; auto: if nvidia-smi finds any")
    ray: RaySettings = RaySettings()


class ReportSettings(Settings):
    """Settings of jobs/report.py."""

    run: Url | None = Field(None, description="finished run, runs/NAME; none: see --predictions")
    predictions: Url | None = Field(
        None, description="--out of jobs/score.py, for the report of a night; none: see --run"
    )
    date: str | None = Field(
        None, description="the night, YYYY-MM-DD; none: the newest of --predictions"
    )

    _date = field_validator("date", mode="before")(day)


SettingsT = TypeVar("SettingsT", bound=Settings)

# Flags that are no settings: `terminal.run_job` acts on them before the settings are read.
_OUTPUT = {
    "verbose": "also show on stderr what is written to the log",
    "json": "write JSON lines to stdout, for machines",
}


def parse(
    settings_class: type[SettingsT],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    examples: str = "",
) -> SettingsT:
    """Return the settings of a command line and of the YAML file that its `--config` names.

    Raises:
        UserError: a flag or key is unknown (the message has the nearest that exists), or a value
            is invalid.
        SystemExit: after `--help`, with code 0.
    """
    parser = _parser(settings_class, prog=prog, description=description, examples=examples)
    known, unknown = parser.parse_known_args([_with_underscores(word) for word in argv])
    flags = vars(known)
    if unknown:
        names = [name for name, _ in leaves(settings_class)] + ["config", "help", *_OUTPUT]
        given = unknown[0].split("=")[0]
        raise mistakes.unknown("flag", given, names, prefix="--", retired=settings_class.retired)
    config = flags.pop("config", None)
    for name in _OUTPUT:
        flags.pop(name, None)
    values: dict[str, Any] = _read_yaml(config) if config else {}
    for name, text in flags.items():
        _put(values, name, _from_text(text, dict(leaves(settings_class))[name]))
    return validate(settings_class, values, where=config)


def validate(
    settings_class: type[SettingsT], values: dict[str, Any], *, where: str | None = None
) -> SettingsT:
    """Return `values`, nested as in YAML, as settings.

    Raises:
        UserError: a key is unknown or a value invalid; the message has its name and place.
    """
    try:
        return settings_class.model_validate(values)
    except ValidationError as error:
        fields = dict(leaves(settings_class))
        raise mistakes.explain(error, fields, where, settings_class.retired) from None


def to_yaml(settings: Settings) -> str:
    """Return all of `settings`, defaults included, as YAML that `--config` reads."""
    document = settings.model_dump(mode="json")
    return str(yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return stored (nested) settings by their dotted names.

    >>> flat({"seed": 0, "head": {"units": [512]}})
    {'seed': 0, 'head.units': [512]}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return found


def leaves(settings_class: type[Settings], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting with its dotted name, in order of definition."""
    for name, field in settings_class.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError("bad-flag", f"{message}; {self.prog} --help lists all flags")


def _parser(
    settings_class: type[Settings], *, prog: str, description: str, examples: str
) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [--config FILE] [--SETTING VALUE …]",
        description=description,
        epilog=f"examples:\n{examples}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file or URL with settings")
    for name, what in _OUTPUT.items():
        parser.add_argument(f"--{name}", action="store_true", help=what)
    for name, field in leaves(settings_class):
        default = "required" if field.is_required() else f"default: {_shown(field.default)}"
        parser.add_argument(
            f"--{name}",
            dest=name,
            metavar=_metavar(field.annotation),
            nargs="?" if field.annotation is bool else None,
            const="true" if field.annotation is bool else None,
            help=f"{field.description} ({default})".replace("%", "%%"),
        )
    return parser


def _shown(default: Any) -> str:
    if default is None or default == ():
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _metavar(annotation: Any) -> str:
    """Return the kinds of values of a setting, for the help.

    >>> _metavar(int), _metavar(int | Literal["auto"]), _metavar(Literal["a", "b"] | None)
    ('INT', 'INT|auto', 'a|b|none')
    """
    if annotation is type(None):
        return "none"
    if typing.get_origin(annotation) is Annotated:
        return _metavar(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return "|".join(_metavar(part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return f"{_metavar(typing.get_args(annotation)[0])},…"
    names = {bool: "BOOL", str: "TEXT"}
    return str(names.get(annotation, annotation.__name__.upper()))


def _from_text(text: str, field: FieldInfo) -> Any:
    parts = typing.get_args(field.annotation)
    if type(None) in parts and text.lower() in ("none", "null"):
        return None
    if typing.get_origin(field.annotation) is tuple:
        return () if text.lower() in ("", "none") else _pieces(text)
    return text


def _pieces(text: str) -> list[str]:
    """The parts of a list; in one of NAME=VALUE, a comma before the `=` is part of the name.

    >>> _pieces("a,b"), _pieces("Pepper,_bell=0.9,rust=1")
    (['a', 'b'], ['Pepper,_bell=0.9', 'rust=1'])
    """
    parts = text.split(",")
    if "=" not in text:
        return parts
    pieces, name = list[str](), list[str]()
    for part in parts:
        name.append(part)
        if "=" in part:
            pieces.append(",".join(name))
            name = []
    return [*pieces, *name]


def _with_underscores(word: str) -> str:
    """Write a flag with underscores, as the settings are named, without changing its value.

    >>> _with_underscores("--max-failed=1-2"), _with_underscores("-a-b")
    ('--max_failed=1-2', '-a-b')
    """
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    for i, part in enumerate(path):
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise UserError("bad-value", f"{'.'.join(path[: i + 1])} must be a mapping in the YAML")
    values[last] = value


def _read_yaml(url: str) -> dict[str, Any]:
    try:
        document = yaml.safe_load(core_storage.read_bytes(url))
    except FileNotFoundError:
        raise UserError("no-such-file", f"--config {url} does not exist") from None
    except yaml.YAMLError as error:
        raise UserError(
            "bad-yaml", f"{url} is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("unreadable", f"cannot read --config {url}: {error}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UserError(
            "bad-yaml", f"{url} must have lines `setting: value`, found {type(document)}"
        )
    return document


def compile_pattern(text: str, *, flag: str) -> re.Pattern[str]:
    """Compile the regular expression that was given with `flag`.

    Raises:
        UserError: `text` is not a regular expression.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(
            "bad-regex", f"{flag} {text!r} is not a regular expression: {error}"
        ) from None
