"""What jobs/export.py does: a published model in other formats, checked against the model.

Whatever the format, `image`, uint8 RGB [N, S, S, 3] with values 0..255, goes in, and
`probabilities`, float32 [N, C], comes out: scaling and softmax are inside, decoding and resizing
are not: `recipes` has a line for each usual decoder, measured. It computes in float32.
"""

import importlib.util
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafnet.core import storage, terminal
from leafnet.core.errors import UserError
from leafnet.core.terminal import say
from leafnet.data import shards, synthetic
from leafnet.data.images import decode
from leafnet.data.shards import SPLITS
from leafnet.metrics.scores import softmax
from leafnet.models import bundle, classifier, onnx, openvino, recipes
from leafnet.models.bundle import Bundle
from leafnet.models.classifier import head_logits
from leafnet.models.settings import ExportSettings

Pixels = NDArray[np.uint8]  # [N, S, S, 3] RGB
Probabilities = NDArray[np.float32]  # [N, C]
Run = Callable[[Pixels], Probabilities]

_SUFFIX = {"onnx": ".onnx", "openvino": ".xml", "litert": ".tflite"}
_NEEDS = {"onnx": ("onnx", "onnxruntime"), "openvino": ("openvino",), "litert": ("ai_edge_litert",)}
_EXTRA = {"onnx": "export", "openvino": "openvino", "litert": "export"}
_SIDECAR = "leafnet.json"
_BATCH = 32
_DECODED = 50  # photographs that each usual decoder is tried on


def run(settings: ExportSettings) -> None:
    """Write the model in another format, unless it then says something else than the model.

    Raises:
        UserError: something in the settings or the model is wrong, or the export gives too many
            photographs another label; nothing is left at --out.
    """
    out, form = storage.absolute(settings.out), settings.to
    _check(out, settings)
    model = bundle.load(settings.model)
    photographs, source = _photographs(model, settings.shards, settings.count)
    log = Path(tempfile.mkdtemp(prefix="leafnet-")) / "export.log"
    with terminal.chatter_to(log), tempfile.TemporaryDirectory(prefix="leafnet-") as folder:
        say(f"model     {model.url}   id {model.model_id}, {len(model.class_names)} classes")
        terminal.keeps("nothing of the export is kept")
        made = Path(folder) / Path(out).name
        write(model, form, made)
        runtime, size = opened(form, made), model.image_size
        kept: list[bytes] = []
        parity = compare(model, runtime, _stacks(_decoded(photographs, size, kept)))
        say(
            f"parity    {parity['equal_labels']:,} of {parity['photographs']:,} photographs "
            f"({source}) have the same label; probabilities differ by at most "
            f"{parity['max_difference']:.2g}"
        )
        decoders = recipes.measure(runtime, kept, size=size)
        for name, told in decoders.items():
            if told["photographs"]:
                say(
                    f"          decoded by {name}: {told['equal_labels']:,} of "
                    f"{told['photographs']:,} the same label, pixels {told['mean_levels']:.2f} "
                    "levels off"
                )
        changed = 100 * (1 - parity["equal_labels"] / parity["photographs"])
        if changed > settings.max_changed:
            raise UserError(
                "export-differs",
                f"{changed:.1f} % of {parity['photographs']:,} photographs get another label from "
                f"the export in {form} than from the model, more than {settings.max_changed:g} %; "
                "nothing was written",
            )
        beside = storage.join(out, _SIDECAR) if made.is_dir() else f"{out}.json"
        # First, as the mark of a folder that is leafnet's to overwrite.
        told_of = _description(model, form, parity | {"of": source}, decoders)
        storage.write_json(beside, told_of)
        _publish(made, out)
        say(f"exported  {out}")
        terminal.result(exported=out, parity=parity)
        say(f"also in   {beside}: classes in order, how to feed it, and the parity")
    shutil.rmtree(log.parent)


