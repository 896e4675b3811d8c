"""Settings of the job score."""

from typing import Any

from pydantic import Field, field_validator

from leafnet.core.settings import (
    AnyPrecision,
    Auto,
    BatchSize,
    Count,
    Engine,
    Gpu,
    LockTimeout,
    MaxMegapixels,
    Model,
    Note,
    RaySettings,
    Settings,
    Url,
    Views,
    day,
)


class ScoreSettings(Settings):
    """Settings of jobs/score.py."""

    model: Model
    images: Url = Field(
        description="photographs: a folder, prefix or glob; a list of URLs (.txt, or .parquet with "
        "a column image); or a data set written by jobs/prepare.py"
    )
    out: Url = Field(description="folder or URL for the predictions")
    date: str | None = Field(
        None, description="the night, as in the partition date=YYYY-MM-DD; none: today in UTC"
    )
    retries: int = Field(
        2,
        ge=0,
        description="number of later nights on which an unreadable photograph is tried again "
        "[nights]",
    )
    max_failed: float = Field(
        5.0,
        ge=0,
        le=100,
        description="exit with code 4 if more photographs of the night than this failed [%]",
    )
    max_megapixels: MaxMegapixels = 120
    engine: Engine = "auto"
    precision: AnyPrecision = "auto"
    tta: Views = 1
    explain: bool = Field(
        False,
        description="show class activation maps beside the photographs for review in the report, "
        "for 500 at most; that many take half a minute on two cores at the end of the night",
    )
    unit: str | None = Field(
        None,
        description="how to find the plant or plot of a photograph, for one verdict on all its "
        "photographs: a regular expression on the URL, or a GeoJSON file as for --field",
    )
    field: str | None = Field(
        None,
        description="how to find the field of a photograph, for a table by field in the report: a "
        "regular expression on the URL, or a GeoJSON file of polygons with the property name",
    )
    gpu: Gpu = "auto"
    workers: Count = Field(
        "auto",
        description="processes that run the network; auto: as many as fit the cluster's CPUs or "
        "GPUs",
    )
    batch_size: BatchSize = "auto"
    cpus_per_decode: float | Auto = Field(
        "auto",
        description="share of a CPU that Ray reserves for a task that decodes [CPUs]; auto: 0.25 "
        "if the network runs on CPUs, 1 if GPUs wait for photographs",
    )
    keep_every: float = Field(
        5.0,
        ge=0,
        description="time between writes of finished rows: at most this much work is lost if the "
        "job is killed [s]",
    )
    lock_timeout: LockTimeout = 60.0
    note: Note = None
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
