"""The simulation behind cluster/SCALING.md, at sizes that take no time."""

from tests.benchmarks import planning


def test_index_and_plan_grow_with_the_shards() -> None:
    written, read, planned = planning.index(64_000)
    assert written.number == read.number == 100  # shards of 64 MB
    assert planned.number == 2 * 300  # row groups: plain views, and seven others
    assert 250 < written.size / written.number < 500  # bytes a shard


def test_parts_check_their_own_results() -> None:
    assert planning.order(1000)[0].size == 8 * 1000
    assert planning.decisions(3000)[0].number == 3000
    assert [result.number for result in planning.night(3000)] == [3000, 300]


def test_a_part_runs_in_its_own_process() -> None:
    results, peak = planning.measured("order", 2_000_000)
    assert results[0].number == 2_000_000
    assert 15 < peak < 500  # 16 MB of order, and not what this process has imported
