"""What the tests of both reports want of a page, read with Python's own parser."""

import itertools
from html.parser import HTMLParser
from typing import Any

_ALLOWED = (
    *("#", "file:", "https:", "http:", "data:,"),
    *("model/", "metrics", "history", "config", "fine_tune"),
)


class Parsed(HTMLParser):
    """A page in pieces: its text, tags with attributes, and headings."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._in_style = False
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        """Called by the parser."""
        self._in_style = tag == "style"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Called by the parser."""
        self._in_style = False

    def handle_data(self, data: str) -> None:
        """Called by the parser."""
        if not self._in_style:
            self.words.append(data)

    @property
    def text(self) -> str:
        """All that is to be read, with single spaces."""
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of each element of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]


def check(page: bytes) -> Parsed:
    """Refuse a page that runs something, asks for something, or cannot be found one's way in."""
    parsed = Parsed(page)
    assert not {"script", "iframe", "object", "embed", "form", "base"} & {t for t, _ in parsed.tags}
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    for image in parsed.all("img"):
        assert str(image["src"]).startswith("data:image/")
        assert image["alt"]
    night = tuple(f"{year}-" for year in range(2020, 2040))  # the report of the night before
    for link in [*parsed.all("a"), *parsed.all("link")]:
        assert str(link["href"]).startswith((*_ALLOWED, *night)), link
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in parsed.tags:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
    for link in parsed.all("a"):
        if str(link["href"]).startswith("#"):
            assert str(link["href"])[1:] in ids
    levels = [int(tag[1]) for tag, _ in parsed.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1
    assert levels[0] == 1
    for before, after in itertools.pairwise(levels):
        assert after <= before + 1
    for head in parsed.all("th"):
        assert head["scope"] in ("row", "col")
    assert len(parsed.all("table")) == len(parsed.all("caption"))
    assert {"header", "main", "nav", "footer"} <= {tag for tag, _ in parsed.tags}
    assert parsed.all("html")[0]["lang"] == "en"
    return parsed
