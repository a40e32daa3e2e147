"""Plain PyTorch loops, which share the order of the examples with the library and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.utils.data import TensorDataset

from harness.modules import Recorder
from lightning_bsl.data import GlobalBatchSampler
from lightning_bsl.schedules import Progress


def whole_steps(batch_size: Callable[[Progress], float], number: int, epochs: int, seed: int = 1) -> Iterator[list[list[int]]]:
    """For each epoch, the examples of each of its steps: the permutation, cut by what the schedule says step by step."""
    clock = Progress()
    for epoch in range(epochs):
        order = GlobalBatchSampler(number, 1, seed=seed).permutation(epoch)
        steps: list[list[int]] = []
        while order:
            size = min(int(batch_size(clock)), len(order))
            steps.append(order[:size])
            order, clock = order[size:], clock.advance(size)
        yield steps
        clock = clock.next_epoch()


def train_by_hand(
    model: Recorder,
    data: TensorDataset,
    steps: Iterable[list[int] | tuple[list[int], float]],
    clip: float | None = None,
) -> list[float]:
    """Train a model step by step, each in one piece; returns the loss of each step.

    Args:
        model: What is trained, by its `loss` and its optimizer.
        data: The examples.
        steps: The indices of each step; or those and its learning rate, which keeps the ratios between the param groups.
        clip: Norm that gradients are clipped to.
    """
    optimizer: torch.optim.Optimizer = model.configure_optimizers()
    ratios = [group["lr"] / optimizer.param_groups[0]["lr"] for group in optimizer.param_groups]
    losses: list[float] = []
    for step in steps:
        if isinstance(step, tuple):
            step, lr = step
            for group, ratio in zip(optimizer.param_groups, ratios):
                group["lr"] = lr * ratio
        optimizer.zero_grad()
        loss = model.loss(data[step])
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.net.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses
