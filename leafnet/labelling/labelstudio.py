"""What a labelling tool reads and writes: Label Studio's tasks and exports, and a plain CSV.

The formats are those of https://labelstud.io/guide/task_format and /guide/predictions.
"""

import csv
import io
import json
import posixpath
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote
from xml.sax.saxutils import quoteattr

from leafnet.core import storage
from leafnet.core.errors import UserError

# What the folder of a review holds.
PHOTOGRAPHS, TASKS, CONFIG = "photographs", "tasks.json", "label_config.xml"
INDEX_CSV, REVIEW = "index.csv", "review.json"
REVIEW_VERSION = 1

# Names of the tags in the labelling interface.
_IMAGE, _LABEL = "image", "label"


class Answer(NamedTuple):
    """What came back for one photograph."""

    key: str  # its file in the folder of the review
    label: str | None  # None: skipped, or of no use
    trouble: str | None = None  # why it is of no use


class Answers(NamedTuple):
    """A file of answers."""

    answers: tuple[Answer, ...]
    folder: str | None  # of the review, where the file tells it


def label_config(class_names: Sequence[str]) -> str:
    """The labelling interface, XML: a photograph and one choice among the classes.

    >>> print(label_config(["a", "b"]))
    <View>
      <Image name="image" value="$image" zoom="true"/>
      <Text name="why" value="$why"/>
      <Choices name="label" toName="image" choice="single" showInline="true">
        <Choice value="a"/>
        <Choice value="b"/>
      </Choices>
    </View>
    """
    choices = "\n".join(f"    <Choice value={quoteattr(name)}/>" for name in class_names)
    return (
        f'<View>\n  <Image name="{_IMAGE}" value="$image" zoom="true"/>\n'
        '  <Text name="why" value="$why"/>\n'
        f'  <Choices name="{_LABEL}" toName="{_IMAGE}" choice="single" showInline="true">\n'
        f"{choices}\n  </Choices>\n</View>"
    )


def task(
    *, key: str, url: str, folder: str, image: str, why: str, label: str, score: float, model: str
) -> dict[str, Any]:
    """A task with the model's label filled in.

    Args:
        key: file of the photograph in `folder`.
        url: by which the tool shows it.
        folder: of the review.
        image: where the photograph came from.
        why: it is worth a label, for people.
        label: the model's.
        score: its probability.
        model: its id.
    """
    result = {
        "from_name": _LABEL,
        "to_name": _IMAGE,
        "type": "choices",
        "value": {"choices": [label]},
    }
    return {
        "data": {"image": url, "key": key, "folder": folder, "source": image, "why": why},
        "predictions": [{"model_version": model, "score": score, "result": [result]}],
    }


def read_answers(url: str) -> Answers:
    """The answers in Label Studio's export (JSON or JSON-MIN) or a CSV with `key` and `label`.

    Raises:
        UserError: it is neither.
    """
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        raise UserError("no-such-file", f"--answers {url} does not exist") from None
    if url.lower().endswith(".csv"):
        return _from_csv(url, data)
    try:
        document = json.loads(data)
    except ValueError as error:
        raise UserError("bad-answers", f"--answers {url} is not valid JSON: {error}") from None
    if not isinstance(document, list) or not all(isinstance(entry, dict) for entry in document):
        raise UserError(
            "bad-answers",
            f"--answers {url} is no list of tasks; export the project as JSON or JSON-MIN",
        )
    answers, folder = [], None
    for entry in document:
        task = entry.get("data", entry)  # JSON-MIN has no level for it
        folder = folder or task.get("folder")
        key = task.get("key") or unquote(posixpath.basename(str(task.get(_IMAGE, ""))))
        answers.append(
            _of_task(key, entry) if "annotations" in entry else _of_text(key, entry.get(_LABEL))
        )
    return Answers(tuple(answers), folder)


def _from_csv(url: str, data: bytes) -> Answers:
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError("bad-answers", f"--answers {url} is no CSV in UTF-8: {error}") from None
    if rows and not {"key", "label"} <= rows[0].keys():
        raise UserError(
            "bad-answers",
            f"--answers {url} has the columns {', '.join(map(str, rows[0]))}; needed are key and "
            "label",
        )
    return Answers(tuple(_of_text(row["key"] or "", row["label"]) for row in rows), None)


def _of_text(key: str, label: Any) -> Answer:
    if isinstance(label, dict):  # several choices in JSON-MIN
        return Answer(key, None, "several labels")
    return Answer(key, str(label or "").strip() or None)


def _of_task(key: str, entry: dict[str, Any]) -> Answer:
    """The answer of all who labelled it: who marked it as ground truth, else everybody's."""
    given = [a for a in entry["annotations"] if not a.get("was_cancelled")]
    given = [a for a in given if a.get("ground_truth")] or given
    labels = set()
    for annotation in given:
        chosen = [
            choice
            for result in annotation.get("result", [])
            if result.get("type") == "choices" and result.get("from_name", _LABEL) == _LABEL
            for choice in result.get("value", {}).get("choices", [])
        ]
        if len(chosen) > 1:
            return Answer(key, None, "several labels")
        labels.update(chosen)
    if len(labels) > 1:
        return Answer(key, None, f"people disagree: {' or '.join(sorted(labels))}")
    return Answer(key, labels.pop() if labels else None)
