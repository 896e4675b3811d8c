"""What jobs/review.py does: the photographs of nights that are most worth a label.

    predictions -> pool of uncertain and novel -> features -> diverse ones -> folder, tasks

`answers` takes back what people made of them.
"""

import csv
import io
import os
import posixpath
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from leafnet.core import storage, terminal
from leafnet.core.errors import UserError
from leafnet.core.terminal import say
from leafnet.data import shards
from leafnet.data.images import ImageError, decode
from leafnet.labelling import answers, audit, labelstudio, selection
from leafnet.labelling.labelstudio import (
    CONFIG,
    INDEX_CSV,
    PHOTOGRAPHS,
    REVIEW,
    REVIEW_VERSION,
    TASKS,
)
from leafnet.labelling.settings import ReviewSettings
from leafnet.models import bundle, engine
from leafnet.models.bundle import Bundle
from leafnet.scoring import ledger

_BATCH = 32
_COLUMNS = (
    *("image", "status", "label", "confidence", "probabilities", "novelty", "model_id"),
    *("run_id", "latitude", "longitude"),
)


def run(settings: ReviewSettings) -> None:
    """Write photographs worth a label, or take the labels back into shards.

    Raises:
        UserError: something in the settings or files is wrong.
    """
    out = storage.absolute(settings.out)
    if storage.list_names(out):
        raise UserError("out-exists", f"--out {out} is not empty; give a new folder")
    if settings.answers is not None:
        answers.take_back(settings, settings.answers, out)
    else:
        assert settings.predictions is not None, "the settings demand one of the two"
        log = Path(tempfile.mkdtemp(prefix="leafnet-")) / "review.log"
        with terminal.chatter_to(log):
            choose(settings, storage.absolute(settings.predictions), out)
        shutil.rmtree(log.parent)


class _Night(NamedTuple):
    """Predictions of one model that were not failed, a row for each photograph."""

    rows: pa.Table  # of _COLUMNS
    class_names: tuple[str, ...]
    model_id: str
    run_id: str  # of the newest
    nights: dict[str, str]  # the night of each run


class _Photograph(NamedTuple):
    """A photograph of the pool, read."""

    row: int  # of the night
    data: bytes
    features: NDArray[np.float32]  # [D]


def choose(settings: ReviewSettings, predictions: str, out: str) -> None:
    """Write the photographs of some nights that are most worth a label, and tasks for them.

    The pool is `settings.pool` times as many as are wanted, in turn the most uncertain and the
    most novel. Features are not kept with predictions, so those of the pool are computed again;
    where the model that made the predictions cannot be had, probabilities stand in for them.
    """
    night = _read_nights(settings, predictions)
    model = _model_of(settings, predictions, night)
    probabilities = _probabilities(night)
    margins = selection.margin(probabilities)
    novelty = night.rows["novelty"].to_numpy().astype(np.float32)
    pool = selection.pool(margins, novelty, settings.pool * settings.count)
    photographs, troubles = [], Counter[str]()
    with terminal.progress("look", len(pool)) as advance:
        for found in _read_pool(night, pool, model, probabilities, troubles):
            photographs.append(found)
            advance(1)
    if troubles:
        told = ", ".join(f"{count:,} {reason}" for reason, count in troubles.most_common())
        say(f"passed over {troubles.total():,} photographs that cannot be read any more ({told})")
    if not photographs:
        raise UserError("no-photographs", f"no photograph of {predictions} can be read any more")
    features = np.stack([photograph.features for photograph in photographs])
    places, distances = selection.k_center(features, settings.count)
    rows = [
        _row(night, photographs[place], rank, margins, novelty, float(distance))
        for rank, (place, distance) in enumerate(zip(places, distances, strict=True), start=1)
    ]
    if len(rows) < settings.count:
        say(f"only {len(rows):,} of {settings.count:,}: all others are copies, or there are none")
    shown = [photographs[place] for place in places]
    drawn = _drawn(night, settings.audit)
    chosen = {photograph.row for photograph in shown}
    shown += [photograph for photograph in drawn if photograph.row not in chosen]
    rows += [
        _row(night, photograph, rank, margins, novelty, np.inf)
        for rank, photograph in enumerate(shown[len(rows) :], start=len(rows) + 1)
    ]
    frame = _audit(predictions, night, rows, shown, chosen, {p.row for p in drawn})
    _write_review(settings, out, night, rows, [p.data for p in shown], frame if drawn else None)
    if drawn:
        say(f"audit     {len(drawn):,} photographs that chance chose are among them")
    say(f"chosen    {len(chosen):,} of {night.rows.num_rows:,} photographs: {out}")
    terminal.result(review=out, chosen=len(chosen), drawn=len(drawn))
    _say_how_to_label(settings, out)