def _check(out: str, settings: ExportSettings) -> None:
    form = settings.to
    missing = [n for n in _NEEDS.get(form, ()) if importlib.util.find_spec(n) is None]
    if missing:
        raise UserError(
            "no-exporter",
            f"--to {form} needs {' and '.join(missing)}, which is not installed: pip install "
            f'"leafnet[{_EXTRA[form]}]"',
        )
    suffix = _SUFFIX.get(form, "")
    if not out.endswith(suffix):
        raise UserError("bad-name", f"--to {form} writes a file *{suffix}, found --out {out}")
    if suffix:
        places = [out, f"{out}.json"] + [f"{out.removesuffix('.xml')}.bin"] * (form == "openvino")
        taken = [place for place in places if storage.exists(place)]
    else:
        taken = [out] if storage.is_file(out) or storage.list_names(out) else []
    if taken and not settings.overwrite:
        raise UserError(
            "out-exists", f"{taken[0]} is there already; give another --out, or --overwrite"
        )
    if taken and not suffix and not storage.is_file(storage.join(out, _SIDECAR)):
        raise UserError(
            "not-ours",
            f"--out {out} has no {_SIDECAR}, and so no export of leafnet is there to overwrite; "
            "give an empty or a new folder",
        )


def write(model: Bundle, form: str, path: Path) -> None:
    """Write `model` as the file, or of tf_saved_model the folder, `path`."""
    if form == "onnx":
        names = json.dumps(list(model.class_names), ensure_ascii=False)
        metadata = {"model_id": model.model_id, "class_names": names}
        size = model.image_size
        data = onnx.build(model.convolutions, model.head, image_size=size, metadata=metadata)
        path.write_bytes(data)
        return
    if form == "openvino":
        graph = openvino.classifier(model.convolutions, model.head, image_size=model.image_size)
        openvino.save(graph, path)
        return
    import keras

    network = classifier.build(
        model.convolutions, model.head, image_size=model.image_size, precision="float32"
    )
    # Named, so that the signature is.
    outputs = {"probabilities": keras.ops.softmax(network.output)}
    keras.Model(network.input, outputs, name="leafnet").export(path, format=form, verbose=False)


def opened(form: str, path: Path) -> Run:
    """A function that runs what `write` wrote, as its users do: pixels to probabilities."""
    if form == "onnx":
        return _onnx(path)
    if form == "openvino":
        return openvino.open_classifier(path)
    return _litert(path) if form == "litert" else _saved_model(path)


def _saved_model(path: Path) -> Run:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))

    def run(pixels: Pixels) -> Probabilities:
        # What a server calls. It does not keep its variables alive, `loaded` does.
        found = loaded.signatures["serving_default"](image=tf.constant(pixels))
        return np.asarray(found["probabilities"])

    return run


def _onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixels: np.asarray(session.run(["probabilities"], {"image": pixels})[0])


def _litert(path: Path) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=2)

    def run(pixels: Pixels) -> Probabilities:
        place = interpreter.get_input_details()[0]["index"]
        interpreter.resize_tensor_input(place, pixels.shape)
        # After the resizing: a signature's runner makes room for its tensors when it is made.
        found = interpreter.get_signature_runner()(image=pixels)
        return np.asarray(found["probabilities"])

    return run


def compare(model: Bundle, run: Run, photographs: Iterator[Pixels]) -> dict[str, Any]:
    """How far the probabilities of `run` are from those of `model` in float32, ready for JSON.

    Args:
        model: the published model.
        run: pixels to probabilities.
        photographs: stacks of pixels [B, S, S, 3].
    """
    count, equal, largest, total = 0, 0, 0.0, 0.0
    for pixels in photographs:
        expected = softmax(head_logits(model.head, model.features(pixels, precision="float32")))
        found = run(pixels)
        if found.shape != expected.shape or not np.isfinite(found).all():
            raise UserError(
                "export-differs",
                f"the export gives {list(found.shape)} for {list(expected.shape)} probabilities, "
                "or numbers that are none",
            )
        difference = np.abs(found - expected)
        count += len(pixels)
        equal += int((found.argmax(axis=1) == expected.argmax(axis=1)).sum())
        largest = max(largest, float(difference.max()))
        total += float(difference.sum())
    return {
        "photographs": count,
        "equal_labels": equal,
        "equal_labels_share": equal / count,
        "max_difference": largest,
        "mean_difference": total / (count * len(model.class_names)),
    }


