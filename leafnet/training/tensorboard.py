"""Event files for TensorBoard below RUN/tensorboard, written without TensorFlow.

    tensorboard --logdir runs

A folder for each split, so that the curves of train and valid share a chart. Each has one file,
which grows with every epoch and is written anew where a run goes on: an epoch is in it once.
Fine-tuning counts its epochs anew, and has tags of its own, `fine_tune/…`, in the same files.
"""

import io
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from leafnet.core import storage
from leafnet.data import shards
from leafnet.data.images import ImageError, decode
from leafnet.data.shards import SPLITS, ShardIndex

FOLDER = "tensorboard"
# What an epoch's row of the history says, by split and tag; the step is the epoch.
_SCALARS = {
    "train": {
        "loss": "train_loss",
        "accuracy": "train_accuracy",
        "learning_rate": "learning_rate",
    },
    "valid": {"loss": "valid_loss", "accuracy": "valid_accuracy"},
}
_TUNED = "fine_tune/"
_SCALARS_TUNED = {
    split: {_TUNED + tag: name for tag, name in tags.items()} for split, tags in _SCALARS.items()
}

_SCALARS_TUNED["train"] |= {_TUNED + name: name for name in ("images_per_s", "waited")}

_STAGES = (_SCALARS, _SCALARS_TUNED)
_RESULTS = ("accuracy", "macro_f1", "log_loss", "ece")
_MAX_CLASSES = 24  # more samples would bury the rest
_SAMPLES, _SAMPLE_PX = 4, 160


