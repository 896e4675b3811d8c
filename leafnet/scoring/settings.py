"""Settings of the job score."""

from typing import Any, Literal

from pydantic import Field, field_validator

from leafnet.core.settings import Auto, Count, RaySettings, Settings, Url, Views, day


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

    _date = field_validator("date", mode="before")(day)
