"""YAML and command line into typed, frozen settings.

Defaults come first, then the file named by `--config`, then the flags. A key that does not exist
and a value that cannot be are refused by name, before any machine is taken.
"""

import argparse
import datetime
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from leafnet import storage
from leafnet.errors import UserError

SPLITS = ("train", "valid", "test")

Url = str
Auto = Literal["auto"]


def _at_least_one(value: int | str) -> int | str:
    if isinstance(value, int) and value < 1:
        raise ValueError(f"must be auto or at least 1, got {value}")
    return value


def _day(value: Any) -> Any:
    if isinstance(value, datetime.date):  # as YAML reads 2026-11-24
        return value.isoformat()
    if isinstance(value, str) and datetime.date.fromisoformat(value).isoformat() != value:
        raise ValueError(f"must be written YYYY-MM-DD, got {value}")
    return value


Count = Annotated[int | Auto, AfterValidator(_at_least_one)]


def _number(value: Any) -> Any:
    # Literals of numbers do not take the text of a command line.
    return int(value) if isinstance(value, str) and value.isdecimal() else value


Views = Annotated[Literal[1, 4, 8], BeforeValidator(_number)]


def _workers(value: int | str) -> int | str:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if value == "auto" or (isinstance(value, int) and value >= 1):
        return value
    if worker_range(value) is None:
        raise ValueError("must be auto or at least 1, or a range such as 1..4")
    return value


def worker_range(workers: int | str) -> tuple[int, int] | None:
    """(fewest, most) where `workers` is a range.

    >>> worker_range("1..4"), worker_range(2), worker_range("auto")
    ((1, 4), None, None)
    """
    fewest, dots, most = str(workers).partition("..")
    if not dots or not fewest.isdecimal() or not most.isdecimal():
        return None
    return (int(fewest), int(most)) if 1 <= int(fewest) <= int(most) else None


Workers = Annotated[int | str, AfterValidator(_workers)]


class Settings(BaseModel):
    """Base of all settings: frozen, and closed to keys that do not exist."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RaySettings(Settings):
    """Where the work runs."""

    address: str | None = Field(
        None,
        description="a running Ray cluster; none: the one of RAY_ADDRESS or of `ray start` on this "
        "machine, else a local one for this job",
    )
    cpus: int | None = Field(
        None, ge=1, description="logical CPUs of a local Ray [CPUs]; none: the machine's"
    )
    wait: float = Field(
        900.0,
        ge=0,
        description="with --gpu true: how long a cluster may take to start machines with GPUs "
        "that it has not yet [s]",
    )


class PrepareSettings(Settings):
    """Settings of jobs/prepare.py."""

    source: Url = Field(
        description="photographs: a folder of class folders, the same under train/valid/test, "
        "Parquet in the Hugging Face image layout, or WebDataset tars"
    )
    out: Url = Field(description="folder or URL for the shards")
    split: str = Field(
        "80/10/10",
        pattern=r"^\d+/\d+/\d+$",
        description="shares of train/valid/test [%] where the source has no split of its own",
    )
    group: str | None = Field(
        None,
        description="regular expression on the key; photographs with the same match (of group 1, "
        "if there is one) stay in one split, such as all of one plant",
    )
    duplicates: Literal["drop", "report"] = Field(
        "drop",
        description="identical pictures across splits (train gives way to valid, valid to test) "
        "and under different labels (all dropped)",
    )
    near_duplicates: Literal["drop", "report"] = Field(
        "report", description="the same for pictures that look alike"
    )
    near_distance: int = Field(
        3,
        ge=0,
        le=3,
        description="perceptual hashes at most this far apart look alike [bits of 64]",
    )
    shard_mb: int = Field(64, ge=1, le=1024, description="size of a shard [MB]")
    row_group: int = Field(256, ge=1, description="rows of a row group [images]")
    max_megapixels: int = Field(
        120, ge=1, description="a larger photograph is refused before it is decoded [megapixels]"
    )
    seed: int = Field(0, ge=0, description="seed of split and order")
    overwrite: bool = Field(False, description="replace the data set at --out")
    lock_timeout: float = Field(
        60.0,
        ge=1,
        description="a job on another machine that has shown no sign of life for so long is "
        "dead, and its output is taken over [s]",
    )
    ray: RaySettings = RaySettings()

    @field_validator("split")
    @classmethod
    def _shares_add_up(cls, value: str) -> str:
        shares = [int(share) for share in value.split("/")]
        if sum(shares) != 100 or not shares[0]:
            raise ValueError(
                f"the three shares must add up to 100 with some for train, got {value}"
            )
        return value


class HeadSettings(Settings):
    """The classifier's head and how it is fitted on the features."""

    units: tuple[int, ...] = Field(
        (512,),
        description="widths of the hidden layers [units], such as 512 or 512,128; empty: none",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout after each hidden layer [share]")
    epochs: int = Field(50, ge=1, description="passes over the training images [epochs]")
    batch_size: int = Field(
        32, ge=1, description="global batch, shared out among the workers [images]"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak rate of AdamW")
    warmup_epochs: float = Field(1.0, ge=0, description="linear warm-up to the peak [epochs]")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled weight decay of AdamW")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share spread over all classes")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: every class counts the same in the loss"
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="stop when the validation loss has not improved for so long [epochs]; "
        "none: run all epochs",
    )
    search: int | None = Field(
        None,
        ge=1,
        description="try so many settings of units, learning_rate, weight_decay, dropout and "
        "label_smoothing, the first those given, and keep the one with the lowest validation loss "
        "[trials]; none: those given",
    )

    @field_validator("units")
    @classmethod
    def _widths_positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(width < 1 for width in value):
            raise ValueError(f"every width must be at least 1, got {value}")
        return value


