"""Write a published model in another format, checked against the model on photographs."""

from leafnet.core.job import Job
from leafnet.models.settings import ExportSettings

EXAMPLES = """\
  python jobs/export.py --model runs/potato/model --to onnx --out potato.onnx --shards data/shards
  python jobs/export.py --model models/champion --to litert --out potato.tflite
  python jobs/export.py --model models/champion --to tf_saved_model --out s3://bucket/served/1
input `image`: uint8 [N, S, S, 3], RGB, 0..255; output `probabilities`: float32 [N, C]
"""
job = Job(ExportSettings, "leafnet.models.export", __doc__, EXAMPLES)

if __name__ == "__main__":
    job.main()
