"""What jobs/review.py does with --answers: labels that people gave become training examples.

    answers + data set -> Parquet that `prepare` understands -> shards

Which photographs they are of is told by the folder that `labelling` wrote.
"""

import posixpath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from leafnet.core import storage
from leafnet.core.documents import ClassNames, Document, FileName, Sha256, parse
from leafnet.core.errors import UserError
from leafnet.core.terminal import say
from leafnet.data import shards
from leafnet.data.shards import ShardIndex
from leafnet.labelling import audit, labelstudio
from leafnet.labelling.labelstudio import PHOTOGRAPHS, REVIEW, REVIEW_VERSION, Answer
from leafnet.labelling.settings import ReviewSettings
from leafnet.preparation import prepare, samples, sources
from leafnet.preparation.settings import PrepareSettings
from leafnet.scoring.audits import Audit

# Settings of prepare that decide which examples of a data set are kept, and how they are written.
_AS_BEFORE = ("duplicates", "near_duplicates", "near_distance", "shard_mb", "row_group", "seed")

# In the folder of examples that is made beside --out and deleted again. Hidden, so that it is taken
# for no example.
_MARK = ".leafnet-source"

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("label", pa.string()),
    ],
    metadata=samples.WITH_KEYS,
)


class _Labelled(NamedTuple):
    """An answer that is taken."""

    key: str
    label: str
    data: bytes
    sha256: str


def take_back(settings: ReviewSettings, answers: str, out: str) -> None:
    """Write the answers, with the examples of `settings.base` if it is given, as a data set.

    All of it goes through `ingest`, as photographs of any other source do. Answers become training
    examples: the other splits stay what they were, so that models can still be compared. An answer
    takes the place of a training example with the same bytes; one that is in another split is left
    out.
    """
    found = labelstudio.read_answers(storage.absolute(answers))
    folder = settings.photographs or found.folder or storage.absolute(answers).rpartition("/")[0]
    review = _read_review(storage.absolute(folder))
    base = shards.read_index(settings.base) if settings.base else None
    if base is not None:
        shards.check_sizes(base)
    classes = base.class_names if base else tuple(review.class_names)
    taken = _taken(found.answers, storage.absolute(folder), review, classes)
    if not taken:
        raise UserError("no-answers", f"--answers {answers} has no label that can be taken")
    if review.audit is not None:
        labels = {answer.key.rpartition("/")[2]: answer.label for answer in taken}
        audit.add_up(posixpath.basename(storage.absolute(folder)), review.audit, labels)
    # Beside --out, where every machine that writes the shards can read it.
    source = f"{out}.source"
    mark = storage.join(source, _MARK)
    storage.delete_folder(source, mark=mark)
    storage.write_bytes(mark, b"")
    try:
        if base is not None:
            taken = _write_base(base, taken, source)
        _write_examples(
            storage.join(source, "answers.parquet"),
            [(t.key, t.data, t.label) for t in taken],
            split="train" if base else None,
        )
        prepared = PrepareSettings(
            source=source,
            out=out,
            split=settings.split,
            ray=settings.ray,
            **(_prepared_as(base) if base else {}),
        )
        prepare.run(prepared, sources.look(source))
    finally:
        storage.delete_folder(source, mark=mark)
    _tell_origin(out, answers=storage.absolute(answers), base=base, count=len(taken))


class _Review(Document):
    class_names: ClassNames
    photographs: dict[FileName, Sha256]
    audit: Audit | None = None


def _read_review(folder: str) -> _Review:
    url = storage.join(folder, REVIEW)
    try:
        document = storage.read_json(url)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            "no-review",
            f"{url} does not exist; name the folder that jobs/review.py wrote with --photographs",
        ) from None
    return parse(
        _Review,
        document,
        url=url,
        version=REVIEW_VERSION,
        reason="bad-review",
        remedy="choose the photographs again with jobs/review.py",
    )


