"""Settings of the job train."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from leafnet.core.settings import Auto, Count, DataSettings, RaySettings, Settings, Url, Workers


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
        None, description="folder or URL shared by runs; none: `features` beside the runs"
    )
    max_gb: float | None = Field(
        None,
        gt=0,
        description="evict the least recently used features above this [GB]; none: never",
    )


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
