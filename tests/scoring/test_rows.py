import io
import os
import time
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import leafnet
from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.data import shards, synthetic
from leafnet.data.images import DECODER_VERSION
from leafnet.metrics.thresholds import Review
from leafnet.scoring import listing, reading
from leafnet.scoring import rows as scoring_rows
from leafnet.scoring.reading import Decoded
from tests.conftest import leaf_jpeg, make_bucket, use_server
from tests.support.s3_server import Server, free_port

CLASSES = ("healthy", "late blight", "rust")


def jpeg(seed: int = 0, size: tuple[int, int] = (64, 48)) -> bytes:
    pixels = synthetic.draw_leaf("healthy", seed=seed, width=size[0], height=size[1])
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2026:11:24 08:15:30"
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 30.0, 0.0), 3: "W", 4: (13.0, 15.0, 0.0)})
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", exif=exif)
    return sink.getvalue()


def numbered(rows: list[dict[str, Any]]) -> pa.Table:
    full = [{"version": "1", "size": None, "row": None} | row for row in rows]
    table = pa.Table.from_pylist(full, listing.SCHEMA)
    return table.append_column("place", pa.array(range(10, 10 + len(rows))))


def decode(table: pa.Table, batch_size: int = 4) -> list[Decoded]:
    return list(
        reading.decode_photographs(
            table, image_size=32, batch_size=batch_size, max_pixels=1_000_000
        )
    )


def made_rows(
    reasons: list[str | None],
    logits: Any,
    novelty: Any = None,
    review: Review | None = None,
) -> list[dict[str, Any]]:
    photographs = pa.Table.from_pylist(
        [{"place": i, "image": f"{i}.jpg", "reason": r} for i, r in enumerate(reasons)],
        reading.PHOTOGRAPH,
    )
    table = scoring_rows.rows(
        photographs,
        np.array(logits, np.float32).reshape(-1, 3),
        None if novelty is None else np.array(novelty, np.float32),
        output=scoring_rows.schema(CLASSES, model_id="m", run_id="r"),
        class_names=CLASSES,
        review=review,
        model_id="m",
        run_id="r",
    )
    table.validate(full=True)
    found: list[dict[str, Any]] = table.to_pylist()
    return found


@pytest.mark.parametrize("remote", [False, True])
def test_photographs_are_decoded_in_stacks_and_failed_ones_take_no_place(
    tmp_path: Path, remote: bool
) -> None:
    root = f"memory://{tmp_path.name}" if remote else str(tmp_path)
    rows = []
    for i in range(11):
        url = storage.join(root, f"{i:02d}.jpg")
        if i != 3:
            storage.write_bytes(url, b"no" if i == 5 else jpeg(seed=i))
        rows.append({"image": url})
    stacks = decode(numbered(rows))
    assert [stack.pixels.shape for stack in stacks] == [
        (4, 32, 32, 3),
        (4, 32, 32, 3),
        (1, 32, 32, 3),
    ]
    table = pa.concat_tables([stack.photographs for stack in stacks])
    assert table["place"].to_pylist() == list(range(10, 21))
    reasons = table["reason"].to_pylist()
    assert reasons[3] == "not-found: it is not there"
    assert reasons[5].startswith("not-an-image: ")
    assert table["reason"].null_count == 9
    row = table.to_pylist()[0]
    assert (row["width"], row["height"]) == (64, 48)
    assert row["captured_at"] == datetime(2026, 11, 24, 8, 15, 30)
    assert (row["latitude"], row["longitude"]) == (52.5, -13.25)
    pixels = np.concatenate([stack.pixels for stack in stacks])
    alone = decode(numbered([rows[6]]))[0].pixels[0]
    np.testing.assert_array_equal(pixels[4], alone)  # 3 and 5 have none


def test_examples_of_a_shard(tmp_path: Path) -> None:
    images = [jpeg(seed=i) for i in range(5)]
    made = {
        "key": [str(i) for i in range(5)],
        "image": images,
        "label": [0] * 5,
        "split": ["test"] * 5,
        "width": [64] * 5,
        "height": [48] * 5,
        "sha256": ["x"] * 5,
    }
    root = str(tmp_path)
    shard = shards.write_shard(root, "test-00000.parquet", pa.table(made), row_group=2)
    url = storage.join(root, "test-00000.parquet")
    rows = [{"image": f"{url}#{i}", "version": shard.sha256[:16], "row": i} for i in (0, 3, 4)]
    (stack,) = decode(numbered(rows))
    for pixels, i in zip(stack.pixels, (0, 3, 4), strict=True):
        storage.write_bytes(storage.join(root, "one.jpg"), images[i])
        expected = decode(numbered([{"image": storage.join(root, "one.jpg")}]))[0].pixels[0]
        np.testing.assert_array_equal(pixels, expected)

    storage.write_bytes(url, b"something else")
    (stack,) = decode(numbered(rows))
    assert set(stack.photographs["reason"].to_pylist()) == {
        "cannot-read: the shard: OSError: the shard was changed since it was listed"
    }


