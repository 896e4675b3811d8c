"""Where photographs come from: how a source is laid out, and reading the examples in it.

A source is looked at before any machine is taken: names, sizes and labels, no image bytes. What is
read later comes as samples, and what is wrong with a single photograph is a value, not an error.
"""

import hashlib
import json
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from leafnet import storage
from leafnet.errors import UserError
from leafnet.storage import File

Layout = Literal["folders", "parquet", "tars"]

ITEM_SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # path below the source
        ("url", pa.string()),
        ("part", pa.int32()),  # row group of a Parquet file, otherwise 0
        ("size", pa.int64()),  # bytes
        ("examples", pa.int64()),  # null: not known before it is read
        ("label", pa.string()),  # class name; null: the container says it for each example
        ("split", pa.string()),  # null: none, or the container says it for each example
    ]
)

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
    "testing": "test",
}
_IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".heic", ".heif", ".avif", ".ppm", ".pgm"),
)
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
# What cameras, tools and people leave beside photographs. Any other file in a class folder is
# taken for a photograph, so that a broken one is told and not passed over.
SIDECAR_SUFFIXES = (
    *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".md", ".xml", ".yaml", ".yml"),
    *(".html", ".ini", ".db", ".log", ".cls"),
)
_NO_CLASS = frozenset({"__MACOSX"})
# Of a Parquet file whose column `key` names each example: leafnet's own, which knows it is unique.
WITH_KEYS = {"leafnet": "examples with keys"}
_FOOTER_THREADS = 16


class Sample(NamedTuple):
    """One example as it was found: a photograph, or why there is none."""

    row: int  # place in its item, from 0
    key: str  # unique in the source
    label: str | None
    split: str | None
    image: bytes | None
    reason: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class Listing:
    """What a source holds, without the photographs themselves."""

    source: str
    layout: Layout
    items: pa.Table  # of ITEM_SCHEMA, by key: files of photographs, row groups, or tars
    has_splits: bool  # it says valid or test (or both) itself
    label_names: tuple[str, ...]  # what whole-number labels mean; empty: their own digits
    notes: tuple[str, ...]  # what a person should know about it
    fingerprint: str  # sha256 over names and sizes

    @property
    def examples(self) -> int | None:
        """How many there are; None for tars, which do not say."""
        return None if self.layout == "tars" else int(sum(self.items["examples"].to_pylist()))

    @property
    def size(self) -> int:
        """Bytes of all items."""
        return int(sum(self.items["size"].to_pylist()))


def look(source: str) -> Listing:
    """Find out how `source`, a path or URL, is laid out, and list it.

    Raises:
        UserError: nothing is there, or nothing that a classifier can be trained on.
    """
    source = storage.absolute(source)
    if not storage.exists(source):
        raise UserError("no-such-folder", f"--source {source} does not exist")
    root = source if storage.is_folder(source) else posixpath.dirname(source)
    files = _list(source, root)
    kinds: dict[str, list[tuple[str, File]]] = {"Parquet files": [], "tars": [], "photographs": []}
    skipped: Counter[str] = Counter()
    for name, file in files:
        suffix = _suffix(name)
        if suffix == ".parquet":
            kinds["Parquet files"].append((name, file))
        elif name.lower().endswith(_TAR_SUFFIXES):
            kinds["tars"].append((name, file))
        # Only class folders make a photograph of a file with any other name.
        elif suffix in _IMAGE_SUFFIXES or ("/" in name and suffix not in SIDECAR_SUFFIXES):
            kinds["photographs"].append((name, file))
        else:
            skipped[suffix] += 1
    others = f"{sum(skipped.values()):,} other files ({_listed(skipped)})"
    found = {kind: entries for kind, entries in kinds.items() if entries}
    if not found:
        raise UserError(
            "empty-folder",
            f"--source {source} holds no photographs, "
            + (f"only {others}" if skipped else "not a single file"),
        )
    if len(found) > 1:
        told = ", ".join(f"{len(v):,} {kind} ({v[0][0]}, …)" for kind, v in found.items())
        raise UserError(
            "mixed-layouts", f"--source {source} holds {told}; give a folder with one kind of them"
        )
    if kinds["Parquet files"]:
        return _look_at_parquet(source, kinds["Parquet files"])
    if kinds["tars"]:
        return _look_at_tars(source, root, kinds["tars"])
    notes = [f"skipped {others}"] if skipped else []
    return _look_at_folders(source, kinds["photographs"], files, notes)


def read_samples(layout: Layout, item: Mapping[str, Any], names: Sequence[str]) -> Iterator[Sample]:
    """The examples of one item of a listing, a row of `Listing.items`, in order.

    A photograph that cannot be read comes with a reason and a message. `names` is the listing's
    `label_names`.
    """
    if layout == "parquet":
        return _parquet_samples(item, names)
    if layout == "tars":
        return _tar_samples(item, names)
    return iter([_file_sample(item)])


