"""What a labelling tool reads and writes: Label Studio's tasks and exports, and a plain CSV.

The formats are those of https://labelstud.io/guide/task_format and /guide/predictions.
"""

import posixpath
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote
from xml.sax.saxutils import quoteattr

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.data.tables import SUFFIXES, columns, read_table
from leafnet.preparation.samples import class_name

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
    """The answers in Label Studio's export (JSON, JSON-MIN or CSV), or in an index.csv of a review.

    One rule for all of them: of several people who labelled a photograph, those who marked their
    label as ground truth count (only JSON tells), else everybody; where they disagree, or chose
    several labels, there is no answer.

    Raises:
        UserError: it is none of them.
    """
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        raise UserError("no-such-file", f"--answers {url} does not exist") from None
    try:
        # Without a suffix, an export is JSON.
        rows = read_table(url if url.lower().endswith(SUFFIXES) else f"{url}.json", data)
    except UserError as error:
        remedy = "; export the project as JSON, JSON-MIN or CSV"
        raise UserError("bad-answers", f"--answers {error}{remedy}") from None
    there = columns(rows)
    if rows and not url.lower().endswith(".json") and not {"key", "label"} <= set(there):
        raise UserError(
            "bad-answers",
            f"--answers {url} has the columns {', '.join(there)}; needed are key and label",
        )
    if url.lower().endswith(".json") and "" in there:
        raise UserError("bad-answers", f"--answers {url} is no list of tasks; export the project")
    answers: dict[str, list[Answer]] = {}
    folder = None
    for row in rows:
        task = row.get("data", row)  # only JSON has a level for it
        folder = folder or task.get("folder")
        key = task.get("key") or unquote(posixpath.basename(str(task.get(_IMAGE, ""))))
        answer = _of_task(key, row) if "annotations" in row else _of_text(key, row.get(_LABEL))
        answers.setdefault(key, []).append(answer)
    return Answers(tuple(map(_settle, answers.values())), folder)


def _settle(answers: list[Answer]) -> Answer:
    """One answer of all for one photograph: JSON-MIN and CSV have a row for each person."""
    trouble = next((answer for answer in answers if answer.trouble is not None), None)
    labels = {answer.label for answer in answers} - {None}
    if trouble or len(labels) < 2:
        return trouble or next((a for a in answers if a.label is not None), answers[0])
    told = " or ".join(sorted(map(str, labels)))
    return Answer(answers[0].key, None, f"people disagree: {told}")


def _of_text(key: str, label: Any) -> Answer:
    # Several choices: an object in JSON-MIN, its text in CSV.
    if isinstance(label, dict) or str(label).startswith('{"choices"'):
        return Answer(key, None, "several labels")
    return Answer(key, class_name(str(label or "")))


def _of_task(key: str, entry: dict[str, Any]) -> Answer:
    """The answer of all who labelled it: who marked it as ground truth, else everybody's."""
    given = [a for a in entry["annotations"] if not a.get("was_cancelled")]
    given = [a for a in given if a.get("ground_truth")] or given
    answers = []
    for annotation in given:
        chosen = [
            choice
            for result in annotation.get("result", [])
            if result.get("type") == "choices" and result.get("from_name", _LABEL) == _LABEL
            for choice in result.get("value", {}).get("choices", [])
        ]
        if len(chosen) > 1:
            return Answer(key, None, "several labels")
        answers += [Answer(key, class_name(choice)) for choice in chosen]
    return _settle(answers or [Answer(key, None)])
