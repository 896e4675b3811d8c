"""Row groups on their way to the network."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from leafnet.data import images, shards
from leafnet.data.isolated import Decoder
from leafnet.distributed import pipeline
from tests.conftest import leaf_jpeg


@pytest.mark.parametrize("name", ["a\nb.jpg", "field#7/#1.jpg", "\u2028.jpg", 'a"b\\.jpg'])
def test_any_name_comes_through(name: str, tmp_path: Path) -> None:
    """A filesystem and a bucket can hold it; two keys are not taken for three."""
    keys = [name, "other.jpg"]
    data = [leaf_jpeg("healthy", seed=i) for i in range(2)]
    columns = {"key": keys, "image": data, "label": [0, 1], "split": ["test"] * 2}
    columns |= {"width": [64] * 2, "height": [64] * 2, "sha256": ["x"] * 2}
    root = str(tmp_path / "field#7")
    shard = shards.write_shard(root, "test-00000.parquet", pa.table(columns), row_group=2)
    index = shards.write_index(root, class_names=("a", "b"), shards=[shard], counts={}, prepared={})
    decoder = Decoder(images.decode, images.fingerprint)
    (row,) = pipeline._decoded_groups(index, shard, None, 16, decoder)
    assert json.loads(str(row["keys"][0])) == keys
    url = f"{root}/{shard.name}"
    assert shards.split_url(f"{url}#{name}") == (url, name)