def _list(source: str, root: str) -> list[tuple[str, File]]:
    """Name below `root` and file, for each file of `source`, by name."""
    files = []
    for file in storage.list_files(source):
        name = file.url[len(root.rstrip("/")) + 1 :]
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(
                "bad-name", f"the name of {file.url!r} is not valid UTF-8; rename the file"
            ) from None
        if name.split("/")[0] not in _NO_CLASS:
            files.append((name, file))
    return sorted(files)


def _fingerprint(files: Iterable[tuple[str, File]]) -> str:
    digest = hashlib.sha256()
    for name, file in files:
        digest.update(json.dumps([name, file.size]).encode() + b"\n")
    return digest.hexdigest()


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _listed(suffixes: Counter[str]) -> str:
    return ", ".join(
        f"{count:,} {suffix or 'without suffix'}" for suffix, count in suffixes.most_common(5)
    )


def _some(names: Iterable[str], limit: int = 4) -> str:
    """A few of `names`, for a message.

    >>> _some(["b", "a"]), _some("abcdef")
    ('a, b', 'a, b, c, d and 2 more')
    """
    ordered = sorted(names)
    more = f" and {len(ordered) - limit:,} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def _split_of_name(name: str) -> str | None:
    """The split that a container's path tells, by a folder or by a word of the file name.

    >>> _split_of_name("data/train-00000-of-00002.parquet"), _split_of_name("Testing/0.tar")
    ('train', 'test')
    >>> _split_of_name("leaves-000.tar")
    """
    *folders, last = name.split("/")
    words = folders + re.split(r"[-_. ]", last)
    return next((_SPLIT_NAMES[w.lower()] for w in words if w.lower() in _SPLIT_NAMES), None)


def _check_classes(source: str, classes: Mapping[str, set[str]]) -> None:
    """Check the class names of each split ("train" alone where there are no splits).

    Raises:
        UserError: no training examples, one class only, or a class that training never sees.
    """
    train = classes.get("train", set())
    if not train:
        raise UserError(
            "no-train-split",
            f"--source {source} has {_some(classes)} but no train examples",
        )
    if len(train) < 2:
        raise UserError(
            "one-class",
            f"--source {source} has one class only, {_some(train)}; a classifier needs at "
            "least two",
        )
    for split, names in classes.items():
        unknown = names - train
        if unknown:
            raise UserError(
                "class-not-in-train",
                f"{split} of {source} has {_some(unknown)}, which train has not "
                f"({_some(train)}); name the classes alike in all splits",
            )


def _settle_splits(source: str, items: list[dict[str, Any]]) -> bool:
    """Whether the items tell valid or test. Train alone is as good as no split."""
    found = {item["split"] for item in items}
    if None in found and len(found) > 1:
        without = next(item["key"] for item in items if item["split"] is None)
        told = next(item["key"] for item in items if item["split"] is not None)
        raise UserError(
            "mixed-layouts",
            f"in --source {source}, {told} names its split and {without} does not; "
            "name train, valid or test for all or none",
        )
    if found - {None, "train"}:
        return True
    for item in items:
        item["split"] = None
    return False


def _look_at_folders(
    source: str, photos: list[tuple[str, File]], files: list[tuple[str, File]], notes: list[str]
) -> Listing:
    direct = [name for name, _ in photos if "/" not in name]
    if direct:
        raise UserError(
            "photographs-in-root",
            f"{len(direct):,} photographs lie directly in {source} ({_some(direct)}); put each "
            "into a folder named after its class",
        )
    tops = {name.split("/")[0] for name, _ in photos} | _empty_folders(source, photos, files)
    without_class = {n.split("/")[0] for n, _ in photos if n.count("/") == 1}
    aliases = {top for top in tops if top.lower() in _SPLIT_NAMES}
    if aliases == tops and without_class:
        raise UserError(
            "photographs-without-class",
            f"photographs lie directly in {source}/{min(without_class)}; put each into a folder "
            f"named after its class, such as {min(without_class)}/healthy",
        )
    splits = aliases - without_class
    if splits and splits != tops:
        raise UserError(
            "mixed-layouts",
            f"--source {source} has {_some(splits)}, which name splits, beside "
            f"{_some(tops - splits)}; put the classes below the splits or leave the splits out",
        )
    depth = 1 if splits else 0
    items = []
    for name, file in photos:
        parts = name.split("/")
        items.append(
            {
                "key": name,
                "url": file.url,
                "part": 0,
                "size": file.size,
                "examples": 1,
                "label": parts[depth],
                "split": _SPLIT_NAMES[parts[0].lower()] if splits else None,
            }
        )
    _check_folder_classes(source, items, tops, splits, photos, files)
    has_splits = _settle_splits(source, items)
    return Listing(
        source=source,
        layout="folders",
        items=pa.Table.from_pylist(items, ITEM_SCHEMA),
        has_splits=has_splits,
        label_names=(),
        notes=tuple(notes),
        fingerprint=_fingerprint(photos),
    )


