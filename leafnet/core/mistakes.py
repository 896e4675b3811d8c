"""What is wrong with the settings of a job, in one line that says what to do."""

import difflib
from collections.abc import Mapping, Sequence

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from leafnet.core.errors import UserError


def explain(
    error: ValidationError,
    fields: Mapping[str, FieldInfo],
    where: str | None,
    retired: Mapping[str, str],
) -> UserError:
    """Turn pydantic's error about settings into one that names the setting and its place.

    Args:
        error: of the validation.
        fields: every setting by its dotted name.
        where: the file that was read; None: the command line alone.
        retired: settings that are gone -> what to do instead.
    """
    first, *more = error.errors(include_url=False)
    for one in (first, *more):
        told = one.get("ctx", {}).get("error")
        if isinstance(told, UserError):  # it says all, and the value may be a secret
            return told
    names = list(fields)
    sections = {name.rsplit(".", 1)[0] for name in names if "." in name}
    given = ".".join(str(part) for part in first["loc"])
    place = f" in {where}" if where else ""
    if not first["loc"]:  # several settings that do not go together
        return UserError("bad-settings", first["msg"].removeprefix("Value error, ") + place)
    if first["type"] == "extra_forbidden":
        names += sorted(sections)
        return unknown("setting", given, names, place=place, retired=retired)
    # For a union, pydantic names the branch as well, as in `workers.int`.
    name = max(
        (known for known in [*names, *sections] if given == known or given.startswith(known + ".")),
        key=len,
        default=given,
    )
    if first["type"] == "missing":
        return UserError("missing-setting", f"--{name} is required: {fields[name].description}")
    message = first["msg"].removeprefix("Value error, ")
    if (
        name != given
        and len({".".join(map(str, e["loc"])).startswith(name) for e in [first, *more]}) == 1
    ):
        others = [e["msg"][0].lower() + e["msg"][1:] for e in more if _is_below(e["loc"], name)]
        message = " or ".join([message, *others])
    return UserError("bad-value", f"--{name} cannot be {first['input']!r}{place}: {message}")


def _is_below(loc: tuple[int | str, ...], name: str) -> bool:
    return ".".join(map(str, loc)).startswith(name + ".")


def unknown(
    kind: str,
    given: str,
    names: Sequence[str],
    *,
    prefix: str = "",
    place: str = "",
    retired: Mapping[str, str],
) -> UserError:
    """Return the error for a name that is not among `names`, with the nearest one."""
    bare = given.removeprefix("--")
    if bare in retired:
        text = f"there is no {kind} {given} any more{place}; {retired[bare]}"
        return UserError("unknown-setting", text)
    near = difflib.get_close_matches(bare, names, n=1, cutoff=0.5) or [
        name for name in names if name.rsplit(".", 1)[-1] == bare.rsplit(".", 1)[-1]
    ]
    hint = f"did you mean {prefix}{near[0]}?" if near else "see --help for all"
    return UserError("unknown-setting", f"there is no {kind} {given}{place}; {hint}")
