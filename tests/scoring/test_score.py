import contextlib
import datetime
import functools
import io
import json
import os
import pickle
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
import pyarrow as pa
import pytest
from PIL import Image

from leafnet.core import lock, storage, terminal
from leafnet.core.errors import EXIT_IN_USE, EXIT_TOO_MANY_FAILED, UserError
from leafnet.core.settings import parse, validate
from leafnet.data import synthetic
from leafnet.data.images import decode
from leafnet.metrics.scores import softmax
from leafnet.metrics.thresholds import REVIEW_ALL, Review
from leafnet.models import bundle, tta
from leafnet.reporting import pages
from leafnet.scoring import explain as scoring_explain
from leafnet.scoring import listing, pipeline, reading, score, thumbnails
from leafnet.scoring import rows as scoring_rows
from leafnet.scoring.settings import ScoreSettings
from leafnet.scoring.staging import Staging, publish, staging_root, start_staging
from tests.conftest import (
    make_bucket,
    publish_random_model,
    use_server,
    write_deadly_decoder,
)
from tests.support.markup import check
from tests.support.s3_server import Proxy, Server

COUNT = 800  # photographs of the job that is killed
KEPT = ("_lock", "_runs", "_reports")  # beside the predictions
ALL_OF_THEM = Review(REVIEW_ALL, precision_target=0.95, novelty=1.0)  # for review
SCORE = Path(__file__).parents[2] / "jobs" / "score.py"


