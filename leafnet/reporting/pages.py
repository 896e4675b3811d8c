"""Templates to pages that need nothing else: no script, no network, pictures inside."""

import base64
import functools
import re
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from leafnet.core.terminal import duration

_NO_BREAK = "\N{NO-BREAK SPACE}"


def render(template: str, **values: Any) -> bytes:
    """The page that `template` of leafnet/templates makes of `values`, in UTF-8.

    Whatever is put into it is escaped: names of photographs and classes come from strangers.
    """
    page = _environment().get_template(template).render(**values)
    # A lone surrogate, of a file's name that is no UTF-8, has no bytes.
    return page.encode("utf-8", "backslashreplace")


def place_of(write: Callable[[], str]) -> str:
    """Where the report is that `write` writes, or why it is not written.

    What it tells of is published before, and a report can be written again.
    """
    try:
        return write()
    except Exception as error:
        traceback.print_exc()
        return f"not written ({type(error).__name__}: {error}); see python jobs/report.py --help"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "name": name,
        "number": number,
        "percent": percent,
        "duration": duration,
        "day": day,
        "picture": picture,
        "when": when,
    }
    return environment


def name(text: str) -> str:
    """`text` with what cannot be seen, or turns the text around, written out.

    >>> name("a\\u202egpj.exe"), name("two\\nlines"), name("Grüße 1.jpg")
    ('a\\\\u202egpj.exe', 'two\\\\nlines', 'Grüße 1.jpg')
    """
    return "".join(
        c
        if c.isprintable() or c == _NO_BREAK
        else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )


def number(value: float) -> str:
    """A count with its thousands apart."""
    return f"{value:,}"


def percent(share: float, places: int = 1) -> str:
    """A share for people; 0 % and 100 % are said only of none and all.

    >>> [percent(share).replace(_NO_BREAK, " ") for share in (0.1234, 0.9999, 0.0001, 1.0)]
    ['12.3 %', '> 99.9 %', '< 0.1 %', '100 %']
    """
    step = 10.0**-places
    if 0 < 100 * share < step / 2:
        text = f"< {step:g} %"
    elif 100 - step / 2 <= 100 * share < 100:
        text = f"> {100 - step:g} %"
    else:
        text = f"{100 * share:.{0 if share in (0, 1) else places}f} %"
    return text.replace(" ", _NO_BREAK)


def day(text: str) -> str:
    """A date in words.

    >>> day("2026-11-04")
    '4 November 2026'
    """
    found = date.fromisoformat(text)
    return f"{found.day} {found:%B %Y}"


def when(text: str) -> str:
    """A time as it is stored, for people; what is none stays as it is.

    >>> when("2026-11-24T23:36:04+00:00"), when("?")
    ('2026-11-24 23:36 UTC', '?')
    """
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d).*\+00:00", text)
    return f"{found[1]} {found[2]} UTC" if found else text


def picture(data: bytes) -> Markup:
    """The URL of a picture that is part of the page."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return Markup(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")
