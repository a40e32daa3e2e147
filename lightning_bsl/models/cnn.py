"""A small convolutional network for small images."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


def cnn5(in_channels: int = 1, num_classes: int = 10, image_size: int = 28, width: int = 40) -> nn.Module:
    """Build a 5-layer CNN: three 3x3 convolutions, each followed by 2x2 max-pooling and ReLU, and two linear layers.

    Li et al. 2024 (arXiv 2405.14578) train "a 5-layer CNN" on Fashion-MNIST; the paper gives no widths. The default network has
    0.2M parameters. It has no BatchNorm and no dropout, so its loss is a mean over examples, and neither micro-batches nor
    evaluation mode change its gradient.

    Args:
        in_channels: Channels of an image.
        num_classes: Number of logits.
        image_size: Height and width of an image, at least 8.
        width: Channels of the first convolution; the other two have twice as many.

    Returns:
        A module that maps ``[batch, in_channels, image_size, image_size]`` to logits ``[batch, num_classes]``.

    Raises:
        ValueError: The images are too small for three poolings.

    Example:
        >>> import torch
        >>> cnn5()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    if image_size < 8:
        raise ValueError(f"image_size={image_size} is too small: it is halved three times; give images of 8x8 or more")
    channels = [in_channels, width, 2 * width, 2 * width]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(channels):
        # ReLU after pooling: the same function, on a quarter of the values
        layers += [nn.Conv2d(fan_in, fan_out, kernel_size=3, padding=1), nn.MaxPool2d(2), nn.ReLU(inplace=True)]
    features = channels[-1] * (image_size // 8) ** 2
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(features, 4 * width),
        nn.ReLU(inplace=True),
        nn.Linear(4 * width, num_classes),
    )