def leaf(seed: int, size: int = 48) -> Image.Image:
    label = synthetic.CLASS_NAMES[seed % 3]
    return Image.fromarray(synthetic.draw_leaf(label, seed=seed, width=size, height=size))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def write_leaves(folder: Path, count: int, first: int = 0) -> None:
    """Leaves by number; after forty, the same pictures come again."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [encoded(leaf(i % 40), "JPEG") for i in range(first, first + min(count, 40))]
    for i in range(count):
        (folder / f"leaf_{first + i:04d}.jpg").write_bytes(pictures[i % len(pictures)])


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
    return validate(ScoreSettings, values)


def tree(out: Path) -> dict[str, bytes]:
    files = [p for p in out.rglob("*") if p.is_file() and p.parent.name != "_lock"]
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


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
        score.run(made(date="2026-11-24", precision="float32"))
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
    assert {path.name for path in out.iterdir()} == {"date=2026-11-24", *KEPT}

    page = check((out / "_reports" / "2026-11-24.html").read_bytes())
    assert (
        "41 photographs: 12 are settled, 0 are for a person to review, and 29 failed" in page.text
    )
    for name in bad:
        assert f"bad/{pages.name(name)}" in page.text

    before = tree(out)
    score.run(made(date="2026-11-24"))
    assert "nothing new" in capfd.readouterr().out
    assert tree(out) == before

    # The next night: one that was not there has come, one is new, one was replaced.
    write_leaves(images / "bad", 1)
    (images / "bad" / "leaf_0000.jpg").rename(images / "bad" / "nowhere.jpg")
    write_leaves(images, 1, first=12)
    leaves[0].write_bytes(leaves[1].read_bytes())
    score.run(made(date="2026-11-25"))
    assert "4 to score, of them" not in capfd.readouterr().out  # its version is new, no retry
    later = pd.read_parquet(out / "date=2026-11-25")
    assert sorted(path.rsplit("/", 1)[1] for path in later.image) == [
        *("leaf_0000.jpg", "leaf_0012.jpg", "link.jpg", "nowhere.jpg"),
    ]
    del before["_reports/latest.html"]
    assert {path: data for path, data in tree(out).items() if path in before} == before


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 1000])
def test_spans_cover_the_list_once(rows: int) -> None:
    listed = pa.table({"row": pa.nulls(rows, pa.int32()), "version": ["v"] * rows})
    spans = [s.to_pylist()[0] for s in pipeline._spans(listed, 32, decoders=2)]
    covered = [i for span in spans for i in range(span["start"], span["stop"])]
    assert covered == list(range(rows))


def test_spans_end_with_their_shard() -> None:
    listed = pa.table(
        {"row": pa.array([0, 5, 9, 0, 3], pa.int32()), "version": ["a", "a", "a", "b", "b"]}
    )
    spans = [s.to_pylist()[0] for s in pipeline._spans(listed, 32, decoders=2)]
    assert spans == [{"start": 0, "stop": 3}, {"start": 3, "stop": 5}]


def stage(
    model: str,
    images: Path,
    out: Path,
    count: int,
    *,
    review: Review | None = None,
    explain: bool = False,
) -> Staging:
    """What a job leaves that finished its first `count` photographs and was killed."""
    loaded = bundle.load(model)
    root = staging_root(str(out), model_id=loaded.model_id, images=str(images))
    staging = start_staging(root, date="2026-11-24", number=1, found=None)
    listed = listing.look(str(images)).photographs
    photographs = listed.slice(0, count).select(["image", "version"])
    for name in reading.PHOTOGRAPH.names:
        if name not in photographs.column_names:
            value = 48 if name in ("width", "height") else None
            column = pa.array([value] * count, reading.PHOTOGRAPH.field(name).type)
            photographs = photographs.append_column(name, column)
    rows = scoring_rows.rows(
        photographs,
        np.zeros((count, 3), np.float32),
        None,
        output=scoring_rows.schema(loaded.class_names),
        class_names=loaded.class_names,
        review=review,
        model_id=loaded.model_id,
        run_id=staging.run_id,
    )
    pixels = np.zeros((count, 32, 32, 3), np.uint8)
    staging.add(thumbnails.Maker(seen=explain).attach(rows, pixels, np.arange(count)))
    return staging


def test_a_job_killed_before_it_published_only_publishes(random_model: str, tmp_path: Path) -> None:
    images, out = tmp_path / "in", tmp_path / "out"
    write_leaves(images, 3)
    staging = stage(random_model, images, out, 3)
    score.run(settings(random_model, images, out, date="2026-11-25"))
    (path,) = out.glob("date=2026-11-25/*.parquet")
    assert path.stem == staging.run_id
    assert len(pd.read_parquet(out)) == 3
    assert {p.name for p in out.iterdir()} == {"date=2026-11-25", *KEPT}


def test_a_job_killed_after_it_published_is_completed(random_model: str, tmp_path: Path) -> None:
    images, out = tmp_path / "in", tmp_path / "out"
    write_leaves(images, 3)
    staging = stage(random_model, images, out, 3, review=ALL_OF_THEM)
    summary = {
        "run_id": staging.run_id,
        "published": "there",
        "scored": 100,
        "status": {"ok": 90, "review": 0, "failed": 10},
    }
    staging.keep_summary(summary)
    schema = scoring_rows.schema(synthetic.CLASS_NAMES, model_id=bundle.load(random_model).model_id)
    publish(staging, str(out), schema=schema, check=lambda counts: None)
    with pytest.raises(UserError, match="10 of 100 photographs failed"):
        score.run(settings(random_model, images, out, date="2026-11-25"))
    assert json.loads((out / "_runs" / f"{staging.run_id}.json").read_text()) == summary
    assert len(pd.read_parquet(out)) == 3
    assert {p.name for p in out.iterdir()} == {"date=2026-11-24", *KEPT}
    page = check((out / "_reports" / "2026-11-24.html").read_bytes())
    assert len(page.all("img")) == 3
    before = tree(out)
    score.run(settings(random_model, images, out, date="2026-11-25"))
    assert tree(out) == before


@pytest.mark.parametrize("left", [("run.json", "summary.json"), ("run.json",)])
def test_a_job_killed_while_it_tidied_up_is_completed(
    left: tuple[str, ...], random_model: str, tmp_path: Path
) -> None:
    """The night and its summary are there, and of the staging only a part: no report yet."""
    images, out = tmp_path / "in", tmp_path / "out"
    write_leaves(images, 3)
    staging = stage(random_model, images, out, 3)
    score.run(settings(random_model, images, out, date="2026-11-24"))
    before = tree(out)
    for file in (out / "_reports").iterdir():
        file.unlink()
    staging = start_staging(staging.root, date="2026-11-24", number=2, found=staging)
    staging.keep_summary({"run_id": staging.run_id})
    for file in Path(staging.root).iterdir():
        if file.name not in left:
            file.unlink()
    score.run(settings(random_model, images, out, date="2026-11-24"))
    after = tree(out)
    assert after.keys() == before.keys()
    assert [after[name] for name in after if "report" not in name] == [
        before[name] for name in after if "report" not in name
    ]


@pytest.mark.ray
def test_a_killed_job_that_goes_on_explains_what_it_did_before_as_well(
    local_ray: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every photograph is for review: three are scored before the kill, two after it."""
    images, out, model = tmp_path / "in", tmp_path / "out", str(tmp_path / "model")
    publish_random_model(model, ALL_OF_THEM)
    write_leaves(images, 5)
    stage(model, images, out, 3, review=ALL_OF_THEM, explain=True)
    score.run(settings(model, images, out, date="2026-11-24", explain=True))
    said = capfd.readouterr().out
    assert "goes on   3 photographs were finished" in said
    assert "activation maps of 5 photographs for review" in said
    frame = pd.read_parquet(out)
    assert frame.columns.tolist() == [*scoring_rows.schema(()).names, "date"]
    page = check((out / "_reports" / "2026-11-24.html").read_bytes())
    alts = {str(image["alt"]) for image in page.all("img")}
    assert alts == {
        text
        for row in frame.itertuples()
        for name in [Path(str(row.image)).name]
        for text in (f"Photograph {name}", f"Where the model sees {row.label} in {name}")
    }
    assert {path.name for path in out.iterdir()} == {"date=2026-11-24", *KEPT}


