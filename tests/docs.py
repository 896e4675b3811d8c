"""Writes jobs/SETTINGS.md and the table of modules in leafnet/README.md: `python -m tests.docs`.

Default, unit and meaning of a setting stand in the settings.py of its package; WHEN says here when
to change it. A setting that is not in WHEN is an error, of the command and of the tests.
"""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from leafnet.core.settings import Settings, _metavar, _shown, leaves
from tests.test_layering import FILES, LEAFNET, MAY_IMPORT

ROOT = Path(__file__).parents[1]
SETTINGS = ROOT / "jobs" / "SETTINGS.md"
MODULES = ROOT / "leafnet" / "README.md"

_INTRO = """\
# Settings

Written by `make docs` from the settings.py of each package; edit there, or in tests/docs.py what is
said on when to change a setting.

Every setting is a flag (`--head.epochs 80`) and a key of the YAML that `--config` reads (`epochs`
below `head`); flags go before the file. A list is given with commas. `none` gives up a setting that
has a value in the file. Text and numbers in brackets behind a setting say what it takes.
"""

# When to change it; `job:setting` goes before `setting`.
WHEN = {
    # All jobs.
    "ray.address": "The work belongs on a cluster, and RAY_ADDRESS is not set",
    "ray.cpus": "Leave processors to others on a shared machine",
    "ray.wait": "Machines take longer, or shorter, to start",
    "precision": "Two machines must agree to the last digit: `float32`",
    "gpu": "`false` keeps a shared GPU free; `true` fails rather than use CPUs",
    "batch_size": "GPU memory runs out (smaller), or a large GPU idles (larger)",
    "max_megapixels": "Scans or panoramas above it are real photographs; memory goes with it",
    "lock_timeout": "Machines stall for longer than this (larger)",
    "seed": "To see how much chance is in a result",
    "data.local_cache": "Shards are in object storage and are read more than once",
    "data.local_cache_gb": "The disk is smaller, or all shards would fit",
    # prepare
    "source": "Always given",
    "out": "Always given",
    "train:out": "Runs belong in object storage or on a shared disk",
    "prepare:split": "Few photographs: more for validation and test",
    "group": "Several photographs show the same plant, field or day",
    "duplicates": "You want to see them before anything is dropped",
    "near_duplicates": "The report shows that look-alikes are copies: `drop`",
    "near_distance": "The report has pairs that are no copies (smaller)",
    "shard_mb": "Many small data sets (smaller), a hundred million photographs (larger)",
    "row_group": "Photographs of many megabytes (smaller)",
    "prepare:seed": "Another split of the same photographs",
    "overwrite": "The data set there is to be replaced",
    "note": "Whoever reads the report must know something first, such as that the data are drawn",
    # train
    "shards": "Always given",
    "name": "Always given",
    "weights": "No internet: a file or URL; `random` only checks the pipeline",
    "image_size": "Small lesions (larger, slower), or speed (smaller)",
    "workers": "More than one machine with GPUs, or to leave some to others",
    "score:workers": "Memory runs out (fewer)",
    "views": "Few photographs (more), little time or disk (fewer)",
    "augment": "Orientation matters, as in photographs with text",
    "precision_target": "Reviewing is cheap (higher), or costs more than a mistake (lower)",
    "precision_guarantee": "A mistake that nobody reviews is costly: 0.9 or 0.95",
    "int8": "Nights run on CPUs, and have to be faster",
    "cross_validate": "Few photographs: one split says little",
    "explain": "Seconds matter more than the maps",
    "dry_run": "Before a long or costly run",
    "max_failures": "Spot machines that go often (larger)",
    "hang_timeout": "Steps that take minutes (larger)",
    "head.units": "Many classes (wider), or fewest parameters (`none`)",
    "head.dropout": "Training accuracy far above validation",
    "head.epochs": "The curves still fall at the end (more)",
    "head.batch_size": "Millions of photographs: larger, and learning_rate with it",
    "head.learning_rate": "The loss jumps (lower) or hardly falls (higher)",
    "head.warmup_epochs": "The loss jumps in the first epochs (longer)",
    "head.weight_decay": "Training accuracy far above validation (larger)",
    "head.label_smoothing": "Confidence comes out too low (smaller)",
    "head.class_weights": "Rare classes count as much as common ones: `balanced`",
    "head.patience": "Large data sets, to stop in time",
    "head.search": "Before a model that stays, such as 20",
    "fine_tune.blocks": "The head alone is not good enough: 4, or fewer for less time",
    "fine_tune.epochs": "The curves still improve at the end (more)",
    "fine_tune.batch_size": "GPUs, or many thousand photographs (larger)",
    "fine_tune.learning_rate": "Validation gets worse at first (lower)",
    "fine_tune.layer_decay": "Photographs unlike ImageNet's (nearer to 1)",
    "fine_tune.warmup_epochs": "The loss jumps in the first epochs (longer)",
    "fine_tune.weight_decay": "Training accuracy far above validation (larger)",
    "fine_tune.clip_norm": "The loss jumps (smaller)",
    "fine_tune.ema": "Few steps in all (smaller)",
    "fine_tune.label_smoothing": "Confidence comes out too low (smaller)",
    "fine_tune.patience": "Large data sets, to stop in time",
    "fine_tune.crop_size": "Steps take too long (smaller)",
    "fine_tune.crop": "Lesions are lost in crops (nearer to 1)",
    "fine_tune.brightness": "Light differs much between days (larger)",
    "fine_tune.colour": "Colour is what tells the classes apart (smaller)",
    "fine_tune.mixup": "Training accuracy far above validation, such as 0.2",
    "fine_tune.cutmix": "Training accuracy far above validation, such as 1",
    "fine_tune.local_gb": "The node's disk is smaller, or holds more",
    "cache.url": "Runs of several people or machines share features",
    "cache.max_gb": "The disk fills",
    "checkpoint.every_seconds": "A kill may cost less (smaller), or saving takes long (larger)",
    "checkpoint.every_steps": "Epochs take many minutes",
    "checkpoint.keep": "You want to go back further",
    "mlflow.enabled": "MLFLOW_TRACKING_URI is set, and the run belongs there",
    "mlflow.tracking_uri": "The team has an MLflow server",
    "mlflow.experiment": "Runs of several projects on one server",
    # evaluate
    "model": "Always given",
    "evaluate:shards": "Always given, but with --images",
    "evaluate:images": "Photographs of another field or season, of which there are no shards",
    "evaluate:split": "`all` for a data set that was never trained on",
    "evaluate:out": "The figures are for a program or a page",
    "against": "To see whether a new model is better, and not by chance",
    "slice_by": "Keys tell farm, camera or year",
    "tta": "Accuracy is worth four or eight times the time",
    "engine": "To compare engines, or when one gives trouble",
    "score:precision": "Two machines must agree to the last digit: `float32`",
    # score
    "images": "Always given",
    "score:out": "Always given",
    "date": "A missed night is scored later",
    "retries": "The store fails often (more)",
    "max_failed": "Cameras that send broken files every night (higher)",
    "unit": "Several photographs show one plant or plot, and one answer is wanted",
    "field": "Counts are wanted by field",
    "score:explain": "Who reviews asks where in a photograph the model sees its label",
    "cpus_per_decode": "GPUs wait for large photographs (smaller: more at a time)",
    "keep_every": "A kill may cost less (smaller)",
    # promote, export, review, report, doctor
    "registry": "Always given",
    "candidate": "Always given, but with --rollback",
    "promote:shards": "Always given, but with --rollback",
    "margin": "A simpler model may cost some accuracy (larger)",
    "min_recall": "No class may be missed (higher)",
    "recall": "One class matters more than others",
    "max_ece_rise": "Confidence decides what is reviewed (smaller)",
    "tie": "The newest of two equal models should serve: `promote`",
    "resamples": "Intervals at the margin should be steadier (more)",
    "promote:seed": "To see how much chance is in the interval",
    "rollback": "The champion misbehaves",
    "to": "Always given",
    "export:shards": "The check should be on real photographs",
    "count": "A stricter check (more), or less time (fewer)",
    "review:count": "As many as people can label",
    "max_changed": "int8 and other formats that round (larger)",
    "predictions": "Given where nights are meant",
    "review:date": "More than the newest night is to be chosen from",
    "report:date": "An earlier night than the newest",
    "audit": "How right the nights are is to be known: 20 and more, the more the surer",
    "pool": "Chosen photographs look alike (larger)",
    "review:model": "The model has moved since it scored the nights",
    "review:split": "Answers alone make a data set, and it is small",
    "image_prefix": "The labelling tool serves photographs from elsewhere",
    "photographs": "The folder has moved since it was written",
    "base": "Given with answers: the data set that they are added to",
    "answers": "People have labelled what was chosen",
    "run": "Given where a run is meant",
    "demo:out": "The demo should not lie in the working directory",
    "storage": "Rights to a bucket are in doubt",
}