def _empty_folders(
    folder: str,
    photos: Iterable[tuple[str, File]],
    files: Iterable[tuple[str, File]],
    below: str = "",
) -> set[str]:
    """Folders directly in `folder` without a photograph; `below` is its name below the source."""
    prefix = f"{below}/" if below else ""
    full = {n[len(prefix) :].split("/")[0] for n, _ in photos if n.startswith(prefix)}
    plain = {n[len(prefix) :] for n, _ in files if n.startswith(prefix)}
    return {
        name
        for name in storage.list_names(folder)
        if name not in full | plain | _NO_CLASS
        and not name.startswith(".")
        and storage.is_folder(storage.join(folder, name))
    }


def _check_folder_classes(
    source: str,
    items: list[dict[str, Any]],
    tops: set[str],
    splits: set[str],
    photos: list[tuple[str, File]],
    files: list[tuple[str, File]],
) -> None:
    classes: dict[str, set[str]] = {}
    for item in items:
        classes.setdefault(item["split"] or "train", set()).add(item["label"])
    empty = set() if splits else tops - classes["train"]
    for top in splits:
        if _SPLIT_NAMES[top.lower()] == "train":
            found = _empty_folders(storage.join(source, top), photos, files, top)
            empty |= found - classes.get("train", set())
    if empty:
        raise UserError(
            "empty-class",
            f"the class folder {min(empty)} of {source} holds no photograph; fill it or remove it",
        )
    if not splits and len(tops) == 1:
        (top,) = tops
        below = {item["key"].split("/")[1] for item in items if item["key"].count("/") > 1}
        if len(below) > 1:
            raise UserError(
                "one-class",
                f"--source {source} has one class folder only, {top}; if {_some(below)} are the "
                f"classes, give --source {storage.join(source, top)}",
            )
    _check_classes(source, classes)


