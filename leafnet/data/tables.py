"""Tables that people write: CSV in any of its dialects, JSON lines and JSON lists."""

import csv
import io
import json
from typing import Any

from leafnet.core.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")

_DELIMITERS = ",;\t|"


def read_table(url: str, data: bytes) -> list[dict[str, Any]]:
    """The rows of a table by column, whose names are in small letters.

    The delimiter of a CSV is the one that its first line has most of; texts keep their spaces, for
    those may be part of a name. Rows of JSON that are no objects have the one column ``.

    Raises:
        UserError: it is no such table.
    """
    text = _text(url, data)
    if not url.lower().endswith(SUFFIXES[2:]):
        return _from_csv(url, text)
    try:
        if url.lower().endswith(".json"):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise UserError("bad-table", f"{url} is not valid JSON: {error}") from None
    if not isinstance(rows, list):
        raise UserError("bad-table", f"{url} is no list of rows")
    return [
        {str(name).strip().lower(): value for name, value in row.items()}
        if isinstance(row, dict)
        else {"": row}
        for row in rows
    ]


def _text(url: str, data: bytes) -> str:
    utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))  # what spreadsheets call Unicode
    try:
        return data.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            "bad-table", f"{url} is not UTF-8 text ({error}); save it as CSV UTF-8"
        ) from None


def _from_csv(url: str, text: str) -> list[dict[str, Any]]:
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(_DELIMITERS, key=first.count)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise UserError("bad-table", f"{url} is no CSV: {error}") from None
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if not rows:
        return []
    columns = [name.strip().lower() for name in rows[0]]
    return [dict(zip(columns, [*row, *[""] * len(columns)], strict=False)) for row in rows[1:]]


def columns(rows: list[dict[str, Any]]) -> list[str]:
    """The names of all columns of `rows`, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row))
