"""Templates: what comes from strangers stays text."""

from leafnet.reporting import pages

EVIL = "\"'><script>alert(1)</script>{{ 7 * 7 }}\u202e\ud800\0"


def test_what_is_put_in_is_escaped_and_what_cannot_be_seen_is_written_out() -> None:
    template = pages._environment().from_string('<a title="{{ x }}">{{ x|name }}</a>')
    page = template.render(x=EVIL)
    assert "<script" not in page
    assert "{{ 7 * 7 }}" in page
    assert "\\u202e\\ud800\\x00</a>" in page