def _photographs(model: Bundle, root: str | None, count: int) -> tuple[Iterator[bytes], str]:
    """`count` encoded photographs, and what they are."""
    if root is None:
        return map(recipes.jpeg, _drawn(3 * model.image_size, count)), "drawn leaves"
    index = shards.read_index(root)
    shards.check_sizes(index)
    split = next((split for split in reversed(SPLITS) if index.examples(split)), None)
    if split is None:
        raise UserError("empty-split", f"{index.root} has no photographs")
    encoded = (
        image
        for shard in index.of_split(split)
        for table in shards.row_groups(index.root, shard)
        for image in table["image"].to_pylist()
    )
    return itertools.islice(encoded, count), f"{split} of {index.root}"


def _decoded(photographs: Iterator[bytes], size: int, kept: list[bytes]) -> Iterator[Pixels]:
    """The pixels of each, and the first `_DECODED` files to `kept`."""
    for image in photographs:
        if len(kept) < _DECODED:
            kept.append(image)
        yield decode(image, size).pixels


def _drawn(size: int, count: int) -> Iterator[Pixels]:
    for seed in range(count):
        label = synthetic.CLASS_NAMES[seed % len(synthetic.CLASS_NAMES)]
        yield synthetic.draw_leaf(label, seed=seed, width=size, height=size * 3 // 4)


def _stacks(photographs: Iterator[Pixels]) -> Iterator[Pixels]:
    waiting: list[Pixels] = []
    for pixels in photographs:
        waiting.append(pixels)
        if len(waiting) == _BATCH:
            yield np.stack(waiting)
            waiting = []
    if waiting:
        yield np.stack(waiting)


def _publish(made: Path, out: str) -> None:
    """Bring a file, a file and the one beside it, or a folder to `out`, what is opened first last.

    A folder or a pair does not appear in one step; `saved_model.pb` and the .xml come last. Of an
    export that was there only that is deleted: the files beside it have the same names again.
    """
    if made.is_dir():
        storage.delete(storage.join(out, "saved_model.pb"))
        files = sorted((path for path in made.rglob("*") if path.is_file()), key=_opened_first)
        for path in files:
            below = path.relative_to(made).as_posix()
            storage.write_bytes(storage.join(out, below), path.read_bytes())
        return
    # OpenVINO's weights.
    for path in sorted(made.parent.iterdir(), key=lambda path: path == made):
        place = storage.join(out.rpartition("/")[0], path.name)
        storage.write_bytes(place, path.read_bytes())


def _opened_first(path: Path) -> bool:
    return path.name == "saved_model.pb"


def _description(
    model: Bundle, form: str, parity: dict[str, Any], decoders: dict[str, Any]
) -> dict[str, Any]:
    size = model.image_size
    return {
        "format": form,
        "model_id": model.model_id,
        "class_names": list(model.class_names),
        "input": {
            "name": "image",
            "dtype": "uint8",
            "shape": ["N", size, size, 3],
            "values": "RGB, 0..255, upright, stretched to a square with antialiasing",
            "decoders": decoders,
        },
        "output": {
            "name": "probabilities",
            "dtype": "float32",
            "shape": ["N", len(model.class_names)],
        },
        "runtime": recipes.RUNTIMES[form],
        "decoder_version": model.description["decoder_version"],
        "parity": parity,
        "versions": bundle.versions(),
    }
