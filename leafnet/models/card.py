"""The model card that is published beside a model."""

import math
from typing import Any

from leafnet.metrics.thresholds import describe


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
    lines += _card_of_temperature(description.get("temperature"))
    lines += _card_of_fine_tune(description.get("fine_tune"))
    lines += _card_of_review(description.get("review"))
    lines += _card_of_int8(description.get("int8"))
    if weights.get("source") == "random":
        lines += ["", "**The backbone has random weights: a check of the pipeline, not a model.**"]
    lines += [
        "",
        "It knows nothing but these classes: a photograph of anything else gets one of them too. "
        "Its figures hold for photographs like those it was evaluated on.",
        "",
    ]
    return "\n".join(lines)


def _card_of_temperature(document: dict[str, Any] | None) -> list[str]:
    if document is None:
        return []
    effects = [
        f"from {ece['before']:.3f} to {ece['after']:.3f} on {split}"
        for split, ece in document["ece"].items()
    ]
    return [
        "",
        f"Its probabilities are calibrated by a temperature of {document['value']:.3f}, fitted on "
        f"{document['examples']:,} validation photographs and part of the head: it took the ECE "
        + " and ".join(effects)
        + ".",
    ]


def _card_of_fine_tune(document: dict[str, Any] | None) -> list[str]:
    if document is None:
        return []
    blocks = document.get("blocks")
    stages = "All stages" if blocks == "all" else f"The last {blocks} of 4 stages"
    if not document.get("published"):
        return [
            "",
            f"{stages} were fine-tuned without a gain on validation, and left as they were.",
        ]
    return [
        "",
        f"{stages} of the backbone were fine-tuned with the head, after it was fitted; the weights "
        f"are the average over steps, as of epoch {document.get('best_epoch')}.",
    ]


def _card_of_review(document: dict[str, Any] | None) -> list[str]:
    if document is None:
        return ["", "It has no thresholds for review: there was no validation split."]
    lines = ["", f"For review are photographs with a novelty over {document['novelty']:.4g}"]
    if document["confidence"] > 1:
        lines[-1] += (
            ", and all others as well: no confidence gave "
            f"{document['precision_target']:.0%} right predictions on validation."
        )
    elif document["confidence"] == 0:
        lines[-1] += (
            ", and none for its confidence: of all validation photographs at least "
            f"{document['precision_target']:.0%} are right."
        )
    else:
        lines[-1] += (
            f" or a confidence under {document['confidence']:.3f}, chosen on validation so that "
            f"{document['precision_target']:.0%} of the others are right."
        )
    for split, of_split in document.get("splits", {}).items():
        lines.append(f"On {split}, {describe(of_split)}.")
    return lines


def _card_of_int8(document: dict[str, Any] | None) -> list[str]:
    if document is None:
        return []
    told = (
        f"int8: validation accuracy {document.get('valid_accuracy', math.nan):.4f}, "
        f"{document.get('valid_accuracy_float', math.nan):.4f} in floating point"
    )
    return ["", f"{told}." if "graph" in document else f"{told}: refused, and left out."]
