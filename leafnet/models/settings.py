"""Settings of the job export."""

from typing import Literal

from pydantic import Field

from leafnet.core.settings import Model, Settings, Url


class ExportSettings(Settings):
    """Settings of jobs/export.py."""

    model: Model
    to: Literal["tf_saved_model", "onnx", "openvino", "litert"] = Field(
        description="format to write"
    )
    out: Url = Field(
        description="file or URL to write: .onnx, .xml (openvino, with a .bin beside it) or "
        ".tflite; for tf_saved_model a folder"
    )
    shards: Url | None = Field(
        None,
        description="data set on whose test split (if it is empty: valid or train) the export is "
        "checked; none: drawn leaves",
    )
    count: int = Field(
        200,
        ge=1,
        description="number of photographs on which export and model are compared [photographs]",
    )
    max_changed: float = Field(
        0.5,
        ge=0,
        le=100,
        description="refuse the export if it labels more of them differently from the model [%]",
    )
    overwrite: bool = Field(False, description="replace what is at --out")
