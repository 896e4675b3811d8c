"""Tasks as a labelling tool reads them, and what it exports."""

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from leafnet import labelstudio
from leafnet.errors import UserError
from leafnet.labelstudio import Answer


def task(key: str) -> dict[str, Any]:
    return labelstudio.task(
        key=key,
        url=f"/data/local-files/?d=review/photographs/{key}",
        folder="/data/review",
        image="s3://field/1.jpg",
        why="rust 0.41",
        label="rust",
        score=0.41,
        model="0123",
    )


def annotation(*labels: str, **more: Any) -> dict[str, Any]:
    value = {"choices": list(labels)}
    result = {"from_name": "label", "to_name": "image", "type": "choices", "value": value}
    return {"id": 7, "completed_by": 1, "was_cancelled": False, "result": [result], **more}


def exported(path: Path, entries: list[Any]) -> labelstudio.Answers:
    path.write_text(json.dumps(entries))
    return labelstudio.read_answers(str(path))


def test_tags_of_tasks_are_those_of_the_interface() -> None:
    names = ["rust", 'a "b" & <c>', "früh"]
    view = ElementTree.fromstring(labelstudio.label_config(names))
    image, _, choices = view
    made = task("1.jpg")
    (result,) = made["predictions"][0]["result"]
    assert (result["from_name"], result["to_name"]) == (choices.get("name"), image.get("name"))
    assert choices.get("toName") == image.get("name")
    assert [choice.get("value") for choice in choices] == names
    shown = {element.get("value", "").removeprefix("$") for element in view} - {""}
    assert shown <= made["data"].keys()


@pytest.mark.parametrize(
    ("annotations", "answer"),
    [
        ([annotation("rust")], Answer("1.jpg", "rust")),
        ([annotation("rust"), annotation("rust")], Answer("1.jpg", "rust")),
        ([annotation("rust"), annotation("ok", was_cancelled=True)], Answer("1.jpg", "rust")),
        ([annotation("rust"), annotation("ok", ground_truth=True)], Answer("1.jpg", "ok")),
        ([annotation("x", was_cancelled=True)], Answer("1.jpg", None)),
        ([annotation()], Answer("1.jpg", None)),
        ([], Answer("1.jpg", None)),
        ([annotation("rust", "ok")], Answer("1.jpg", None, "several labels")),
        (
            [annotation("rust"), annotation("ok")],
            Answer("1.jpg", None, "people disagree: ok or rust"),
        ),
    ],
)
def test_what_people_answered(annotations: list[Any], answer: Answer, tmp_path: Path) -> None:
    entry = {"id": 1, **task("1.jpg"), "annotations": annotations, "total_annotations": 1}
    found = exported(tmp_path / "export.json", [entry])
    assert found.answers == (answer,)
    assert found.folder == "/data/review"


def test_the_small_export(tmp_path: Path) -> None:
    small = [{"id": 1, "label": "rust", "annotator": 1, **task("1.jpg")["data"]}]
    several = [{**small[0], "label": {"choices": ["rust", "ok"]}}]
    without = [{"image": "/data/local-files/?d=review/photographs/a%20b.jpg", "label": "ok"}]
    found = exported(tmp_path / "min.json", small + several + without)
    assert found.answers == (
        Answer("1.jpg", "rust"),
        Answer("1.jpg", None, "several labels"),
        Answer("a b.jpg", "ok"),
    )


def test_a_table(tmp_path: Path) -> None:
    path = tmp_path / "index.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["key", "label", "x"], ["1.jpg", " früh "], ["2.jpg", "", 1]])
    found = labelstudio.read_answers(str(path))
    assert found.answers == (Answer("1.jpg", "früh"), Answer("2.jpg", None))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "is not valid JSON"),
        ("a.json", '{"tasks": []}', "is no list of tasks; export the project as JSON"),
        ("a.csv", "file,class\n1.jpg,rust\n", "has the columns file, class; needed are key and"),
        ("a.csv", "key,label\n\xff", "is no CSV in UTF-8"),
        ("gone.json", None, r"gone\.json does not exist"),
    ],
)
def test_what_is_no_answer(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        labelstudio.read_answers(str(tmp_path / name))
