"""Settings of the job export."""

from typing import Literal

from pydantic import Field

from leafnet.core.settings import Settings, Url


class ExportSettings(Settings):
    """Settings of jobs/export.py."""

    model: Url = Field(description="a published model, runs/NAME/model or REGISTRY/champion")
    to: Literal["tf_saved_model", "onnx", "openvino", "litert"] = Field(description="format")
    out: Url = Field(
        description="file or URL to write: .onnx, .xml (openvino; a .bin beside it), .tflite; of "
        "tf_saved_model a folder"
    )
    shards: Url | None = Field(
        None,
        description="data set whose test split (valid or train where that is empty) the export is "
        "checked on; none: drawn leaves",
    )
    count: int = Field(
        200, ge=1, description="photographs on which export and model are compared [photographs]"
    )
    max_changed: float = Field(
        0.5,
        ge=0,
        le=100,
        description="the export is refused when it gives more of them another label than the "
        "model does [%]",
    )
    overwrite: bool = Field(False, description="replace what is at --out")
