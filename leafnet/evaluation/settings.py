"""Settings of the jobs evaluate and promote."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from leafnet.core.settings import (
    AnyPrecision,
    BatchSize,
    DataSettings,
    Engine,
    Gpu,
    LockTimeout,
    Model,
    Precision,
    RaySettings,
    Settings,
    Url,
    Views,
)


class EvaluateSettings(Settings):
    """Settings of jobs/evaluate.py."""

    model: Model
    shards: Url | None = Field(
        None, description="data set written by jobs/prepare.py; or give --images"
    )
    images: Url | None = Field(
        None,
        description="photographs in class folders, or any source of jobs/prepare.py, to evaluate "
        "on without preparing them",
    )
    split: Literal["train", "valid", "test", "all"] = Field(
        "test", description="split to evaluate on"
    )
    out: Url | None = Field(
        None,
        description="folder or URL for evaluation.json and a gallery of telling photographs; a "
        "name ending in .json: that file only; none: write nothing",
    )
    against: Url | None = Field(
        None, description="another published model to compare with; none: do not compare"
    )
    slice_by: str | None = Field(
        None,
        description="regular expression on the key: also give the accuracy for each value of its "
        "named groups, or of group 1; none: only by folder and size",
    )
    tta: Views = 1
    explain: bool = Field(
        True, description="with --out: show class activation maps beside the photographs"
    )
    engine: Engine = "auto"
    precision: AnyPrecision = "auto"
    gpu: Gpu = "auto"
    batch_size: BatchSize = "auto"
    data: DataSettings = DataSettings()
    ray: RaySettings = RaySettings()

    @model_validator(mode="after")
    def _one_source(self) -> "EvaluateSettings":
        if (self.shards is None) == (self.images is None):
            raise ValueError("give --shards DATA or --images PHOTOGRAPHS, one of the two")
        return self


class PromoteSettings(Settings):
    """Settings of jobs/promote.py."""

    registry: Url = Field(description="folder or URL of models, history and champion")
    candidate: Url | None = Field(
        None, description="a published model, runs/NAME/model; required unless --rollback"
    )
    shards: Url | None = Field(
        None,
        description="data set written by jobs/prepare.py, on whose test split both models are "
        "evaluated; required unless --rollback",
    )
    margin: float = Field(
        1.0,
        ge=0,
        le=100,
        description="the candidate is not worse if the 90 % interval of the difference in accuracy "
        "(candidate minus champion) lies above minus this [points]",
    )
    min_recall: float = Field(
        0.5, ge=0, le=1, description="recall that the candidate must reach in every class [share]"
    )
    recall: tuple[str, ...] = Field(
        (),
        description="recall required of single classes instead, such as "
        "late_blight=0.9,healthy=0.8 [share]",
    )
    max_ece_rise: float = Field(
        0.02,
        ge=0,
        le=1,
        description="largest increase of the calibration error (ECE) over the champion's, beside "
        "what is chance [share]",
    )
    tie: Literal["keep", "promote"] = Field(
        "keep",
        description="which model becomes champion if the candidate is not worse, but no more "
        "accurate either",
    )
    resamples: int = Field(
        10_000,
        ge=100,
        description="draws of the interval and of the calibration [resamples]",
    )
    seed: int = Field(0, ge=0, description="seed of these draws")
    rollback: bool = Field(False, description="make the previous champion champion again")
    dry_run: bool = Field(False, description="evaluate and report, but write nothing")
    precision: Precision = "auto"
    gpu: Gpu = "auto"
    batch_size: BatchSize = "auto"
    lock_timeout: LockTimeout = 60.0
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
