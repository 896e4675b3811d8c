"""Features larger than memory: the head is fitted under a limit that does not hold them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMITED = """
import resource, sys
import numpy as np
from leafnet.distributed.worker import Place
from leafnet.features import moments
from leafnet.features.cache import SplitFeatures
from leafnet.training.head import fit as head_fit
from leafnet.training.head.fit import TrainingData
from leafnet.training.head.fit import fit_head
from leafnet.training.settings import HeadSettings
import sys

EXAMPLES, VIEWS, WIDTH = 12_000, 8, 2048
path, headroom_mb = sys.argv[1], int(sys.argv[2])

def fit(values, labels):
    mean, deviation = moments.statistics(moments.moments(values))
    valid = SplitFeatures(values[:64], labels[:64])
    data = TrainingData(head_fit.cached_views(values, seed=0), labels, valid, mean, deviation)
    return fit_head(
        data, settings=HeadSettings(units=(16,), epochs=2, batch_size=256), num_classes=3,
        seed=0, place=Place(0, 1), report=lambda row: None,
    )

def made(rows):
    labels = (np.arange(rows) % 3).astype(np.int32)
    values = np.zeros((rows, VIEWS, WIDTH), np.float16)
    values[np.arange(rows), :, labels] = 1
    return values, labels

def private_bytes():  # what RLIMIT_DATA counts: writable memory that no file backs
    line = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
    return int(line.split()[1]) * 1024

fit(*made(512))  # TensorFlow's threads and pools are there before the limit is set
mapped = np.lib.format.open_memmap(path, "w+", np.float16, (EXAMPLES, VIEWS, WIDTH))
for start in range(0, EXAMPLES, 600):
    mapped[start : start + 600] = made(600)[0]
del mapped
limit = private_bytes() + headroom_mb * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
mapped = np.load(path, mmap_mode="r")
assert mapped.nbytes > headroom_mb * 2**20
try:
    np.array(mapped)
except MemoryError:
    print("the features do not fit")
labels = (np.arange(EXAMPLES) % 3).astype(np.int32)
print("train accuracy", fit(mapped, labels).history[-1]["train_accuracy"])
"""


@pytest.mark.slow
def test_head_fit_on_features_larger_than_memory(tmp_path: Path) -> None:
    """393 MB of features, and 250 MB that may be taken beyond what TensorFlow has at the start."""
    paths = [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "features.npy"), "250"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the features do not fit" in done.stdout
    assert float(done.stdout.split("train accuracy")[1]) > 0.95