def _taken(
    answers: tuple[Answer, ...], folder: str, review: _Review, classes: tuple[str, ...]
) -> list[_Labelled]:
    """The answers that can be taken; of all others it is told in a line each kind."""
    taken: dict[str, _Labelled] = {}
    known = {samples.class_name(name): name for name in classes}
    refused: dict[str, list[str]] = {}
    for answer in answers:
        trouble, label = answer.trouble, known.get(answer.label)
        if answer.key not in review.photographs:
            trouble = "no such photograph"
        elif answer.label is not None and label is None:
            trouble = f"unknown class {answer.label!r}"
        if trouble is not None:
            refused.setdefault(trouble, []).append(answer.key)
            continue
        if label is None:
            continue
        place = storage.join(folder, PHOTOGRAPHS, answer.key)
        try:
            data = storage.read_bytes(place)
        except FileNotFoundError:
            refused.setdefault("the photograph is gone", []).append(answer.key)
            continue
        digest = storage.sha256(data)
        if digest != review.photographs[answer.key]:
            refused.setdefault("the photograph was changed", []).append(answer.key)
            continue
        key = f"{posixpath.basename(folder)}/{answer.key}"
        taken[answer.key] = _Labelled(key, label, data, digest)
    refused_count = sum(map(len, refused.values()))
    skipped = len(answers) - len(taken) - refused_count
    say(f"answers   {len(taken):,} taken, {skipped:,} without a label, {refused_count:,} refused")
    if refused:
        told = "; ".join(
            f"{trouble}: {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"
            for trouble, keys in refused.items()
        )
        say(f"refused   {told} (the classes are {', '.join(classes)})")
    return list(taken.values())


def _write_base(base: ShardIndex, taken: list[_Labelled], source: str) -> list[_Labelled]:
    """Write the examples of `base` as a source, and give the answers that are new beside them."""
    by_digest = {answer.sha256: answer for answer in taken}
    keys: set[str] = set()
    known: set[str] = set()  # digests of answers that are in another split than train
    replaced = 0
    for shard in base.shards:
        examples = []
        for table in shards.row_groups(base.root, shard):
            for row in table.to_pylist():
                if row["sha256"] in by_digest:
                    if shard.split == "train":
                        replaced += 1
                        continue
                    known.add(row["sha256"])
                keys.add(row["key"])
                examples.append((row["key"], row["image"], base.class_names[row["label"]]))
        _write_examples(storage.join(source, shard.name), examples, split=shard.split)
    if replaced:
        say(f"          {replaced:,} training examples give way to answers of the same bytes")
    if known:
        say(f"          {len(known):,} answers are left out: their bytes are in valid or test")
    return [
        answer._replace(key=f"{answer.sha256[:8]}/{answer.key}") if answer.key in keys else answer
        for answer in taken
        if answer.sha256 not in known
    ]


def _write_examples(url: str, examples: list[tuple[str, bytes, str]], *, split: str | None) -> None:
    """Write key, bytes and class of examples in the Parquet layout that `sources` reads."""
    if not examples:
        return
    rows = [
        {"key": key, "image": {"bytes": data, "path": posixpath.basename(key)}, "label": label}
        for key, data, label in examples
    ]
    table = pa.Table.from_pylist(rows, _SCHEMA)
    if split is not None:
        table = table.append_column("split", pa.array([split] * len(rows)))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=256, compression="none")
    storage.write_bytes(url, sink.getvalue().to_pybytes())


def _prepared_as(base: ShardIndex) -> dict[str, Any]:
    """The settings with which `base` was prepared: another choice would drop examples of it."""
    found = shards.prepared(base.root).get("settings", {})
    return {name: found[name] for name in _AS_BEFORE if name in found}


def _tell_origin(out: str, *, answers: str, base: ShardIndex | None, count: int) -> None:
    """Say in the index where the examples came from; `ingest` saw only what was made of them."""
    index = shards.read_index(out)
    prepared = shards.prepared(out)
    del prepared["listing_sha256"]  # of a source that is gone: nothing is ever prepared like it
    origin = {
        "answers": answers,
        "answered": count,
        "base": base.root if base else None,
        "base_fingerprint": base.fingerprint if base else None,
    }
    prepared["settings"] = prepared["settings"] | {"source": answers}
    shards.write_index(
        out,
        class_names=index.class_names,
        shards=index.shards,
        counts=index.counts,
        prepared=prepared | {"source": answers, "review": origin},
    )