class FineTuneSettings(Settings):
    """How the last stages of the ResNet50 are trained with the head, after it was fitted."""

    blocks: int | Literal["all"] = Field(
        0, description="stages trained, counted from the end, 0 to 4 or all; 0: do not fine-tune"
    )
    epochs: int = Field(40, ge=1, description="passes over the training images [epochs]")
    batch_size: int = Field(
        16, ge=1, description="global batch, shared out among the workers [images]"
    )
    learning_rate: float = Field(
        3e-3,
        gt=0,
        description="peak rate of AdamW for the last stage and the head, relative to the scale of "
        "what is trained",
    )
    layer_decay: float = Field(
        0.7, gt=0, le=1, description="rate of each stage as a share of that of the one after it"
    )
    warmup_epochs: float = Field(1.0, ge=0, description="linear warm-up to the peak [epochs]")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay of AdamW")
    clip_norm: float = Field(
        1.0, gt=0, description="largest norm of all gradients together; longer ones are scaled"
    )
    ema: float = Field(
        0.98,
        ge=0,
        lt=1,
        description="share that the average of the weights keeps of itself in a step; the average "
        "is what is evaluated and published",
    )
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share spread over all classes")
    patience: int | None = Field(
        None,
        ge=1,
        description="stop when the validation loss has not improved for so long [epochs]; "
        "none: run all epochs",
    )
    crop_size: int | Auto = Field(
        "auto",
        description="views to train on are squares of this size, smaller ones faster [pixels]; "
        "auto: image_size. Validation and the model look at image_size all the same",
    )
    crop: float = Field(
        0.5, gt=0, le=1, description="smallest area of a random crop [share]; 1: no crops"
    )
    brightness: float = Field(0.1, ge=0, lt=1, description="largest change of brightness [share]")
    colour: float = Field(
        0.1, ge=0, lt=1, description="largest change of saturation, twice that of tint [share]"
    )
    mixup: float = Field(
        0.0, ge=0, description="alpha of Mixup, pairs of images blended into each other; 0: off"
    )
    cutmix: float = Field(
        0.0, ge=0, description="alpha of CutMix, a box of one image put into another; 0: off"
    )
    local_gb: float = Field(
        20.0,
        ge=0,
        description="decoded photographs kept on each node's disk [GB]; a larger data set is "
        "decoded again in each epoch",
    )

    @field_validator("blocks")
    @classmethod
    def _stages(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 0 <= value <= 4:
            raise ValueError(f"must be 0 to 4 or all, got {value}")
        return value

    @field_validator("crop_size")
    @classmethod
    def _crop_pixels(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 32 <= value <= 1024:
            raise ValueError(f"must be auto or from 32 to 1024, got {value}")
        return value


def stages(blocks: int | str) -> str:
    """What `fine_tune.blocks` trains, in words.

    >>> stages(2), stages(4)
    ('the last 2 of 4 stages', 'all 4 stages')
    """
    words = {1: "the last of 4 stages", 4: "all 4 stages", "all": "all 4 stages and the stem"}
    return words.get(blocks, f"the last {blocks} of 4 stages")


class CacheSettings(Settings):
    """Where computed features are kept."""

    url: Url | None = Field(
        None, description="folder or URL shared by runs; none: `features` beside the runs"
    )
    max_gb: float | None = Field(
        None,
        gt=0,
        description="evict the least recently used features above this [GB]; none: never",
    )


class DataSettings(Settings):
    """How shards are read."""

    local_cache: str | None = Field(
        None,
        description="folder on a fast disk of each machine for copies of the shards that it reads, "
        "such as /mnt/nvme/leafnet; none: each read asks the store",
    )
    local_cache_gb: float = Field(
        100.0,
        gt=0,
        description="the shards that were read least recently make room above this, on each "
        "machine [GB]",
    )

    @field_validator("local_cache")
    @classmethod
    def _on_a_disk(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not storage.is_local(value):
            raise ValueError("must be a folder on a disk, not a URL")
        return storage.absolute(value)


class CheckpointSettings(Settings):
    """How often the state of training is saved."""

    every_seconds: float = Field(
        10.0,
        ge=0,
        description="when the last is this old, or older where more than a fiftieth of the time "
        "would go into saving [s]; 0: at the end of every epoch",
    )
    every_steps: int | None = Field(
        None, ge=1, description="also after so many steps [steps]; none: only by time"
    )
    keep: int = Field(
        2, ge=1, description="newest ones kept; each holds the best head as well [checkpoints]"
    )


class DoctorSettings(Settings):
    """Settings of jobs/doctor.py."""

    storage: Url | None = Field(
        None,
        description="folder or URL below which a file is written, read and deleted; none: not "
        "tried",
    )
    gpu: bool | Auto = Field("auto", description="look for GPUs; auto: when nvidia-smi finds some")
    ray: RaySettings = RaySettings()


class MlflowSettings(Settings):
    """What is told to an MLflow tracking server, and to which one."""

    enabled: bool = Field(
        False,
        description="log the run to MLflow; in YAML `mlflow: true` will do, and a tracking_uri "
        "turns it on, too",
    )
    tracking_uri: str | None = Field(
        None,
        description="tracking server, such as http://mlflow:5000, or sqlite:///FILE; none: that of "
        "MLFLOW_TRACKING_URI. Credentials only in MLflow's own environment variables",
    )
    experiment: str = Field("leafnet", description="name of the experiment in MLflow")

    @model_validator(mode="before")
    @classmethod
    def _from_switch(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return {"enabled": value}
        if isinstance(value, dict) and value.get("tracking_uri") and "enabled" not in value:
            return {**value, "enabled": True}
        return value


class TrainSettings(Settings):
    """Settings of jobs/train.py."""

    shards: Url = Field(description="data set that jobs/prepare.py wrote")
    out: Url = Field("runs", description="folder or URL of all runs")
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of this run, a folder below --out",
    )
    weights: str = Field(
        "imagenet",
        description="of the ResNet50: imagenet, random, or path or URL of an .h5 or .weights.h5",
    )
    image_size: int = Field(
        256, ge=32, le=1024, description="images are resized to a square [pixels]"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the backbone; auto: bfloat16 where the processor or GPU has it"
    )
    workers: Workers = Field(
        "auto",
        description="Ray Train workers; auto: one for each GPU, or one on CPUs; 1..4: as many as "
        "there is room for, a GPU or a machine's CPUs each, more or fewer as machines come and go",
    )
    max_failures: int = Field(
        3,
        ge=0,
        description="failures of workers in a row, without a new checkpoint in between, after "
        "which the run still goes on [failures]",
    )
    hang_timeout: float = Field(
        300.0,
        gt=0,
        description="a worker that gets nowhere for so long is ended and replaced, but never "
        "before the time that its start took [s]",
    )
    gpu: bool | Auto = Field("auto", description="use GPUs; auto: when the cluster has some")
    features: Literal["cached", "online"] = Field(
        "cached",
        description="cached: the frozen backbone runs once over each view; online: in every epoch",
    )
    views: int = Field(
        8, ge=1, le=256, description="views of each training image in the cache; the first is plain"
    )
    augment: bool = Field(
        True, description="flip and rotate (up to 0.2 turn) the views after the first"
    )
    batch_size: Count = Field(
        "auto", description="images in one pass of the backbone; auto: 32 on CPU, 256 on GPU"
    )
    precision_target: float = Field(
        0.95,
        gt=0,
        le=1,
        description="accuracy of the predictions that nobody has to review, on the validation "
        "split: sets the model's threshold of confidence [share]",
    )
    int8: bool = Field(
        False,
        description="quantize the published backbone for OpenVINO on CPUs, unless that costs more "
        "than 0.5 points of validation accuracy",
    )
    explain: bool = Field(
        True, description="class activation maps in the gallery of the evaluation, some seconds"
    )
    seed: int = Field(0, ge=0, description="seed of initial weights, order, views and dropout")
    cross_validate: int | None = Field(
        None,
        ge=2,
        description="also give the accuracy over so many folds of train and valid [folds]; "
        "none: do not",
    )
    dry_run: bool = Field(
        False,
        description="check everything and print the plan, in seconds; train nothing, leave nothing",
    )
    lock_timeout: float = Field(
        60.0,
        ge=1,
        description="a job on another machine that has shown no sign of life for so long is "
        "dead, and its output is taken over [s]",
    )
    head: HeadSettings = HeadSettings()
    fine_tune: FineTuneSettings = FineTuneSettings()
    data: DataSettings = DataSettings()
    cache: CacheSettings = CacheSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    mlflow: MlflowSettings = MlflowSettings()
    ray: RaySettings = RaySettings()


class EvaluateSettings(Settings):
    """Settings of jobs/evaluate.py."""

    model: Url = Field(description="a published model, runs/NAME/model or REGISTRY/champion")
    shards: Url = Field(description="data set that jobs/prepare.py wrote")
    split: Literal["train", "valid", "test", "all"] = Field(
        "test", description="what to evaluate on"
    )
    out: Url | None = Field(
        None,
        description="folder or URL for evaluation.json and the photographs worth a look; a name "
        "that ends in .json: that file alone; none: not written",
    )
    against: Url | None = Field(
        None, description="another published model to compare with; none: no comparison"
    )
    slice_by: str | None = Field(
        None,
        description="regular expression on the key: accuracy by what it finds, of each named group "
        "or of group 1; none: only by folder and size",
    )
    tta: Views = Field(
        1,
        description="test-time augmentation: mean over so many views, the flips (4) and quarter "
        "turns too (8) [views]",
    )
    explain: bool = Field(
        True, description="with --out: class activation maps beside the photographs"
    )
    engine: Literal["auto", "tensorflow", "openvino"] = Field(
        "auto", description="what runs the network; auto: the fastest, which score takes too"
    )
    precision: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        "auto", description="of the backbone; auto: the fastest that model and processor have"
    )
    gpu: bool | Auto = Field("auto", description="use GPUs; auto: when the cluster has some")
    batch_size: Count = Field("auto", description="images in one pass; auto: 32 on CPU, 256 on GPU")
    data: DataSettings = DataSettings()
    ray: RaySettings = RaySettings()


class ScoreSettings(Settings):
    """Settings of jobs/score.py."""

    model: Url = Field(description="a published model, runs/NAME/model or REGISTRY/champion")
    images: Url = Field(
        description="photographs: a folder, a prefix, a glob, a list of URLs (.txt, or .parquet "
        "with a column image), or a data set that jobs/prepare.py wrote"
    )
    out: Url = Field(description="folder or URL for the predictions")
    date: str | None = Field(
        None, description="the night, for the partition date=YYYY-MM-DD; none: today in UTC"
    )
    retries: int = Field(
        2,
        ge=0,
        description="later nights on which a photograph that could not be read is tried again",
    )
    max_failed: float = Field(
        5.0, ge=0, le=100, description="exit code 4 when more of the night failed [%]"
    )
    max_megapixels: int = Field(
        120, ge=1, description="a larger photograph is refused before it is decoded [megapixels]"
    )
    engine: Literal["auto", "tensorflow", "openvino"] = Field(
        "auto", description="what runs the network; auto: the fastest that is installed"
    )
    precision: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        "auto", description="of the backbone; auto: the fastest that model and processor have"
    )
    tta: Views = Field(
        1,
        description="test-time augmentation: mean over so many views, the flips (4) and quarter "
        "turns too (8); takes so many times as long [views]",
    )
    explain: bool = Field(
        False,
        description="class activation maps beside the photographs for review in the night's "
        "report, 500 at most; half a minute at the end of the night for so many, on two cores",
    )
    gpu: bool | Auto = Field("auto", description="use GPUs; auto: when the cluster has some")
    workers: Count = Field(
        "auto", description="processes that hold the network; auto: from the cluster's CPUs or GPUs"
    )
    batch_size: Count = Field("auto", description="images in one pass; auto: 32 on CPU, 256 on GPU")
    cpus_per_decode: float | Auto = Field(
        "auto",
        description="share of a CPU that Ray sets aside for a task that decodes [CPUs]; auto: 0.25 "
        "beside a network on CPUs, 1 where GPUs wait for photographs",
    )
    keep_every: float = Field(
        5.0, ge=0, description="finished rows are kept so often: what a kill can lose [s]"
    )
    lock_timeout: float = Field(
        60.0,
        ge=1,
        description="a job on another machine that has shown no sign of life for so long is "
        "dead, and its output is taken over [s]",
    )
    ray: RaySettings = RaySettings()

    @field_validator("max_failed", mode="before")
    @classmethod
    def _percent(cls, value: Any) -> Any:
        return value.removesuffix("%") if isinstance(value, str) else value

    @field_validator("cpus_per_decode")
    @classmethod
    def _some_cpu(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 < value <= 64:
            raise ValueError(f"must be auto or more than 0 and at most 64, got {value}")
        return value

    _date = field_validator("date", mode="before")(_day)


class ReportSettings(Settings):
    """Settings of jobs/report.py."""

    run: Url | None = Field(None, description="a finished run, runs/NAME; none: see --predictions")
    predictions: Url | None = Field(
        None, description="what jobs/score.py wrote to, for the report of a night; none: see --run"
    )
    date: str | None = Field(
        None, description="the night, YYYY-MM-DD; none: the newest of --predictions"
    )

    _date = field_validator("date", mode="before")(_day)


class PromoteSettings(Settings):
    """Settings of jobs/promote.py."""

    registry: Url = Field(description="folder or URL of models, history and champion")
    candidate: Url | None = Field(
        None, description="a published model, runs/NAME/model; required unless --rollback"
    )
    shards: Url | None = Field(
        None,
        description="data set that jobs/prepare.py wrote, on whose test split both models are "
        "evaluated; required unless --rollback",
    )
    margin: float = Field(
        1.0,
        ge=0,
        le=100,
        description="not worse: the 95 % interval of the difference in accuracy, candidate less "
        "champion, lies above minus this [points]",
    )
    min_recall: float = Field(
        0.5, ge=0, le=1, description="recall that the candidate needs in every class [share]"
    )
    recall: tuple[str, ...] = Field(
        (),
        description="recall that it needs in some classes in place of that, such as "
        "late_blight=0.9,healthy=0.8 [share]",
    )
    max_ece_rise: float = Field(
        0.02,
        ge=0,
        le=1,
        description="the candidate's calibration error (ECE) may be so much above the champion's "
        "[share]",
    )
    tie: Literal["keep", "promote"] = Field(
        "keep",
        description="which of the two is champion when the candidate is not worse, but no better: "
        "its accuracy is at most the champion's",
    )
    resamples: int = Field(
        10_000, ge=100, description="paired bootstrap of the interval [resamples]"
    )
    seed: int = Field(0, ge=0, description="seed of the bootstrap")
    rollback: bool = Field(False, description="make the champion before this one champion again")
    dry_run: bool = Field(False, description="evaluate and tell, and write nothing")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the backbone; auto: bfloat16 where the processor or GPU has it"
    )
    gpu: bool | Auto = Field("auto", description="use GPUs; auto: when the cluster has some")
    batch_size: Count = Field("auto", description="images in one pass; auto: 32 on CPU, 256 on GPU")
    lock_timeout: float = Field(
        60.0,
        ge=1,
        description="a job on another machine that has shown no sign of life for so long is "
        "dead, and the registry is taken over [s]",
    )
    ray: RaySettings = RaySettings()

    @field_validator("recall")
    @classmethod
    def _floors(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            _, equals, share = text.rpartition("=")
            if not equals or not re.fullmatch(r"[01]|0?\.\d+|1\.0+", share):
                raise ValueError(f"must be CLASS=SHARE with a share from 0 to 1, got {text}")
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> "PromoteSettings":
        if not self.rollback and (self.candidate is None or self.shards is None):
            raise ValueError("give --candidate MODEL and --shards DATA, or --rollback")
        if self.rollback and self.candidate is not None:
            raise ValueError("--rollback takes no --candidate; give one of the two")
        return self


class ExportSettings(Settings):
    """Settings of jobs/export.py."""

    model: Url = Field(description="a published model, runs/NAME/model or REGISTRY/champion")
    to: Literal["tf_saved_model", "onnx", "openvino", "litert"] = Field(description="format")
    out: Url = Field(
        description="file or URL to write: .onnx, .xml (openvino; a .bin beside it), .tflite; of "
        "tf_saved_model a folder"
    )
    shards: Url | None = Field(
        None,
        description="data set whose test split (valid or train where that is empty) the export is "
        "checked on; none: drawn leaves",
    )
    count: int = Field(
        200, ge=1, description="photographs on which export and model are compared [photographs]"
    )
    max_changed: float = Field(
        0.5,
        ge=0,
        le=100,
        description="the export is refused when it gives more of them another label than the "
        "model does [%]",
    )
    overwrite: bool = Field(False, description="replace what is at --out")


class ReviewSettings(Settings):
    """Settings of jobs/review.py."""

    out: Url = Field(
        description="folder or URL to write: of photographs and tasks, or with --answers of shards"
    )
    predictions: Url | None = Field(None, description="what jobs/score.py wrote as --out")
    date: tuple[str, ...] = Field(
        (), description="nights to choose from [YYYY-MM-DD,…]; none: the newest"
    )
    count: int = Field(50, ge=1, description="photographs to label [photographs]")
    pool: int = Field(
        3,
        ge=1,
        description="photographs among which diverse ones are chosen, the most uncertain and the "
        "most novel [multiples of --count]",
    )
    model: Url | None = Field(
        None,
        description="the model that scored the nights, for its features; none: the one that the "
        "summary of the newest night names",
    )
    image_prefix: str | None = Field(
        None,
        description="what a labelling tool puts before the name of a photograph to show it; none: "
        "Label Studio's local files below the folder of --out, or the URL of --out",
    )
    answers: Url | None = Field(
        None,
        description="labels to take back: Label Studio's export as JSON or JSON-MIN, or a CSV "
        "with the columns key and label",
    )
    photographs: Url | None = Field(
        None,
        description="folder that this job wrote and --answers is of; none: the one it names, or of "
        "a CSV the one it lies in",
    )
    base: Url | None = Field(
        None,
        description="data set to which the answers are added as training examples; its own "
        "examples keep their splits; none: the answers alone",
    )
    split: str = Field(
        "80/10/10",
        pattern=r"^\d+/\d+/\d+$",
        description="shares of train/valid/test [%] of answers alone",
    )
    ray: RaySettings = RaySettings()

    @field_validator("date", mode="before")
    @classmethod
    def _are_days(cls, value: Any) -> Any:
        days = value if isinstance(value, list | tuple) else [value]
        days = [day.isoformat() if isinstance(day, datetime.date) else str(day) for day in days]
        for day in days:
            if datetime.date.fromisoformat(day).isoformat() != day:
                raise ValueError(f"must be written YYYY-MM-DD, got {day}")
        return tuple(days)

    @model_validator(mode="after")
    def _one_way(self) -> "ReviewSettings":
        if (self.predictions is None) == (self.answers is None):
            raise ValueError("give --predictions OUT to choose photographs, or --answers FILE")
        return self


SettingsT = TypeVar("SettingsT", bound=Settings)

# Flags that are no settings: `terminal.run_job` has acted on them before the settings are read.
_OUTPUT = {
    "verbose": "show what goes to the log on stderr as well",
    "json": "write one JSON object a line to stdout, for machines",
}


def parse(
    settings_class: type[SettingsT],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    examples: str = "",
) -> SettingsT:
    """Settings from `argv`, over those of the YAML file that `--config` names, over the defaults.

    Raises:
        UserError: an unknown flag or key, with the nearest that exists; an impossible value.
        SystemExit: after `--help`, with code 0.
    """
    parser = _parser(settings_class, prog=prog, description=description, examples=examples)
    known, unknown = parser.parse_known_args([_with_underscores(word) for word in argv])
    flags = vars(known)
    if unknown:
        names = [name for name, _ in leaves(settings_class)] + ["config", "help", *_OUTPUT]
        raise _unknown("flag", unknown[0].split("=")[0], names, prefix="--")
    config = flags.pop("config", None)
    for name in _OUTPUT:
        flags.pop(name, None)
    values: dict[str, Any] = _read_yaml(config) if config else {}
    for name, text in flags.items():
        _put(values, name, _from_text(text, dict(leaves(settings_class))[name]))
    return validate(settings_class, values, where=config)


def validate(
    settings_class: type[SettingsT], values: dict[str, Any], *, where: str | None = None
) -> SettingsT:
    """`values`, nested as in YAML, as settings.

    Raises:
        UserError: an unknown key or an impossible value, named with its place.
    """
    try:
        return settings_class.model_validate(values)
    except ValidationError as error:
        raise _explain(error, settings_class, where) from None


def to_yaml(settings: Settings) -> str:
    """`settings`, complete with defaults, as YAML that `--config` reads."""
    document = settings.model_dump(mode="json")
    return str(yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings as they are stored, nested, by their dotted names.

    >>> flat({"seed": 0, "head": {"units": [512]}})
    {'seed': 0, 'head.units': [512]}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return found


def leaves(settings_class: type[Settings], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting with its dotted name, in order of definition."""
    for name, field in settings_class.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError("bad-flag", f"{message}; {self.prog} --help lists all flags")


def _parser(
    settings_class: type[Settings], *, prog: str, description: str, examples: str
) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=f"examples:\n{examples}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file or URL with settings")
    for name, what in _OUTPUT.items():
        parser.add_argument(f"--{name}", action="store_true", help=what)
    for name, field in leaves(settings_class):
        default = "required" if field.is_required() else f"default: {_shown(field.default)}"
        parser.add_argument(
            f"--{name}",
            dest=name,
            metavar=_metavar(field.annotation),
            nargs="?" if field.annotation is bool else None,
            const="true" if field.annotation is bool else None,
            help=f"{field.description} ({default})".replace("%", "%%"),
        )
    return parser


def _shown(default: Any) -> str:
    if default is None or default == ():
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _metavar(annotation: Any) -> str:
    """What may be given, in a word.

    >>> _metavar(int), _metavar(int | Literal["auto"]), _metavar(Literal["a", "b"] | None)
    ('INT', 'INT|auto', 'a|b|none')
    """
    if annotation is type(None):
        return "none"
    if typing.get_origin(annotation) is Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return "|".join(_metavar(part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return f"{_metavar(typing.get_args(annotation)[0])},…"
    names = {bool: "BOOL", str: "TEXT"}
    return str(names.get(annotation, annotation.__name__.upper()))


def _from_text(text: str, field: FieldInfo) -> Any:
    parts = typing.get_args(field.annotation)
    if type(None) in parts and text.lower() in ("none", "null"):
        return None
    if typing.get_origin(field.annotation) is tuple:
        return () if text.lower() in ("", "none") else text.split(",")
    return text


def _with_underscores(word: str) -> str:
    """A flag as the settings are named; values are left alone.

    >>> _with_underscores("--max-failed=1-2"), _with_underscores("-a-b")
    ('--max_failed=1-2', '-a-b')
    """
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    for i, part in enumerate(path):
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise UserError("bad-value", f"{'.'.join(path[: i + 1])} must be a mapping in the YAML")
    values[last] = value


def _read_yaml(url: str) -> dict[str, Any]:
    try:
        document = yaml.safe_load(storage.read_bytes(url))
    except FileNotFoundError:
        raise UserError("no-such-file", f"--config {url} does not exist") from None
    except yaml.YAMLError as error:
        raise UserError(
            "bad-yaml", f"{url} is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("unreadable", f"cannot read --config {url}: {error}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UserError(
            "bad-yaml", f"{url} must hold `setting: value` lines, found {type(document)}"
        )
    return document


def _explain(
    error: ValidationError, settings_class: type[Settings], where: str | None
) -> UserError:
    first, *more = error.errors(include_url=False)
    names = [name for name, _ in leaves(settings_class)]
    sections = {name.rsplit(".", 1)[0] for name in names if "." in name}
    given = ".".join(str(part) for part in first["loc"])
    place = f" in {where}" if where else ""
    if not first["loc"]:  # of several settings together
        return UserError("bad-settings", first["msg"].removeprefix("Value error, ") + place)
    if first["type"] == "extra_forbidden":
        return _unknown("setting", given, names + sorted(sections), place=place)
    # A union reports a place inside itself, such as `workers.int`.
    name = max(
        (known for known in [*names, *sections] if given == known or given.startswith(known + ".")),
        key=len,
        default=given,
    )
    if first["type"] == "missing":
        described = dict(leaves(settings_class))[name].description
        return UserError("missing-setting", f"--{name} is required: {described}")
    message = first["msg"].removeprefix("Value error, ")
    if (
        name != given
        and len({".".join(map(str, e["loc"])).startswith(name) for e in [first, *more]}) == 1
    ):
        others = [e["msg"][0].lower() + e["msg"][1:] for e in more if _is_below(e["loc"], name)]
        message = " or ".join([message, *others])
    return UserError("bad-value", f"--{name} cannot be {first['input']!r}{place}: {message}")


def _is_below(loc: tuple[int | str, ...], name: str) -> bool:
    return ".".join(map(str, loc)).startswith(name + ".")


def _unknown(
    kind: str, given: str, names: Sequence[str], *, prefix: str = "", place: str = ""
) -> UserError:
    bare = given.removeprefix("--")
    near = difflib.get_close_matches(bare, names, n=1, cutoff=0.5) or [
        name for name in names if name.rsplit(".", 1)[-1] == bare.rsplit(".", 1)[-1]
    ]
    hint = f"did you mean {prefix}{near[0]}?" if near else "see --help for all"
    return UserError("unknown-setting", f"there is no {kind} {given}{place}; {hint}")
