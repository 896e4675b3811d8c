"""The published model: what scoring needs, where it came from, and nothing that runs.

A model is a folder with one HDF5 file of weights, perhaps two files of an int8 network,
`model.json` and a model card. `model.json` names the files with their sha256 and is written last,
by one small write: readers read only that, so a model is seen whole or not at all, also while
another takes its place. Loading rebuilds the network in leafnet's code; nothing is unpickled and
no code travels with a model.
"""

import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.data.images import DECODER_VERSION, ImageError, decode
from leafnet.metrics.novelty import Novelty
from leafnet.metrics.thresholds import Review, judge
from leafnet.models import document as model_document
from leafnet.models import hdf5, rates, registry, resnet
from leafnet.models.card import model_card
from leafnet.models.classifier import Head, head_logits
from leafnet.models.document import BUNDLE_VERSION, File, ModelDocument, model_id
from leafnet.models.openvino import Int8
from leafnet.models.runtime import forward
from leafnet.models.weights import Array, Convolutions

if TYPE_CHECKING:
    import keras


_OURS = re.compile(r"model-[0-9a-f]{16}\.(weights\.h5|int8\.xml|int8\.bin)")

_INPUT = "uint8 RGB 0..255; inside the network BGR minus the ImageNet mean (Keras `caffe` mode)"


@dataclass(frozen=True)
class Prediction:
    """What the model says of one photograph; `label` is None where it could not be decoded."""

    label: str | None
    confidence: float | None
    probabilities: dict[str, float]
    error: str | None = None
    novelty: float | None = None  # how unlike the training photographs; None: no such measure
    review: str | None = None  # why a person should look at it; None: nobody has to


@dataclass
class Bundle:
    """A published model in memory."""

    url: str
    model_id: str
    class_names: tuple[str, ...]
    image_size: int  # S, pixels
    convolutions: Convolutions
    head: Head  # on raw features
    description: dict[str, Any]  # model.json
    novelty: Novelty | None = None
    review: Review | None = None
    int8: Int8 | None = None
    int8_review: Review | None = None  # for what int8 computes, in place of `review`
    _network: "keras.Model | None" = None
    _network_precision: str = ""

    def features(
        self, pixels: NDArray[np.uint8], *, batch_size: int = 32, precision: str = "auto"
    ) -> Array:
        """Features [N, 2048] float32 of RGB `pixels` [N, S, S, 3], by TensorFlow on the CPU.

        The network is built at the first call. `auto` is as `rates.precision`; float32 is exact
        everywhere. `engine.open_engine` knows faster ways.
        """
        chosen = precision
        if precision == "auto":
            chosen = rates.precision(image_size=self.image_size, threads=os.cpu_count() or 1)
        if self._network is None or self._network_precision != chosen:
            self._network = resnet.build(
                self.convolutions, image_size=self.image_size, precision=chosen
            )
            self._network_precision = chosen
        return forward(self._network, pixels, batch_size=batch_size)

    def predict(
        self,
        photographs: Sequence[bytes],
        *,
        batch_size: int = 32,
        precision: str = "auto",
        features: Callable[[NDArray[np.uint8]], Array] | None = None,
        review: Review | None = None,
    ) -> list[Prediction]:
        """Predictions for encoded photographs, in their order, one for each.

        A photograph that cannot be decoded gets a prediction with `error` and without a label.

        Args:
            photographs: the bytes of each file.
            batch_size: photographs decoded and computed at a time.
            precision: of `Bundle.features`.
            features: computes features in place of that, such as `Engine.features`.
            review: thresholds in place of the model's, such as `Engine.review`.
        """
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
            stack = np.stack(pixels)
            made = (
                features(stack)
                if features
                else self.features(stack, batch_size=batch_size, precision=precision)
            )
            for i, prediction in zip(places, self._judge(made, review or self.review), strict=True):
                results[i] = prediction
        return [result for result in results if result is not None]

    def _judge(self, features: Array, review: Review | None) -> list[Prediction]:
        """Predictions from features [B, 2048]."""
        distances = self.novelty.distance(features) if self.novelty else None
        judged = judge(head_logits(self.head, features), distances, review)
        return [
            Prediction(None, None, {}, reason)
            if failed
            else Prediction(
                self.class_names[label],
                float(confidence),
                dict(zip(self.class_names, map(float, probabilities), strict=True)),
                novelty=None if np.isnan(distance) else float(distance),
                review=reason,
            )
            for failed, probabilities, label, confidence, distance, reason in zip(
                *judged, strict=True
            )
        ]


