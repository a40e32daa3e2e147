"""The residual networks."""

import pytest
import torch
from torch import nn

from lightning_bsl.models import resnet18, wide_resnet28_10


def size(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(("channels", "side", "stem"), [(3, 32, (3, 1)), (1, 64, (3, 1)), (1, 96, (7, 2))])
def test_resnet18_stem(channels: int, side: int, stem: tuple[int, int]) -> None:
    net = resnet18(in_channels=channels, num_classes=5, image_size=side)
    convolution = net.conv1
    assert isinstance(convolution, nn.Conv2d)
    assert (convolution.kernel_size[0], convolution.stride[0]) == stem
    assert isinstance(net.maxpool, nn.Identity) == (side <= 64)
    assert net(torch.zeros(2, channels, side, side)).shape == (2, 5)


def test_resnet18_size() -> None:
    assert size(resnet18(num_classes=100)) == 11_220_132  # the usual figure of the CIFAR-100 variant


@pytest.mark.parametrize(("num_classes", "expected"), [(10, 36_479_194), (100, 36_536_884)])
def test_wide_resnet_size(num_classes: int, expected: int) -> None:
    with torch.device("meta"):
        net = wide_resnet28_10(num_classes=num_classes)
    assert size(net) == expected  # 36.5M in the paper
    assert sum(isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) for module in net.modules()) == 25


@pytest.mark.parametrize("side", [8, 32, 64])
def test_wide_resnet_shapes(side: int) -> None:
    net = wide_resnet28_10(in_channels=1, num_classes=5, image_size=side, depth=10, widen_factor=1, dropout=0.3)
    assert net(torch.zeros(2, 1, side, side)).shape == (2, 5)
    assert sum(isinstance(module, nn.Dropout) for module in net.modules()) == 3


def test_wide_resnet_refuses_other_depths() -> None:
    with pytest.raises(ValueError, match="depth=27"):
        wide_resnet28_10(depth=27)
    with pytest.raises(ValueError, match="image_size=2"):
        wide_resnet28_10(image_size=2)
