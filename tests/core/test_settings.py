import math
import re
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml

from leafnet.core import settings as core_settings
from leafnet.core.errors import UserError
from leafnet.core.settings import (
    DataSettings,
    DoctorSettings,
    RaySettings,
    ReportSettings,
    Settings,
    flat,
    leaves,
    to_yaml,
    validate,
)
from leafnet.evaluation.settings import EvaluateSettings, PromoteSettings
from leafnet.labelling.settings import ReviewSettings
from leafnet.models.settings import ExportSettings
from leafnet.preparation.settings import PrepareSettings
from leafnet.scoring.settings import ScoreSettings
from leafnet.training.settings import (
    CacheSettings,
    CheckpointSettings,
    FineTuneSettings,
    HeadSettings,
    MlflowSettings,
    TrainSettings,
    describe_stages,
)

REQUIRED = ["--shards", "data/shards", "--name", "potato"]


def parse(argv: list[str]) -> TrainSettings:
    return core_settings.parse(TrainSettings, argv, prog="jobs/train.py", description="Train.")


def test_defaults_then_file_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("seed: 3\nhead:\n  epochs: 7\n  learning_rate: 1e-4\n")
    settings = parse([*REQUIRED, "--config", str(file), "--head.epochs", "80"])
    assert settings.head.epochs == 80
    assert settings.head.learning_rate == 1e-4
    assert settings.seed == 3
    assert settings.head.batch_size == 32


def test_texts_become_what_the_setting_is() -> None:
    given = {
        "--shards": "s",
        "--name": "007",
        "--head.units": "512,128",
        "--workers": "3",
        "--gpu": "false",
        "--head.patience": "none",
        "--batch_size": "auto",
    }
    settings = parse([word for pair in given.items() for word in pair])
    assert settings.head.units == (512, 128)
    assert settings.workers == 3
    assert settings.gpu is False
    assert settings.head.patience is None
    assert settings.batch_size == "auto"
    assert settings.name == "007"
    assert parse([*REQUIRED, "--head.units", "none"]).head.units == ()


def test_switch_needs_no_value() -> None:
    argv = ["--source", "a", "--out", "b", "--overwrite"]
    assert core_settings.parse(PrepareSettings, argv, prog="p", description="").overwrite


