"""What jobs store, made in a moment from drawn leaves: the reports are pages about it."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray

from leafnet.core import storage
from leafnet.core.settings import validate
from leafnet.data import synthetic
from leafnet.data.shards import ShardIndex
from leafnet.evaluation.gallery import Item
from leafnet.metrics import drift, prevalence, thresholds
from leafnet.metrics import scores as metrics_scores
from leafnet.metrics.scores import tally
from leafnet.metrics.thresholds import Outcomes, Review
from leafnet.models import bundle
from leafnet.scoring import explain, ledger, reading, sheet, thumbnails
from leafnet.scoring import rows as scoring_rows
from leafnet.scoring.staging import Counts, publish, staging_root, start_staging
from leafnet.training.settings import TrainSettings
from tests.conftest import leaf_jpeg

CLASSES = synthetic.CLASS_NAMES
THRESHOLDS = Review(confidence=0.75, precision_target=0.95, novelty=60.0)

Array = NDArray[np.float32]


def outcomes(count: int, *, seed: int = 0, novelty: float = 45.0) -> tuple[Array, Outcomes]:
    """(logits [N, 3], outcomes) of `count` examples, the classes in turn; most are right."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    logits = rng.normal(0, 1, (count, len(CLASSES))).astype(np.float32)
    logits[np.arange(count), labels] += 3
    distance = (novelty + 6 * rng.standard_normal(count)).astype(np.float32)
    return logits, thresholds.outcomes(logits, labels, distance)


def left_edge(pixels: NDArray[np.uint8], classes: NDArray[np.int64]) -> Array:
    """The class maps of a model that sees every class at the left edge."""
    return np.repeat(np.array([[[4, 2, 1, 0]]], np.float32), 4, axis=1).repeat(len(pixels), axis=0)


def write_night(
    out: Path | str,
    date: str,
    *,
    images: str,
    names: list[str],
    seed: int = 0,
    novelty: float = 45.0,
    failed: int = 0,
    placed: bool = False,
    model_id: str = "0123456789abcdef",
    run_id: str | None = None,
    leaves: int = 12,
    side: int = 64,
    explained: bool = False,
    logits: Array | None = None,
    **settings: Any,
) -> str:
    """A published night of photographs called `names` below `images`; returns its run id.

    The first `failed` of them are failed, and the others show `leaves` different leaves of `side`
    pixels. With `explained` those for review have activation maps, of a model that looks at the
    left edge; `logits` [N, 3] are what the model says, `settings` what the job was told besides.
    Nothing is written below `images`.
    """
    rng = np.random.default_rng(seed)
    count = len(names)
    reasons = ["truncated: the JPEG file is cut off after 19 bytes" for _ in range(failed)]
    photographs = pa.Table.from_pylist(
        [
            {
                "place": i,
                "image": f"{images}/{name}",
                "version": "1",
                "reason": reasons[i] if i < failed else None,
                "width": None if i < failed else 320,
                "height": None if i < failed else 240,
                "latitude": 52.1 + 0.01 * rng.standard_normal() if placed and i % 3 else None,
                "longitude": 11.6 + 0.02 * rng.standard_normal() if placed and i % 3 else None,
            }
            for i, name in enumerate(names)
        ],
        reading.PHOTOGRAPH,
    )
    drawn, found = outcomes(count - failed, seed=seed, novelty=novelty)
    logits = drawn if logits is None else logits
    run_id = run_id or f"{date.replace('-', '')}T020000Z-{seed:06x}"
    schema = scoring_rows.schema(CLASSES, model_id=model_id, run_id=run_id)
    rows = scoring_rows.rows(
        photographs,
        logits,
        found.novelty,
        output=schema,
        class_names=CLASSES,
        review=THRESHOLDS,
        model_id=model_id,
        run_id=run_id,
    )
    pixels = np.stack(
        [
            synthetic.draw_leaf(CLASSES[i % 3], seed=i, width=side, height=side)
            for i in range(leaves)
        ]
    )
    decoded = np.arange(failed, count)
    maker = thumbnails.Maker(seen=explained)
    rows = maker.attach(rows, pixels[np.arange(len(decoded)) % leaves], decoded)
    root = staging_root(str(out), model_id=model_id, images=images)
    staging = start_staging(root, date=date, number=1, found=None)
    staging.run_id = run_id
    staging.add(rows)
    if explained:
        shown = sheet.shown(staging)
        assert shown is not None, "nothing is for review"
        made = explain.make(shown, left_edge, CLASSES, size=side)
        staging.keep_aside(thumbnails.EXPLAINED, made)
    counts: list[Counts] = []
    publish(staging, str(out), schema=schema, check=counts.append)
    sheet.keep_thumbnails(staging, str(out))
    logits_of_valid, valid = outcomes(300, seed=99)
    labels = np.arange(300) % len(CLASSES)
    held_out = metrics_scores.scores(tally(logits_of_valid, labels), CLASSES)
    status = {name: counts[0].status.get(name, 0) for name in ("ok", "review", "failed")}
    summary = {
        "run_id": run_id,
        "date": date,
        "images": images,
        "scored": count,
        "status": status,
        "labels": counts[0].label,
        "reasons": counts[0].reason,
        "engine": "tensorflow",
        "precision": "bfloat16",
        "device": "2 CPUs",
        "images_per_second": {"from_start_to_end": 35.0},
        "model": {
            "url": "runs/leaves/model",
            "model_id": model_id,
            "class_names": list(CLASSES),
            "trained_at": "2026-11-20T10:00:00+00:00",
            "review": {"confidence": 0.75, "novelty": 60.0, "precision_target": 0.95},
            "reference": drift.reference(valid),
            "calibration": held_out["calibration"],
            "prevalence": prevalence.document(prevalence.fit_bias(logits_of_valid, labels)),
        },
        "started_at": f"{date}T02:00:00+00:00",
        "settings": {"images": images, "max_failed": 5.0, "ray": {"address": None}, **settings},
        "versions": {"leafnet": "0.1.0"},
        "seconds": {"total": 12.5},
    }
    storage.write_json(storage.join(str(out), ledger.RUNS, f"{run_id}.json"), summary)
    staging.delete()
    return run_id


