"""Write a published model in another format, checked against the model on photographs."""

from collections.abc import Sequence

from leafnet.core import terminal
from leafnet.core.settings import parse
from leafnet.models.settings import ExportSettings

EXAMPLES = """\
  python jobs/export.py --model runs/potato/model --to onnx --out potato.onnx --shards data/shards
  python jobs/export.py --model models/champion --to litert --out potato.tflite
  python jobs/export.py --model models/champion --to tf_saved_model --out s3://bucket/served/1
input `image`: uint8 [N, S, S, 3], RGB, 0..255; output `probabilities`: float32 [N, C]
"""


def main(argv: Sequence[str]) -> None:
    settings = parse(
        ExportSettings,
        argv,
        prog="jobs/export.py",
        description=__doc__,
        examples=EXAMPLES,
    )
    # After the settings are known to be right.
    from leafnet.models import export

    export.run(settings)


if __name__ == "__main__":
    terminal.leave(terminal.run_job(main))