def _read_nights(settings: ReviewSettings, predictions: str) -> _Night:
    published = ledger.published(predictions)
    if not published:
        raise UserError(
            "no-predictions", f"--predictions {predictions} has no nights; score some first"
        )
    dates = settings.date or (max(file.date for file in published),)
    missing = set(dates) - {file.date for file in published}
    if missing:
        there = sorted({file.date for file in published})
        raise UserError(
            "no-such-night",
            f"--date {min(missing)}: {predictions} has {len(there):,} nights, {there[0]} to "
            f"{there[-1]}, and not that one",
        )
    chosen = [file for file in published if file.date in dates]
    tables, classes, model_id, newest = [], (), "", ""
    for file in sorted(chosen, key=lambda file: (file.date, file.run_id), reverse=True):
        with storage.open_file(file.url) as opened:
            table = pq.read_table(opened, columns=list(_COLUMNS))
        if not table.num_rows:
            continue
        of_file = str(table["model_id"][0].as_py())
        if model_id and of_file != model_id:
            say(f"passed over {file.url}: another model than the newest, {of_file}")
            continue
        model_id, newest = of_file, newest or file.run_id
        classes = tuple(field.name for field in table.field("probabilities").type)
        tables.append(table.filter(pc.not_equal(table["status"], "failed")))
    rows = pa.concat_tables(tables) if tables else pa.table({})
    if not rows.num_rows:
        raise UserError("no-photographs", f"the nights {', '.join(dates)} have no photographs")
    # The newest of each photograph: the files come newest first.
    images = rows["image"].to_pylist()
    first = {image: i for i, image in reversed(list(enumerate(images)))}
    rows = rows.take(sorted(first.values())).combine_chunks()
    say(f"nights    {', '.join(dates)}: {rows.num_rows:,} photographs, by model {model_id}")
    return _Night(rows, classes, model_id, newest, {file.run_id: file.date for file in chosen})


def _model_of(settings: ReviewSettings, predictions: str, night: _Night) -> Bundle | None:
    """The model that scored the nights; None: it cannot be had, and nobody named it."""
    if settings.model is not None:
        model = bundle.load(settings.model)
        if model.model_id != night.model_id:
            raise UserError(
                "other-model",
                f"--model {settings.model} is {model.model_id}, and the nights were scored by "
                f"{night.model_id}; give that one, or leave --model out",
            )
        return model
    try:
        summary = storage.read_json(storage.join(predictions, ledger.RUNS, f"{night.run_id}.json"))
        model = bundle.load(summary["model"]["url"])
        if model.model_id == night.model_id:
            return model
        why = f"{model.url} is {model.model_id} now"
    except FileNotFoundError:
        why = "the night has no summary"
    except UserError as error:
        why = str(error)
    say(f"diverse   by probabilities and not by features, since {why} (--model names another)")
    return None


def _probabilities(night: _Night) -> NDArray[np.float32]:
    column = night.rows["probabilities"].combine_chunks()
    found = [column.field(i).to_numpy(zero_copy_only=False) for i in range(len(night.class_names))]
    return np.stack(found, axis=1).astype(np.float32)


def _read_pool(
    night: _Night,
    pool: NDArray[np.int64],
    model: Bundle | None,
    probabilities: NDArray[np.float32],
    troubles: Counter[str],
) -> Iterator[_Photograph]:
    """The photographs of the pool that can be read, in its order, with their features."""
    if model is None:
        for row in pool:
            data = _read(night.rows["image"][int(row)].as_py(), troubles)
            if data is not None:
                yield _Photograph(int(row), data, probabilities[row])
        return
    ready = engine.open_engine(
        model,
        engine="auto",
        precision="auto",
        threads=os.cpu_count() or 1,
        gpu=False,
        batch_size=_BATCH,
    )
    for start in range(0, len(pool), _BATCH):
        read, pixels = [], []
        for row in pool[start : start + _BATCH]:
            data = _read(night.rows["image"][int(row)].as_py(), troubles)
            if data is None:
                continue
            try:
                pixels.append(decode(data, model.image_size).pixels)
            except ImageError as error:
                troubles[error.reason] += 1
                continue
            read.append((int(row), data))
        if read:
            features = ready.features(np.stack(pixels))
            for (row, data), of_photograph in zip(read, features, strict=True):
                yield _Photograph(row, data, of_photograph)


def _drawn(night: _Night, count: int) -> list[_Photograph]:
    """So many photographs as chance has it, without those that cannot be read any more."""
    found: list[_Photograph] = []
    troubles = Counter[str]()
    for row in audit.order(night.rows) if count else ():
        data = _read(night.rows["image"][int(row)].as_py(), troubles)
        if data is not None:
            found.append(_Photograph(int(row), data, np.empty(0, np.float32)))
        if len(found) == count:
            break
    return found


