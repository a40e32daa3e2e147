"""Residual networks for small images."""

from __future__ import annotations

import torchvision
from torch import Tensor, nn


def resnet18(in_channels: int = 3, num_classes: int = 100, image_size: int = 32) -> nn.Module:
    """Build torchvision's ResNet-18, with the CIFAR stem for images of up to 64x64 pixels.

    Umeda & Iiduka 2025 (arXiv 2409.08770) train this network on CIFAR-100.

    Args:
        in_channels: Channels of an image.
        num_classes: Number of logits.
        image_size: Height and width of an image; up to 64 the stem is a 3x3 convolution of stride 1, without max-pooling.

    Returns:
        A module that maps ``[batch, in_channels, image_size, image_size]`` to logits ``[batch, num_classes]``.

    Example:
        >>> import torch
        >>> resnet18(num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    net: nn.Module = torchvision.models.resnet18(num_classes=num_classes)
    if image_size <= 64:
        stem = nn.Conv2d(in_channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
        net.maxpool = nn.Identity()
    else:
        stem = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    net.conv1 = stem
    return net


def wide_resnet28_10(
    in_channels: int = 3,
    num_classes: int = 100,
    image_size: int = 32,
    depth: int = 28,
    widen_factor: int = 10,
    dropout: float = 0.0,
) -> nn.Module:
    """Build a pre-activation wide residual network (Zagoruyko & Komodakis, arXiv 1605.07146): WRN-28-10 by default.

    Args:
        in_channels: Channels of an image.
        num_classes: Number of logits.
        image_size: Height and width of an image, at least 4 (two convolutions of stride 2, then global pooling).
        depth: Number of convolutions, ``6 n + 4`` for n blocks in each of the three groups.
        widen_factor: Width over that of the plain network (16, 32, 64 channels).
        dropout: Probability of dropout between the two convolutions of a block.

    Returns:
        A module that maps ``[batch, in_channels, image_size, image_size]`` to logits ``[batch, num_classes]``.

    Raises:
        ValueError: ``depth`` is not ``6 n + 4``, or the images are too small.

    Example:
        >>> import torch
        >>> wide_resnet28_10(num_classes=10, depth=10, widen_factor=1)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth={depth} does not make three equal groups of blocks; give 6 n + 4: 10, 16, 22, 28, 40")
    if image_size < 4:
        raise ValueError(f"image_size={image_size} is too small: it is halved twice; give images of 4x4 or more")
    blocks = (depth - 4) // 6
    width = 16
    layers: list[nn.Module] = [nn.Conv2d(in_channels, width, kernel_size=3, padding=1, bias=False)]
    for group in range(3):
        for block in range(blocks):
            fan_out = 16 * 2**group * widen_factor
            layers.append(_WideBlock(width, fan_out, 2 if group > 0 and block == 0 else 1, dropout))
            width = fan_out
    layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(width, num_classes))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


class _WideBlock(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution, twice, around a shortcut: ``[B, C, H, W] -> [B, C', H/stride, W/stride]``."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(fan_in), nn.ReLU(inplace=True))
        self.residual = nn.Sequential(
            nn.Conv2d(fan_in, fan_out, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(fan_out),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout) if dropout else nn.Identity(),
            nn.Conv2d(fan_out, fan_out, kernel_size=3, padding=1, bias=False),
        )
        self.shortcut = None
        if fan_in != fan_out:
            self.shortcut = nn.Conv2d(fan_in, fan_out, kernel_size=1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.activate(x)
        # a block that changes the width takes its shortcut after the activation, as in the authors' code
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(active)
        residual: Tensor = self.residual(active)
        return shortcut + residual
