"""Event files for TensorBoard below RUN/tensorboard, written without TensorFlow.

    tensorboard --logdir runs

There is a folder for each split, so that the curves of train and valid share a chart. Each has one
file, which grows with every epoch and is written anew when a run is continued, so that it has every
epoch once. Fine-tuning counts its epochs from 1 again, with tags of its own (`fine_tune/…`).
"""

import io
import socket
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from leafnet.core import storage
from leafnet.data import shards
from leafnet.data.images import ImageError, decode
from leafnet.data.shards import SPLITS, ShardIndex

FOLDER = "tensorboard"
# By split and tag, the column of the history; the step is the epoch.
_HEAD = {
    "train": {
        "loss": "train_loss",
        "accuracy": "train_accuracy",
        "learning_rate": "learning_rate",
    },
    "valid": {"loss": "valid_loss", "accuracy": "valid_accuracy"},
}
_TUNED = "fine_tune/"
_FINE_TUNE = {
    split: {_TUNED + tag: column for tag, column in tags.items()} for split, tags in _HEAD.items()
}
_FINE_TUNE["train"] |= {_TUNED + column: column for column in ("images_per_s", "waited")}
_STAGES = (_HEAD, _FINE_TUNE)
_FINAL = len(_STAGES)  # the stage of the results, which come last
_RESULTS = ("accuracy", "macro_f1", "log_loss", "ece")
_MAX_CLASSES = 24  # more samples would bury the rest
_SAMPLES, _SAMPLE_PX = 4, 160


