"""The small CNN."""

import pytest
import torch

from lightning_bsl.models import cnn5


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (1, 8), (3, 32)])
def test_shapes(channels: int, size: int) -> None:
    net = cnn5(in_channels=channels, num_classes=7, image_size=size)
    assert net(torch.zeros(2, channels, size, size)).shape == (2, 7)


def test_size_of_the_fashion_mnist_workload() -> None:
    assert sum(parameter.numel() for parameter in cnn5().parameters()) == 203_930


def test_five_layers_and_nothing_that_differs_in_evaluation_mode() -> None:
    net = cnn5()
    kinds = [type(module).__name__ for module in net.modules()]
    assert kinds.count("Conv2d") + kinds.count("Linear") == 5
    images = torch.rand(4, 1, 28, 28)
    assert torch.equal(net.train()(images), net.eval()(images))


def test_images_too_small() -> None:
    with pytest.raises(ValueError, match="image_size=7 is too small"):
        cnn5(image_size=7)
