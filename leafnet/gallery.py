"""Photographs worth looking at: one item of a run's galleries."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """A photograph in a gallery of a run's report."""

    kind: str  # "confident-error" | "likely-wrong-label" | "confused-pair" | "sample"
    key: str
    label: str
    predicted: str
    confidence: float
    jpeg: bytes  # thumbnail, at most 160 pixels
    cam_jpeg: bytes | None  # the same with its class activation map; None: there is none
