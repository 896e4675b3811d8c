"""Sources that are Parquet files in the Hugging Face image layout."""

import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.core.storage import File
from leafnet.preparation.samples import (
    ITEM_SCHEMA,
    SPLIT_NAMES,
    WITH_KEYS,
    Listing,
    Sample,
    check_classes,
    damaged,
    fingerprint,
    label_text,
    make_sample,
    one_line,
    settle_splits,
    some,
    split_of_name,
)

_FOOTER_THREADS = 16


def look_at_parquet(source: str, files: list[tuple[str, File]]) -> Listing:
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        looked = list(pool.map(lambda entry: _look_at_parquet_file(*entry), files))
    all_names = {names for _, names, _ in looked}
    if len(all_names) > 1:
        raise UserError(
            "mixed-layouts",
            f"the Parquet files of {source} have different lists of class names; "
            "write them with one list",
        )
    items = [item for rows, _, _ in looked for item in rows]
    classes: dict[str, set[str]] = {}
    by_row = any(None not in found for _, _, found in looked)
    for (name, _), (_, _, found) in zip(files, looked, strict=True):
        for split, labels in found.items():
            classes.setdefault(split or split_of_name(name) or "train", set()).update(labels)
    has_splits = bool(set(classes) - {"train"}) if by_row else settle_splits(source, items)
    if not items:
        raise UserError("empty-folder", f"the Parquet files of {source} have no rows")
    check_classes(source, classes)
    return Listing(
        source=source,
        layout="parquet",
        items=pa.Table.from_pylist(items, ITEM_SCHEMA),
        has_splits=has_splits,
        label_names=next(iter(all_names)),
        notes=(),
        fingerprint=fingerprint(files),
    )


def _look_at_parquet_file(
    name: str, file: File
) -> tuple[list[dict[str, Any]], tuple[str, ...], dict[str | None, set[str]]]:
    """Items, names of the whole-number labels, and the labels of each split of one file."""
    with storage.open_file(file.url) as opened:
        try:
            parquet = pq.ParquetFile(opened)
        except pa.ArrowException as error:
            raise UserError(
                "bad-parquet", f"{file.url} is not a Parquet file: {one_line(error)}"
            ) from None
        schema = parquet.schema_arrow
        columns = _columns(file.url, schema)
        names = _class_label_names(schema, columns["label"])
        wanted = [columns["label"]] + ([columns["split"]] if "split" in columns else [])
        table = parquet.read(columns=wanted)
        metadata = parquet.metadata
    labels = _label_texts(table.column(columns["label"]), names)
    found: dict[str | None, set[str]] = {}
    if "split" in columns:
        told = [str(value) for value in table.column(columns["split"]).to_pylist()]
        unknown = {value for value in told if value.lower() not in SPLIT_NAMES}
        if unknown:
            raise UserError(
                "unknown-split",
                f"the column split of {file.url} says {some(unknown)}; expected train, valid "
                "or test",
            )
        splits: list[str | None] = [SPLIT_NAMES[value.lower()] for value in told]
    else:
        splits = [None] * len(labels)
    for split, label in set(zip(splits, labels, strict=True)):
        found.setdefault(split, set()).update({label} - {None})  # type: ignore[arg-type]
    items = [
        {
            "key": name,
            "url": file.url,
            "part": group,
            # The whole group's, of all columns: the image column is nearly all of it.
            "size": sum(
                metadata.row_group(group).column(i).total_compressed_size
                for i in range(metadata.num_columns)
            ),
            "examples": metadata.row_group(group).num_rows,
            "label": None,
            "split": None if "split" in columns else split_of_name(name),
        }
        for group in range(metadata.num_row_groups)
        if metadata.row_group(group).num_rows
    ]
    return items, names, found


def _columns(url: str, schema: pa.Schema) -> dict[str, str]:
    image = schema.field("image").type if "image" in schema.names else None
    nested = image is not None and pa.types.is_struct(image) and image.get_field_index("bytes") >= 0
    label = next((name for name in ("label", "labels") if name in schema.names), None)
    if not nested or label is None:
        raise UserError(
            "no-image-column",
            f"{url} is not in the Hugging Face image layout: expected the columns image "
            f"(struct of bytes and path) and label, found {', '.join(schema.names)}",
        )
    optional = ["split"] if "split" in schema.names else []
    if (schema.metadata or {}).get(b"leafnet") == WITH_KEYS["leafnet"].encode():
        optional.append("key")
    return {"image": "image", "label": label} | {name: name for name in optional}


def _class_label_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """Names of the ClassLabel feature, as the `datasets` library stores them; () without."""
    try:
        document = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(map(str, document["info"]["features"][label]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


def _label_texts(labels: pa.ChunkedArray, names: Sequence[str]) -> list[str | None]:
    return [label_text(value, names) for value in labels.to_pylist()]


def parquet_samples(item: Mapping[str, Any], names: Sequence[str]) -> Iterator[Sample]:
    row = 0
    try:
        with storage.open_file(item["url"]) as opened:
            file = pq.ParquetFile(opened)
            columns = _columns(item["url"], file.schema_arrow)
            before = sum(file.metadata.row_group(i).num_rows for i in range(item["part"]))
            batches = file.iter_batches(
                batch_size=64, row_groups=[item["part"]], columns=sorted(set(columns.values()))
            )
            for batch in batches:
                for values in batch.to_pylist():
                    key = f"{item['key']}/{before + row:08d}"
                    yield _parquet_sample(row, key, values, columns, item["split"], names)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        key = f"{item['key']}, row group {item['part']}"
        yield damaged(row, key, item["split"], "damaged-parquet", "row group", error)


def _parquet_sample(
    row: int,
    key: str,
    values: dict[str, Any],
    columns: Mapping[str, str],
    split: str | None,
    names: Sequence[str],
) -> Sample:
    image, given = values["image"] or {}, values[columns["label"]]
    told = posixpath.basename(image.get("path") or "")
    if "split" in columns:
        split = SPLIT_NAMES[str(values["split"]).lower()]
    key = f"{key}/{told}" if told else key
    key = values["key"] if "key" in columns else key
    return make_sample(row, key, label_text(given, names), split, image.get("bytes"), given)