def _audit(
    predictions: str,
    night: _Night,
    rows: list[dict[str, Any]],
    shown: list[_Photograph],
    chosen: set[int],
    drawn: set[int],
) -> dict[str, Any]:
    try:
        summary = storage.read_json(storage.join(predictions, ledger.RUNS, f"{night.run_id}.json"))
        field = summary["settings"].get("field")
    except FileNotFoundError:
        field = None
    places = [photograph.row for photograph in shown]
    return audit.frame(
        night.rows,
        [(r["key"], at, at in drawn, at in chosen) for r, at in zip(rows, places, strict=True)],
        predictions=predictions,
        nights=night.nights,
        model_id=night.model_id,
        field=field,
    )


def _read(image: str, troubles: Counter[str]) -> bytes | None:
    """The bytes of a photograph as predictions name it; None: counted under its trouble."""
    shard, key = shards.split_url(image)
    try:
        if not key:
            return storage.read_bytes(image)
        with storage.open_file(shard) as file:
            table = pq.read_table(file, columns=["key", "image"], filters=[("key", "=", key)])
        if table.num_rows:
            return bytes(table["image"][0].as_py())
        troubles["not-found"] += 1
    except UserError:  # a store that does not answer says nothing of the photograph
        raise
    except FileNotFoundError:
        troubles["not-found"] += 1
    # Every filesystem has errors of its own, and one photograph must not end the job.
    except Exception:
        troubles["cannot-read"] += 1
    return None


def _row(
    night: _Night,
    photograph: _Photograph,
    rank: int,
    margins: NDArray[np.float32],
    novelty: NDArray[np.float32],
    distance: float,
) -> dict[str, Any]:
    """A row of index.csv."""
    row = {name: night.rows[name][photograph.row].as_py() for name in _COLUMNS}
    name = re.sub(r"[^A-Za-z0-9._-]", "_", posixpath.basename(row["image"]))
    known = float(novelty[photograph.row])
    return {
        "key": f"{rank:04d}-{name}",
        "label": "",
        "predicted": row["label"],
        "confidence": round(row["confidence"], 4),
        "margin": round(float(margins[photograph.row]), 4),
        "novelty": round(known, 2) if np.isfinite(known) else "",
        "distance": round(distance, 4) if np.isfinite(distance) else "",
        "image": row["image"],
        "sha256": storage.sha256(photograph.data),
    }


def _write_review(
    settings: ReviewSettings,
    out: str,
    night: _Night,
    rows: list[dict[str, Any]],
    photographs: list[bytes],
    told: dict[str, Any] | None,
) -> None:
    for row, data in zip(rows, photographs, strict=True):
        storage.write_bytes(storage.join(out, PHOTOGRAPHS, row["key"]), data)
    prefix = settings.image_prefix
    if prefix is None:
        folder = storage.join(out, PHOTOGRAPHS)
        local = f"/data/local-files/?d={Path(out).name}/{PHOTOGRAPHS}"
        prefix = f"{local if storage.is_local(out) else folder}/"
    tasks = [
        labelstudio.task(
            key=row["key"],
            url=f"{prefix}{row['key']}",
            folder=out,
            image=row["image"],
            why=_why(row),
            label=row["predicted"],
            score=row["confidence"],
            model=night.model_id,
        )
        for row in rows
    ]
    storage.write_json(storage.join(out, TASKS), tasks)
    config = labelstudio.label_config(night.class_names)
    storage.write_bytes(storage.join(out, CONFIG), f"{config}\n".encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    storage.write_bytes(storage.join(out, INDEX_CSV), text.getvalue().encode())
    storage.write_json(
        storage.join(out, REVIEW),
        {
            "version": REVIEW_VERSION,
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "model_id": night.model_id,
            "class_names": list(night.class_names),
            "photographs": {row["key"]: row["sha256"] for row in rows},
            "settings": settings.model_dump(mode="json"),
            "audit": told,
        },
    )


def _why(row: dict[str, Any]) -> str:
    novel = f", novelty {row['novelty']}" if row["novelty"] != "" else ""
    return f"{row['predicted']} {row['confidence']:.2f}, lead {row['margin']:.2f}{novel}"


def _say_how_to_label(settings: ReviewSettings, out: str) -> None:
    say(f"label     by Label Studio: {CONFIG} is the labelling interface, {TASKS} is imported;")
    if storage.is_local(out) and settings.image_prefix is None:
        say(
            "          start it with LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true and "
            f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={Path(out).parent},"
        )
        say(f"          and add {storage.join(out, PHOTOGRAPHS)} as the project's local storage;")
    say(f"          or by hand: fill the column label of {storage.join(out, INDEX_CSV)}")
    say("next      python jobs/review.py --answers EXPORT.json --base SHARDS --out NEW_SHARDS")
