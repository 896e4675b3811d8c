"""Settings of the job prepare."""

from typing import Literal

from pydantic import Field, field_validator

from leafnet.core.settings import RaySettings, Settings, Url


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