@pytest.mark.ray
def test_maps_that_fail_do_not_cost_the_night(
    local_ray: None,
    random_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    images, out = tmp_path / "in", tmp_path / "out"
    write_leaves(images, 3)
    stage(random_model, images, out, 3, review=ALL_OF_THEM, explain=True)

    def full(*arguments: Any) -> None:
        raise MemoryError("no room for another network")

    monkeypatch.setattr(scoring_explain, "run", full)
    score.run(settings(random_model, images, out, date="2026-11-24", explain=True))
    said = capfd.readouterr().out
    assert "no activation maps (MemoryError: no room for another network)" in said
    page = check((out / "_reports" / "2026-11-24.html").read_bytes())
    assert [image["alt"] for image in page.all("img")] == [
        f"Photograph leaf_000{i}.jpg" for i in range(3)
    ]


def test_nothing_is_published_that_does_not_add_up(
    random_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = tmp_path / "in", tmp_path / "out"
    write_leaves(images, 3)
    stage(random_model, images, out, 2)
    monkeypatch.setattr(score, "_score", lambda *arguments: {})  # a pipeline that loses one
    with pytest.raises(RuntimeError, match="listed 3 photographs, but 0 were done and there are 2"):
        score.run(settings(random_model, images, out))
    assert list(out.rglob("*.parquet")) == []


def test_two_jobs_for_one_output(random_model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_leaves(tmp_path / "in", 1)
    with lock.hold(str(out), timeout_s=60):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}") as caught:
            score.run(settings(random_model, tmp_path / "in", out))
        assert caught.value.exit_code == EXIT_IN_USE


def test_an_empty_night(random_model: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    score.run(settings(random_model, tmp_path / "in", tmp_path / "out"))
    assert tree(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"out": "in/predictions"}, "out-in-images"),
        ({"model": "nowhere"}, "no-model"),
        ({"images": "nowhere"}, "no-images"),
    ],
)
def test_what_is_refused(
    changes: dict[str, str], reason: str, random_model: str, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    values = {"model": random_model, "images": "in", "out": "out"} | changes
    made = settings(
        values["model"] if values["model"] == random_model else str(tmp_path / values["model"]),
        tmp_path / values["images"],
        tmp_path / values["out"],
    )
    with pytest.raises(UserError) as caught:
        score.run(made)
    assert caught.value.reason == reason


def test_settings_as_people_write_them() -> None:
    words = ["--model", "m", "--images=a-b", "--out", "o", "--max-failed", "7.5%", "--retries=0"]
    made = parse(ScoreSettings, words, prog="p", description="d")
    assert (made.images, made.max_failed, made.retries) == ("a-b", 7.5, 0)
    night = datetime.date(2026, 11, 24)  # as YAML reads it
    assert settings("m", Path("in"), Path("out"), date=night).date == "2026-11-24"


@pytest.mark.parametrize("views", [1, 4, 8])
def test_scored_by_the_mean_over_views(random_model: str, tmp_path: Path, views: int) -> None:
    """An actor on a stack of four photographs, without Ray."""
    write_leaves(tmp_path, 4)
    listed = listing.look(str(tmp_path)).photographs
    chosen = listed.append_column("place", pa.array(np.arange(4)))
    model = bundle.load(random_model)
    made = settings(random_model, tmp_path, tmp_path / "out", tta=str(views))
    job = pipeline.Job(
        image_size=32, stack=4, max_pixels=10**6, batch_size=4, precision="float32",
        engine="openvino",
        model_id="m", run_id="r", start="s", class_names=model.class_names, views=made.tta,
    )  # fmt: skip
    (stack,) = pipeline._decode(pa.table({"start": [0], "stop": [4]}), chosen=chosen, job=job)
    network = pipeline._Network(model, job, threads=2, gpu=False)
    rows = pipeline._from_ipc(network(stack)["rows"][0].as_py()).to_pylist()
    pixels = np.stack([decode(Path(row["image"]).read_bytes(), 32).pixels for row in rows])
    outputs = tta.run(network._engine.features, model.head, pixels, views=views)
    found = [list(row["probabilities"].values()) for row in rows]
    np.testing.assert_allclose(found, softmax(outputs.logits), atol=1e-5)
    assert (np.abs(softmax(outputs.plain) - found).max() > 1e-4) == (views > 1)


@pytest.mark.parametrize("date", ["2026-11-31", "20261124", "tonight", "24.11.2026"])
def test_a_date_that_is_none(date: str) -> None:
    with pytest.raises(UserError, match="--date cannot be"):
        settings("m", Path("in"), Path("out"), date=date)


def test_a_job_ends_with_the_code_of_its_error() -> None:
    def job(argv: Any) -> None:
        raise pickle.loads(pickle.dumps(UserError("r", "m", exit_code=EXIT_TOO_MANY_FAILED)))

    assert terminal.run_job(job, []) == EXIT_TOO_MANY_FAILED


class Job:
    """jobs/score.py in a process group of its own, with a Ray of its own."""

    def __init__(self, arguments: list[str], log: Path, **environment: str) -> None:
        self._mark = uuid.uuid4().hex
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")},
            "LEAFNET_TEST_JOB": self._mark,
            "PYTHONPATH": str(SCORE.parent.parent),
            **environment,
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
@pytest.mark.timeout(1800)
def test_killed_at_ten_random_moments(tmp_path: Path, jobs: list[Job]) -> None:
    """Every photograph is for review, so that each row has a thumbnail to lose."""
    images, out, log = tmp_path / "in", tmp_path / "out", tmp_path / "log"
    model = str(tmp_path / "model")
    publish_random_model(model, ALL_OF_THEM)
    write_leaves(images, COUNT)
    arguments = [
        *("--model", model, "--images", str(images), "--out", str(out)),
        *("--date", "2026-11-24", "--batch-size", "2", "--keep-every", "0", "--ray.cpus", "2"),
    ]
    generator = random.Random(20261124)
    finished: dict[str, Any] = {}  # image -> when it was scored
    halfway = 0
    life = 0.0  # seconds from the start to the first rows
    for i in range(10):
        parts = len(list(out.glob("_staging/*/part-*")))
        job, began = Job(arguments, log), time.monotonic()
        jobs.append(job)
        # Half of the kills come before the job keeps rows, the others just after, when there is
        # something to lose; none so late that the following find nothing to do.
        moment = began + (generator.uniform(0, life) if i % 2 else 300)
        while len(list(out.glob("_staging/*/part-*"))) <= parts and job.process.poll() is None:
            if time.monotonic() > moment:
                assert i % 2, log.read_text()
                break
            time.sleep(0.01)
        if i % 2 == 0:
            life = min(life or 300, time.monotonic() - began)
            time.sleep(generator.uniform(0, 0.3))
        workers = [pid for pid, command in job.pids().items() if "ray::" in command]
        if i % 3 == 2 and workers:
            _kill(generator.choice(workers))
            time.sleep(generator.uniform(0, 1))
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)
        job.end()
        staged = [p for p in out.glob("_staging/*/part-*") if "." not in p.name]
        for path in staged:
            rows = pd.read_parquet(path)
            finished |= dict(zip(rows.image, rows.scored_at, strict=True))
        halfway += bool(staged) and len(finished) < COUNT
    assert halfway, "no kill came between the first rows and the last"
    job = Job(arguments, log)
    jobs.append(job)
    assert job.process.wait(300) == 0, log.read_text()
    frame = pd.read_parquet(out)
    assert len(frame) == COUNT
    assert frame.image.is_unique
    assert set(frame.status) == {"review"}
    scored_at = dict(zip(frame.image, frame.scored_at, strict=True))
    assert {image: scored_at[image] for image in finished} == finished  # and not done again
    assert {path.name for path in out.iterdir()} == {"date=2026-11-24", *KEPT}
    assert len(list(out.glob("_runs/*.json"))) == 1
    page = check((out / "_reports" / "latest.html").read_bytes())
    assert len(page.all("img")) == thumbnails.LIMIT
    assert f"The {thumbnails.LIMIT} of {COUNT} photographs that need it most" in page.text