class EventLog:
    """The event files of one run, from one start of it."""

    def __init__(self, run: str) -> None:
        self._files = {split: _File(storage.join(run, FOLDER, split)) for split in SPLITS}

    def epoch(self, row: Mapping[str, float]) -> None:
        """Add a row of the head's history, and drop this epoch and later ones if they are there."""
        self._add(0, row)

    def fine_tune_epoch(self, row: Mapping[str, float]) -> None:
        """Add a row of the history of fine-tuning, which follows the head."""
        self._add(1, row)

    def _add(self, stage: int, row: Mapping[str, float]) -> None:
        for split in _STAGES[stage]:
            self._files[split].add((stage, int(row["epoch"])), _row(stage, split, row))

    def results(
        self,
        history: Sequence[Mapping[str, float]],
        scores: Mapping[str, Any],
        *,
        images: Mapping[str, bytes],
        samples: Mapping[str, bytes],
        fine_tune: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Add the results of the run, and the epochs that are missing because of a kill.

        Args:
            history: of the whole fit of the head.
            scores: `scores.scores` of each split; pictures go to the first of them.
            images: tag -> PNG.
            samples: class -> PNG, of photographs.
            fine_tune: history of the whole fine-tuning, if there was one.
        """
        last = int(history[-1]["epoch"])
        pictures = {**images, **{f"samples/{name}": png for name, png in samples.items()}}
        for split, file in self._files.items():
            events: dict[_Place, list[Any]] = {
                (stage, int(row["epoch"])): _row(stage, split, row)
                for stage, rows in enumerate((history, fine_tune))
                for row in rows
                if split in _STAGES[stage]
            }
            if split in scores:
                found = events[_FINAL, last] = _scalars(last, _final(scores[split]))
                if split == next(iter(scores)):
                    found += [_image(last, tag, png) for tag, png in pictures.items()]
            file.complete(events)


def _row(stage: int, split: str, row: Mapping[str, float]) -> list[Any]:
    columns = _STAGES[stage][split]
    return _scalars(
        int(row["epoch"]), {tag: row[name] for tag, name in columns.items() if name in row}
    )


def _final(scores: Mapping[str, Any]) -> dict[str, float]:
    values = {f"final/{name}": scores[name] for name in _RESULTS}
    if len(scores["per_class"]) <= _MAX_CLASSES:
        values |= {f"final_f1/{name}": one["f1"] for name, one in scores["per_class"].items()}
    return values


def sample_photographs(index: ShardIndex, split: str) -> dict[str, bytes]:
    """Return a strip of the first photographs of each class, as PNG, from one row group."""
    table = next(shards.unchecked_groups(index, split, ["image", "label"]))
    tiles: dict[int, list[Image.Image]] = {}
    for data, label in zip(table["image"], table["label"].to_pylist(), strict=True):
        of_class = tiles.setdefault(label, [])
        if len(of_class) < _SAMPLES:
            try:
                of_class.append(Image.fromarray(decode(data.as_py(), _SAMPLE_PX).pixels))
            except ImageError:
                continue
    return {
        index.class_names[label]: _strip(tiles[label])
        for label in sorted(tiles)[:_MAX_CLASSES]
        if tiles[label]
    }


def _strip(tiles: Sequence[Image.Image]) -> bytes:
    strip = Image.new("RGB", (len(tiles) * _SAMPLE_PX, _SAMPLE_PX))
    for place, tile in enumerate(tiles):
        strip.paste(tile, (place * _SAMPLE_PX, 0))
    sink = io.BytesIO()
    strip.save(sink, "PNG")
    return sink.getvalue()


# (stage, epoch)
_Place = tuple[int, int]


class _File:
    """The event file of one split, by place. On a disk it is appended to, elsewhere replaced."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._events: dict[_Place, list[Any]] | None = None
        self._url = ""  # of this start, once it has written something
        self._writer: Any = None

    def add(self, place: _Place, events: list[Any]) -> None:
        """Add the events of `place` in place of any at the same or later places."""
        known = self._load()
        self._events = {other: known[other] for other in known if other < place} | {place: events}
        if self._writer and len(self._events) > len(known):
            self._write(events)
            self._upload()
        else:
            self._start()

    def complete(self, events: Mapping[_Place, list[Any]]) -> None:
        """Take `events`, of all places, but keep the epochs that are known with their times."""
        known = {place: old for place, old in self._load().items() if place[0] < _FINAL}
        self._events = {**events, **known}
        if self._events:
            self._start()

    def _start(self) -> None:
        """Write everything to a new file, and delete the old ones."""
        from tensorboardX.record_writer import RecordWriter

        events = self._load()
        old = storage.list_names(self._folder)
        # TensorBoard continues in the file with the highest name.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._url = storage.join(self._folder, name)
        path = Path(self._url)
        if not storage.is_local(self._folder):
            self._scratch = tempfile.TemporaryDirectory(prefix="leafnet-")
            path = Path(self._scratch.name) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._writer:
            self._writer.close()
        # Under another name until it is complete: a kill must not leave the newest file half done.
        self._path, unfinished = path, path.with_name(f"{name}.tmp")
        self._writer = RecordWriter(str(unfinished))
        first = [_event(file_version="brain.Event:2"), _restart(min(epoch for _, epoch in events))]
        self._write([*first, *(event for place in sorted(events) for event in events[place])])
        unfinished.rename(path)
        self._upload()
        for other in old:
            storage.delete(storage.join(self._folder, other))

    def _write(self, events: Sequence[Any]) -> None:
        for event in events:
            self._writer.write(event.SerializeToString())
        self._writer.flush()

    def _upload(self) -> None:
        if not storage.is_local(self._folder):
            storage.write_bytes(self._url, self._path.read_bytes())

    def _load(self) -> dict[_Place, list[Any]]:
        """Return all events; those of earlier starts are read once."""
        if self._events is None:
            self._events = {}
            names = [name for name in storage.list_names(self._folder) if not name.endswith(".tmp")]
            # Each file has everything of the one before, which a kill may have left behind.
            for name in names[-1:]:
                for event in _read(storage.read_bytes(storage.join(self._folder, name))):
                    if event.HasField("summary"):
                        place = (_stage(event.summary.value[0].tag), event.step)
                        self._events.setdefault(place, []).append(event)
        return self._events


def _stage(tag: str) -> int:
    if tag.startswith(_TUNED):
        return 1
    return 0 if any(tag in tags for tags in _HEAD.values()) else _FINAL


# tensorboardX is imported late because it imports boto3.


def _event(step: int = 0, **content: Any) -> Any:
    from tensorboardX.proto import event_pb2

    return event_pb2.Event(wall_time=time.time(), step=step, **content)


def _summary(step: int, **value: Any) -> Any:
    from tensorboardX.proto import summary_pb2

    return _event(step, summary=summary_pb2.Summary(value=[summary_pb2.Summary.Value(**value)]))


def _scalars(step: int, values: Mapping[str, float]) -> list[Any]:
    return [_summary(step, tag=tag, simple_value=value) for tag, value in values.items()]


def _image(step: int, tag: str, png: bytes) -> Any:
    with Image.open(io.BytesIO(png)) as picture:
        width, height = picture.size
    image = {"height": height, "width": width, "colorspace": 4, "encoded_image_string": png}
    return _summary(step, tag=tag, image=image)


def _restart(step: int) -> Any:
    """Return the event that makes an open TensorBoard forget everything from `step` on."""
    return _event(step, session_log={"status": "START"})


def _read(data: bytes) -> Iterator[Any]:
    """Yield the events of a file, without a last one that a kill has cut off."""
    from tensorboardX.proto import event_pb2

    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        end = at + 12 + length + 4
        if end > len(data):
            return
        yield event_pb2.Event.FromString(data[at + 12 : end - 4])
        at = end
