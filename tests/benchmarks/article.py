"""The script of the article that leafnet grew from, in today's Keras: the peer of rows b.

    python -m tests.benchmarks.article DATA --epochs 3 --weights FILE.h5 --preprocess resnet50
    python -m tests.benchmarks.article DATA --weights FILE.h5 --preprocess resnet50 --heads 3 \\
        --folded

The frozen backbone runs over every image in every epoch, behind layers that flip and turn. Prints
JSON: a line an epoch with the seconds since the start, and a last line. For its accuracy alone, the
same recipe is had sooner: `--heads` fits several heads side by side on the same drawn images, each
from its own first weights (Adam works on each number by itself, so none knows of the others), and
`--folded` runs leafnet's faster backbone.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from leafnet.models import rates, resnet
from leafnet.models.weights import load_weights

IMAGE_SIZE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="folder with train, valid and test, each with class folders")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--weights", default="random", help="random, imagenet or an .h5 file")
    parser.add_argument("--preprocess", choices=["article", "resnet50"], default="article")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--folded", action="store_true", help="leafnet's backbone, not Keras's")
    options = parser.parse_args()

    began = time.perf_counter()
    import keras

    keras.utils.set_random_seed(options.seed)
    train, valid, test = (_images(options.data, split) for split in ("train", "valid", "test"))
    classes = len(train.class_names)
    if options.heads > 1:
        train, valid, test = (
            images.map(lambda pixels, labels: (pixels, (labels,) * options.heads))
            for images in (train, valid, test)
        )
    model = _network(options, classes=classes)

    def say(epoch: int, logs: dict[str, Any]) -> None:
        seconds = time.perf_counter() - began
        print(json.dumps({"epoch": epoch + 1, "seconds": seconds, **logs}), flush=True)

    model.fit(
        train,
        validation_data=None if options.folded else valid,
        epochs=options.epochs,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=say)],
    )
    found = model.evaluate(test, verbose=0, return_dict=True)
    accuracies = [float(value) for name, value in found.items() if name.endswith("accuracy")]
    print(
        json.dumps(
            {
                "test_accuracy": sum(accuracies) / len(accuracies),
                "test_accuracies": accuracies,
                "seconds": time.perf_counter() - began,
            }
        )
    )


def _images(data: str, split: str) -> Any:
    import keras

    return keras.utils.image_dataset_from_directory(
        Path(data) / split,
        shuffle=split == "train",
        image_size=(IMAGE_SIZE, IMAGE_SIZE),
        batch_size=32,
        verbose=False,
    )


def _network(options: argparse.Namespace, *, classes: int) -> Any:
    import keras

    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    scaling = {
        # As the article does it; `resnet50` is what the weights were trained with.
        "article": keras.layers.Rescaling(1 / 255),
        "resnet50": keras.layers.Lambda(keras.applications.resnet50.preprocess_input),
    }
    inputs = keras.Input(shape)
    x = keras.layers.Resizing(IMAGE_SIZE, IMAGE_SIZE)(inputs)
    turn = keras.Sequential(
        [keras.layers.RandomFlip("horizontal_and_vertical"), keras.layers.RandomRotation(0.2)]
    )
    if options.folded:
        assert options.preprocess == "resnet50", "leafnet's backbone scales as ResNet50 wants it"
        x = turn(x)
        frozen = _folded(options.weights)
    else:
        x = turn(scaling[options.preprocess](x))
        frozen = keras.applications.ResNet50(
            include_top=False,
            pooling="avg",
            input_shape=shape,
            weights=None if options.weights == "random" else options.weights,
        )
        frozen.trainable = False
    features = keras.layers.Flatten()(frozen(x))
    heads = [
        keras.Sequential(
            [
                keras.layers.Dense(512, activation="relu"),
                keras.layers.Dense(classes, activation="softmax"),
            ],
            name=f"head_{number}",
        )(features)
        for number in range(options.heads)
    ]
    model = keras.Model(inputs, heads if len(heads) > 1 else heads[0])
    losses = ["sparse_categorical_crossentropy"] * len(heads)
    metrics = ["accuracy"] * len(heads)
    model.compile("adam", losses, metrics=metrics if len(heads) == 1 else [[m] for m in metrics])
    return model


def _folded(weights: str) -> Any:
    precision = rates.precision(image_size=IMAGE_SIZE, threads=os.cpu_count() or 1)
    convolutions = load_weights(weights).convolutions
    return resnet.build(convolutions, image_size=IMAGE_SIZE, precision=precision)


if __name__ == "__main__":
    main()