def _look_at_parquet(source: str, files: list[tuple[str, File]]) -> Listing:
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
            classes.setdefault(split or _split_of_name(name) or "train", set()).update(labels)
    has_splits = bool(set(classes) - {"train"}) if by_row else _settle_splits(source, items)
    if not items:
        raise UserError("empty-folder", f"the Parquet files of {source} have no rows")
    _check_classes(source, classes)
    return Listing(
        source=source,
        layout="parquet",
        items=pa.Table.from_pylist(items, ITEM_SCHEMA),
        has_splits=has_splits,
        label_names=next(iter(all_names)),
        notes=(),
        fingerprint=_fingerprint(files),
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
                "bad-parquet", f"{file.url} is not a Parquet file: {_one_line(error)}"
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
        unknown = {value for value in told if value.lower() not in _SPLIT_NAMES}
        if unknown:
            raise UserError(
                "unknown-split",
                f"the column split of {file.url} says {_some(unknown)}; expected train, valid "
                "or test",
            )
        splits: list[str | None] = [_SPLIT_NAMES[value.lower()] for value in told]
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
            "split": None if "split" in columns else _split_of_name(name),
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
    return [_label_text(value, names) for value in labels.to_pylist()]


def _label_text(value: Any, names: Sequence[str]) -> str | None:
    """The class name of a stored label; None where there is none.

    >>> _label_text(1, ["a", "b"]), _label_text(7, []), _label_text(" rust", [])
    ('b', '7', 'rust')
    >>> _label_text(-1, []), _label_text(2, ["a", "b"])
    (None, None)
    """
    if isinstance(value, int):
        if names:
            return names[value] if 0 <= value < len(names) else None
        # The Hub's way to say that the labels of a test split are withheld.
        return str(value) if value >= 0 else None
    return str(value).strip() or None if value is not None else None


def _look_at_tars(source: str, root: str, tars: list[tuple[str, File]]) -> Listing:
    items: list[dict[str, Any]] = [
        {
            "key": name,
            "url": file.url,
            "part": 0,
            "size": file.size,
            "examples": None,
            "label": None,
            "split": _split_of_name(name),
        }
        for name, file in tars
    ]
    has_splits = _settle_splits(source, items)
    if has_splits and not any(item["split"] == "train" for item in items):
        _check_classes(source, {item["split"]: set() for item in items})
    beside = {posixpath.dirname(file.url) for _, file in tars} | {root}
    lists = [storage.join(folder, "classes.txt") for folder in sorted(beside)]
    names: tuple[str, ...] = ()
    for url in filter(storage.exists, lists):
        lines = storage.read_bytes(url).decode("utf-8", "replace").splitlines()
        names = tuple(line.strip() for line in lines if line.strip())
    return Listing(
        source=source,
        layout="tars",
        items=pa.Table.from_pylist(items, ITEM_SCHEMA),
        has_splits=has_splits,
        label_names=names,
        notes=(),
        fingerprint=_fingerprint(tars),
    )


def _file_sample(item: Mapping[str, Any]) -> Sample:
    sample = Sample(0, item["key"], item["label"], item["split"], None)
    try:
        return sample._replace(image=storage.read_bytes(item["url"]))
    except UserError as error:
        # A store that cannot be reached says nothing of the photograph.
        if error.reason != "no-access":
            raise
        return sample._replace(reason="cannot-read", message=f"cannot read it: {_one_line(error)}")
    # Every filesystem has errors of its own, and what is wrong with one file must not end the job.
    except Exception as error:
        reason = "not-found" if isinstance(error, FileNotFoundError) else "cannot-read"
        return sample._replace(reason=reason, message=f"cannot read it: {_one_line(error)}")


def _parquet_samples(item: Mapping[str, Any], names: Sequence[str]) -> Iterator[Sample]:
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
        yield _damaged(row, key, item["split"], "damaged-parquet", "row group", error)


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
        split = _SPLIT_NAMES[str(values["split"]).lower()]
    key = f"{key}/{told}" if told else key
    key = values["key"] if "key" in columns else key
    return _sample(row, key, _label_text(given, names), split, image.get("bytes"), given)


def _damaged(
    row: int, key: str, split: str | None, reason: str, what: str, error: BaseException
) -> Sample:
    message = f"the {what} cannot be read after its first {row:,} examples: {_one_line(error)}"
    return Sample(row, key, None, split, None, reason, message)


def _sample(
    row: int, key: str, label: str | None, split: str | None, image: bytes | None, given: Any
) -> Sample:
    sample = Sample(row, key, label, split, image)
    if image is None:
        return sample._replace(reason="no-image", message="there are no image bytes")
    if label is None:
        return sample._replace(
            image=None, reason="no-label", message=f"the label {given!r} names no class"
        )
    return sample


def _tar_samples(item: Mapping[str, Any], names: Sequence[str]) -> Iterator[Sample]:
    row, seen = 0, set()
    try:
        with (
            storage.open_file(item["url"], stream=True) as opened,
            tarfile.open(fileobj=opened, mode="r|*") as tar,
        ):
            for stem, parts in _tar_groups(tar):
                sample = _tar_sample(row, stem, parts, item, names)
                if sample.key in seen:
                    sample = sample._replace(
                        key=f"{sample.key}#{row}",
                        image=None,
                        reason="duplicate-key",
                        message="the tar has an earlier sample of this name",
                    )
                seen.add(sample.key)
                yield sample
                row += 1
            # A tar ends with blocks of zeros. `tarfile` takes one that was cut off between two
            # members for whole: it then has read nothing past the last member.
            if tar.fileobj is None or tar.fileobj.tell() <= tar.offset:
                raise EOFError("the end-of-archive mark is missing")
    except (tarfile.TarError, EOFError, OSError) as error:
        yield _damaged(row, item["key"], item["split"], "damaged-tar", "tar", error)


def _tar_groups(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Name and files, by suffix, of each sample: consecutive members alike up to the first dot."""
    current, parts = None, dict[str, bytes]()
    for member in tar:
        folder, name = posixpath.split(member.name)
        if not member.isfile() or name.startswith("."):
            continue
        stem, _, suffix = name.partition(".")
        stem = posixpath.join(folder, stem).removeprefix("./")
        if current is not None and stem != current:
            yield current, parts
            parts = {}
        current = stem
        opened = tar.extractfile(member)
        if opened is not None and (f".{suffix}".lower() in _IMAGE_SUFFIXES or suffix == "cls"):
            parts[suffix.lower()] = opened.read()
    if current is not None:
        yield current, parts


def _tar_sample(
    row: int, stem: str, parts: dict[str, bytes], item: Mapping[str, Any], names: Sequence[str]
) -> Sample:
    suffix = next((suffix for suffix in parts if suffix != "cls"), None)
    key = f"{item['key']}/{stem}" + (f".{suffix}" if suffix else "")
    text = parts.get("cls", b"").decode("utf-8", "replace").strip()
    label = _label_text(int(text) if re.fullmatch(r"-?\d+", text) else text, names)
    image = parts[suffix] if suffix else None
    return _sample(row, key, label, item["split"], image, text)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