class EventLog:
    """The event files of one run, from one start of it.

    Local files are appended to; elsewhere a file is written whole after each epoch, a few
    kilobytes.
    """

    def __init__(self, run: str) -> None:
        self._folder = storage.join(run, FOLDER)
        self._files = {split: _File(storage.join(self._folder, split)) for split in SPLITS}

    def epoch(self, row: Mapping[str, float]) -> None:
        """Add a row of the head's history; rows of this epoch and later ones, if there are, go."""
        self._add(0, row)

    def fine_tune_epoch(self, row: Mapping[str, float]) -> None:
        """The same of fine-tuning, which comes after the head."""
        self._add(1, row)

    def _add(self, stage: int, row: Mapping[str, float]) -> None:
        place = (stage, int(row["epoch"]))
        for split, values in _values(stage, row).items():
            self._files[split].add(place, _scalars(place[1], values))

    def results(
        self,
        history: Sequence[Mapping[str, float]],
        scores: Mapping[str, Any],
        *,
        images: Mapping[str, bytes],
        samples: Mapping[str, bytes],
        fine_tune: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Add what the run came to, and the epochs that a kill kept from the files.

        Args:
            history: of the whole fit of the head.
            scores: `scores.scores` of each split; pictures go to the first of them.
            images: tag -> PNG.
            samples: class -> PNG, of photographs.
            fine_tune: history of the whole fine-tuning, if there was one.
        """
        last = int(history[-1]["epoch"])
        known = {split: file.places() for split, file in self._files.items()}
        for stage, rows in enumerate((history, fine_tune)):
            for row in rows:
                place = (stage, int(row["epoch"]))
                for split, values in _values(stage, row).items():
                    if place not in known[split]:
                        self._files[split].put(place, _scalars(place[1], values))
        for number, (split, of_split) in enumerate(scores.items()):
            values = {f"final/{name}": of_split[name] for name in _RESULTS}
            if len(of_split["per_class"]) <= _MAX_CLASSES:
                for name, of_class in of_split["per_class"].items():
                    values[f"final_f1/{name}"] = of_class["f1"]
            events = _scalars(last, values)
            if number == 0:
                for tag, png in images.items():
                    events += _image(last, tag, png)
                for name, png in samples.items():
                    events += _image(last, f"samples/{name}", png)
            self._files[split].put((0, last), events, over=_SCALARS.get(split, {}))
        for file in self._files.values():
            file.write()


def _values(stage: int, row: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """What `row` says: split -> tag -> value."""
    found = {
        split: {tag: row[name] for tag, name in tags.items() if name in row}
        for split, tags in _STAGES[stage].items()
    }
    return {split: values for split, values in found.items() if values}


def sample_photographs(index: ShardIndex, split: str) -> dict[str, bytes]:
    """A strip of the first photographs of each class in `split`, as PNG, from one row group."""
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


# Where events stand in a file: (0 for the head or 1 for fine-tuning, epoch).
_Place = tuple[int, int]


class _File:
    """The events of one split: place -> its events, as they are on disk."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._url: str | None = None  # none: nothing written by this start
        self._events: dict[_Place, list[Any]] | None = None

    def places(self) -> set[_Place]:
        return set(self._load())

    def add(self, place: _Place, events: list[Any]) -> None:
        """Put the events of the latest place, and write them."""
        before = self._load()
        goes_on = self._url is not None and (not before or place > max(before))
        for later in [known for known in before if known >= place]:
            del before[later]
        before[place] = events
        if goes_on and storage.is_local(self._folder):
            assert self._url is not None
            with open(self._url, "ab") as file:
                file.write(b"".join(map(_record, events)))
        elif goes_on:
            self._store(str(self._url))
        else:
            self.write()

    def put(
        self, place: _Place, events: list[Any], *, over: Mapping[str, str] | None = None
    ) -> None:
        """Put events to be written; of those of the same place only the tags `over` stay."""
        before = self._load()
        kept = [
            event
            for event in before.get(place, [])
            if over and {value.tag for value in event.summary.value} <= set(over)
        ]
        before[place] = kept + events

    def write(self) -> None:
        """Write all anew, under a name that TensorBoard takes for a later one."""
        if not self._load():
            return
        old = storage.list_names(self._folder)
        # It reads on in the file with the highest name, and forgets what that says again.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._url = storage.join(self._folder, name)
        self._store(self._url)
        for file in old:
            if file != name:
                storage.delete(storage.join(self._folder, file))

    def _store(self, url: str) -> None:
        places = self._load()
        events = [_opening(), _restart(min(epoch for _, epoch in places))]
        events += [event for place in sorted(places) for event in places[place]]
        storage.write_bytes(url, b"".join(map(_record, events)))

    def _load(self) -> dict[_Place, list[Any]]:
        """All events; those of earlier starts are read once."""
        if self._events is None:
            self._events = {}
            names = [name for name in storage.list_names(self._folder) if not name.endswith(".tmp")]
            # Each file has all of the one before it, which a kill may have left.
            for name in names[-1:]:
                for event in _read(storage.read_bytes(storage.join(self._folder, name))):
                    if event.HasField("summary"):
                        stage = int(event.summary.value[0].tag.startswith(_TUNED))
                        self._events.setdefault((stage, event.step), []).append(event)
        return self._events


# Events, in the format of TensorFlow's record files. tensorboardX comes with Ray Tune; it is
# imported late because it imports boto3.


def _scalars(step: int, values: Mapping[str, float]) -> list[Any]:
    from tensorboardX.proto import event_pb2, summary_pb2

    now = time.time()
    return [
        event_pb2.Event(
            wall_time=now,
            step=step,
            summary=summary_pb2.Summary(
                value=[summary_pb2.Summary.Value(tag=tag, simple_value=value)]
            ),
        )
        for tag, value in values.items()
    ]


def _image(step: int, tag: str, png: bytes) -> list[Any]:
    from tensorboardX.proto import event_pb2, summary_pb2

    with Image.open(io.BytesIO(png)) as picture:
        width, height = picture.size
    image = summary_pb2.Summary.Image(
        height=height, width=width, colorspace=4, encoded_image_string=png
    )
    value = summary_pb2.Summary.Value(tag=tag, image=image)
    summary = summary_pb2.Summary(value=[value])
    return [event_pb2.Event(wall_time=time.time(), step=step, summary=summary)]


def _opening() -> Any:
    from tensorboardX.proto import event_pb2

    return event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2")


def _restart(step: int) -> Any:
    """What makes a TensorBoard that is open forget all from `step` on."""
    from tensorboardX.proto import event_pb2

    log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    return event_pb2.Event(wall_time=time.time(), step=step, session_log=log)


def _record(event: Any) -> bytes:
    from tensorboardX.record_writer import masked_crc32c

    data: bytes = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + next(sums) + data + next(sums)


def _read(data: bytes) -> Iterator[Any]:
    """The events of a file; a last one that was cut off by a kill is left out."""
    from tensorboardX.proto import event_pb2

    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        end = at + 12 + length + 4
        if end > len(data):
            return
        yield event_pb2.Event.FromString(data[at + 12 : end - 4])
        at = end