def save(
    url: str,
    *,
    convolutions: Convolutions,
    head: Head,
    class_names: Sequence[str],
    image_size: int,
    provenance: dict[str, Any],
    novelty: Novelty | None = None,
    review: Review | None = None,
    int8: Int8 | None = None,
    int8_review: Review | None = None,
) -> str:
    """Publish a model at the folder `url`; returns its id.

    Args:
        url: folder or URL. A model that is there stays readable until this one is complete.
        convolutions: folded backbone weights.
        head: on raw features.
        class_names: in the order of the logits.
        image_size: pixels.
        provenance: JSON-ready; what else is to be known of the model, see `model_card`. What it
            says under `review` and `int8` is kept beside what is needed to load them.
        novelty: how unlike the training photographs something is.
        review: when a person should look.
        int8: the quantized backbone.
        int8_review: the same as `review` for its features, whose rounding adds to the novelty.
    """
    files = {"weights": (_to_hdf5(convolutions, head, novelty), ".weights.h5")}
    if int8 is not None:
        files |= {
            "int8_graph": (int8.xml, ".int8.xml"),
            "int8_weights": (int8.weights, ".int8.bin"),
        }
    described = {name: _described(data, suffix) for name, (data, suffix) in files.items()}
    reviews = [review, int8_review if int8 else None]
    identity = model_id(
        digests=[entry["sha256"] for entry in described.values()],
        class_names=list(class_names),
        image_size=image_size,
        reviews=[thresholds for thresholds in reviews if thresholds],
    )
    description = {
        "version": BUNDLE_VERSION,
        "model_id": identity,
        "class_names": list(class_names),
        "image_size": image_size,
        "input": _INPUT,
        "decoder_version": DECODER_VERSION,
        "weights": described["weights"],
        **provenance,
    }
    if review is not None:
        description["review"] = provenance.get("review", {}) | asdict(review)
    if int8 is not None:
        told = provenance.get("int8", {})
        description["int8"] = told | {
            "graph": described["int8_graph"],
            "weights": described["int8_weights"],
        }
        if int8_review is not None:
            description["int8"]["review"] = told.get("review", {}) | asdict(int8_review)
    # 1. The data, under names of their own. 2. The card. 3. The pointer, which makes them the
    # model. 4. Data that no pointer names any more.
    for name, (data, _) in files.items():
        storage.write_bytes(storage.join(url, described[name]["file"]), data)
    storage.write_bytes(storage.join(url, "MODEL_CARD.md"), model_card(description).encode())
    before = storage.list_names(url)
    storage.write_json(storage.join(url, "model.json"), description)
    for name in {name for name in before if _OURS.fullmatch(name)}.difference(
        entry["file"] for entry in described.values()
    ):
        storage.delete(storage.join(url, name))
    return identity


def _described(data: bytes, suffix: str) -> dict[str, Any]:
    digest = storage.sha256(data)
    return {"file": f"model-{digest[:16]}{suffix}", "sha256": digest, "bytes": len(data)}