def write_run(
    run: Path,
    index: ShardIndex,
    *,
    class_names: tuple[str, ...] | None = None,
    fine_tuned: bool = False,
) -> None:
    """A finished run on the data set `index`."""
    names = class_names or index.class_names
    rng = np.random.default_rng(0)

    def scores(count: int, seed: int) -> dict[str, Any]:
        labels = np.arange(count) % len(names)
        logits = np.random.default_rng(seed).normal(0, 1, (count, len(names)))
        logits[np.arange(count), labels] += 3
        return metrics_scores.scores(tally(logits.astype(np.float32), labels), names)

    _, valid = outcomes(90)
    effect = thresholds.effect(valid, THRESHOLDS)
    settings = validate(TrainSettings, {"shards": index.root, "name": run.name})
    documents: dict[str, Any] = {
        "metrics.json": {"test": scores(90, 1), "valid": scores(90, 2), "train": scores(300, 3)},
        "run.json": {
            "model_id": "0123456789abcdef",
            "finished_at": datetime(2026, 11, 24, 8, tzinfo=UTC).isoformat(),
            "seconds": {
                "start": 4.0,
                "features": 40.0,
                "head": 9.0,
                "publish": 1.5,
                "total": 54.5,
            },
            "images_per_second": {"features": 38.2, "head": 1250.0},
            "command": "python jobs/train.py --shards data/shards --name leaves",
            "workers": 1,
            "gpus": 0,
            "precision": "bfloat16",
            "epochs": 12,
            "best_epoch": 9,
            "versions": bundle.versions(),
        },
        "model/model.json": {
            "version": 1,
            "model_id": "0123456789abcdef",
            "class_names": list(names),
            "best_epoch": 9,
            "head": "512, 3 units",
            "weights": {"file": "w", "sha256": "a" * 64, "bytes": 1},
            "backbone": {"source": "imagenet", "fingerprint": "b" * 64},
            "data": {"shards": index.root, "fingerprint": index.fingerprint},
            "git_commit": None,
            "review": {
                "confidence": 0.75,
                "novelty": 60.0,
                "precision_target": 0.95,
                "splits": {"valid": effect, "test": effect},
            },
        },
    }
    for name, document in documents.items():
        storage.write_json(str(run / name), document)
    rows = ["epoch,learning_rate,train_loss,train_accuracy,valid_loss,valid_accuracy"]
    for epoch in range(1, 13):
        loss = 1.1 * np.exp(-epoch / 4) + 0.2
        rows.append(
            f"{epoch},0.001,{loss:.4f},{1 - loss / 2:.4f},"
            f"{loss + 0.1 + 0.01 * rng.random():.4f},{0.95 - loss / 2:.4f}"
        )
    (run / "history.csv").write_text("\n".join(rows) + "\n")
    (run / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    if fine_tuned:
        _add_fine_tuning(run, documents["run.json"])


def _add_fine_tuning(run: Path, facts: dict[str, Any]) -> None:
    """Twenty epochs, of which the 17th was the best."""
    rows = [
        "epoch,step,learning_rate,train_loss,train_accuracy,valid_loss,valid_accuracy,"
        "images_per_s,waited,best"
    ]
    for epoch in range(1, 21):
        loss = 0.5 * np.exp(-epoch / 6) + 0.1
        valid = loss + 0.05 + 0.002 * abs(epoch - 17)
        rows.append(
            f"{epoch},{10 * epoch},0.002,{loss:.4f},{1 - loss / 2:.4f},{valid:.4f},"
            f"{0.98 - valid / 2:.4f},12.5,0.013,{float(epoch <= 17)}"
        )
    (run / "fine_tune.csv").write_text("\n".join(rows) + "\n")
    of_split = {"accuracy": 0.86, "log_loss": 0.41, "ece": 0.031}
    facts["fine_tune"] = {
        "blocks": 2,
        "published": True,
        "epochs": 20,
        "best_epoch": 17,
        "head_alone_valid": {"valid_loss": 0.452, "valid_accuracy": 0.854},
        "images_per_s": 12.5,
        "waited": 0.013,
        "head_alone": {"test": of_split, "valid": of_split},
        "fine_tuned": {split: of_split | {"accuracy": 0.94} for split in ("test", "valid")},
    }
    facts["seconds"] |= {"fine_tune": 480.0, "fine_tuned_features": 20.0, "total": 554.5}
    storage.write_json(str(run / "run.json"), facts)


def items(count: int, kind: str) -> list[Item]:
    """Items of a gallery, each with a map of where the model looked."""
    return [
        Item(
            kind=kind,
            key=f"test/{CLASSES[i % 3]}/leaf_{i:04d}.jpg",
            label=CLASSES[i % 3],
            predicted=CLASSES[(i + 1) % 3],
            confidence=0.99 - 0.01 * i,
            jpeg=leaf_jpeg(CLASSES[i % 3], seed=i, size=160),
            cam_jpeg=leaf_jpeg(CLASSES[i % 3], seed=i + 1, size=160),
        )
        for i in range(count)
    ]
