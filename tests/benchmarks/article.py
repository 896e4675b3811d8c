"""The script of the article that leafnet grew from, in today's Keras: the peer of rows b.

    python -m tests.benchmarks.article DATA --epochs 3 --weights FILE.h5 --preprocess resnet50

The frozen backbone runs over every image in every epoch, behind layers that flip and turn. Prints
JSON: a line an epoch with the seconds since the start, and a last line.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

IMAGE_SIZE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="folder with train, valid and test, each with class folders")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--weights", default="random", help="random, imagenet or an .h5 file")
    parser.add_argument("--preprocess", choices=["article", "resnet50"], default="article")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    began = time.perf_counter()
    import keras

    keras.utils.set_random_seed(options.seed)
    train, valid, test = (_images(options.data, split) for split in ("train", "valid", "test"))
    model = _network(options.weights, options.preprocess, classes=len(train.class_names))

    def say(epoch: int, logs: dict[str, Any]) -> None:
        seconds = time.perf_counter() - began
        print(json.dumps({"epoch": epoch + 1, "seconds": seconds, **logs}), flush=True)

    model.fit(
        train,
        validation_data=valid,
        epochs=options.epochs,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=say)],
    )
    _, accuracy = model.evaluate(test, verbose=0)
    print(json.dumps({"test_accuracy": float(accuracy), "seconds": time.perf_counter() - began}))


def _images(data: str, split: str) -> Any:
    import keras

    return keras.utils.image_dataset_from_directory(
        Path(data) / split,
        shuffle=split == "train",
        image_size=(IMAGE_SIZE, IMAGE_SIZE),
        batch_size=32,
        verbose=False,
    )


def _network(weights: str, preprocess: str, *, classes: int) -> Any:
    import keras

    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    backbone = keras.applications.ResNet50(
        include_top=False,
        pooling="avg",
        input_shape=shape,
        weights=None if weights == "random" else weights,
    )
    backbone.trainable = False
    scaling = {
        # As the article does it; `resnet50` is what the weights were trained with.
        "article": keras.layers.Rescaling(1 / 255),
        "resnet50": keras.layers.Lambda(keras.applications.resnet50.preprocess_input),
    }
    model = keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Resizing(IMAGE_SIZE, IMAGE_SIZE),
            scaling[preprocess],
            keras.layers.RandomFlip("horizontal_and_vertical"),
            keras.layers.RandomRotation(0.2),
            backbone,
            keras.layers.Flatten(),
            keras.layers.Dense(512, activation="relu"),
            keras.layers.Dense(classes, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


if __name__ == "__main__":
    main()
