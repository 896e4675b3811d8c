"""Photographs to shards, with Ray: every layout, bad input, and going on after an interruption."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.data import images, shards
from leafnet.data.shards import ShardIndex
from leafnet.preparation import sources
from leafnet.preparation.settings import PrepareSettings
from tests.conftest import write_deadly_decoder

JOB = Path(__file__).parents[2] / "jobs" / "prepare.py"


def encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int) -> Image.Image:
    """64 x 48, blotches; perceptual hashes of two of them are far apart."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    return Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC)


def photograph(seed: int, quality: int = 90) -> bytes:
    return encode(picture(seed), "JPEG", quality=quality)


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def folders(root: Path, *, per_class: int = 20, classes: str = "ab") -> dict[str, bytes]:
    """The files of class folders below `root`, written there."""
    files = {
        f"{name}/{i:03d}.jpg": photograph(1000 * c + i)
        for c, name in enumerate(classes)
        for i in range(per_class)
    }
    write_files(root, files)
    return files


def run(source: Path | str, out: Path | str, **settings: Any) -> ShardIndex:
    from leafnet.preparation import prepare

    prepare.run(
        PrepareSettings(source=str(source), out=str(out), **settings), sources.look(str(source))
    )
    return shards.read_index(str(out))


def refused(source: Path, out: Path, **settings: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        run(source, out, **settings)
    return caught.value


def examples(index: ShardIndex) -> dict[str, dict[str, Any]]:
    """Every example by its key, read as a user of the shards would."""
    shards.check_sizes(index)
    rows = [
        row
        for shard in index.shards
        for table in shards.row_groups(index.root, shard)
        for row in table.to_pylist()
    ]
    found = {row["key"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def rejected(index: ShardIndex) -> dict[str, str]:
    table = pq.read_table(f"{index.root}/rejected.parquet")
    assert all(table["message"].to_pylist())
    return dict(zip(table["key"].to_pylist(), table["reason"].to_pylist(), strict=True))


def duplicates(index: ShardIndex) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(f"{index.root}/duplicates.parquet").to_pylist()
    return rows


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def prepared(
    local_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Path, dict[str, bytes]]]:
    """A source of two classes, its data set in small shards, and the files. Not to be changed."""
    root = tmp_path_factory.mktemp("prepared")
    files = folders(root / "photos")
    run(root / "photos", root / "shards", row_group=5)
    before = {
        path.name: path.read_bytes() for path in (root / "shards").iterdir() if path.is_file()
    }
    yield root / "photos", root / "shards", files
    after = {path.name: path.read_bytes() for path in (root / "shards").iterdir() if path.is_file()}
    assert after == before


@pytest.fixture
def copied(prepared: tuple[Path, Path, dict[str, bytes]], tmp_path: Path) -> tuple[Path, Path]:
    """The data set of `prepared`, to be changed: source and shards."""
    shutil.copytree(prepared[1], tmp_path / "shards")
    return prepared[0], tmp_path / "shards"


# Layouts


@pytest.mark.ray
def test_class_folders(prepared: tuple[Path, Path, dict[str, bytes]]) -> None:
    _, out, files = prepared
    index = shards.read_index(str(out))
    found = examples(index)
    assert {key: row["image"] for key, row in found.items()} == files
    for key, row in found.items():
        assert row["sha256"] == hashlib.sha256(files[key]).hexdigest()
        assert index.class_names[row["label"]] == key[0]
        assert (row["width"], row["height"]) == (64, 48)
    assert index.counts == {
        "train": {"a": 16, "b": 16},
        "valid": {"a": 2, "b": 2},
        "test": {"a": 2, "b": 2},
    }
    assert [shard.row_groups for shard in index.shards] == [(5,) * 6 + (2,), (4,), (4,)]
    for shard in index.shards:
        tables = list(shards.row_groups(index.root, shard))
        assert {split for table in tables for split in table["split"].to_pylist()} == {shard.split}
    assert rejected(index) == {}
    assert duplicates(index) == []


@pytest.mark.ray
def test_what_lies_there_afterwards(prepared: tuple[Path, Path, dict[str, bytes]]) -> None:
    source, out, _ = prepared
    parts = {f"{split}-00000.parquet" for split in ("train", "valid", "test")}
    assert names(out) == parts | {
        *("index.json", "rejected.parquet", "duplicates.parquet", "prepare.log", "_lock"),
    }
    # Nothing is newer than the index but the log and the lock that is given back.
    later = {"prepare.log", "_lock"}
    newest = max(path.stat().st_mtime_ns for path in out.iterdir() if path.name not in later)
    assert (out / "index.json").stat().st_mtime_ns == newest
    told = json.loads((out / "index.json").read_text())["prepared"]
    assert told["source"] == str(source)
    assert told["settings"]["row_group"] == 5
    assert told["read"] == 40


@pytest.mark.ray
def test_split_folders_by_other_names_and_a_copy_in_two_of_them(
    local_ray: None, tmp_path: Path
) -> None:
    files = {
        f"{split}/{name}/{i}.jpg": photograph(100 * s + 10 * c + i)
        for s, split in enumerate(("Training", "Val", "TEST"))
        for c, name in enumerate(("rust", "healthy"))
        for i in range(4)
    }
    # The same pixels in another file: a PNG of what the JPEG shows.
    shown = images.decode(files["TEST/rust/0.jpg"], 48)
    assert (shown.width, shown.height) == (64, 48)
    with Image.open(io.BytesIO(files["TEST/rust/0.jpg"])) as opened:
        files["Training/rust/copy.png"] = encode(opened, "PNG")
    index = run(write_files(tmp_path / "photos", files), tmp_path / "shards")
    assert index.class_names == ("healthy", "rust")
    assert {split: sum(of.values()) for split, of in index.counts.items()} == {
        "train": 8,
        "valid": 8,
        "test": 8,
    }
    found = examples(index)
    assert set(found) == set(files) - {"Training/rust/copy.png"}
    assert found["Val/rust/2.jpg"]["split"] == "valid"
    (pair,) = duplicates(index)
    assert pair == {
        "kind": "exact",
        "key_a": "TEST/rust/0.jpg",
        "key_b": "Training/rust/copy.png",
        "split_a": "test",
        "split_b": "train",
        "label_a": "rust",
        "label_b": "rust",
        "distance": 0,
        "dropped_a": False,
        "dropped_b": True,
    }


@pytest.mark.ray
def test_parquet_in_the_hugging_face_layout(local_ray: None, tmp_path: Path) -> None:
    feature = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["z", "y"]}}}}
    files: dict[str, bytes] = {}
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for s, (split, count) in enumerate((("train", 9), ("validation", 3), ("test", 3))):
        name = f"data/{split}-00000-of-00001.parquet"
        pictures = [photograph(100 * s + i) for i in range(count)]
        files |= {f"{name}/{i:08d}/p{i}.jpg": data for i, data in enumerate(pictures)}
        rows = [{"bytes": data, "path": f"p{i}.jpg"} for i, data in enumerate(pictures)]
        table = pa.table({"image": rows, "label": [i % 2 for i in range(count)]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
        pq.write_table(table, tmp_path / "hub" / name, row_group_size=4)
    index = run(f"file://{tmp_path}/hub", tmp_path / "shards")
    assert index.class_names == ("y", "z")
    assert index.counts == {
        "train": {"y": 4, "z": 5},
        "valid": {"y": 1, "z": 2},
        "test": {"y": 1, "z": 2},
    }
    found = examples(index)
    assert {key: row["image"] for key, row in found.items()} == files
    assert found["data/train-00000-of-00001.parquet/00000005/p5.jpg"]["label"] == 0


@pytest.mark.ray
def test_webdataset_tars(local_ray: None, tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    (tmp_path / "tars").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / "tars" / f"leaves-{number:03d}.tar", "w") as tar:
            for i in range(15):
                members = {f"{i}.jpg": photograph(100 * number + i), f"{i}.cls": b"%d" % (i % 3)}
                for name, data in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                files[f"leaves-{number:03d}.tar/{i}.jpg"] = members[f"{i}.jpg"]
    (tmp_path / "tars" / "classes.txt").write_text("rust\nscab\nhealthy\n")
    index = run(tmp_path / "tars", tmp_path / "shards", split="60/20/20")
    assert index.class_names == ("healthy", "rust", "scab")
    assert index.counts["train"] == {"healthy": 6, "rust": 6, "scab": 6}
    found = examples(index)
    assert {key: row["image"] for key, row in found.items()} == files
    assert index.class_names[found["leaves-001.tar/4.jpg"]["label"]] == "scab"


@pytest.mark.ray
def test_groups_stay_together_and_shards_have_their_size(local_ray: None, tmp_path: Path) -> None:
    files = {
        f"{name}/plant{plant}_{i}.bmp": encode(picture(1000 * c + 10 * plant + i), "BMP")
        for c, name in enumerate("ab")
        for plant in range(10)
        for i in range(3)
    }
    big = encode(picture(7).resize((640, 480)), "BMP")  # 0.9 MB
    files |= {"a/plant3_big.bmp": big, "b/plant4_big.bmp": big[:-3] + b"xyz"}
    source = write_files(tmp_path / "photos", files)
    index = run(source, tmp_path / "shards", group=r"\w/plant\d", shard_mb=1)
    of_group: dict[str, set[str]] = {}
    for key, row in examples(index).items():
        of_group.setdefault(key.split("_")[0], set()).add(row["split"])
    assert len(of_group) == 20
    assert all(len(splits) == 1 for splits in of_group.values())
    assert len(index.of_split("train")) > 1


# Bad photographs


def bomb() -> bytes:
    """A PNG of 40,000 x 40,000 in 200 kB, complete: rows of zeros compress well."""
    packer = zlib.compressobj(9)
    rows = [packer.compress(bytes(100 * 5001)) for _ in range(400)]  # 1 bit a pixel
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", 40_000, 40_000, 1, 0, 0, 0, 0),
        b"IDAT": b"".join([*rows, packer.flush()]),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks.items()
    )


@pytest.mark.ray
def test_what_cannot_be_read_is_told_and_what_is_only_odd_is_kept(
    local_ray: None, tmp_path: Path
) -> None:
    files = folders(tmp_path / "photos", per_class=4)
    grey = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    frames = [picture(50), picture(51)]
    palette = picture(52).quantize(16)
    odd = {
        "a/cmyk.jpg": encode(picture(53).convert("CMYK"), "JPEG"),
        "a/deep.png": encode(Image.fromarray(grey), "PNG"),
        "a/moving.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "a/holes.png": encode(palette, "PNG", transparency=3),
        "a/no-suffix": photograph(54),
    }
    bad = {
        "b/text.jpg": b"This is not a photograph.\n",
        "b/cut.jpg": photograph(55)[:-400],
        "b/empty.jpg": b"",
        "b/bomb.png": bomb(),
    }
    assert len(bad["b/bomb.png"]) < 300_000
    write_files(tmp_path / "photos", odd | bad)
    index = run(tmp_path / "photos", tmp_path / "shards")
    assert rejected(index) == {
        "b/text.jpg": "not-an-image",
        "b/cut.jpg": "truncated",
        "b/empty.jpg": "empty",
        "b/bomb.png": "too-large",
    }
    found = examples(index)
    assert {key: row["image"] for key, row in found.items()} == files | odd
    for row in found.values():
        assert (row["width"], row["height"]) == (64, 48)
        images.decode(row["image"], 32)


@pytest.mark.ray
def test_a_damaged_tar_and_one_photograph_without_class(local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for number, name in enumerate(("whole.tar", "cut.tar")):
        with tarfile.open(tmp_path / "tars" / name, "w") as tar:
            for i in range(12):
                members = {f"{i}.jpg": photograph(100 * number + i)}
                members |= {f"{i}.cls": b"ab"[i % 2 : i % 2 + 1]} if i != 7 else {}
                for member, data in members.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    cut = tmp_path / "tars" / "cut.tar"
    cut.write_bytes(cut.read_bytes()[:9000])
    index = run(tmp_path / "tars", tmp_path / "shards")
    told = rejected(index)
    assert told["cut.tar"] == "damaged-tar"
    assert told["whole.tar/7.jpg"] == "no-label"
    assert set(told) <= {"cut.tar", "whole.tar/7.jpg", "cut.tar/7.jpg"}
    found = examples(index)
    assert {f"whole.tar/{i}.jpg" for i in range(12) if i != 7} <= set(found)


@pytest.mark.ray
def test_nothing_readable(local_ray: None, tmp_path: Path) -> None:
    source = write_files(tmp_path / "photos", {"a/1.jpg": b"", "b/1.jpg": b"x", "b/2.jpg": b"y"})
    error = refused(source, tmp_path / "shards")
    assert error.reason == "nothing-readable"
    assert "none of the 3 photographs can be used: 1 empty, 2 not-an-image" in str(error)
    assert not (tmp_path / "shards" / "index.json").exists()


# What is at --out already


@pytest.mark.ray
def test_already_prepared(copied: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    source, out = copied
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    run(source, out, row_group=5)
    assert capfd.readouterr().out == f"{out} is already prepared; nothing to do\n"
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.ray
def test_another_data_set_is_not_replaced(copied: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = copied
    error = refused(source, out, row_group=5, seed=3)
    assert error.reason == "out-exists"
    assert "with --seed 0, not 3; give another --out, or --overwrite" in str(error)
    grown = tmp_path / "grown"
    shutil.copytree(source, grown)
    write_files(grown, {"a/more.jpg": photograph(77)})
    assert f"not {grown}; give another" in str(refused(grown, out, row_group=5))


@pytest.mark.ray
def test_a_source_that_has_grown_since(local_ray: None, tmp_path: Path) -> None:
    source, out = tmp_path / "photos", tmp_path / "shards"
    folders(source, per_class=4)
    before = run(source, out)
    (out / "notes.txt").write_text("mine")
    write_files(source, {"a/more.jpg": photograph(77)})
    error = refused(source, out)
    assert error.reason == "out-exists"
    assert "before files at" in str(error)
    assert shards.read_index(str(out)) == before
    index = run(source, out, overwrite=True)
    assert "a/more.jpg" in examples(index)
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "unfinished.json").exists()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("damage", "reason"), [("missing", "shard-missing"), ("longer", "shard-changed")]
)
def test_shards_changed_after_preparation(
    copied: tuple[Path, Path], damage: str, reason: str
) -> None:
    source, out = copied
    shard = out / "valid-00000.parquet"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes() + b"x")
    error = refused(source, out, row_group=5)
    assert error.reason == reason
    assert "--overwrite" in str(error)


@pytest.mark.ray
def test_strangers_files_are_left_alone(
    prepared: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    source = prepared[0]
    (tmp_path / "thesis.tex").write_text("years of work")
    error = refused(source, tmp_path)
    assert error.reason == "out-not-empty"
    assert "thesis.tex" in str(error)
    # A file of the name of ours is not a data set of ours.
    (tmp_path / "index.json").write_text('{"pages": 3}')
    assert refused(source, tmp_path, overwrite=True).reason == "out-not-empty"
    assert refused(source, tmp_path / "thesis.tex").reason == "out-not-empty"
    assert names(tmp_path) == {"thesis.tex", "index.json"}


@pytest.mark.ray
def test_out_and_source_in_each_other(
    prepared: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    source = prepared[0]
    assert refused(source, source / "shards").reason == "out-in-source"
    assert refused(source, source.parent).reason == "out-in-source"
    (tmp_path / "link").symlink_to(source)
    assert refused(source, tmp_path / "link" / "shards").reason == "out-in-source"


@pytest.mark.ray
def test_out_that_cannot_be_written(
    prepared: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    error = refused(prepared[0], tmp_path / "file" / "shards")
    assert error.reason == "cannot-write"
    assert f"cannot write to --out {tmp_path}/file/shards: " in str(error)


@pytest.mark.ray
@pytest.mark.parametrize("stage", ["_write_table", "_write", "_read"])
def test_interrupted_and_run_again(
    prepared: tuple[Path, Path, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    from leafnet.preparation import prepare

    source, out, _ = prepared

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, stage, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "shards", row_group=5)
    assert not names(tmp_path / "shards") & {"index.json", "_staging"}
    with pytest.raises(UserError, match="an interrupted prepare is there"):
        shards.read_index(str(tmp_path / "shards"))
    # What was being written by a process that was killed, and a shard of another plan.
    write_files(
        tmp_path / "shards",
        {
            "train-00000.parquet.0123abcd.tmp": b"half",
            "train-00007.parquet": b"old",
            "_staging/0123456789abcdef/0000000000000000": b"bytes of photographs",
        },
    )
    index = run(source, tmp_path / "shards", row_group=5)
    assert index.fingerprint == shards.read_index(str(out)).fingerprint
    assert names(tmp_path / "shards") == names(out)


# Staging


def staged(folder: Path, files: dict[int, list[bytes]]) -> pa.Table:
    """Photographs in files of staging, as the rows of a shard, from the last to the first."""
    rows = []
    for file, photographs in files.items():
        write_files(folder, {f"{file:016x}": b"".join(photographs)})
        offset = 0
        for data in photographs:
            rows.append(
                {
                    "file": file,
                    "offset": offset,
                    "bytes": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
            )
            offset += len(data)
    return pa.Table.from_pylist(rows[::-1])


def test_photographs_are_gathered_from_staging_in_few_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leafnet.preparation import prepare

    monkeypatch.setattr(prepare, "_REQUEST_BYTES", 250_000)
    draw = np.random.default_rng(0)
    files = {
        file: [draw.bytes(size) for size in sizes]
        for file, sizes in {
            1 << 32: [100, 30_000, 5000, 70_000, 8],
            7: [200_000, 60_000],
            9: [1],
        }.items()
    }
    rows = staged(tmp_path, files)
    read = storage.read_bytes
    requests: list[tuple[int, int, int]] = []

    def counted(url: str, *, start: int, stop: int) -> bytes:
        requests.append((int(url.rsplit("/", 1)[-1], 16), start, stop))
        return read(url, start=start, stop=stop)

    monkeypatch.setattr(storage, "read_bytes", counted)
    # Without the second and the fourth: the one is read over, the other left out.
    wanted = rows.take([0, 1, 2, 3, 5, 7])
    expected = [data for photographs in files.values() for data in photographs][::-1]
    found = prepare._staged(wanted, str(tmp_path))
    assert found == [expected[i] for i in (0, 1, 2, 3, 5, 7)]
    assert sorted(requests) == [
        (7, 0, 200_000),
        (7, 200_000, 260_000),
        (9, 0, 1),
        (1 << 32, 0, 35_100),
        (1 << 32, 105_100, 105_108),
    ]


@pytest.mark.parametrize(
    ("damage", "reason"), [("gone", "out-not-shared"), ("cut", "store-failed")]
)
def test_staging_that_is_not_what_was_written(tmp_path: Path, damage: str, reason: str) -> None:
    from leafnet.preparation import prepare

    rows = staged(tmp_path, {3: [b"one", b"two"]})
    file = tmp_path / f"{3:016x}"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(b"onetw")
    with pytest.raises(UserError, match=f"{3:016x}") as caught:
        prepare._staged(rows, str(tmp_path))
    assert caught.value.reason == reason


# The command


def command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, JOB, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


def check_refused(done: subprocess.CompletedProcess[str], reason: str) -> None:
    """Exit code 2 and one line that tells the reason; no stack trace, and no log of one."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert re.fullmatch(rf"error\[{reason}\]: [^\n]+\n", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("files", "flags", "reason"),
    [
        (None, [], "no-such-folder"),
        ([], [], "empty-folder"),
        (["a/1.jpg"], [], "one-class"),
        (["a/1.jpg", "b/1.jpg"], ["--config", "prepare.yaml"], "unknown-setting"),
        (["a/1.jpg", "b/1.jpg"], ["--split", "50/50"], "bad-value"),
        (["a/1.jpg", "b/1.jpg"], ["--group", "("], "bad-group"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: list[str] | None,
    flags: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prepare.yaml").write_text("sede: 3\n")
    if files is not None:
        Path("photos").mkdir()
        write_files(Path("photos"), dict.fromkeys(files, b"x"))
    done = command("--source", "photos", "--out", "shards", *flags)
    check_refused(done, reason)
    if reason == "unknown-setting":
        assert "sede in prepare.yaml; did you mean seed?" in done.stderr
    assert not Path("shards", "index.json").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    folders(tmp_path / "photos")
    write_files(tmp_path / "photos", {"a/cut.jpg": photograph(99)[:-400], "a/list.csv": b"1,2\n"})
    done = command("--source", tmp_path / "photos", "--out", tmp_path / "shards")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    out = tmp_path / "shards"
    told = done.stdout.splitlines()
    assert told[1] == "passed over 1 other files (1 .csv)"
    assert re.match(r"read         41 of 41 images +[\d.]+ images/s +[\d.]+ s$", told[2])
    assert f"rejected    1 of 41 (1 truncated): {out}/rejected.parquet" in told
    assert "found       41 photographs = 40 kept + 1 rejected + 0 dropped; 1 other files" in told
    assert any(line.startswith("            such as a/cut.jpg: the JPEG file is") for line in told)
    assert ["all", "32", "4", "4"] in [line.split() for line in told]
    assert told[-1] == f"next        python jobs/train.py --shards {out} --name NAME"
    log = (out / "prepare.log").read_text()
    assert "rejected    1 of 41" in log
    assert set(rejected(shards.read_index(str(out)))) == {"a/cut.jpg"}


@pytest.mark.ray
@pytest.mark.slow
def test_a_photograph_that_kills_is_refused_and_a_killed_job_starts_over(
    prepared: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    source, out, marks = tmp_path / "photos", tmp_path / "shards", tmp_path / "marks"
    shutil.copytree(prepared[0], source)
    marks.mkdir()
    write_files(source, {"a/005-deadly.jpg": write_deadly_decoder(tmp_path)})
    environment = {
        "PYTHONPATH": os.pathsep.join([str(JOB.parents[1]), str(tmp_path)]),
        "TMPDIR": str(marks),
        "RAY_TMPDIR": os.environ.get("RAY_TMPDIR", "/tmp"),  # a short path: sockets are below it
    }
    arguments: list[str | Path] = ["--source", source, "--out", out]
    arguments += ["--row_group", "5", "--ray.cpus", "2"]

    process = subprocess.Popen(
        [sys.executable, JOB, *arguments],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not list(out.glob("_staging/*/*")):
            assert process.poll() is None, "it ended before it staged"
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert "index.json" not in names(out)
    (left,) = out.glob("_staging/*")

    done = command(*arguments, **environment)
    assert done.returncode == 0, done.stderr + (out / "prepare.log").read_text()
    assert pq.read_table(out / "rejected.parquet").to_pylist() == [
        {
            "key": "a/005-deadly.jpg",
            "reason": "crashed",
            "message": "the decoder's process died on it (SIGSEGV)",
        }
    ]
    assert f"rejected    1 of 41 (1 crashed): {out}/rejected.parquet" in done.stdout
    index = shards.read_index(str(out))
    assert {key: row["image"] for key, row in examples(index).items()} == prepared[2]
    assert index.fingerprint == shards.read_index(str(prepared[1])).fingerprint
    assert names(out) == names(prepared[1])
    assert {path.name for path in marks.glob("leafnet-*/*")} <= {f"tries-{left.name}"}


CLUSTER_JOB = """
import sys
import ray
from ray.cluster_utils import Cluster
from leafnet.preparation import prepare
from leafnet.preparation import sources
from leafnet.preparation.settings import PrepareSettings

source, out, nodes = sys.argv[1], sys.argv[2], int(sys.argv[3])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
for _ in range(nodes - 1):
    cluster.add_node(num_cpus=1)
assert len(cluster.list_all_nodes()) == nodes
settings = PrepareSettings(source=source, out=out, shard_mb=1, ray={"address": cluster.address})
prepare.run(settings, sources.look(source))
cluster.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_two_nodes_write_the_same_data_set_as_one(local_ray: None, tmp_path: Path) -> None:
    source = tmp_path / "photos"
    draw = np.random.default_rng(0)
    files = {
        f"{name}/{i:03d}.png": encode(
            Image.fromarray(draw.integers(0, 256, (120, 160, 3), np.uint8)), "PNG"
        )
        for name in "abc"
        for i in range(40)
    }
    write_files(source, files | {"a/bad.jpg": b"x"})
    one = run(source, tmp_path / "one", shard_mb=1)
    # A process of its own: this one is connected to the session's Ray.
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER_JOB, source, tmp_path / "two", "2"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    two = shards.read_index(str(tmp_path / "two"))
    assert len(two.shards) > 5
    assert two.shards == one.shards
    assert two.fingerprint == one.fingerprint
    assert len(examples(two)) == 120
