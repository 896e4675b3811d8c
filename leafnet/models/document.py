"""`model.json`: what a published model says of itself, and the id that its contents give."""

import hashlib
import json
from dataclasses import astuple
from typing import Annotated, Any

from pydantic import Field

from leafnet.core.documents import ClassNames, Count, Document, FileName, ModelId, Sha256, parse
from leafnet.core.errors import UserError
from leafnet.data.images import DECODER_VERSION
from leafnet.metrics.thresholds import Review

BUNDLE_VERSION = 1

_REMEDY = "copy the model again from where it was published, or train again with jobs/train.py"


class File(Document):
    """A file beside model.json."""

    file: FileName
    sha256: Sha256
    bytes: Count


class Thresholds(Document):
    """When a person should look."""

    confidence: float
    precision_target: float
    novelty: float

    def review(self) -> Review:
        """The same for use."""
        return Review(self.confidence, self.precision_target, self.novelty)


class _Int8(Document):
    # None: int8 was refused, and what is told of it is why.
    graph: File | None = None
    weights: File | None = None
    review: Thresholds | None = None


class ModelDocument(Document):
    """The fields of model.json that are needed to load a model; the others are told to people."""

    model_id: ModelId
    class_names: Annotated[ClassNames, Field(min_length=1)]
    image_size: Annotated[int, Field(ge=1, le=8192)]  # pixels
    decoder_version: int
    weights: File
    review: Thresholds | None = None
    int8: _Int8 = _Int8()

    @property
    def files(self) -> tuple[File, ...]:
        """Every file that the model consists of."""
        return tuple(f for f in (self.weights, self.int8.graph, self.int8.weights) if f)


def fields(document: Any, url: str) -> ModelDocument:
    """`document`, the JSON at `url`, as a model.json.

    Raises:
        UserError: it is damaged, or of another version.
    """
    return parse(
        ModelDocument,
        document,
        url=url,
        version=BUNDLE_VERSION,
        reason="damaged-model",
        remedy=_REMEDY,
    )


def read(document: Any, url: str) -> ModelDocument:
    """As `fields`, of a model that this leafnet can load and whose id its contents give.

    Raises:
        UserError: it is damaged, was edited, or is of another version.
    """
    found = fields(document, url)
    if found.decoder_version != DECODER_VERSION:
        raise UserError(
            "other-decoder",
            f"{url} was trained with decoder {found.decoder_version}, this leafnet "
            f"has {DECODER_VERSION}: its pixels would differ; train again",
        )
    int8 = found.int8
    if (int8.graph is None) != (int8.weights is None):
        raise UserError("damaged-model", f"{url} names one of two int8 files; {_REMEDY}")
    reviews = [found.review, int8.review if int8.graph else None]
    expected = model_id(
        digests=[file.sha256 for file in found.files],
        class_names=found.class_names,
        image_size=found.image_size,
        reviews=[thresholds.review() for thresholds in reviews if thresholds],
    )
    if found.model_id != expected:
        raise UserError(
            "damaged-model",
            f"{url} was edited: its classes, thresholds and files are not those of model "
            f"{found.model_id}; {_REMEDY}",
        )
    return found


def model_id(
    *, digests: list[str], class_names: list[str], image_size: int, reviews: list[Review]
) -> str:
    """16 hexadecimal digits over all that decides on a prediction.

    Args:
        digests: sha256 of the weights, and of graph and weights of int8 if there are any.
        class_names: in the order of the logits.
        image_size: pixels.
        reviews: thresholds of the model and of int8, those that there are.
    """
    names = ("confidence", "precision_target", "novelty")
    identity = [digests[0], class_names, image_size, DECODER_VERSION]
    identity += [dict(zip(names, astuple(review), strict=True)) for review in reviews]
    identity += digests[1:]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