def test_memory_does_not_grow_with_the_number_of_photographs(tmp_path: Path) -> None:
    url = storage.join(str(tmp_path), "a.jpg")
    storage.write_bytes(url, jpeg())

    def peak(count: int) -> int:
        table = numbered([{"image": url}] * count)
        tracemalloc.start()
        for _ in reading.decode_photographs(
            table, image_size=64, batch_size=16, max_pixels=1_000_000
        ):
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    # 320 photographs decoded take 3.9 MB; the rows of the listing, as Python's, 0.2 MB.
    assert peak(320) < peak(64) + 1_000_000


def test_rows_agree_with_the_logits() -> None:
    found = made_rows([None, "corrupt: x", None], [[0, 2, 0], [9, -9, -9]], novelty=[1.5, 2.5])
    assert [row["status"] for row in found] == ["ok", "failed", "ok"]
    assert [row["label"] for row in found] == ["late blight", None, "healthy"]
    assert [row["novelty"] for row in found] == [1.5, None, 2.5]
    first = found[0]["probabilities"]
    assert list(first) == list(CLASSES)
    expected = np.exp([0, 2, 0]) / np.exp([0, 2, 0]).sum()
    np.testing.assert_allclose(list(first.values()), expected, rtol=1e-6)
    assert found[0]["confidence"] == max(first.values())
    assert found[1]["probabilities"] is None
    assert found[1]["confidence"] is None
    assert found[1]["reason"] == "corrupt: x"
    assert found[0]["reason"] is None
    assert {row["model_id"] for row in found} == {"m"}


def test_a_model_without_a_measure_of_novelty() -> None:
    (row,) = made_rows([None], [[0, 2, 0]])
    assert row["novelty"] is None


@pytest.mark.parametrize(
    ("logit", "novelty", "status", "reason"),
    [
        (9, 1.0, "ok", None),
        (0, 1.0, "review", "low-confidence: 0.333 is under 0.800"),
        (9, 7.0, "review", "unlike-training: novelty 7 is over 5"),
        (0, 7.0, "review", "unlike-training: novelty 7 is over 5; low-confidence: 0.333 is under"),
    ],
)
def test_review(logit: float, novelty: float, status: str, reason: str | None) -> None:
    review = Review(confidence=0.8, precision_target=0.95, novelty=5.0)
    (row,) = made_rows([None], [[logit, 0, 0]], novelty=[novelty], review=review)
    assert row["status"] == status
    assert (row["reason"] or "").startswith(reason or "")
    assert (row["reason"] is None) == (reason is None)
    assert row["label"] == "healthy"


def test_a_network_that_gives_no_number() -> None:
    found = made_rows([None, None], [[np.nan, 0, 0], [0, 0, 1]], novelty=[np.nan, 1])
    assert [row["status"] for row in found] == ["failed", "ok"]
    assert found[0]["reason"] == "not-finite: the network gave no number for it"
    assert found[0]["label"] is None


def test_no_pixels_at_all() -> None:
    found = made_rows(["empty: x", "corrupt: y"], [])
    assert [row["status"] for row in found] == ["failed", "failed"]


def test_schema_names_the_order_of_the_classes() -> None:
    schema = scoring_rows.schema(("z", "ä"), model_id="m")
    assert schema.metadata[b"class_names"].decode() == '["z", "ä"]'
    assert [field.name for field in schema.field("probabilities").type] == ["z", "ä"]


def test_careful_decoding_gives_the_same(tmp_path: Path) -> None:
    rows = []
    for i in range(5):
        url = str(tmp_path / f"{i}.jpg")
        storage.write_bytes(url, b"no" if i == 2 else jpeg(seed=i))
        rows.append({"image": url})
    table = numbered(rows)
    careful = reading.decode_photographs(
        table, image_size=32, batch_size=4, max_pixels=1_000_000, careful=True
    )
    for found, expected in zip(careful, decode(table), strict=True):
        assert found.photographs.equals(expected.photographs)
        np.testing.assert_array_equal(found.pixels, expected.pixels)