class Outage(Proxy):
    """A store that is away for all photographs but the first few, until it is back."""

    PASSED = 150

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.away, self._read = True, 0

    def _fault(self, request: bytes) -> str | None:
        self._read += request.startswith(b"GET /") and b".jpg" in request.split(b"\r\n", 1)[0]
        return "503" if self.away and self._read > self.PASSED else None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_store_that_goes_away_and_a_photograph_that_kills(
    random_model: str,
    tmp_path: Path,
    jobs: list[Job],
    moto: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The night ends unpublished with one line; the next start goes on, past the deadly one."""
    deadly = write_deadly_decoder(tmp_path)
    use_server(monkeypatch, moto.environment())
    images, out, said = make_bucket("night-outage"), tmp_path / "out", tmp_path / "said"
    for i in range(200):
        storage.write_bytes(f"{images}/{i:03d}.jpg", encoded(leaf(i % 20), "JPEG"))
    storage.write_bytes(f"{images}/100.jpg", deadly)
    storage._filesystem.cache_clear()
    proxy = Outage(moto.endpoint)
    arguments = [
        *("--model", random_model, "--images", images, "--out", str(out), "--date", "2026-11-24"),
        *("--batch-size", "2", "--keep-every", "0", "--ray.cpus", "2"),
    ]
    with proxy.running() as endpoint:
        environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_MAX_ATTEMPTS": "1",
            "PYTHONPATH": f"{SCORE.parent.parent}:{tmp_path}",
        }
        jobs.append(Job(arguments, said, **environment))
        assert jobs[-1].process.wait(200) == 2, said.read_text()
        last = said.read_text().splitlines()[-1]
        assert last.startswith("error[store-failed]: s3://night-outage/"), said.read_text()
        assert list(out.rglob("*.parquet")) == []
        (log,) = out.glob("_runs/*.log")
        assert "INFO leafnet: tonight" not in log.read_text()  # from the work on
        assert "INFO leafnet: device" in log.read_text()
        kept = sum(len(pd.read_parquet(path)) for path in out.glob("_staging/*/part-*"))
        assert 0 < kept <= Outage.PASSED

        proxy.away = False
        jobs.append(Job(arguments, said, **environment))
        assert jobs[-1].process.wait(200) == 0, said.read_text()
    assert f"goes on   {kept:,} photographs were finished" in said.read_text()
    frame = pd.read_parquet(out).set_index("image")
    assert len(frame) == 200
    assert frame.index.is_unique
    failed = frame[frame.status == "failed"]
    assert list(failed.index) == [f"{images}/100.jpg"]
    assert failed.reason.iloc[0] == "crashed: the decoder's process died on it (SIGSEGV)"
    assert [path.suffix for path in sorted(out.glob("_runs/*"))] == [".json", ".log"]
