"""Settings of the job review."""

import datetime
from typing import Any

from pydantic import Field, field_validator, model_validator

from leafnet.core.settings import RaySettings, Settings, Url


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