def test_a_store_that_is_away_is_no_affair_of_a_photograph(
    moto: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_server(monkeypatch, moto.environment() | {"AWS_MAX_ATTEMPTS": "1"})
    bucket = make_bucket("scoring-outage")
    storage.write_bytes(f"{bucket}/a.jpg", jpeg())
    rows = [{"image": f"{bucket}/a.jpg"}, {"image": f"{bucket}/gone.jpg"}]
    (stack,) = decode(numbered(rows))
    assert stack.photographs["reason"].to_pylist() == [None, "not-found: it is not there"]

    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    storage._filesystem.cache_clear()
    with pytest.raises(UserError, match="cannot reach http") as caught:
        decode(numbered(rows))
    assert caught.value.reason == "no-network"
    example = {"image": f"{bucket}/s.parquet#1", "version": "0" * 16, "row": 1}
    with pytest.raises(UserError, match="cannot reach http"):
        decode(numbered([example]))
    storage._filesystem.cache_clear()


def test_an_object_that_may_not_be_read_is_a_row(
    radosgw: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_server(monkeypatch, radosgw.environment())
    url = f"{make_bucket('scoring-no-access')}/a.jpg"
    storage.write_bytes(url, jpeg())
    for name, value in radosgw.reader.environment().items():
        monkeypatch.setenv(name, value)
    storage._filesystem.cache_clear()
    (stack,) = decode(numbered([{"image": url}]))
    (reason,) = stack.photographs["reason"].to_pylist()
    assert reason.startswith("cannot-read: UserError: ")
    assert "refuses reading" in reason
    storage._filesystem.cache_clear()


def test_a_host_of_the_web_that_is_away_is_a_row() -> None:
    (stack,) = decode(numbered([{"image": f"http://127.0.0.1:{free_port()}/a.jpg"}]))
    (reason,) = stack.photographs["reason"].to_pylist()
    assert reason.startswith("cannot-read: ")


def write_all(root: Path, contents: list[bytes]) -> pa.Table:
    """A listing of files with these contents."""
    for i, content in enumerate(contents):
        (root / f"{i:03d}.jpg").write_bytes(content)
    return numbered([{"image": str(root / f"{i:03d}.jpg")} for i in range(len(contents))])


def test_a_stack_ends_though_all_photographs_fail(tmp_path: Path) -> None:
    """A night of broken files gets its rows written as any other: 8 to a place of the stack."""
    stacks = decode(write_all(tmp_path, [b"no"] * 50), batch_size=3)
    assert [stack.photographs.num_rows for stack in stacks] == [24, 24, 2]
    assert all(stack.pixels.shape == (0, 32, 32, 3) for stack in stacks)
    places = [place for stack in stacks for place in stack.photographs["place"].to_pylist()]
    assert places == list(range(10, 60))


def test_failures_between_photographs_count_among_the_rows_of_a_stack(tmp_path: Path) -> None:
    contents = [b"no"] * 5 + [jpeg(1)] + [b"no"] * 12 + [jpeg(2), jpeg(3)] + [b"no"] * 2
    stacks = decode(write_all(tmp_path, contents), batch_size=2)
    # 16 rows with one photograph, then two photographs, and what is left.
    assert [stack.photographs.num_rows for stack in stacks] == [16, 4, 2]
    assert [len(stack.pixels) for stack in stacks] == [1, 2, 0]
    assert [stack.photographs["reason"].null_count for stack in stacks] == [1, 2, 0]


def test_each_stack_has_the_pixels_of_its_own_photographs(tmp_path: Path) -> None:
    contents = [jpeg(seed, size=(32, 32)) for seed in range(7)]
    expected = [np.asarray(Image.open(io.BytesIO(content))) for content in contents]
    stacks = decode(write_all(tmp_path, contents), batch_size=3)
    assert [len(stack.pixels) for stack in stacks] == [3, 3, 1]
    # A picture of the size of the network is not changed.
    np.testing.assert_array_equal(np.concatenate([s.pixels for s in stacks]), expected)


def test_seconds_are_those_of_decoding(tmp_path: Path) -> None:
    table = write_all(tmp_path, [jpeg(seed) for seed in range(4)])
    began = time.perf_counter()
    seconds = [stack.seconds for stack in decode(table, batch_size=1)]
    assert min(seconds) > 0
    assert sum(seconds) < time.perf_counter() - began


def test_what_is_known_of_a_photograph_goes_with_it(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    images = [str(tmp_path / name) for name in ("gone.jpg", "a.jpg")]
    table = numbered([{"image": images[0], "version": "v0"}, {"image": images[1], "version": "v1"}])
    (stack,) = decode(table)
    version = listing.look(images[1]).photographs["version"][0].as_py()
    columns = ("place", "image", "version", "width", "height")
    assert stack.photographs.select(columns).to_pylist() == [
        dict(zip(columns, (10, images[0], "v0", None, None), strict=True)),
        # Of the bytes that were read.
        dict(zip(columns, (11, images[1], version, 64, 48), strict=True)),
    ]


def test_a_photograph_with_too_many_pixels_is_refused(tmp_path: Path) -> None:
    table = write_all(tmp_path, [jpeg(size=(64, 48))])
    for allowed, reason in ((64 * 48, None), (64 * 48 - 1, "too-large")):
        (stack,) = reading.decode_photographs(
            table, image_size=32, batch_size=4, max_pixels=allowed
        )
        (found,) = stack.photographs["reason"].to_pylist()
        assert (found and found.partition(":")[0]) == reason
        assert len(stack.pixels) == (reason is None)


def test_nothing_to_decode() -> None:
    assert decode(numbered([])) == []


def read(row: dict[str, Any]) -> Any:
    """The bytes of a photograph, or the slug and message of why there are none."""
    found = reading._read({"size": None} | row)
    return found if isinstance(found, bytes) else (found.reason, str(found))


def test_a_file_that_is_too_long_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ("too-many-bytes", "the file has 512 MB")
    assert read({"image": "/nowhere.jpg", "size": 512_000_001}) == expected
    monkeypatch.setattr(reading, "_MAX_IMAGE_BYTES", 2_000_000)
    path = tmp_path / "a.jpg"
    path.write_bytes(b"x" * 2_000_000)
    for size in (None, 0, 2_000_000):
        assert read({"image": str(path), "size": size}) == b"x" * 2_000_000
    expected = ("too-many-bytes", "the file has 3 MB")
    assert read({"image": str(path), "size": 2_500_001}) == expected
    assert read({"image": str(path), "size": 2_000_001})[0] == "too-many-bytes"
    path.write_bytes(b"x" * 5_000_000)
    assert read({"image": str(path)}) == ("too-many-bytes", "the file has 5 MB")


def test_why_a_file_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"x")
    not_a_file = ("not-a-file", "a folder, a pipe or a device, not a file")
    assert read({"image": str(tmp_path / "pipe")}) == not_a_file
    assert read({"image": str(tmp_path)}) == not_a_file
    assert read({"image": str(tmp_path / "gone")}) == ("not-found", "it is not there")
    assert read({"image": "memory://gone/a.jpg"}) == ("not-found", "it is not there")
    bad_name = ("bad-name", "its name is not valid UTF-8; rename the file")
    assert read({"image": f"{tmp_path}/\\udcff.jpg"}) == bad_name
    slug, message = read({"image": str(tmp_path / "file" / "below.jpg")})
    assert slug == "cannot-read"
    assert message.startswith("NotADirectoryError: ")


def test_reasons_are_one_line_of_at_most_300_letters() -> None:
    assert reading._one_line(OSError("a\n  b\tc")) == "OSError: a b c"
    assert reading._one_line(OSError("x" * 400)) == "OSError: " + "x" * 291


@pytest.mark.parametrize(
    ("error", "url", "other", "ends"),
    [
        (UserError("no-network", ""), "s3://b/a.jpg", UserError("no-network", ""), True),
        (UserError("wrong-keys", ""), "s3a://b/a.jpg", UserError("no-answer", ""), True),
        (UserError("no-keys", ""), "s3://b/a.jpg", UserError("clock-skew", ""), True),
        # It was this one only.
        (UserError("no-network", ""), "s3://b/a.jpg", None, False),
        (UserError("no-network", ""), "s3://b/a.jpg", UserError("no-access", ""), False),
        # Not of the store, and of the web, where each photograph may have a store of its own.
        (UserError("no-access", ""), "s3://b/a.jpg", UserError("no-network", ""), False),
        (OSError(), "s3://b/a.jpg", UserError("no-network", ""), False),
        (UserError("no-network", ""), "https://b/a.jpg", UserError("no-network", ""), False),
        (UserError("no-network", ""), "/s3://", UserError("no-network", ""), False),
    ],
)
def test_a_store_that_is_away_ends_the_job_and_a_file_does_not(
    error: Exception,
    url: str,
    other: UserError | None,
    ends: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exists(asked: str) -> bool:
        assert asked != url
        assert asked.startswith(url)
        if other is not None:
            raise other
        return False

    monkeypatch.setattr(storage, "exists", exists)
    assert reading._ends_the_job(error, url) is ends


def read_shard(tmp_path: Path, rows: list[int], row_group: int) -> list[tuple[int, Any]]:
    made = {
        "key": [str(i) for i in range(5)],
        "image": [b"%d" % i for i in range(5)],
        "label": [0] * 5,
        "split": ["test"] * 5,
        "width": [64] * 5,
        "height": [48] * 5,
        "sha256": ["x"] * 5,
    }
    shard = shards.write_shard(str(tmp_path), "s.parquet", pa.table(made), row_group=row_group)
    listed = [{"row": row, "version": shard.sha256[:16]} for row in rows]
    found = reading._read_shard(storage.join(str(tmp_path), "s.parquet"), listed)
    return [(row["row"], data) for row, data in found]


@pytest.mark.parametrize("row_group", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [4, 0, 3], [2], [1, 2]])
def test_each_example_of_a_shard_is_found_in_its_row_group(
    rows: list[int], row_group: int, tmp_path: Path
) -> None:
    assert read_shard(tmp_path, rows, row_group) == [(row, b"%d" % row) for row in sorted(rows)]


def test_examples_of_two_shards_in_one_listing(tmp_path: Path) -> None:
    expected = []
    rows = []
    for name, count in (("test-00000", 2), ("test-00001", 3)):
        contents = [jpeg(seed=10 * count + i, size=(32, 32)) for i in range(count)]
        made = {
            "key": [f"{i}#x" for i in range(count)],
            "image": contents,
            "label": [0] * count,
            "split": ["test"] * count,
            "width": [32] * count,
            "height": [32] * count,
            "sha256": ["x"] * count,
        }
        shard = shards.write_shard(str(tmp_path), f"{name}.parquet", pa.table(made), row_group=2)
        expected += [np.asarray(Image.open(io.BytesIO(content))) for content in contents]
        url, version = f"{tmp_path}/{name}.parquet", shard.sha256[:16]
        rows += [{"image": f"{url}#{i}#x", "version": version, "row": i} for i in range(count)]
    (stack,) = decode(numbered(rows), batch_size=8)
    assert stack.photographs["image"].to_pylist() == [row["image"] for row in rows]
    np.testing.assert_array_equal(stack.pixels, expected)


def test_a_network_that_gives_no_number_leaves_the_other_rows_theirs() -> None:
    """A photograph without pixels, one without numbers, and others on both sides of them."""
    logits = [[3, 0, 0], [0, np.inf, 0], [0, 4, 0], [0, 0, np.nan], [0, 0, 5]]
    reasons = [None, None, "corrupt: x", None, None, None]
    found = made_rows(reasons, logits, novelty=[10, 20, 30, 40, 50])
    assert [row["image"] for row in found] == [f"{i}.jpg" for i in range(6)]
    assert [row["status"] for row in found] == ["ok", "failed", "failed", "ok", "failed", "ok"]
    assert [row["label"] for row in found] == [
        *("healthy", None, None, "late blight", None, "rust"),
    ]
    assert [row["novelty"] for row in found] == [10, None, None, 30, None, 50]
    no_number = "not-finite: the network gave no number for it"
    assert [row["reason"] for row in found] == [
        *(None, no_number, "corrupt: x", None, no_number, None),
    ]
    for row, logit in ((0, 3), (3, 4), (5, 5)):
        # The softmax of (z, 0, 0) at its z.
        expected = 1 / (1 + 2 * np.exp(-logit))
        assert found[row]["confidence"] == pytest.approx(expected, rel=1e-6)
        assert max(found[row]["probabilities"].values()) == pytest.approx(expected, rel=1e-6)
        assert sum(found[row]["probabilities"].values()) == pytest.approx(1, rel=1e-6)
    assert [found[i]["confidence"] for i in (1, 2, 4)] == [None] * 3
    assert [found[i]["probabilities"] for i in (1, 2, 4)] == [None] * 3


def test_a_distance_that_is_no_number_is_no_novelty() -> None:
    review = Review(confidence=0.0, precision_target=0.95, novelty=5.0)
    found = made_rows([None, None], [[0, 2, 0], [0, 2, 0]], novelty=[np.nan, 5.5], review=review)
    assert [row["novelty"] for row in found] == [None, 5.5]
    assert [row["status"] for row in found] == ["ok", "review"]


def test_thresholds_are_of_each_row() -> None:
    review = Review(confidence=0.5, precision_target=0.95, novelty=5.0)
    logits = [[0, 0, 0], [9, 0, 0], [9, 0, 0]]
    found = made_rows(["empty: x", None, None, None], logits, novelty=[1, 6, 2], review=review)
    assert [row["status"] for row in found] == ["failed", "review", "review", "ok"]
    assert [(row["reason"] or "ok").split(":")[0] for row in found] == [
        *("empty", "low-confidence", "unlike-training", "ok"),
    ]


def test_logits_of_other_photographs_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rows of logits for 1 decoded photographs"):
        made_rows([None, "empty: x"], [[0, 0, 0], [0, 0, 0]])


def test_a_row_has_what_was_known_of_its_photograph_and_of_the_run() -> None:
    output = scoring_rows.schema(("a", "b"), model_id="the model", run_id="the run")
    known = {
        "image": "s3://b/a.jpg",
        "version": "v",
        "width": 3000,
        "height": 2000,
        "captured_at": datetime(2026, 5, 4, 3, 2, 1),
        "latitude": -12.5,
        "longitude": 130.25,
    }
    photographs = pa.Table.from_pylist([{"place": 7, **known}], reading.PHOTOGRAPH)
    before = datetime.now(UTC)
    table = scoring_rows.rows(
        photographs,
        np.zeros((1, 2), np.float32),
        None,
        output=output,
        class_names=("a", "b"),
        review=None,
        model_id="the model",
        run_id="the run",
    )
    assert table.schema.equals(output, check_metadata=True)
    (row,) = table.to_pylist()
    assert {name: row[name] for name in known} == known
    assert before <= row["scored_at"] <= datetime.now(UTC)
    assert (row["model_id"], row["run_id"]) == ("the model", "the run")
    assert row["decoder_version"] == DECODER_VERSION
    # Of classes that are as probable the first.
    assert (row["label"], row["confidence"]) == ("a", 0.5)


def test_columns_of_the_predictions() -> None:
    schema = scoring_rows.schema(("a", "b"), model_id="m", run_id="r")
    needed = {"image", "status", "decoder_version", "model_id", "run_id", "scored_at"}
    assert {field.name for field in schema if not field.nullable} == needed
    assert {field.name: str(field.type) for field in schema} == {
        "image": "string",
        "version": "string",
        "status": "string",
        "label": "string",
        "confidence": "float",
        "probabilities": "struct<a: float, b: float>",
        "reason": "string",
        "width": "int32",
        "height": "int32",
        "captured_at": "timestamp[us]",
        "latitude": "double",
        "longitude": "double",
        "novelty": "float",
        "decoder_version": "int32",
        "model_id": "string",
        "run_id": "string",
        "scored_at": "timestamp[us, tz=UTC]",
    }
    assert schema.metadata == {
        b"class_names": b'["a", "b"]',
        b"model_id": b"m",
        b"run_id": b"r",
        b"decoder_version": str(DECODER_VERSION).encode(),
        b"leafnet": leafnet.__version__.encode(),
    }


def test_another_process_decodes_only_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def apart() -> None:
        raise AssertionError("started")

    monkeypatch.setattr(reading, "DecoderProcess", apart)
    assert len(decode(write_all(tmp_path, [jpeg()]))) == 1


def test_a_row_has_the_version_of_the_bytes_that_were_judged(tmp_path: Path) -> None:
    """The photograph is another by the time it is read."""
    place = tmp_path / "a.jpg"
    place.write_bytes(leaf_jpeg("healthy", seed=0))
    listed = listing.look(str(tmp_path)).photographs
    place.write_bytes(leaf_jpeg("healthy", seed=1) + b"longer")
    now = listing.look(str(tmp_path)).photographs["version"].to_pylist()
    assert now != listed["version"].to_pylist()
    numbered = listed.append_column("place", pa.array([0]))
    (decoded,) = reading.decode_photographs(numbered, image_size=32, batch_size=4, max_pixels=10**6)
    assert decoded.photographs["version"].to_pylist() == now
