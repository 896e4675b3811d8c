import os

from leafnet.core import hardware


def test_what_this_machine_is() -> None:
    here = hardware.look()
    assert 0 < here.memory_free <= here.memory
    assert 0 < here.disk_free <= here.disk
    assert os.path.isdir(here.folder)
    assert 1 <= here.cores <= (os.cpu_count() or 1)
    assert here.processor
    assert here.versions["ray"].startswith("2.")
    assert hardware.versions(["no-such-thing-at-all"]) == {"no-such-thing-at-all": ""}


def test_nodes_that_differ() -> None:
    same = {"python": "3.11.7", "keras": "3.15.1", "ray": "2.60.0"}
    assert hardware.differing({"a": same, "b": same}) == []
    other = same | {"keras": "", "ray": "2.59.0"}
    assert hardware.differing({"a": same, "b": other, "c": same}) == [
        "keras is 3.15.1 on a, c and not installed on b",
        "ray is 2.59.0 on b and 2.60.0 on a, c",
    ]
