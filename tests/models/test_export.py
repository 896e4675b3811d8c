"""Exports that say what the model says, and one that does not."""

import json
import uuid
from pathlib import Path

import numpy as np
import pytest

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.core.settings import validate
from leafnet.data.shards import ShardIndex
from leafnet.models import bundle, classifier, export, resnet, runtime
from leafnet.models.bundle import Bundle
from leafnet.models.settings import ExportSettings
from leafnet.models.weights import FEATURES, load_weights
from tests.conftest import make_bucket, use_server
from tests.support.s3_server import Server

SIZE = 64
FORMATS = {"tf_saved_model": "a", "onnx": "a.onnx", "openvino": "a.xml", "litert": "a.tflite"}


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """Pixels [7, S, S, 3] in which an exchange of axes or colours shows."""
    ramp = np.linspace(0, 1, SIZE)[None, :, None, None] * np.array([0.2, 0.5, 1.0])
    noise = np.random.default_rng(3).uniform(0, 255, (7, SIZE, SIZE, 3))
    return np.array(noise * ramp, np.uint8)


@pytest.fixture(scope="module")
def model(weights_file: str, noise: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A published model with two layers in its head, to which not all noise is of one class."""
    url = str(tmp_path_factory.mktemp("model"))
    weights = load_weights(weights_file)
    hidden, (kernel, bias) = classifier.initial_head([8], 3, inputs=FEATURES, seed=0)
    network = resnet.build(weights.convolutions, image_size=SIZE, precision="float32")
    features = runtime.forward(network, noise, batch_size=len(noise))
    # Logits of mean 0 in every class: none can be the largest for all.
    bias = -classifier.head_logits([hidden, (kernel, bias)], features).mean(axis=0)
    bundle.save(
        url,
        convolutions=weights.convolutions,
        head=[hidden, (kernel, bias)],
        class_names=("früh", "healthy", "late"),
        image_size=SIZE,
        provenance={},
    )
    return url


def settings(model: str, form: str, out: Path, **changes: object) -> ExportSettings:
    values = {"model": model, "to": form, "out": str(out), "count": 10, **changes}
    return validate(ExportSettings, values)


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_says_what_the_model_says(
    form: str,
    model: str,
    data_set: ShardIndex,
    noise: np.ndarray,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / FORMATS[form]
    export.run(settings(model, form, out, shards=data_set.root))
    assert "9 of 9 photographs (test of" in capfd.readouterr().out
    beside = out / "leafnet.json" if form == "tf_saved_model" else Path(f"{out}.json")
    told = json.loads(beside.read_text())
    assert told["class_names"] == ["früh", "healthy", "late"]
    assert told["input"]["shape"] == ["N", SIZE, SIZE, 3]
    assert told["parity"]["equal_labels"] == told["parity"]["photographs"] == 9
    assert told["parity"]["max_difference"] < 1e-4
    # As others read it, with another number of photographs than it was checked on.
    run = export.opened(form, out)
    loaded = bundle.load(model)
    parity = export.compare(loaded, run, iter([noise[:1], noise]))
    assert parity["max_difference"] < 1e-4
    assert len(np.unique(run(noise).argmax(axis=1))) > 1  # or equal labels would say little


def test_an_export_of_another_model_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = export.write

    def write_other(model: Bundle, form: str, path: Path) -> None:
        kernel, bias = model.head[-1]
        turned = [*model.head[:-1], (-kernel, -bias)]
        write(Bundle(**(vars(model) | {"head": turned})), form, path)

    monkeypatch.setattr(export, "write", write_other)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"100\.0 % of 10 photographs get another label"):
        export.run(settings(model, "onnx", out / "a.onnx"))
    assert not out.exists()
    export.run(settings(model, "onnx", out / "a.onnx", max_changed=100))
    assert json.loads((out / "a.onnx.json").read_text())["parity"]["equal_labels"] == 0


@pytest.mark.parametrize(
    ("form", "name", "message"),
    [
        ("onnx", "a.tflite", r"--to onnx writes a file \*.onnx, found --out"),
        ("onnx", "there.onnx", "is there already; give another --out, or --overwrite"),
        ("tf_saved_model", "folder", "is there already"),
        ("onnx", "beside.onnx", r"beside\.onnx\.json is there already"),
        ("openvino", "pair.xml", r"pair\.bin is there already"),
    ],
)
def test_what_is_refused(form: str, name: str, message: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "there.onnx").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "beside.onnx.json").write_text("mine")
    (tmp_path / "pair.bin").write_text("mine")
    with pytest.raises(UserError, match=message):
        export.run(settings(model, form, tmp_path / name))
    found = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert found == ["mine"] * 4


def test_a_folder_of_others_is_not_overwritten(
    model: str, moto: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_server(monkeypatch, moto.environment())
    bucket = make_bucket(f"exports-{uuid.uuid4().hex[:12]}")
    for place in (str(tmp_path / "thesis"), bucket):
        storage.write_bytes(storage.join(place, "variables", "thesis.txt"), b"years")
        values = {"model": model, "to": "tf_saved_model", "out": place, "overwrite": True}
        with pytest.raises(
            UserError, match=r"has no leafnet\.json.*give an empty or a new"
        ) as told:
            export.run(validate(ExportSettings, values))
        assert told.value.reason == "not-ours"
        assert len(storage.list_files(place)) == 1


def test_a_folder_is_overwritten_and_what_others_put_there_stays(tmp_path: Path) -> None:
    out, made = tmp_path / "served", tmp_path / "1"
    for folder, content in ((out, "old"), (made, "new")):
        for name in ("saved_model.pb", "variables/variables.index"):
            storage.write_bytes(str(folder / name), content.encode())
    (out / "thesis.txt").write_text("years")
    export._publish(made, str(out))
    assert (out / "saved_model.pb").read_text() == "new"
    assert (out / "variables" / "variables.index").read_text() == "new"
    assert (out / "thesis.txt").read_text() == "years"


def test_a_format_whose_package_is_not_there(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(export._NEEDS, "litert", ("ai_edge_litert_which_is_not",))
    with pytest.raises(UserError, match=r'pip install "leafnet\[export\]"'):
        export.run(settings(model, "litert", tmp_path / "a.tflite"))


def test_an_export_is_replaced(model: str, tmp_path: Path) -> None:
    out = tmp_path / "a.onnx"
    out.write_text("old")
    export.run(settings(model, "onnx", out, overwrite=True, count=1))
    assert out.stat().st_size > 80_000_000


def test_a_folder_and_a_pair_in_object_storage(
    moto: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_server(monkeypatch, moto.environment())
    bucket = make_bucket(f"exports-{uuid.uuid4().hex[:12]}")
    folder, pair = tmp_path / "1", tmp_path / "pair"
    for name in ("saved_model.pb", "variables/variables.index"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    pair.mkdir()
    for name in ("a.xml", "a.bin"):
        (pair / name).write_text(name)
    export._publish(folder, f"{bucket}/served/1")
    export._publish(pair / "a.xml", f"{bucket}/a.xml")
    found = {file.url: storage.read_bytes(file.url).decode() for file in storage.list_files(bucket)}
    assert found == {
        f"{bucket}/a.bin": "a.bin",
        f"{bucket}/a.xml": "a.xml",
        f"{bucket}/served/1/saved_model.pb": "saved_model.pb",
        f"{bucket}/served/1/variables/variables.index": "variables/variables.index",
    }
