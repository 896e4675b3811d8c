import io
import tracemalloc
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from leafnet import demo, listing, scoring, shards, storage
from leafnet.errors import UserError
from leafnet.review import Review
from leafnet.scoring import Decoded
from tests.conftest import make_bucket, use_server
from tests.s3_server import Server, free_port

CLASSES = ("healthy", "late blight", "rust")


def jpeg(seed: int = 0, size: tuple[int, int] = (64, 48)) -> bytes:
    pixels = demo.draw_leaf("healthy", seed=seed, width=size[0], height=size[1])
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
        scoring.decode_photographs(
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
        scoring.PHOTOGRAPH,
    )
    table = scoring.rows(
        photographs,
        np.array(logits, np.float32).reshape(-1, 3),
        None if novelty is None else np.array(novelty, np.float32),
        output=scoring.schema(CLASSES, model_id="m", run_id="r"),
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
    shard = shards.write_shard(root, "s.parquet", pa.table(made), row_group=2)
    url = storage.join(root, "s.parquet")
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
        for _ in scoring.decode_photographs(
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
    schema = scoring.schema(("z", "ä"), model_id="m")
    assert schema.metadata[b"class_names"].decode() == '["z", "ä"]'
    assert [field.name for field in schema.field("probabilities").type] == ["z", "ä"]


def test_careful_decoding_gives_the_same(tmp_path: Path) -> None:
    rows = []
    for i in range(5):
        url = str(tmp_path / f"{i}.jpg")
        storage.write_bytes(url, b"no" if i == 2 else jpeg(seed=i))
        rows.append({"image": url})
    table = numbered(rows)
    careful = scoring.decode_photographs(
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
