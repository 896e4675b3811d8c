"""Settings of the job train."""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from leafnet.core.settings import (
    Auto,
    BatchSize,
    DataSettings,
    Gpu,
    LockTimeout,
    Note,
    Precision,
    RaySettings,
    Settings,
    Shards,
    Url,
    Workers,
)

_Epochs = Annotated[int, Field(ge=1, description="passes over the training images [epochs]")]
_GlobalBatch = Annotated[
    int, Field(ge=1, description="global batch, divided among the workers [images]")
]
_Warmup = Annotated[float, Field(ge=0, description="linear warm-up to the peak [epochs]")]
_WeightDecay = Annotated[float, Field(ge=0, description="decoupled weight decay of AdamW")]
_Smoothing = Annotated[float, Field(ge=0, lt=1, description="share spread over all classes")]
_Patience = Annotated[
    int | None,
    Field(
        ge=1,
        description="stop if the validation loss has not improved for this many epochs [epochs]; "
        "none: run all epochs",
    ),
]


class HeadSettings(Settings):
    """The classifier's head and how it is fitted on the features."""

    units: tuple[int, ...] = Field(
        (512,),
        description="widths of the hidden layers [units], such as 512 or 512,128; none: no hidden "
        "layer",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout after each hidden layer [share]")
    epochs: _Epochs = 50
    batch_size: _GlobalBatch = 32
    learning_rate: float = Field(1e-3, gt=0, description="peak rate of AdamW")
    warmup_epochs: _Warmup = 1.0
    weight_decay: _WeightDecay = 1e-4
    label_smoothing: _Smoothing = 0.1
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: every class has the same weight in the loss"
    )
    patience: _Patience = None
    search: int | None = Field(
        None,
        ge=1,
        description="number of combinations of units, learning_rate, weight_decay, dropout and "
        "label_smoothing to try, beginning with the given one; the one with the lowest validation "
        "loss is kept [trials]; none: no search",
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
        0,
        description="number of stages to train, counted from the end, 0 to 4 or all; 0: do not "
        "fine-tune",
    )
    epochs: _Epochs = 40
    batch_size: _GlobalBatch = 16
    learning_rate: float = Field(
        3e-3,
        gt=0,
        description="peak rate of AdamW for the last stage and the head, relative to the scale of "
        "the weights",
    )
    layer_decay: float = Field(
        0.7,
        gt=0,
        le=1,
        description="learning rate of each stage as a share of that of the next one",
    )
    warmup_epochs: _Warmup = 1.0
    weight_decay: _WeightDecay = 0.01
    clip_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this global norm")
    ema: float = Field(
        0.98,
        ge=0,
        lt=1,
        description="decay of the moving average of the weights, per step; the averaged weights "
        "are evaluated and published",
    )
    label_smoothing: _Smoothing = 0.1
    patience: _Patience = None
    crop_size: int | Auto = Field(
        "auto",
        description="size of the square views to train on; smaller ones are faster [pixels]; auto: "
        "image_size. Validation and the published model use image_size in any case",
    )
    crop: float = Field(
        0.5, gt=0, le=1, description="smallest area of a random crop [share]; 1: no crops"
    )
    brightness: float = Field(0.1, ge=0, lt=1, description="largest change of brightness [share]")
    colour: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="largest change of saturation, and twice the largest change of tint [share]",
    )
    mixup: float = Field(
        0.0, ge=0, description="alpha of Mixup, which blends pairs of images; 0: off"
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        description="alpha of CutMix, which pastes a box of one image into another; 0: off",
    )
    local_gb: float = Field(
        20.0,
        ge=0,
        description="space for decoded photographs on each node's disk [GB]; a larger data set is "
        "decoded again in every epoch",
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


def describe_stages(blocks: int | str) -> str:
    """What `fine_tune.blocks` trains, in words.

    >>> describe_stages(2), describe_stages(4)
    ('the last 2 of 4 stages', 'all 4 stages')
    """
    words = {1: "the last of 4 stages", 4: "all 4 stages", "all": "all 4 stages and the stem"}
    return words.get(blocks, f"the last {blocks} of 4 stages")


class CacheSettings(Settings):
    """Where computed features are kept."""

    url: Url | None = Field(
        None, description="folder or URL that several runs share; none: `features` beside the runs"
    )
    max_gb: float | None = Field(
        None,
        gt=0,
        description="remove the least recently used features above this size [GB]; none: never",
    )


class CheckpointSettings(Settings):
    """How often the state of training is saved."""

    every_seconds: float = Field(
        10.0,
        ge=0,
        description="time between checkpoints; longer if saving would take more than a fiftieth of "
        "the time [s]; 0: at the end of every epoch",
    )
    every_steps: int | None = Field(
        None, ge=1, description="also save after this many steps [steps]; none: only by time"
    )
    keep: int = Field(
        2,
        ge=1,
        description="number of checkpoints to keep; each has the best head so far as well "
        "[checkpoints]",
    )


class MlflowSettings(Settings):
    """Whether to log the run to MLflow, and to which server."""

    enabled: bool = Field(
        False,
        description="log the run to MLflow; in YAML `mlflow: true` is enough, and a tracking_uri "
        "turns it on as well",
    )
    tracking_uri: str | None = Field(
        None,
        description="tracking server, such as http://mlflow:5000 (sqlite:///FILE needs the package "
        "mlflow, not mlflow-skinny); none: "
        "MLFLOW_TRACKING_URI. Credentials belong in MLflow's own environment variables",
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

    retired: ClassVar[dict[str, str]] = {
        "features": "features are always computed once and kept: leave it out"
    }

    shards: Shards
    out: Url = Field("runs", description="folder or URL of all runs")
    name: str = Field(description="name of this run and of its folder in --out")
    weights: Url = Field(
        "imagenet",
        description="weights of the ResNet50: imagenet, random, or path or URL of an .h5 or "
        ".weights.h5 file",
    )
    image_size: int = Field(
        256, ge=32, le=1024, description="side of the square that images are resized to [pixels]"
    )
    precision: Precision = "auto"
    workers: Workers = Field(
        "auto",
        description="number of Ray Train workers; auto: one for each GPU, or one on CPUs; 1..4: as "
        "many as fit (a GPU, or all CPUs of a machine, for each), adjusted as machines come and go",
    )
    max_failures: int = Field(
        3,
        ge=0,
        description="number of successive failures of workers, without a new checkpoint in "
        "between, that the run survives [failures]",
    )
    hang_timeout: float = Field(
        300.0,
        gt=0,
        description="restart a worker that makes no progress for this long, or for as long as its "
        "start took if that is longer [s]",
    )
    gpu: Gpu = "auto"
    views: int = Field(
        8,
        ge=1,
        le=256,
        description="views of each training image in the cache; the first is not augmented",
    )
    augment: bool = Field(True, description="flip and rotate the other views (by up to 0.2 turns)")
    batch_size: BatchSize = "auto"
    precision_target: float = Field(
        0.95,
        gt=0,
        le=1,
        description="accuracy on the validation split of the predictions that need no review: sets "
        "the model's confidence threshold [share]",
    )
    precision_guarantee: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="probability with which precision_target also holds for new photographs like "
        "those of validation, at the price of more review [share]; none: no guarantee, so that "
        "their accuracy may as well be a little lower as higher",
    )
    int8: bool = Field(
        False,
        description="quantize the published backbone for OpenVINO on CPUs, unless validation "
        "accuracy falls by more than 0.5 points",
    )
    explain: bool = Field(
        True,
        description="show class activation maps in the gallery of the evaluation; takes some "
        "seconds",
    )
    seed: int = Field(0, ge=0, description="seed of the initial weights, order, views and dropout")
    cross_validate: int | None = Field(
        None,
        ge=2,
        description="also estimate the accuracy by cross-validation on train and valid [folds]; "
        "none: do not",
    )
    note: Note = None
    dry_run: bool = Field(
        False,
        description="check everything and print the plan, in seconds; train and write nothing",
    )
    lock_timeout: LockTimeout = 60.0
    head: HeadSettings = HeadSettings()
    fine_tune: FineTuneSettings = FineTuneSettings()
    data: DataSettings = DataSettings()
    cache: CacheSettings = CacheSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    mlflow: MlflowSettings = MlflowSettings()
    ray: RaySettings = RaySettings()

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            other = re.sub(r"[^A-Za-z0-9._-]+", "_", value).strip("._-") or "leaves"
            raise ValueError(
                "a name has letters A to Z and digits, and behind the first also . _ and -, such "
                f"as {other}"
            )
        return value
