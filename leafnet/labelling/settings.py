"""Settings of the job review."""

import datetime
from typing import Any

from pydantic import Field, field_validator, model_validator

from leafnet.core.settings import RaySettings, Settings, Url


class ReviewSettings(Settings):
    """Settings of jobs/review.py."""

    out: Url = Field(
        description="folder or URL to write: photographs and tasks, or with --answers shards"
    )
    predictions: Url | None = Field(None, description="--out of jobs/score.py")
    date: tuple[str, ...] = Field(
        (), description="nights to choose from [YYYY-MM-DD,…]; none: the newest"
    )
    count: int = Field(50, ge=1, description="photographs to label [photographs]")
    pool: int = Field(
        3,
        ge=1,
        description="size of the pool of the most uncertain and most novel photographs, from which "
        "diverse ones are chosen [multiples of --count]",
    )
    model: Url | None = Field(
        None,
        description="the model that scored the nights, for its features; none: the one named in "
        "the summary of the newest night",
    )
    image_prefix: Url | None = Field(
        None,
        description="what the labelling tool needs before the name of a photograph to show it; "
        "none: the prefix of Label Studio's local files in the folder of --out, or the URL of "
        "--out",
    )
    answers: Url | None = Field(
        None,
        description="labels to add: an export of Label Studio (JSON or JSON-MIN), or a CSV with "
        "the columns key and label",
    )
    audit: int = Field(
        0,
        ge=0,
        description="photographs chosen at random as well, whose answers show how many labels of "
        "the nights are right [photographs]",
    )
    photographs: Url | None = Field(
        None,
        description="folder written by this job that --answers belongs to; none: the one named in "
        "it, or for a CSV the folder that it is in",
    )
    base: Url | None = Field(
        None,
        description="data set to which the answers are added as training examples (its own "
        "examples keep their splits); none: a data set of the answers alone",
    )
    split: str = Field(
        "80/10/10",
        pattern=r"^\d+/\d+/\d+$",
        description="without --base: shares of train/valid/test [%]",
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
