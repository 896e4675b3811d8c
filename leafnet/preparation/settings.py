"""Settings of the job prepare."""

from typing import Literal

from pydantic import Field, field_validator

from leafnet.core.settings import LockTimeout, MaxMegapixels, RaySettings, Settings, Url


class PrepareSettings(Settings):
    """Settings of jobs/prepare.py."""

    source: Url = Field(
        description="photographs: a folder with a folder for each class, or such folders below "
        "train/, valid/ and test/; photographs with a table of labels; Parquet in the Hugging Face "
        "image layout; tars of class folders or in the WebDataset layout"
    )
    out: Url = Field(description="folder or URL for the shards")
    split: str = Field(
        "80/10/10",
        pattern=r"^\d+/\d+/\d+$",
        description="shares of train/valid/test [%] if the source has no splits of its own; "
        "0/0/100: for evaluation alone",
    )
    group: str | None = Field(
        None,
        description="regular expression on the key; photographs with the same match (of group 1, "
        "if there is one), for example all of one plant, stay in the same split",
    )
    duplicates: Literal["drop", "report"] = Field(
        "drop",
        description="identical pictures in several splits (the copy in test is kept before that in "
        "valid, and that before train) or with different labels (all are dropped)",
    )
    near_duplicates: Literal["drop", "report"] = Field(
        "report", description="the same for pictures that look alike, also flipped or turned"
    )
    near_distance: int = Field(
        3,
        ge=0,
        le=3,
        description="pictures look alike if their perceptual hashes differ in at most this many "
        "bits [bits of 64]",
    )
    shard_mb: int = Field(64, ge=1, le=1024, description="size of a shard [MB]")
    row_group: int = Field(256, ge=1, description="size of a Parquet row group [images]")
    max_megapixels: MaxMegapixels = 120
    seed: int = Field(0, ge=0, description="seed of the split and of the order")
    overwrite: bool = Field(False, description="replace the data set at --out")
    lock_timeout: LockTimeout = 60.0
    ray: RaySettings = RaySettings()

    @field_validator("split")
    @classmethod
    def _shares_add_up(cls, value: str) -> str:
        shares = [int(share) for share in value.split("/")]
        if sum(shares) != 100 or (not shares[0] and shares[1:] != [0, 100]):
            raise ValueError(
                f"the three shares must add up to 100 with some for train, got {value}; 0/0/100 is "
                "for evaluation alone"
            )
        return value
