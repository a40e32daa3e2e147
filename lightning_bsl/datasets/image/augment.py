"""The augmentation of Umeda & Iiduka 2025 (arXiv 2409.08770), for whole batches on any device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bsl.data.sampler import epoch_generator


def epoch_randoms(n: int, seed: int, epoch: int) -> Tensor:
    """Draw the uniform random numbers of every example's augmentation, whichever batch or process it ends up in.

    Args:
        n: Number of examples.
        seed: Seed of the run.
        epoch: Epoch.

    Returns:
        float32 ``[n, 4]`` in ``[0, 1)``, a function of the arguments alone.

    Example:
        >>> bool((epoch_randoms(3, 0, 1) == epoch_randoms(3, 0, 1)).all())
        True
    """
    return torch.rand(n, 4, generator=epoch_generator(seed, epoch, stream=1))  # stream 0 is the sampler's permutation


def crop_flip_rotate(images: Tensor, randoms: Tensor, padding: int = 4, degrees: float = 15.0) -> Tensor:
    """Crop, flip and rotate every image by random numbers of its own: the augmentation of the paper, in one resampling.

    Equal to torchvision's ``RandomCrop(size, padding)``, ``RandomHorizontalFlip()`` and ``RandomRotation(degrees)`` one
    after the other (nearest neighbour, zeros outside), but for pixels on a rounding tie. Own code because library
    transforms either work image by image or draw from a global generator in the order of the batches.

    Args:
        images: uint8 or float ``[B, C, H, W]``.
        randoms: ``[B, 4]`` uniform in ``[0, 1)``: left and top of the crop, flip, angle.
        padding: Pixels of zero padding on each side before the crop.
        degrees: Largest angle, either way.

    Returns:
        float32 ``[B, C, H, W]``, values as in ``images``.

    Example:
        >>> image = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
        >>> crop_flip_rotate(image, torch.tensor([[0.5, 0.7, 0.9, 0.5]]), padding=1)[0, 0].int().tolist()
        [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [0, 0, 0, 0]]
    """
    _, _, height, width = images.shape
    shift = (randoms[:, :2] * (2 * padding + 1)).floor() - padding
    dx, dy = shift[:, :1], shift[:, 1:]
    flip = torch.where(randoms[:, 2:3] < 0.5, -1.0, 1.0)
    angle = (2 * randoms[:, 3:] - 1) * math.radians(degrees)
    cos, sin = angle.cos(), angle.sin()

    # What the crop cuts off must not be rotated back in. What it adds is zero, as is all that lies outside the image.
    columns, rows = torch.arange(width, device=images.device), torch.arange(height, device=images.device)
    kept_columns = (columns >= dx) & (columns < dx + width)
    kept_rows = (rows >= dy) & (rows < dy + height)
    cropped = (images * (kept_rows[:, None, :, None] & kept_columns[:, None, None, :])).float()

    # Pixel (x, y), from the centre, takes its value from shift(flip(rotation(x, y))); grid_sample wants [-1, 1].
    x, y = columns - (width - 1) / 2, rows - (height - 1) / 2
    to_x, to_y = 2 / width, 2 / height
    grid_x = ((flip * cos * x + dx) * to_x)[:, None, :] - (flip * sin * y * to_x)[:, :, None]
    grid_y = (sin * x * to_y)[:, None, :] + ((cos * y + dy) * to_y)[:, :, None]
    grid = torch.stack((grid_x, grid_y), dim=-1)
    return F.grid_sample(cropped, grid, mode="nearest", align_corners=False)