def load(url: str) -> Bundle:
    """The model published at the folder `url`. Needs no Ray; Keras is imported at first use.

    Of an alias, REGISTRY/champion, it is the model that it names at this moment: who holds the
    bundle keeps it, whatever the alias names later.

    Raises:
        UserError: no model is there, it is of another version, or a file of it is damaged.
    """
    url = storage.absolute(url)
    pointer = storage.join(url, "model.json")
    try:
        description = storage.read_json(pointer)
    except (FileNotFoundError, NotADirectoryError):
        named = registry.resolve(url)
        if named is not None:
            return load(named)
        raise UserError(
            "no-model", f"{pointer} does not exist; train a model with jobs/train.py"
        ) from None
    document = model_document.read(description, pointer)
    convolutions, head, novelty = _arrays(pointer, document)
    int8 = None
    if document.int8.graph and document.int8.weights:
        graph, weights = document.int8.graph, document.int8.weights
        int8 = Int8(_read_file(pointer, graph), _read_file(pointer, weights))
    quantized = document.int8.review if int8 else None
    return Bundle(
        url=url,
        model_id=document.model_id,
        class_names=tuple(document.class_names),
        image_size=document.image_size,
        convolutions=convolutions,
        head=head,
        description=description,
        novelty=novelty,
        review=document.review.review() if document.review else None,
        int8=int8,
        int8_review=quantized.review() if quantized else None,
    )


def _arrays(pointer: str, document: ModelDocument) -> tuple[Convolutions, Head, Novelty | None]:
    try:
        found = _from_hdf5(_read_file(pointer, document.weights))
        widths = [kernel.shape for kernel, _ in found[1]]
        if not widths or widths[-1][1:] != (len(document.class_names),):
            raise ValueError(f"its head is for {widths[-1:]} and not for the classes")
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            "damaged-model", f"the weights of {pointer} are not those of a model: {error}"
        ) from None
    return found


def _read_file(pointer: str, entry: File) -> bytes:
    """The file that `entry` of the description at `pointer` names, checked."""
    place = storage.join(pointer.rsplit("/", 1)[0], entry.file)
    try:
        data = storage.read_bytes(place)
    except FileNotFoundError:
        raise UserError("no-model", f"{pointer} names {place}, which is gone") from None
    if storage.sha256(data) != entry.sha256:
        raise UserError(
            "damaged-model", f"{place} is damaged: its sha256 is not that of model.json"
        )
    return data


def versions() -> dict[str, str]:
    """Versions of what a model's numbers depend on."""
    packages = ("leafnet", "tensorflow", "keras", "ray", "numpy", "pillow", "pyarrow")
    return {package: metadata.version(package) for package in packages}


def _to_hdf5(convolutions: Convolutions, head: Head, novelty: Novelty | None) -> bytes:
    """The same bytes for the same numbers, so that a model trained again has the same id."""
    sink = io.BytesIO()
    # Not `track_order`: groups that keep one also keep the time at which they were made.
    with h5py.File(sink, "w") as file:
        for name, (kernel, bias) in convolutions.items():
            file[f"backbone/{name}/kernel"], file[f"backbone/{name}/bias"] = kernel, bias
        for i, (kernel, bias) in enumerate(head):
            file[f"head/{i}/kernel"], file[f"head/{i}/bias"] = kernel, bias
        for name, array in (novelty.arrays() if novelty else {}).items():
            file[f"novelty/{name}"] = array
    return sink.getvalue()


def _from_hdf5(data: bytes) -> tuple[Convolutions, Head, Novelty | None]:
    limit = len(data)  # nothing is compressed

    def pair(file: h5py.File, place: str) -> tuple[Array, Array]:
        kernel, bias = (
            hdf5.array(file, f"{place}/{name}", limit=limit) for name in ("kernel", "bias")
        )
        if kernel.shape[-1:] != bias.shape:
            raise ValueError(f"{place} has a kernel {kernel.shape} and a bias {bias.shape}")
        return kernel, bias

    def names(file: h5py.File, place: str) -> list[str]:
        return list(hdf5.item(file, place) or ())

    with h5py.File(io.BytesIO(data), "r") as file:
        convolutions = {name: pair(file, f"backbone/{name}") for name in names(file, "backbone")}
        head = [pair(file, f"head/{i}") for i in range(len(names(file, "head")))]
        novelty = None
        if parts := names(file, "novelty"):
            novelty = Novelty(
                **{name: hdf5.array(file, f"novelty/{name}", limit=limit) for name in parts}
            )
    return convolutions, head, novelty
