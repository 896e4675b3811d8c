"""Stored JSON documents, checked field by field before anything in them is used.

A document may have been edited, or come from somebody else: a name in it becomes a path, a digest
the name of a file, a number the size of an array. Each kind is a class below `Document`; what it
does not name is left alone, and everything that it names has been checked once it is parsed.
"""

import json
import unicodedata
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from leafnet.core.errors import UserError


def _file_name(name: str) -> str:
    if name in ("", ".", "..") or any(c in "/\\" or unicodedata.category(c) == "Cc" for c in name):
        raise ValueError("must be the name of a file, without a folder")
    return name


def _no_control(text: str) -> str:
    if any(unicodedata.category(c) == "Cc" for c in text):
        raise ValueError("must have no control characters")
    return text


def _unique(values: list[str]) -> list[str]:
    if len(set(values)) < len(values):
        raise ValueError("must be different from each other")
    return values


FileName = Annotated[str, AfterValidator(_file_name)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
ModelId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
Date = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}$")]
Count = Annotated[int, Field(ge=0)]
ClassName = Annotated[str, StringConstraints(min_length=1), AfterValidator(_no_control)]
ClassNames = Annotated[list[ClassName], AfterValidator(_unique)]


class Document(BaseModel):
    """Base of all kinds. Types are not converted, and numbers are finite."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


DocumentT = TypeVar("DocumentT", bound=Document)


def parse(
    kind: type[DocumentT], document: Any, *, url: str, version: int, reason: str, remedy: str
) -> DocumentT:
    """What JSON gave as a document of `kind`.

    Args:
        kind: of the document.
        document: of any type, as `storage.read_json` returns it.
        url: of the document, for people.
        version: that this leafnet reads.
        reason: of the error, where the document is of this version and damaged.
        remedy: what a person can do, beginning with a verb.

    Raises:
        UserError: it is of another version (`other-version`), or a field of it cannot be.
    """
    found = document.get("version") if isinstance(document, dict) else None
    if type(found) is not int or found != version:
        raise UserError(
            "other-version", f"{url} has version {found}, this leafnet reads {version}; {remedy}"
        )
    try:
        return kind.model_validate_json(json.dumps(document))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise UserError(
            reason, f"{url} is damaged or was edited: {place}: {first['msg']}; {remedy}"
        ) from None
