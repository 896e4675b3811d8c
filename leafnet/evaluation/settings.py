"""Settings of the jobs evaluate and promote."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from leafnet.core.errors import UserError
from leafnet.core.settings import Auto, Count, DataSettings, RaySettings, Settings, Url, Views


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


def compile_pattern(text: str, *, flag: str) -> re.Pattern[str]:
    """The regular expression in `text`, given with `flag`.

    Raises:
        UserError: it is none.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(
            "bad-regex", f"{flag} {text!r} is not a regular expression: {error}"
        ) from None