@pytest.mark.parametrize(
    ("argv", "reason", "message"),
    [
        (["--name", "a"], "missing-setting", "--shards is required"),
        ([*REQUIRED, "--head.epoch", "3"], "unknown-setting", "did you mean --head.epochs?"),
        ([*REQUIRED, "--epochs", "3"], "unknown-setting", "did you mean --head.epochs?"),
        ([*REQUIRED, "--features", "online"], "unknown-setting", "kept: leave it out"),
        ([*REQUIRED, "--head.epochs"], "bad-flag", "expected one argument"),
        ([*REQUIRED, "--workers", "0"], "bad-value", "--workers cannot be '0': must be auto"),
        ([*REQUIRED, "--batch_size", "some"], "bad-value", "or input should be 'auto'"),
        ([*REQUIRED, "--head.dropout", "1"], "bad-value", "--head.dropout cannot be '1'"),
        ([*REQUIRED, "--head.units", "512,0"], "bad-value", "every width must be at least 1"),
        ([*REQUIRED, "--precision", "int4"], "bad-value", "'auto', 'float32' or 'bfloat16'"),
        ([*REQUIRED, "--name", "../x"], "bad-value", "--name cannot be '../x'"),
        ([*REQUIRED, "--config", "no.yaml"], "no-such-file", "no.yaml does not exist"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], reason: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(argv)
    assert caught.value.reason == reason
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason", "message"),
    [
        ("head:\n  epoch: 3\n", "unknown-setting", "head.epoch in FILE; did you mean head.epochs?"),
        ("haed:\n  epochs: 3\n", "unknown-setting", "haed in FILE; did you mean head?"),
        ("features: cached\n", "unknown-setting", "no setting features any more in FILE; feat"),
        ("workers: 0\n", "bad-value", "--workers cannot be 0 in"),
        ("head: 3\n", "bad-value", "--head cannot be 3 in"),
        ("- 1\n- 2\n", "bad-yaml", "must have lines `setting: value`"),
        ("a: [1\n", "bad-yaml", "is not valid YAML"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, reason: str, message: str) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        parse([*REQUIRED, "--config", str(file)])
    assert caught.value.reason == reason
    assert message.replace("FILE", str(file)) in str(caught.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse(REQUIRED).seed = 4  # type: ignore[misc]


def test_yaml_gives_the_same_settings_back() -> None:
    settings = parse([*REQUIRED, "--head.units", "64,32", "--cache.max_gb", "1.5"])
    again = validate(TrainSettings, yaml.safe_load(to_yaml(settings)))
    assert again == settings


def test_help_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, _ in leaves(TrainSettings):
        assert f"--{name} " in shown
    assert "passes over the training images [epochs] (default: 50)" in shown


def test_every_setting_is_described() -> None:
    for settings_class in (PrepareSettings, TrainSettings, EvaluateSettings):
        for name, field in leaves(settings_class):
            assert field.description, name


@pytest.mark.parametrize("share", ["80/10", "50/30/30", "0/50/50", "a/b/c"])
def test_split_shares(share: str) -> None:
    argv = ["--source", "a", "--out", "b", "--split", share]
    with pytest.raises(UserError, match="--split cannot be"):
        core_settings.parse(PrepareSettings, argv, prog="p", description="")


def test_counts_are_at_least_one_in_every_job() -> None:
    for settings_class, names in (
        (TrainSettings, ("workers", "batch_size")),
        (EvaluateSettings, ("batch_size",)),
        (ScoreSettings, ("workers", "batch_size")),
    ):
        needed = {n: "a" for n, f in leaves(settings_class) if f.is_required()}
        for name in names:
            with pytest.raises(UserError, match=f"--{name} cannot be 0: must be auto or at least"):
                validate(settings_class, {**needed, name: 0})


@pytest.mark.parametrize("given", ["auto", "1", "3", "1..4", "2..2"])
def test_workers_are_a_number_or_a_range(given: str) -> None:
    settings = parse(["--shards", "s", "--name", "n", "--workers", given])
    assert settings.workers == (int(given) if given.isdecimal() else given)


@pytest.mark.parametrize(
    "given", ["0", "4..1", "0..2", "1..", "..3", "..", "x..3", "3..x", "many", "-1"]
)
def test_impossible_workers_are_refused(given: str) -> None:
    with pytest.raises(UserError, match=r"--workers cannot be .* a range such as 1\.\.4"):
        parse(["--shards", "s", "--name", "n", f"--workers={given}"])


Number = int | float

# Every setting that is a number: its kind and what it may be, ends included or not.
WHOLE, REAL = "whole", "real"
LIMITS: dict[type[Settings], dict[str, tuple[str, str]]] = {
    RaySettings: {"cpus": (WHOLE, "[1, inf)"), "wait": (REAL, "[0, inf)")},
    PrepareSettings: {
        "near_distance": (WHOLE, "[0, 3]"),
        "shard_mb": (WHOLE, "[1, 1024]"),
        "row_group": (WHOLE, "[1, inf)"),
        "max_megapixels": (WHOLE, "[1, inf)"),
        "seed": (WHOLE, "[0, inf)"),
        "lock_timeout": (REAL, "[1, inf)"),
    },
    HeadSettings: {
        "dropout": (REAL, "[0, 1)"),
        "epochs": (WHOLE, "[1, inf)"),
        "batch_size": (WHOLE, "[1, inf)"),
        "learning_rate": (REAL, "(0, inf)"),
        "warmup_epochs": (REAL, "[0, inf)"),
        "weight_decay": (REAL, "[0, inf)"),
        "label_smoothing": (REAL, "[0, 1)"),
        "patience": (WHOLE, "[1, inf)"),
        "search": (WHOLE, "[1, inf)"),
    },
    FineTuneSettings: {
        "blocks": (WHOLE, "[0, 4]"),
        "epochs": (WHOLE, "[1, inf)"),
        "batch_size": (WHOLE, "[1, inf)"),
        "learning_rate": (REAL, "(0, inf)"),
        "layer_decay": (REAL, "(0, 1]"),
        "warmup_epochs": (REAL, "[0, inf)"),
        "weight_decay": (REAL, "[0, inf)"),
        "clip_norm": (REAL, "(0, inf)"),
        "ema": (REAL, "[0, 1)"),
        "label_smoothing": (REAL, "[0, 1)"),
        "patience": (WHOLE, "[1, inf)"),
        "crop_size": (WHOLE, "[32, 1024]"),
        "crop": (REAL, "(0, 1]"),
        "brightness": (REAL, "[0, 1)"),
        "colour": (REAL, "[0, 1)"),
        "mixup": (REAL, "[0, inf)"),
        "cutmix": (REAL, "[0, inf)"),
        "local_gb": (REAL, "[0, inf)"),
    },
    CacheSettings: {"max_gb": (REAL, "(0, inf)")},
    DataSettings: {"local_cache_gb": (REAL, "(0, inf)")},
    CheckpointSettings: {
        "every_seconds": (REAL, "[0, inf)"),
        "every_steps": (WHOLE, "[1, inf)"),
        "keep": (WHOLE, "[1, inf)"),
    },
    TrainSettings: {
        "image_size": (WHOLE, "[32, 1024]"),
        "workers": (WHOLE, "[1, inf)"),
        "max_failures": (WHOLE, "[0, inf)"),
        "hang_timeout": (REAL, "(0, inf)"),
        "views": (WHOLE, "[1, 256]"),
        "batch_size": (WHOLE, "[1, inf)"),
        "precision_target": (REAL, "(0, 1]"),
        "precision_guarantee": (REAL, "(0, 1)"),
        "seed": (WHOLE, "[0, inf)"),
        "cross_validate": (WHOLE, "[2, inf)"),
        "lock_timeout": (REAL, "[1, inf)"),
    },
    EvaluateSettings: {"batch_size": (WHOLE, "[1, inf)")},
    ScoreSettings: {
        "retries": (WHOLE, "[0, inf)"),
        "max_failed": (REAL, "[0, 100]"),
        "max_megapixels": (WHOLE, "[1, inf)"),
        "workers": (WHOLE, "[1, inf)"),
        "batch_size": (WHOLE, "[1, inf)"),
        "cpus_per_decode": (REAL, "(0, 64]"),
        "keep_every": (REAL, "[0, inf)"),
        "lock_timeout": (REAL, "[1, inf)"),
    },
    PromoteSettings: {
        "margin": (REAL, "[0, 100]"),
        "min_recall": (REAL, "[0, 1]"),
        "max_ece_rise": (REAL, "[0, 1]"),
        "resamples": (WHOLE, "[100, inf)"),
        "seed": (WHOLE, "[0, inf)"),
        "batch_size": (WHOLE, "[1, inf)"),
        "lock_timeout": (REAL, "[1, inf)"),
    },
    ExportSettings: {"count": (WHOLE, "[1, inf)"), "max_changed": (REAL, "[0, 100]")},
    ReviewSettings: {
        "count": (WHOLE, "[1, inf)"),
        "pool": (WHOLE, "[1, inf)"),
        "audit": (WHOLE, "[0, inf)"),
    },
}
# What a job cannot do without.
NEEDED: dict[type[Settings], dict[str, Any]] = {
    PrepareSettings: {"source": "a", "out": "b"},
    TrainSettings: {"shards": "a", "name": "b"},
    EvaluateSettings: {"model": "a", "shards": "b"},
    ScoreSettings: {"model": "a", "images": "b", "out": "c"},
    PromoteSettings: {"registry": "a", "candidate": "b", "shards": "c"},
    ExportSettings: {"model": "a", "to": "onnx", "out": "b"},
    ReviewSettings: {"out": "a", "predictions": "b"},
}
JOBS: tuple[type[Settings], ...] = (*NEEDED, ReportSettings, DoctorSettings)


def on_the_edges(kind: str, limits: str) -> tuple[list[Number], list[tuple[Number, str]]]:
    """The outermost values that are accepted, and the next ones, which are not, with the limit."""
    low, high = (float(end) for end in limits[1:-1].split(", "))
    step = 1 if kind == WHOLE else 1e-6
    accepted, refused = [], []
    for end, outwards, included in ((low, -step, "["), (high, step, "]")):
        if not math.isinf(end):
            accepted.append(end if included in limits else end - outwards)
            refused.append((end + outwards if included in limits else end, f"{end:g}"))
    if kind == WHOLE:
        return [int(value) for value in accepted], [(int(value), end) for value, end in refused]
    return list(accepted), list(refused)


@pytest.mark.parametrize(
    ("settings_class", "name"), [(found, name) for found in LIMITS for name in LIMITS[found]]
)
def test_numbers_are_accepted_up_to_their_limits(settings_class: type[Settings], name: str) -> None:
    accepted, refused = on_the_edges(*LIMITS[settings_class][name])
    needed = NEEDED.get(settings_class, {})
    for value in accepted:
        for written in (value, str(value)):  # by YAML and by a flag
            settings = validate(settings_class, {**needed, name: written})
            assert getattr(settings, name) == value
            assert type(getattr(settings, name)) is type(value)
    for value, limit in refused:
        with pytest.raises(UserError, match=f"--{name} cannot be ") as caught:
            validate(settings_class, {**needed, name: value})
        assert caught.value.reason == "bad-value"
        said = str(caught.value).partition(": ")[2]
        assert limit in re.findall(r"\d+", said), said


def test_no_number_is_without_limits() -> None:
    every: set[type[Settings]] = {*JOBS, *LIMITS, MlflowSettings}
    for settings_class in every:
        for name, field in settings_class.model_fields.items():
            parts = {field.annotation, *get_args(field.annotation)}
            if parts & {int, float} and get_origin(field.annotation) is not tuple:
                assert name in LIMITS[settings_class]


@pytest.mark.parametrize("settings_class", [EvaluateSettings, ScoreSettings])
def test_views_of_a_test_are_1_4_or_8(settings_class: type[Settings]) -> None:
    given: Any
    for views in (1, 4, 8):
        for given in (views, str(views)):
            settings = validate(settings_class, {**NEEDED[settings_class], "tta": given})
            assert settings.model_dump()["tta"] == views
    for given in (0, "2", 3, "5", 7, "9", "x", 4.5):
        with pytest.raises(UserError, match=r"--tta cannot be .*: [Ii]nput should be 1, 4 or 8"):
            validate(settings_class, {**NEEDED[settings_class], "tta": given})


# As the settings pages and the README tell them: a command without a flag does this.
DEFAULTS: dict[type[Settings], str] = {
    PrepareSettings: """
        split: 80/10/10
        group: null
        duplicates: drop
        near_duplicates: report
        near_distance: 3
        shard_mb: 64
        row_group: 256
        max_megapixels: 120
        seed: 0
        overwrite: false
        lock_timeout: 60.0
        ray: {address: null, cpus: null, wait: 900.0}
    """,
    TrainSettings: """
        out: runs
        weights: imagenet
        image_size: 256
        precision: auto
        workers: auto
        max_failures: 3
        hang_timeout: 300.0
        gpu: auto
        views: 8
        augment: true
        batch_size: auto
        precision_target: 0.95
        precision_guarantee: null
        int8: false
        explain: true
        seed: 0
        cross_validate: null
        note: null
        dry_run: false
        lock_timeout: 60.0
        head:
          units: [512]
          dropout: 0.0
          epochs: 50
          batch_size: 32
          learning_rate: 0.001
          warmup_epochs: 1.0
          weight_decay: 0.0001
          label_smoothing: 0.1
          class_weights: none
          patience: null
          search: null
        fine_tune:
          blocks: 0
          epochs: 40
          batch_size: 16
          learning_rate: 0.003
          layer_decay: 0.7
          warmup_epochs: 1.0
          weight_decay: 0.01
          clip_norm: 1.0
          ema: 0.98
          label_smoothing: 0.1
          patience: null
          crop_size: auto
          crop: 0.5
          brightness: 0.1
          colour: 0.1
          mixup: 0.0
          cutmix: 0.0
          local_gb: 20.0
        data: {local_cache: null, local_cache_gb: 100.0}
        cache: {url: null, max_gb: null}
        checkpoint: {every_seconds: 10.0, every_steps: null, keep: 2}
        mlflow: {enabled: false, tracking_uri: null, experiment: leafnet}
        ray: {address: null, cpus: null, wait: 900.0}
    """,
    EvaluateSettings: """
        images: null
        split: test
        out: null
        against: null
        slice_by: null
        tta: 1
        explain: true
        engine: auto
        precision: auto
        gpu: auto
        batch_size: auto
        data: {local_cache: null, local_cache_gb: 100.0}
        ray: {address: null, cpus: null, wait: 900.0}
    """,
    ScoreSettings: """
        date: null
        retries: 2
        field: null
        unit: null
        max_failed: 5.0
        max_megapixels: 120
        engine: auto
        precision: auto
        tta: 1
        explain: false
        gpu: auto
        workers: auto
        batch_size: auto
        cpus_per_decode: auto
        keep_every: 5.0
        note: null
        lock_timeout: 60.0
        ray: {address: null, cpus: null, wait: 900.0}
    """,
    PromoteSettings: """
        margin: 1.0
        min_recall: 0.5
        recall: []
        max_ece_rise: 0.02
        tie: keep
        resamples: 10000
        seed: 0
        rollback: false
        dry_run: false
        precision: auto
        gpu: auto
        batch_size: auto
        lock_timeout: 60.0
        ray: {address: null, cpus: null, wait: 900.0}
    """,
    ExportSettings: "{shards: null, count: 200, max_changed: 0.5, overwrite: false}",
    ReviewSettings: """
        date: []
        count: 50
        pool: 3
        model: null
        audit: 0
        image_prefix: null
        answers: null
        photographs: null
        base: null
        split: 80/10/10
        ray: {address: null, cpus: null, wait: 900.0}
    """,
    ReportSettings: "{run: null, predictions: null, date: null}",
    DoctorSettings: """
        storage: null
        gpu: auto
        ray: {address: null, cpus: null, wait: 900.0}
    """,
}


@pytest.mark.parametrize("settings_class", DEFAULTS)
def test_what_a_command_does_without_a_flag(settings_class: type[Settings]) -> None:
    needed = NEEDED.get(settings_class, {})
    found = validate(settings_class, needed).model_dump(mode="json")
    assert found == needed | yaml.safe_load(DEFAULTS[settings_class])


def refused(settings_class: type[Settings], **changes: Any) -> str:
    """What is said of impossible settings."""
    with pytest.raises(UserError) as caught:
        validate(settings_class, {**NEEDED.get(settings_class, {}), **changes})
    return str(caught.value)


@pytest.mark.parametrize("share", ["0", "1", "0.9", ".5", "0.05", "1.0", "1.00"])
def test_floors_of_recall_are_shares(share: str) -> None:
    given = {**NEEDED[PromoteSettings], "recall": [f"rust={share}", "a=b=0.25"]}
    settings = validate(PromoteSettings, given)
    assert settings.recall == (f"rust={share}", "a=b=0.25")


@pytest.mark.parametrize(
    "floor",
    ["x=2", "x=1.1", "x=1.01", "x=-0.5", "x=-1", "x=10", "x=", "x", "1", "0.5", "x=0.", "x=a"],
)
def test_floors_of_recall_that_are_no_shares_are_refused(floor: str) -> None:
    message = f"must be CLASS=SHARE with a share from 0 to 1, got {floor}"
    assert refused(PromoteSettings, recall=["rust=0.5", floor]).endswith(message)
    assert message in refused(PromoteSettings, recall=[floor, "rust=0.5"])


@pytest.mark.parametrize("share", ["100/0/0", "70/0/30", "1/99/0", "80/10/10"])
def test_shares_of_a_split_add_up(share: str) -> None:
    given = {**NEEDED[PrepareSettings], "split": share}
    assert validate(PrepareSettings, given).split == share


@pytest.mark.parametrize("share", ["100/1/0", "99/0/0", "200/0/0", "0/100/0"])
def test_shares_of_a_split_that_do_not_add_up_are_refused(share: str) -> None:
    said = refused(PrepareSettings, split=share)
    assert "must add up to 100 with some for train" in said
    assert f", got {share}" in said


def test_widths_of_layers_are_at_least_one() -> None:
    assert HeadSettings(units=(1, 1)).units == (1, 1)
    for units in ((0,), (0, 5), (5, 0), (-1, 2)):
        assert "every width must be at least 1" in refused(HeadSettings, units=units)


def test_stages_that_are_trained() -> None:
    for blocks in (0, 1, 4, "all"):
        assert FineTuneSettings(blocks=blocks).blocks == blocks
    for wrong in (-1, 5):
        assert f"must be 0 to 4 or all, got {wrong}" in refused(FineTuneSettings, blocks=wrong)
    assert "--blocks cannot be 'some'" in refused(FineTuneSettings, blocks="some")


def test_stages_in_words() -> None:
    assert describe_stages(1) == "the last of 4 stages"
    assert describe_stages(3) == "the last 3 of 4 stages"
    assert describe_stages("all") == "all 4 stages and the stem"


def test_sizes_of_crops() -> None:
    assert FineTuneSettings(crop_size="auto").crop_size == "auto"
    for wrong in (1, 31, 1025, 2000):
        message = f"--crop_size cannot be {wrong}: must be auto or from 32 to 1024, got {wrong}"
        assert refused(FineTuneSettings, crop_size=wrong) == message


def test_a_share_of_a_cpu() -> None:
    for accepted in ("auto", 0.25, 64.0):
        given = {**NEEDED[ScoreSettings], "cpus_per_decode": accepted}
        assert validate(ScoreSettings, given).cpus_per_decode == accepted
    for wrong in (0, -0.5, 64.5, 65):
        message = "must be auto or more than 0 and at most 64"
        assert message in refused(ScoreSettings, cpus_per_decode=wrong)


def test_a_share_of_failures_may_have_its_sign() -> None:
    for given in ("2.5%", "2.5", 2.5):
        settings = validate(ScoreSettings, {**NEEDED[ScoreSettings], "max_failed": given})
        assert settings.max_failed == 2.5
    assert "--max_failed cannot be '101'" in refused(ScoreSettings, max_failed="101%")


@pytest.mark.parametrize("settings_class", [ScoreSettings, ReportSettings])
def test_a_night_is_a_day_of_the_calendar(settings_class: type[Settings]) -> None:
    needed = NEEDED.get(settings_class, {})
    # YAML reads a date as a date where it has no quotes.
    for given in ("2026-02-28", yaml.safe_load("2026-02-28")):
        settings = validate(settings_class, {**needed, "date": given})
        assert settings.model_dump()["date"] == "2026-02-28"
    assert validate(settings_class, {**needed, "date": None}).model_dump()["date"] is None
    for wrong in ("20260228", "2026-W09-6"):
        message = f"must be written YYYY-MM-DD, got {wrong}"
        assert message in refused(settings_class, date=wrong)
    assert "--date cannot be '2026-02-30': " in refused(settings_class, date="2026-02-30")
    assert "valid string" in refused(settings_class, date=20260228)


def test_nights_to_choose_from() -> None:
    needed = NEEDED[ReviewSettings]
    for given in (
        ["2026-02-27", "2026-03-01"],
        ("2026-02-27", "2026-03-01"),
        yaml.safe_load("[2026-02-27, 2026-03-01]"),
    ):
        settings = validate(ReviewSettings, {**needed, "date": given})
        assert settings.date == ("2026-02-27", "2026-03-01")
    one = validate(ReviewSettings, {**needed, "date": yaml.safe_load("2026-02-27")})
    assert one.date == ("2026-02-27",)
    for wrong in (["2026-02-27", "20260301"], "20260301"):
        message = "must be written YYYY-MM-DD, got 20260301"
        assert message in refused(ReviewSettings, date=wrong)


def test_promotion_or_rollback() -> None:
    both = "give --candidate MODEL and --shards DATA, or --rollback"
    assert refused(PromoteSettings, candidate=None) == both
    assert refused(PromoteSettings, shards=None) == both
    assert refused(PromoteSettings, candidate=None, shards=None) == both
    one = "--rollback takes no --candidate; give one of the two"
    assert refused(PromoteSettings, rollback=True) == one
    for shards in (None, "s"):
        given = {"registry": "r", "rollback": True, "shards": shards}
        assert validate(PromoteSettings, given).rollback


def test_a_review_chooses_or_takes_back() -> None:
    message = "give --predictions OUT to choose photographs, or --answers FILE"
    assert refused(ReviewSettings, predictions=None) == message
    assert refused(ReviewSettings, answers="a.csv") == message
    taking = validate(ReviewSettings, {"out": "o", "answers": "a.csv"})
    assert (taking.predictions, taking.answers) == (None, "a.csv")


def test_copies_of_shards_are_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert validate(DataSettings, {"local_cache": None}).local_cache is None
    assert DataSettings(local_cache="fast").local_cache == str(tmp_path / "fast")
    said = refused(DataSettings, local_cache="s3://bucket/fast")
    assert said.endswith("must be a folder on a disk, not a URL")


def test_mlflow_is_turned_on_by_a_switch_or_a_server() -> None:
    def enabled(mlflow: Any) -> bool:
        given = {**NEEDED[TrainSettings], "mlflow": mlflow}
        return validate(TrainSettings, given).mlflow.enabled

    assert enabled(True)
    assert not enabled(False)
    assert enabled({"tracking_uri": "http://mlflow:5000"})
    assert not enabled({"tracking_uri": "http://mlflow:5000", "enabled": False})
    assert not enabled({"experiment": "leaves"})
    assert not enabled({"tracking_uri": ""})
    assert enabled({"enabled": True})
    assert enabled(MlflowSettings(enabled=True))
    assert "--mlflow cannot be 3" in refused(TrainSettings, mlflow=3)


def test_a_switch_of_a_flag_turns_mlflow_on(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("mlflow:\n  experiment: leaves\n")
    argv = [*REQUIRED, "--config", str(file), "--mlflow.tracking_uri", "http://mlflow:5000"]
    mlflow = parse(argv).mlflow
    assert (mlflow.enabled, mlflow.experiment) == (True, "leaves")


def test_each_flag_goes_before_the_file_and_the_file_before_the_default(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    given = {"seed": 1, "views": 2, "head": {"epochs": 3, "units": [4, 5]}, "gpu": False}
    file.write_text(yaml.safe_dump(given))
    flags = ["--seed", "6", "--head.units=7,8", "--head.dropout", "0.5", "--ray.cpus", "9"]
    found = parse([*flags, *REQUIRED, f"--config={file}"])
    assert (found.seed, found.views, found.gpu, found.augment) == (6, 2, False, True)
    assert found.head == HeadSettings(epochs=3, units=(7, 8), dropout=0.5)
    assert found.ray == RaySettings(cpus=9)


def test_none_for_what_may_be_none_and_for_lists() -> None:
    for none in ("none", "None", "null", "NULL"):
        assert parse([*REQUIRED, "--cross_validate", none]).cross_validate is None
        assert parse([*REQUIRED, f"--cache.url={none}"]).cache.url is None
    # What is text keeps the word.
    assert parse([*REQUIRED, "--weights", "none"]).weights == "none"
    assert parse([*REQUIRED, "--weights", "null"]).weights == "null"
    for empty in ("", "none", "None"):
        assert parse([*REQUIRED, f"--head.units={empty}"]).head.units == ()
    assert parse([*REQUIRED, "--head.units", "7"]).head.units == (7,)
    with pytest.raises(UserError, match=r"--seed cannot be 'none'"):
        parse([*REQUIRED, "--seed", "none"])


def test_switches() -> None:
    assert parse([*REQUIRED, "--dry-run"]).dry_run
    assert parse([*REQUIRED, "--dry_run", "true"]).dry_run
    assert not parse([*REQUIRED, "--augment", "false"]).augment
    assert parse([*REQUIRED, "--gpu", "auto"]).gpu == "auto"
    with pytest.raises(UserError, match="--gpu: expected one argument"):
        parse([*REQUIRED, "--gpu"])


def test_dashes_in_a_flag_are_underscores_and_in_a_value_stay() -> None:
    found = parse(["--shards", "a-b", "--name=c-d", "--head.learning-rate=1e-2", "--out", "e-f"])
    assert (found.shards, found.name, found.out) == ("a-b", "c-d", "e-f")
    assert found.head.learning_rate == 0.01


def test_flags_that_are_no_settings_are_passed_over() -> None:
    assert parse([*REQUIRED, "--verbose", "--json"]) == parse(REQUIRED)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        # No flag is shortened: the next version may have another that begins so.
        ("--see", "there is no flag --see; did you mean --seed?"),
        ("--confg=a.yaml", "there is no flag --confg; did you mean --config?"),
        ("--verbos", "there is no flag --verbos; did you mean --verbose?"),
        ("--zzzzzz", "there is no flag --zzzzzz; see --help for all"),
        ("--drop", "there is no flag --drop; did you mean --head.dropout?"),
        ("--gb", "there is no flag --gb; see --help for all"),
        ("--a.keep", "there is no flag --a.keep; did you mean --checkpoint.keep?"),
        ("--zzzzzzzz.max_gb", "there is no flag --zzzzzzzz.max_gb; did you mean --cache.max_gb?"),
    ],
)
def test_a_flag_that_is_not_there(flag: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse([*REQUIRED, flag])
    assert (str(caught.value), caught.value.reason) == (message, "unknown-setting")


def test_a_bad_flag_names_the_job() -> None:
    with pytest.raises(UserError, match=r"jobs/train\.py --help lists all flags$") as caught:
        parse([*REQUIRED, "--seed"])
    assert caught.value.reason == "bad-flag"


def test_where_a_mistake_of_the_file_is(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"

    def said(text: str) -> str:
        file.write_text(text)
        with pytest.raises(UserError) as caught:
            parse([*REQUIRED, "--config", str(file)])
        return str(caught.value)

    assert said("seed: x\n").startswith(
        f"--seed cannot be 'x' in {file}: Input should be a valid i"
    )
    message = said("head:\n  units: [a, 3]\n")
    assert message.startswith(f"--head.units cannot be 'a' in {file}: Input should be a valid int")
    message = said("gpu: maybe\n")
    assert message.startswith(f"--gpu cannot be 'maybe' in {file}: Input should be a valid boolean")
    assert message.endswith(", unable to interpret input or input should be 'auto'")
    # Of two mistakes one is told, without the other's reason.
    message = said("gpu: maybe\nbatch_size: x\n")
    assert message.startswith(f"--gpu cannot be 'maybe' in {file}: ")
    assert message.count(" or ") == 0


def test_a_value_below_what_is_no_section(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("head: 3\n")
    with pytest.raises(UserError, match="head must be a mapping in the YAML") as caught:
        parse([*REQUIRED, "--config", str(file), "--head.epochs", "3"])
    assert caught.value.reason == "bad-value"


def test_settings_that_exclude_each_other_are_told_with_their_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("rollback: true\ncandidate: c\nregistry: r\n")
    with pytest.raises(UserError, match=r"give one of the two in .*yaml$") as caught:
        core_settings.parse(PromoteSettings, ["--config", str(file)], prog="p", description="")
    assert caught.value.reason == "bad-settings"


def test_what_is_missing_is_described() -> None:
    with pytest.raises(UserError) as caught:
        parse(["--shards", "a"])
    assert str(caught.value) == "--name is required: name of this run and of its folder in --out"
    assert caught.value.reason == "missing-setting"


def test_an_empty_file_holds_no_settings_and_a_folder_is_none(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("# nothing\n")
    assert parse([*REQUIRED, "--config", str(file)]) == parse(REQUIRED)
    with pytest.raises(UserError, match=f"cannot read --config {tmp_path}: ") as caught:
        parse([*REQUIRED, "--config", str(tmp_path)])
    assert caught.value.reason == "unreadable"


def test_settings_as_yaml_are_for_people() -> None:
    written = to_yaml(parse(["--shards", "früh", "--name", "n", "--head.units", "3,4"]))
    lines = written.splitlines()
    assert lines[:3] == ["shards: früh", "out: runs", "name: n"]
    assert written.index("\nhead:") < written.index("\nfine_tune:") < written.index("\ncache:")


def test_stored_settings_by_dotted_names() -> None:
    stored = {"a": 1, "b": {"c": [2], "d": {"e": None}}, "f": {}}
    assert flat(stored) == {"a": 1, "b.c": [2], "b.d.e": None}


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        core_settings.parse(
            PromoteSettings,
            ["--help"],
            prog="jobs/promote.py",
            description="Makes a champion.",
            examples="  promote this\n  promote that",
        )
    text = capsys.readouterr().out
    assert text.startswith("usage: jobs/promote.py ")
    assert "\nMakes a champion.\n" in text
    assert "\nexamples:\n  promote this\n  promote that\n" in text
    shown = " ".join(text.split())
    for line in (
        "--config FILE YAML file or URL with settings --",
        "--verbose also show on stderr what is written to the log --",
        "--json write JSON lines to stdout, for machines --",
        "--registry TEXT folder or URL of models, history and champion (required)",
        "--candidate TEXT|none a published model, runs/NAME/model; required unless --rollback "
        "(default: none)",
        "--margin FLOAT the candidate is not worse if the 90 % interval of",
        "--recall TEXT,… recall required of single classes",
        "late_blight=0.9,healthy=0.8 [share] (default: none)",
        "--tie keep|promote which",
        "--resamples INT draws of the interval and of the calibration [resamples] (default: 10000)",
        "--rollback [BOOL] make the previous champion champion again (default: false)",
        "--batch_size INT|auto images per pass",
        "--ray.cpus INT|none logical CPUs",
    ):
        assert line in shown


def test_no_setting_that_is_a_url_holds_a_secret(tmp_path: Path) -> None:
    """It is refused before a configuration, a log or a tracker is written, and not shown."""
    for name in ("shards", "out", "weights", "cache.url"):
        for url in ("s3://key:hushhush@bucket/a", "https://host/a?sig=hushhush"):
            nested: Any = {"url": url} if name == "cache.url" else url
            values = {"shards": "a", name.partition(".")[0]: nested}
            with pytest.raises(UserError, match="holds a password or a signature") as told:
                validate(TrainSettings, values)
            assert told.value.reason == "secret-in-url"
            assert "hushhush" not in str(told.value)