def load(job: str) -> ModuleType:
    """jobs/`job`.py as a module."""
    spec = importlib.util.spec_from_file_location(f"jobs_{job}", ROOT / "jobs" / f"{job}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def jobs() -> dict[str, type[Settings]]:
    """Every job that has settings, with their class, in the order in which they are used."""
    names = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
    found: dict[str, type[Settings]] = {name: load(name).job.settings for name in names}
    order = ["prepare", "train", "evaluate", "score"]
    return {job: found[job] for job in [*order, *sorted(set(found) - set(order))]}


def when(job: str, name: str) -> str | None:
    """When to change a setting; None: nobody has said so."""
    return WHEN.get(f"{job}:{name}", WHEN.get(name))


def missing() -> list[str]:
    """Settings on which WHEN says nothing."""
    return [
        f"{job}: {name}"
        for job, settings_class in jobs().items()
        for name, _ in leaves(settings_class)
        if when(job, name) is None
    ]


def settings_page() -> str:
    """jobs/SETTINGS.md as it should be."""
    parts = [_INTRO]
    for job, settings_class in jobs().items():
        parts.append(f"## jobs/{job}.py\n")
        parts.append("| setting | default | unit | what it is | when to change it |")
        parts.append("|---|---|---|---|---|")
        for name, field in leaves(settings_class):
            unit, description = _unit(field.description or "")
            default = "required" if field.is_required() else f"`{_shown(field.default)}`"
            cells = [
                f"`{name}` ({_metavar(field.annotation)})",
                default,
                unit,
                description,
                when(job, name) or "",
            ]
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def _unit(description: str) -> tuple[str, str]:
    """The unit, and the description without it.

    >>> _unit("hashes at most this far apart [bits of 64]; none: all")
    ('bits of 64', 'hashes at most this far apart; none: all')
    """
    match = re.search(r" ?\[([^\]]+)\]", description)
    return (match[1], description.replace(match[0], "", 1)) if match else ("", description)


def modules_page() -> str:
    """leafnet/README.md as it should be, with a row for each package and its modules."""
    rows = ["| package | what is in it | modules |", "|---|---|---|"]
    for package in MAY_IMPORT:
        file = LEAFNET / package / "__init__.py"
        own = file if file.exists() else LEAFNET / f"{package}.py"
        first = (ast.get_docstring(ast.parse(own.read_text())) or "").split("\n\n")[0]
        names = [each.removeprefix(f"{package}.") for each in FILES if each.startswith(package)]
        shown = " ".join(f"`{name.replace('.', '/')}`" for name in names)
        line = " ".join(first.split()).removesuffix(".").replace("|", "/")
        path = own.relative_to(LEAFNET).as_posix().removesuffix("__init__.py")
        rows.append(f"| `{path}` | {line} | {shown} |")
    before, _, rest = MODULES.read_text().partition("<!-- modules -->\n")
    _, _, after = rest.partition("<!-- /modules -->")
    return f"{before}<!-- modules -->\n" + "\n".join(rows) + f"\n<!-- /modules -->{after}"


def main() -> int:
    """Write the pages; 1 and no page when a setting is not explained."""
    if missing():
        print(f"say in tests/docs.py when to change: {', '.join(missing())}", file=sys.stderr)
        return 1
    for path, text in ((SETTINGS, settings_page()), (MODULES, modules_page())):
        path.write_text(text)
        print(f"written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
