"""The model card that is published beside a model."""

import math
from pathlib import Path
from typing import Any

import jinja2

from leafnet.metrics.thresholds import describe


def model_card(description: dict[str, Any]) -> str:
    """Write a page of Markdown about a model (model cards: Mitchell et al. 2019, arXiv:1810.03993).

    Args:
        description: the model's `model.json`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "describe": describe,
        "figure": "{:.3f}".format,
        "share": "{:.0%}".format,
    }
    metrics = description.get("metrics") or {}
    scores = metrics.get("test", next(iter(metrics.values()), {"per_class": {}}))
    weakest = min(scores["per_class"].items(), key=lambda item: item[1]["recall"], default=None)
    values: dict[str, Any] = {"backbone": {}, "data": {}, "nan": math.nan, "weakest": weakest}
    return environment.get_template("model_card.md.jinja").render(values | description)
