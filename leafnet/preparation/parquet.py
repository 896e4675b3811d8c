"""Sources that are Parquet files in the Hugging Face image layout."""

import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.data.listing import Found
from leafnet.preparation.folders import read_photograph
from leafnet.preparation.samples import (
    ITEM_SCHEMA,
    WITH_KEYS,
    Listing,
    Sample,
    class_name,
    damaged,
    fingerprint,
    label_text,
    make_sample,
    one_line,
    settle_splits,
    some,
    split_of_name,
    split_of_value,
)

_FOOTER_THREADS = 16


class _File(NamedTuple):
    """What the look at one file found."""

    items: list[dict[str, Any]]
    names: tuple[str, ...]  # of whole-number labels
    labels: dict[str | None, set[str]]  # split of the column, or None -> classes
    has_column: bool  # of splits
    of_text: bool  # labels are texts, and no whole numbers


def look_at_parquet(
    source: str, files: Sequence[Found], photos: Sequence[Found] = ()
) -> Listing | None:
    """The examples of `files`; None: they have `photos` beside them and do not name any.

    Raises:
        UserError: columns of other types, or files that contradict each other.
    """
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        looked = list(pool.map(_look_at_file, files))
    if photos and not any(map(_names_photographs, files)):
        return None
    empty = [file for file, found in zip(files, looked, strict=True) if not found.items]
    looked = [found for found in looked if found.items]
    if not looked:
        raise UserError("empty-folder", f"the Parquet files of {source} have no rows")
    if len({found.names for found in looked}) > 1:
        raise UserError(
            "mixed-layouts",
            f"the Parquet files of {source} have different lists of class names; "
            "write them with one list",
        )
    by_type = {found.of_text: found.items[0]["key"] for found in looked}
    if len(by_type) > 1:
        raise UserError(
            "mixed-layouts",
            f"in --source {source}, the labels of {by_type[True]} are texts and those of "
            f"{by_type[False]} whole numbers; write them alike",
        )
    items = [item for found in looked for item in found.items]
    has_splits = _settle(source, looked, items)
    classes: dict[str, set[str]] = {}
    for found in looked:
        for split, labels in found.labels.items():
            told = split or found.items[0]["split"] or "train"
            classes.setdefault(told, set()).update(labels)
    notes = [f"passed over {len(empty):,} Parquet files without rows"] if empty else []
    return Listing(
        source=source,
        layout="parquet",
        items=pa.Table.from_pylist(items, ITEM_SCHEMA),
        has_splits=has_splits,
        label_names=looked[0].names,
        notes=tuple(notes),
        fingerprint=fingerprint(files),
        classes=classes,
    )


def _settle(source: str, looked: Sequence[_File], items: list[dict[str, Any]]) -> bool:
    """Whether the files tell valid or test, by a column or by their names."""
    if not any(found.has_column for found in looked):
        return settle_splits(source, items)
    for found in looked:
        first = found.items[0]
        if not found.has_column and first["split"] is None:
            other = next(found.items[0]["key"] for found in looked if found.has_column)
            raise UserError(
                "mixed-layouts",
                f"in --source {source}, {other} has a column split and {first['key']} has neither "
                "the column nor a split in its name; give it one of the two",
            )
    told = {found.items[0]["split"] for found in looked} | {
        split for found in looked for split in found.labels
    }
    return bool(told - {None, "train"})


def _look_at_file(file: Found) -> _File:
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
    labels = [label_text(value, names) for value in table.column(columns["label"]).to_pylist()]
    splits: list[str | None] = [None] * len(labels)
    if "split" in columns:
        splits = _splits(file.url, table.column(columns["split"]).to_pylist())
    found: dict[str | None, set[str]] = {}
    for split, label in set(zip(splits, labels, strict=True)):
        found.setdefault(split, set()).update({label} - {None})  # type: ignore[arg-type]
    items = [
        {
            "key": file.name,
            "url": file.url,
            "part": group,
            # The whole group's, of all columns: the image column is nearly all of it.
            "size": sum(
                metadata.row_group(group).column(i).total_compressed_size
                for i in range(metadata.num_columns)
            ),
            "examples": metadata.row_group(group).num_rows,
            "label": None,
            "split": None if "split" in columns else split_of_name(file.name),
        }
        for group in range(metadata.num_row_groups)
        if metadata.row_group(group).num_rows
    ]
    of_text = not pa.types.is_integer(schema.field(columns["label"]).type)
    return _File(items, names, found, "split" in columns, of_text)


def _splits(url: str, values: Sequence[Any]) -> list[str | None]:
    told = {value: split_of_value(str(value)) if value is not None else None for value in values}
    unknown = {str(value) for value, split in told.items() if split is None}
    if unknown:
        raise UserError(
            "unknown-split",
            f"the column split of {url} says {some(unknown)}; expected train, valid or test",
        )
    return [told[value] for value in values]


