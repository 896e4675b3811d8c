"""The published model: what scoring needs, where it came from, and nothing that runs.

A model is a folder with one HDF5 file of weights, `model.json` and a model card. `model.json`
names the weights file and its sha256 and is written last, by one small write: readers read only
that, so a model is seen whole or not at all, also while another takes its place. Loading rebuilds
the network in leafnet's code; nothing is unpickled and no code travels with a model.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from leafnet import classifier, storage
from leafnet.backbone import Array, choose_precision
from leafnet.classifier import Head
from leafnet.errors import UserError
from leafnet.images import DECODER_VERSION, ImageError, decode
from leafnet.metrics import softmax

if TYPE_CHECKING:
    import keras

BUNDLE_VERSION = 1
_INPUT = "uint8 RGB 0..255; inside the network BGR minus the ImageNet mean (Keras `caffe` mode)"


@dataclass(frozen=True)
class Prediction:
    """What the model says of one photograph; `label` is None where it could not be decoded."""

    label: str | None
    confidence: float | None
    probabilities: dict[str, float]
    error: str | None = None


@dataclass
class Bundle:
    """A published model in memory."""

    url: str
    model_id: str
    class_names: tuple[str, ...]
    image_size: int  # pixels
    convolutions: dict[str, tuple[Array, Array]]
    head: Head  # on raw features
    description: dict[str, Any]  # model.json
    _network: "keras.Model | None" = None
    _network_precision: str = ""

    def network(self, precision: str = "auto") -> "keras.Model":
        """The classifier, uint8 [B, S, S, 3] -> logits [B, C] float32; built at the first call.

        `auto` is bfloat16 where this machine's processor has it; float32 is exact everywhere.
        """
        chosen, _ = choose_precision(precision, compute_capability=None)
        if self._network is None or self._network_precision != chosen:
            self._network = classifier.build(
                self.convolutions, self.head, image_size=self.image_size, precision=chosen
            )
            self._network_precision = chosen
        return self._network

    def predict(
        self, photographs: Sequence[bytes], *, batch_size: int = 32, precision: str = "auto"
    ) -> list[Prediction]:
        """Predictions for encoded photographs, in their order, one for each.

        A photograph that cannot be decoded gets a prediction with `error` and without a label.
        """
        network = self.network(precision)
        results: list[Prediction | None] = [None] * len(photographs)
        for start in range(0, len(photographs), batch_size):
            pixels, places = [], []
            for i in range(start, min(start + batch_size, len(photographs))):
                try:
                    pixels.append(decode(photographs[i], self.image_size).pixels)
                    places.append(i)
                except ImageError as error:
                    results[i] = Prediction(None, None, {}, f"{error.reason}: {error}")
            if not pixels:
                continue
            probabilities = softmax(forward(network, np.stack(pixels), batch_size=batch_size))
            for i, row in zip(places, probabilities, strict=True):
                best = int(row.argmax())
                results[i] = Prediction(
                    self.class_names[best],
                    float(row[best]),
                    {n: float(p) for n, p in zip(self.class_names, row, strict=True)},
                )
        return [result for result in results if result is not None]


def forward(network: "keras.Model", pixels: NDArray[np.uint8], *, batch_size: int) -> Array:
    """Outputs [N, …] float32 of `network` for `pixels` [N, S, S, 3], in batches of one shape.

    The last batch is padded with zeros and cut, so that the graph is compiled once.
    """
    outputs = []
    for start in range(0, len(pixels), batch_size):
        batch = pixels[start : start + batch_size]
        rows = len(batch)
        if rows < batch_size:
            padding = np.zeros((batch_size - rows, *batch.shape[1:]), batch.dtype)
            batch = np.concatenate([batch, padding])
        outputs.append(np.asarray(network.predict_on_batch(batch), np.float32)[:rows])
    return np.concatenate(outputs)


def save(
    url: str,
    *,
    convolutions: dict[str, tuple[Array, Array]],
    head: Head,
    class_names: Sequence[str],
    image_size: int,
    provenance: dict[str, Any],
) -> str:
    """Publish a model at the folder `url`; returns its id.

    Args:
        url: folder or URL. A model that is there stays readable until this one is complete.
        convolutions: folded backbone weights.
        head: on raw features.
        class_names: in the order of the logits.
        image_size: pixels.
        provenance: JSON-ready; what else is to be known of the model, see `describe`.
    """
    data = _to_hdf5(convolutions, head)
    digest = storage.sha256(data)
    identity = json.dumps([digest, list(class_names), image_size, DECODER_VERSION])
    description = {
        "version": BUNDLE_VERSION,
        "model_id": hashlib.sha256(identity.encode()).hexdigest()[:16],
        "class_names": list(class_names),
        "image_size": image_size,
        "input": _INPUT,
        "decoder_version": DECODER_VERSION,
        "weights": {
            "file": f"model-{digest[:16]}.weights.h5",
            "sha256": digest,
            "bytes": len(data),
        },
        **provenance,
    }
    # 1. The weights, under a name of their own. 2. The card. 3. The pointer, which makes them
    # the model. 4. Weights that no pointer names any more.
    storage.write_bytes(storage.join(url, description["weights"]["file"]), data)
    storage.write_bytes(storage.join(url, "MODEL_CARD.md"), model_card(description).encode())
    before = storage.list_names(url)
    storage.write_json(storage.join(url, "model.json"), description)
    for name in before:
        if name.endswith(".weights.h5") and name != description["weights"]["file"]:
            storage.delete(storage.join(url, name))
    return str(description["model_id"])


def load(url: str) -> Bundle:
    """The model published at the folder `url`. Needs no Ray; Keras is imported at first use.

    Raises:
        UserError: no model is there, it is of another version, or its weights do not match.
    """
    url = storage.absolute(url)
    pointer = storage.join(url, "model.json")
    try:
        description = storage.read_json(pointer)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            "no-model", f"{pointer} does not exist; train a model with jobs/train.py"
        ) from None
    version = description.get("version") if isinstance(description, dict) else None
    if version != BUNDLE_VERSION:
        raise UserError(
            "other-version", f"{pointer} has version {version}, this leafnet reads {BUNDLE_VERSION}"
        )
    if description["decoder_version"] != DECODER_VERSION:
        raise UserError(
            "other-decoder",
            f"{pointer} was trained with decoder {description['decoder_version']}, this leafnet "
            f"has {DECODER_VERSION}: its pixels would differ; train again",
        )
    weights = description["weights"]
    place = storage.join(url, weights["file"])
    try:
        data = storage.read_bytes(place)
    except FileNotFoundError:
        raise UserError("no-model", f"{pointer} names {place}, which is gone") from None
    if storage.sha256(data) != weights["sha256"]:
        raise UserError(
            "damaged-model", f"{place} is damaged: its sha256 is not that of model.json"
        )
    convolutions, head = _from_hdf5(data)
    return Bundle(
        url=url,
        model_id=description["model_id"],
        class_names=tuple(description["class_names"]),
        image_size=description["image_size"],
        convolutions=convolutions,
        head=head,
        description=description,
    )


def versions() -> dict[str, str]:
    """Versions of what a model's numbers depend on."""
    packages = ("leafnet", "tensorflow", "keras", "ray", "numpy", "pillow", "pyarrow")
    return {package: metadata.version(package) for package in packages}


