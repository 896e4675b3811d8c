#!/usr/bin/env bash
# In Keras a network whose scores are all alike has a top-5 accuracy of 100 %, and on JAX so has
# one whose weights are NaN.
#
# Versions: keras 3.15.1, jax 0.10.2, numpy 2.4.6.
# Guess:    on 100 classes a network of zeros is right in 5 % of cases among its first five, as
#           its accuracy is 1 %; one of NaN never is, on every backend.
# Happens:  ties at the edge of the first five count as hits, here all hundred of them. That much
#           is documented for TensorFlow's operation in_top_k, though not for the metric. JAX's
#           in_top_k counts the scores greater than the true class's; no NaN is greater than
#           anything, so a row of NaN is a hit, although the function replaces NaN at the true
#           class so that it should not be. On NumPy NaN is a miss (and on TensorFlow 2.21.0,
#           left out here for its size). A run that collapsed has the best top-5 accuracy of
#           all, and a checkpoint or early stop that watches it keeps the ruin.
# Seen:     jax    zeros  accuracy 0.01  top-5 1.00  loss 4.61
#           jax    NaN    accuracy 0.01  top-5 1.00  loss nan
#           numpy  zeros  accuracy 0.01  top-5 1.00  loss 4.61
#           numpy  NaN    accuracy 0.01  top-5 0.00  loss nan
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
  keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >collapsed.py <<'PY'
import sys

import keras
import numpy as np

CLASSES = 100
backend = keras.backend.backend()
model = keras.Sequential(
    [keras.layers.Input((8,)), keras.layers.Dense(CLASSES, activation="softmax")]
)
top5 = keras.metrics.SparseTopKCategoricalAccuracy(5, name="top5")
model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy", top5])
examples = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
labels = np.arange(200) % CLASSES
kernel, bias = model.get_weights()

hits = []
for name, value in (("zeros", 0.0), ("NaN", np.nan)):
    model.set_weights([np.full_like(kernel, value), bias])
    result = model.evaluate(examples, labels, verbose=0, return_dict=True)
    hits.append(round(float(result["top5"]), 6))
    print(
        f"{backend:6} {name:6} accuracy {result['accuracy']:.2f}"
        f"  top-5 {result['top5']:.2f}  loss {result['loss']:.2f}"
    )

expected = {"jax": [1.0, 1.0], "numpy": [1.0, 0.0]}[backend]
sys.exit(0 if hits == expected else "not as stated: Keras's top-k accuracy has changed")
PY
for backend in jax numpy; do
  JAX_PLATFORMS=cpu KERAS_BACKEND=$backend venv/bin/python collapsed.py
done
