"""The demo as a person starts it: its drawn leaves are learnt, and its night mostly settled."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_learns_its_drawn_leaves_and_settles_most_of_its_night(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs/demo.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = "The photographs are drawn and the weights of the ResNet50 are random"
    # At the beginning, at the end and in the two commands; and on the pages.
    assert done.stdout.count(told) == 4
    for page in ("runs/demo/report.html", "predictions/_reports/latest.html"):
        assert told in (tmp_path / page).read_text().partition("<nav")[0]

    metrics = json.loads((tmp_path / "runs/demo/metrics.json").read_text())
    assert metrics["test"]["examples"] >= 60
    assert metrics["test"]["accuracy"] > 0.9

    (night,) = (tmp_path / "predictions").glob("date=*/*.parquet")
    # Read as a file: in a folder date=... pyarrow would add a column.
    rows = {
        Path(row["image"]).relative_to(tmp_path / "drawn_night").as_posix(): row
        for row in pq.ParquetFile(night).read().to_pylist()
    }
    assert len(rows) == 3 * 12 + 5
    failed = [name for name, row in rows.items() if row["status"] == "failed"]
    assert failed == ["odd/broken.jpg"]
    assert rows["odd/broken.jpg"]["reason"].startswith("truncated")
    for name in ("odd/covered_lens.jpg", "odd/no_leaf.jpg"):
        assert rows[name]["status"] == "review"
        assert rows[name]["reason"].startswith("unlike-training")
    leaves = {name: row for name, row in rows.items() if not name.startswith("odd/")}
    settled = {name: row for name, row in leaves.items() if row["status"] == "ok"}
    assert len(settled) > 0.8 * len(leaves)
    right = [row["label"] == name.split("/")[0] for name, row in settled.items()]
    assert sum(right) > 0.9 * len(right)
