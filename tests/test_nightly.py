import contextlib
import functools
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from leafnet import bundle, config, demo, nightly
from leafnet.config import ScoreSettings
from leafnet.errors import EXIT_TOO_MANY_FAILED, UserError

SCORE = Path(__file__).parent.parent / "jobs" / "score.py"


def leaf(seed: int, size: int = 48) -> Image.Image:
    label = demo.CLASS_NAMES[seed % 3]
    return Image.fromarray(demo.draw_leaf(label, seed=seed, width=size, height=size))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def write_leaves(folder: Path, count: int, first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        (folder / f"leaf_{i:04d}.jpg").write_bytes(encoded(leaf(i), "JPEG"))


def write_bad_files(folder: Path) -> dict[str, str]:
    """Twenty-eight kinds of bad file: name -> slug of the reason."""
    picture = leaf(1)
    whole = {kind: encoded(picture, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "AVIF")}
    damaged = bytearray(whole["PNG"])
    damaged[len(damaged) // 2] ^= 0xFF
    bomb = bytearray(whole["PNG"])
    bomb[16:24] = b"\x00\x01\x00\x00\x00\x01\x00\x00"  # 65,536 x 65,536 pixels in the header
    flt = encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")
    rng = np.random.default_rng(0)
    files = {
        "empty.jpg": (b"", "empty"),
        "zeros.jpg": (bytes(5000), "not-an-image"),
        "text.jpg": (b"Gone for lunch.\n" * 20, "not-an-image"),
        "page.jpg": (b"<!DOCTYPE html><title>404</title>", "not-an-image"),
        "noise.jpg": (b"\x01" + rng.bytes(4000), "not-an-image"),
        "zip.jpg": (b"PK\x03\x04" + bytes(60), "not-an-image"),
        "movie.jpg": (b"\0\0\0\x18ftypmp42" + bytes(60), "not-an-image"),
        "document.jpg": (b"%PDF-1.7\n", "unsupported"),
        "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unsupported"),
        "print.jpg": (b"%!PS-Adobe-3.0\n", "unsupported"),
        "layers.jpg": (b"8BPS\0\x01" + bytes(60), "unsupported"),
        "icon.png": (b"\0\0\x01\0\x01\0" + bytes(60), "unsupported"),
        "grey.jpg": (b"P5 2 2 255\n....", "unsupported"),
        "jpeg2000.jpg": (b"\0\0\0\x0cjP  \r\n\x87\n", "unsupported"),
        "jpegxl.jpg": (b"\xff\x0a" + bytes(60), "unsupported"),
        "float.tif": (flt, "unsupported"),
        "cut.jpg": (whole["JPEG"][: len(whole["JPEG"]) // 2], "truncated"),
        "head.jpg": (whole["JPEG"][:20], "truncated"),
        "cut.png": (whole["PNG"][: len(whole["PNG"]) // 2], "truncated"),
        "cut.gif": (whole["GIF"][: len(whole["GIF"]) // 2], "truncated"),
        "cut.webp": (whole["WEBP"][: len(whole["WEBP"]) // 2], "truncated"),
        "cut.bmp": (whole["BMP"][: len(whole["BMP"]) // 2], "truncated"),
        "cut.avif": (whole["AVIF"][: len(whole["AVIF"]) // 2], "truncated"),
        "damaged.png": (bytes(damaged), "corrupt"),
        "bomb.png": (bytes(bomb), "corrupt"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    with open(folder / "huge.jpg", "wb") as file:
        file.truncate(600_000_000)  # takes no room on the disk
    os.mkfifo(folder / "pipe.jpg")
    (folder / "link.jpg").symlink_to(folder / "nowhere.jpg")
    Path(os.fsdecode(bytes(folder) + b"/n\xe4me.jpg")).write_bytes(whole["JPEG"])
    more = {
        "huge.jpg": "too-many-bytes",
        "pipe.jpg": "not-a-file",
        "link.jpg": "not-found",
        "n\\udce4me.jpg": "bad-name",
    }
    return {name: reason for name, (_, reason) in files.items()} | more


def settings(model: str, images: Path, out: Path, **changes: Any) -> ScoreSettings:
    values = {"model": model, "images": str(images), "out": str(out), "batch_size": 8} | changes
    return config.validate(ScoreSettings, values)


def tree(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.mark.ray
@pytest.mark.slow
def test_a_night_with_every_kind_of_bad_file(
    local_ray: None, random_model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "in", tmp_path / "out"
    bad = write_bad_files(images / "bad")
    write_leaves(images, 12)
    (images / "notes.txt").write_text("three plants")
    made = functools.partial(settings, random_model, images, out)
    with pytest.raises(UserError, match="29 of 41 photographs failed") as caught:
        nightly.run(made(date="2026-11-24", precision="float32"))
    assert caught.value.exit_code == EXIT_TOO_MANY_FAILED
    said = capfd.readouterr().out
    assert "listed    41 = 0 already done + 12 ok + 0 review + 29 failed" in said
    assert "passed over 1 other files (1 .txt)" in said

    frame = pd.read_parquet(out).set_index("image")
    assert len(frame) == 41
    assert frame.index.is_unique
    reasons = {name: frame.loc[str(images / "bad" / name)].reason for name in bad}
    assert {name: reason.split(":")[0] for name, reason in reasons.items()} == bad
    leaves = sorted(images.glob("*.jpg"))
    expected = bundle.load(random_model).predict(
        [path.read_bytes() for path in leaves], precision="float32"
    )
    for path, prediction in zip(leaves, expected, strict=True):
        row = frame.loc[str(path)]
        assert (row.status, row.label) == ("ok", prediction.label)
        assert row.confidence == pytest.approx(prediction.confidence, abs=1e-5)
        assert row.probabilities == pytest.approx(prediction.probabilities, abs=1e-5)
        assert (row.width, row.height) == (48, 48)
    (summary_path,) = (out / "_runs").glob("*.json")
    summary = json.loads(summary_path.read_text())
    assert summary["status"] == {"ok": 12, "review": 0, "failed": 29}
    assert summary["reasons"]["truncated"] == 7
    assert sum(summary["labels"].values()) == 12
    assert {path.name for path in out.iterdir()} == {"date=2026-11-24", "_runs"}

    before = tree(out)
    nightly.run(made(date="2026-11-24"))
    assert "nothing new" in capfd.readouterr().out
    assert tree(out) == before

    # The next night: one that was not there has come, one is new, one was replaced.
    write_leaves(images / "bad", 1)
    (images / "bad" / "leaf_0000.jpg").rename(images / "bad" / "nowhere.jpg")
    write_leaves(images, 1, first=12)
    leaves[0].write_bytes(leaves[1].read_bytes())
    nightly.run(made(date="2026-11-25"))
    assert "4 to score, of them" not in capfd.readouterr().out  # its version is new, no retry
    later = pd.read_parquet(out / "date=2026-11-25")
    assert sorted(path.rsplit("/", 1)[1] for path in later.image) == [
        *("leaf_0000.jpg", "leaf_0012.jpg", "link.jpg", "nowhere.jpg"),
    ]
    assert {path: data for path, data in tree(out).items() if path in before} == before


class Job:
    """jobs/score.py in a process group of its own, with a Ray of its own."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._mark = uuid.uuid4().hex
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")},
            "LEAFNET_TEST_JOB": self._mark,
            "PYTHONPATH": str(SCORE.parent.parent),
        }
        with open(log, "ab") as said:
            self.process = subprocess.Popen(
                [sys.executable, str(SCORE), *arguments],
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def pids(self) -> dict[int, str]:
        """Its processes, those of its Ray too: pid -> command."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if f"LEAFNET_TEST_JOB={self._mark}".encode() in (path / "environ").read_bytes():
                    command = (path / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(path.name)] = command.decode(errors="replace")
            except OSError:  # gone meanwhile
                continue
        return found

    def end(self) -> None:
        for pid in self.pids():
            _kill(pid)
        self.process.wait()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for job in started:
        job.end()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_ten_random_moments(random_model: str, tmp_path: Path, jobs: list[Job]) -> None:
    images, out, log = tmp_path / "in", tmp_path / "out", tmp_path / "log"
    write_leaves(images, 160)
    arguments = [
        *("--model", random_model, "--images", str(images), "--out", str(out)),
        *("--date", "2026-11-24", "--batch_size", "4", "--keep_every", "0", "--ray.cpus", "2"),
    ]
    generator = random.Random(20261124)
    finished_parts = 0
    began = time.monotonic()
    life = 15.0
    for i in range(10):
        job = Job(arguments, log)
        jobs.append(job)
        # Half of the kills come once rows are kept, when there is something to lose.
        deadline = time.monotonic() + 60
        while i % 2 and job.process.poll() is None and time.monotonic() < deadline:
            if len(list(out.glob("_staging/*/part-*"))) > finished_parts:
                break
            time.sleep(0.02)
        try:
            job.process.wait(generator.uniform(0, 0.5 if i % 2 else life))
        except subprocess.TimeoutExpired:
            workers = [pid for pid, command in job.pids().items() if "ray::" in command]
            if i % 3 == 2 and workers:
                _kill(generator.choice(workers))
                try:
                    job.process.wait(generator.uniform(0, 3))
                except subprocess.TimeoutExpired:
                    os.killpg(job.process.pid, signal.SIGKILL)
            else:
                os.killpg(job.process.pid, signal.SIGKILL)
        job.end()
        parts = len(list(out.glob("_staging/*/part-*")))
        finished_parts = max(finished_parts, parts)
    assert time.monotonic() - began > 0
    job = Job(arguments, log)
    jobs.append(job)
    assert job.process.wait(240) == 0, log.read_text()
    frame = pd.read_parquet(out)
    assert len(frame) == 160
    assert frame.image.is_unique
    assert set(frame.status) == {"ok"}
    assert "finished when" in log.read_text()
    assert {path.name for path in out.iterdir()} == {"date=2026-11-24", "_runs"}
    assert len(list(out.glob("_runs/*.json"))) == 1