def _columns(url: str, schema: pa.Schema) -> dict[str, str]:
    """The columns by what they are for.

    Raises:
        UserError: one is missing, or of a type that is not understood.
    """
    label = next((name for name in ("label", "labels") if name in schema.names), None)
    if "image" not in schema.names or label is None:
        raise UserError(
            "no-image-column",
            f"{url} is not in the Hugging Face image layout: expected the columns image "
            f"(struct of bytes and path) and label, found {', '.join(schema.names)}",
        )
    of_image = schema.field("image").type
    parts = {field.name: field.type for field in of_image} if pa.types.is_struct(of_image) else {}
    if not parts.keys() & {"bytes", "path"} or not _is_binary(parts.get("bytes", pa.binary())):
        remedy = "write the encoded bytes of the files"
        if any(_is_text(each) for each in (of_image, parts.get("bytes"))):
            remedy = "if it holds base64, decode it; if paths, write them as image.path"
        raise UserError(
            "image-type",
            f"the column image of {url} is {_shown(of_image)}; expected a struct of bytes (binary) "
            f"and path (string): {remedy}",
        )
    _check_label_type(url, label, schema.field(label).type)
    optional = ["split"] if "split" in schema.names else []
    if optional and not _is_text(schema.field("split").type):
        raise UserError(
            "split-type",
            f"the column split of {url} is {_shown(schema.field('split').type)}; expected texts: "
            "train, valid or test",
        )
    if (schema.metadata or {}).get(b"leafnet") == WITH_KEYS["leafnet"].encode():
        optional.append("key")
    return {"image": "image", "label": label} | {name: name for name in optional}


def _check_label_type(url: str, column: str, of_label: pa.DataType) -> None:
    if pa.types.is_integer(of_label) or _is_text(of_label):
        return
    remedy = "write a text or a whole number for each photograph"
    if pa.types.is_nested(of_label):
        remedy = (
            "a photograph has one class here: write one label for each, or leave out the others"
        )
    elif pa.types.is_floating(of_label):
        remedy = "cast it to whole numbers, and drop the rows without a label"
    elif pa.types.is_null(of_label):
        remedy = "all labels are missing"
    raise UserError("label-type", f"the column {column} of {url} is {_shown(of_label)}; {remedy}")


def _is_text(of_column: pa.DataType | None) -> bool:
    if of_column is not None and pa.types.is_dictionary(of_column):
        of_column = of_column.value_type
    return of_column is not None and (
        pa.types.is_string(of_column)
        or pa.types.is_large_string(of_column)
        or pa.types.is_string_view(of_column)
    )


def _is_binary(of_column: pa.DataType) -> bool:
    # All paths and no bytes: a column of nulls.
    return bool(
        pa.types.is_binary(of_column)
        or pa.types.is_large_binary(of_column)
        or pa.types.is_null(of_column)
    )


def _shown(of_column: pa.DataType) -> str:
    text = str(of_column)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _names_photographs(file: Found) -> bool:
    """Whether the first row has a path and no bytes."""
    with storage.open_file(file.url) as opened:
        for batch in pq.ParquetFile(opened).iter_batches(batch_size=1, columns=["image"]):
            (image,) = batch.column(0).to_pylist()
            return bool(image and image.get("path") and image.get("bytes") is None)
    return False


def _class_label_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """Names of the ClassLabel feature, as the `datasets` library stores them; () without."""
    try:
        document = json.loads((schema.metadata or {})[b"huggingface"])
        names = document["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(class_name(str(name)) or "" for name in names)


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
                    yield _parquet_sample(row, key, values, columns, item, names)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        good = row
        for lost in range(good, max(item["examples"], good + 1)):
            key = f"{item['key']}, row group {item['part']}, row {lost}"
            told = damaged(good, key, item["split"], "damaged-parquet", "row group", error)
            yield told._replace(row=lost)


def _parquet_sample(
    row: int,
    key: str,
    values: dict[str, Any],
    columns: Mapping[str, str],
    item: Mapping[str, Any],
    names: Sequence[str],
) -> Sample:
    image, given, split = values["image"] or {}, values[columns["label"]], item["split"]
    path = image.get("path") or ""
    if "split" in columns:
        split = split_of_value(str(values["split"]))
    key = f"{key}/{posixpath.basename(path)}" if path else key
    key = values["key"] if "key" in columns else key
    label = label_text(given, names)
    if image.get("bytes") is None and path and label is not None:
        return _at_path(Sample(row, key, label, split, None), path, item)
    return make_sample(row, key, label, split, image.get("bytes"), given)


def _at_path(sample: Sample, path: str, item: Mapping[str, Any]) -> Sample:
    """`sample` with the photograph at `path`: as it is, or below the Parquet file or the source."""
    root = item["url"].removesuffix(item["key"]).rstrip("/")
    places = [posixpath.dirname(item["url"]), root]
    urls = [path] if "://" in path or path.startswith("/") else []
    for url in urls or [storage.join(place, path) for place in places]:
        found = read_photograph(sample, url)
        if found.reason != "not-found":
            return found
    return sample._replace(
        reason="no-image",
        message=f"the column image has no bytes, and nothing is at its path {path}: embed the "
        "bytes, or put the files below the Parquet file",
    )
