"""Tasks as a labelling tool reads them, and what it exports."""

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from leafnet.core.errors import UserError
from leafnet.labelling import labelstudio
from leafnet.labelling.labelstudio import Answer


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
    found = exported(tmp_path / "min.json", small + without)
    assert found.answers == (Answer("1.jpg", "rust"), Answer("a b.jpg", "ok"))
    found = exported(tmp_path / "min.json", small + several)
    assert found.answers == (Answer("1.jpg", None, "several labels"),)


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
        ("a.json", '{"tasks": []}', "is no list of rows; export the project as JSON"),
        ("a.csv", "file,class\n1.jpg,rust\n", "has the columns file, class; needed are key and"),
        ("a.csv", "key,label\n\xff", "is not UTF-8 text .*; save it as CSV UTF-8"),
        ("gone.json", None, r"gone\.json does not exist"),
    ],
)
def test_what_is_no_answer(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        labelstudio.read_answers(str(tmp_path / name))


def test_a_task_holds_the_label_of_the_model() -> None:
    assert task("1.jpg") == {
        "data": {
            "image": "/data/local-files/?d=review/photographs/1.jpg",
            "key": "1.jpg",
            "folder": "/data/review",
            "source": "s3://field/1.jpg",
            "why": "rust 0.41",
        },
        "predictions": [
            {
                "model_version": "0123",
                "score": 0.41,
                "result": [
                    {
                        "from_name": "label",
                        "to_name": "image",
                        "type": "choices",
                        "value": {"choices": ["rust"]},
                    }
                ],
            }
        ],
    }


@pytest.mark.parametrize(
    ("annotations", "answer"),
    [
        # Two who are right against one, and both of them cancelled.
        (
            [
                annotation("a"),
                annotation("b", ground_truth=True),
                annotation("c", ground_truth=True, was_cancelled=True),
            ],
            Answer("1.jpg", "b"),
        ),
        (
            [annotation("b", ground_truth=True), annotation("a", ground_truth=True)],
            Answer("1.jpg", None, "people disagree: a or b"),
        ),
        # Who said nothing does not disagree.
        ([annotation(), annotation("a")], Answer("1.jpg", "a")),
        ([{"id": 1}], Answer("1.jpg", None)),
        ([annotation("a"), annotation("b", "c")], Answer("1.jpg", None, "several labels")),
    ],
)
def test_whose_answer_counts(annotations: list[Any], answer: Answer, tmp_path: Path) -> None:
    entry = {**task("1.jpg"), "annotations": annotations}
    assert exported(tmp_path / "export.json", [entry]).answers == (answer,)


def test_only_choices_of_the_label_count(tmp_path: Path) -> None:
    def result(**changes: Any) -> dict[str, Any]:
        return {"type": "choices", "from_name": "label", "value": {"choices": ["rust"]}} | changes

    results = [
        result(type="textarea", value={"text": ["ok"]}),
        result(type="textarea", value={"choices": ["ok"]}),
        result(from_name="quality", value={"choices": ["blurred"]}),
        result(value={}),
        {"type": "choices", "value": {"choices": ["rust"]}},
    ]
    entry = {**task("1.jpg"), "annotations": [{"result": results}]}
    assert exported(tmp_path / "export.json", [entry]).answers == (Answer("1.jpg", "rust"),)


def test_which_photograph_and_which_folder(tmp_path: Path) -> None:
    entries = [
        {"data": {"image": "s3://b/photographs/a%20%C3%A4.jpg"}, "annotations": []},
        {"data": {"key": "b.jpg", "image": "c.jpg", "folder": "/first"}, "annotations": []},
        {"key": "d.jpg", "folder": "/second", "label": "  "},
        {"label": None},
    ]
    found = exported(tmp_path / "EXPORT.JSON", entries)
    assert [answer.key for answer in found.answers] == ["a ä.jpg", "b.jpg", "d.jpg", ""]
    assert {(answer.label, answer.trouble) for answer in found.answers} == {(None, None)}
    assert found.folder == "/first"


def test_no_answers_at_all(tmp_path: Path) -> None:
    assert exported(tmp_path / "a.json", []) == ((), None)
    (tmp_path / "a.CSV").write_text("key,label\n")
    assert labelstudio.read_answers(str(tmp_path / "a.CSV")) == ((), None)
    (tmp_path / "b.csv").write_text("label,key\nrust\n,a.jpg\n")
    found = labelstudio.read_answers(str(tmp_path / "b.csv"))
    assert found.answers == (Answer("", "rust"), Answer("a.jpg", None))


@pytest.mark.parametrize("text", ["3", '"a"', "[3]", '[{"key": "a"}, 3]', "null"])
def test_a_document_that_is_no_list_of_tasks(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"is no list of (rows|tasks); export ") as caught:
        labelstudio.read_answers(str(tmp_path / "a.json"))
    assert caught.value.reason == "bad-answers"


@pytest.mark.parametrize("header", ["key,class", "file,label"])
def test_both_columns_are_needed(header: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\na,b\n")
    with pytest.raises(UserError, match="needed are key and label") as caught:
        labelstudio.read_answers(str(tmp_path / "a.csv"))
    assert caught.value.reason == "bad-answers"


def test_three_exports_and_one_rule_on_disagreement(tmp_path: Path) -> None:
    """JSON has all annotations in a task, JSON-MIN and CSV a row for each of them."""
    labelled: dict[str, list[Any]] = {
        "1.jpg": ["rust", "rust"],
        "2.jpg": ["rust", "scab"],
        "3.jpg": [None, "scab"],
        "4.jpg": [None],
        "5.jpg": [["rust", "scab"]],
    }
    expected = (
        Answer("1.jpg", "rust"),
        Answer("2.jpg", None, "people disagree: rust or scab"),
        Answer("3.jpg", "scab"),
        Answer("4.jpg", None),
        Answer("5.jpg", None, "several labels"),
    )
    tasks, rows, lines = [], [], []
    for key, labels in labelled.items():
        given = []
        for label in labels:
            several = label if isinstance(label, list) else [label] if label else []
            given.append(annotation(*several))
            stored = {"choices": label} if isinstance(label, list) else label
            rows.append({"key": key, "folder": "/r"} | ({"label": stored} if label else {}))
            text = json.dumps(stored) if isinstance(label, list) else label or ""
            lines.append({"id": 1, "key": key, "folder": "/r", "label": text})
        tasks.append({"data": {"key": key, "folder": "/r"}, "annotations": given})
    assert exported(tmp_path / "all.json", tasks) == (expected, "/r")
    assert exported(tmp_path / "min.json", rows) == (expected, "/r")
    with open(tmp_path / "all.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "key", "folder", "label"])
        writer.writeheader()
        writer.writerows(lines)
    assert labelstudio.read_answers(str(tmp_path / "all.csv")) == (expected, "/r")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_an_index_that_a_spreadsheet_saved(tmp_path: Path, encoding: str) -> None:
    text = 'Key ; Label\n1.jpg;"Pepper,_bell"\n2.jpg;bru\u0302lure\n3.jpg\n'
    (tmp_path / "index.csv").write_text(text, encoding=encoding)
    assert labelstudio.read_answers(str(tmp_path / "index.csv")).answers == (
        Answer("1.jpg", "Pepper,_bell"),
        Answer("2.jpg", "br\u00fblure"),
        Answer("3.jpg", None),
    )
