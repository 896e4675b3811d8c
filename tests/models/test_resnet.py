"""The architecture by shapes alone; its numbers are compared with Keras's in test_weights.py."""

import pytest

from leafnet.models import resnet, weights

Shape = tuple[int, int]  # side of the feature map, channels


def side(x: int, kernel: int, stride: int, pad: int) -> int:
    return (x + 2 * pad - kernel) // stride + 1


def operators(applied: list[str]) -> resnet.Operators:
    shapes = {name: shape for name, _, shape in weights.convolutions()}

    def convolve(x: Shape, name: str, stride: int, pad: int) -> Shape:
        height, width, inputs, filters = shapes[name]
        assert (height, x[1]) == (width, inputs), name
        applied.append(name)
        return side(x[0], height, stride, pad), filters

    def add(x: Shape, y: Shape) -> Shape:
        assert x == y
        return x

    return resnet.Operators(convolve, lambda x: x, lambda x: (side(x[0], 3, 2, 1), x[1]), add)


@pytest.mark.parametrize("size", [64, 224, 256, 320])
def test_every_convolution_once_and_a_32nd_of_the_size(size: int) -> None:
    applied: list[str] = []
    assert resnet.apply_stages(operators(applied), (size, 3)) == (size // 32, 2048)
    assert len(applied) == 53
    assert set(applied) == {name for name, _, _ in weights.convolutions()}


def test_stages_one_after_the_other_are_the_whole() -> None:
    whole: list[str] = []
    resnet.apply_stages(operators(whole), (224, 3))
    applied: list[str] = []
    x: Shape = (224, 3)
    # He et al. 2015, table 1: 56 x 56 after the stem and in conv2, then halved.
    for stage, expected in ((1, (56, 64)), (2, (56, 256)), (3, (28, 512)), (4, (14, 1024))):
        x = resnet.apply_stages(operators(applied), x, range(stage, stage + 1))
        assert x == expected
    resnet.apply_stages(operators(applied), x, range(5, 6))
    assert applied == whole