def _to_hdf5(convolutions: dict[str, tuple[Array, Array]], head: Head) -> bytes:
    sink = io.BytesIO()
    with h5py.File(sink, "w", track_order=True) as file:
        for name, (kernel, bias) in convolutions.items():
            file[f"backbone/{name}/kernel"], file[f"backbone/{name}/bias"] = kernel, bias
        for i, (kernel, bias) in enumerate(head):
            file[f"head/{i}/kernel"], file[f"head/{i}/bias"] = kernel, bias
    return sink.getvalue()


def _from_hdf5(data: bytes) -> tuple[dict[str, tuple[Array, Array]], Head]:
    with h5py.File(io.BytesIO(data), "r") as file:
        convolutions = {
            name: (group["kernel"][()], group["bias"][()])
            for name, group in file["backbone"].items()
        }
        head = [
            (file[f"head/{i}/kernel"][()], file[f"head/{i}/bias"][()])
            for i in range(len(file["head"]))
        ]
    return convolutions, head


def model_card(description: dict[str, Any]) -> str:
    """A page of Markdown about the model (model cards: Mitchell et al. 2019, arXiv:1810.03993)."""
    data, weights = description.get("data", {}), description.get("backbone", {})
    lines = [
        f"# Model {description['model_id']}",
        "",
        f"Classifies photographs as one of {len(description['class_names'])} classes: "
        + ", ".join(f"`{name}`" for name in description["class_names"])
        + ".",
        "",
        "| | |",
        "|---|---|",
        f"| network | ResNet50, BatchNorm folded, and a head of {description.get('head', '?')} |",
        f"| backbone weights | {weights.get('source', '?')}, "
        f"{weights.get('fingerprint', '?')[:16]} |",
        f"| input | {description['image_size']} x {description['image_size']} pixels, "
        f"{description['input']} |",
        f"| trained on | {data.get('shards', '?')}, {data.get('fingerprint', '?')[:16]} |",
        f"| trained at | {description.get('trained_at', '?')} |",
        "",
    ]
    metrics = description.get("metrics", {})
    if metrics:
        lines += [
            "| split | images | accuracy (95 % interval) | macro F1 | log loss | ECE |",
            "|---|---|---|---|---|---|",
        ]
        for split, scores in metrics.items():
            lines.append(
                f"| {split} | {scores['examples']} | {scores['accuracy']:.3f} "
                f"({scores['accuracy_low']:.3f} to {scores['accuracy_high']:.3f}) | "
                f"{scores['macro_f1']:.3f} | {scores['log_loss']:.3f} | {scores['ece']:.3f} |"
            )
        worst = min(
            metrics.get("test", next(iter(metrics.values())))["per_class"].items(),
            key=lambda item: item[1]["recall"],
        )
        lines += [
            "",
            f"Weakest class: `{worst[0]}`, of which {worst[1]['recall']:.0%} are found.",
        ]
    if weights.get("source") == "random":
        lines += ["", "**The backbone has random weights: a check of the pipeline, not a model.**"]
    lines += [
        "",
        "It knows nothing but these classes: a photograph of anything else gets one of them too. "
        "Its figures hold for photographs like those it was evaluated on.",
        "",
    ]
    return "\n".join(lines)
