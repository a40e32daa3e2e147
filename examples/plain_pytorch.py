"""Grow the batch size and the learning rate in a plain PyTorch loop, without Lightning's Trainer.

The plan says what will happen. The sampler cuts each epoch into the batches of the schedule, and the loop sets the learning
rate of each step from the same clock.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bsl.data import GlobalBatchSampler
from lightning_bsl.schedules import Exponential, JointSchedule, Progress, plan

EPOCHS = 6


def make_data() -> TensorDataset:
    """1,000 inputs ``[20]`` and targets ``[1]``."""
    x = torch.randn(1000, 20, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.sum(dim=1, keepdim=True).relu())


def make_model() -> nn.Module:
    """A network of two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1))


def make_schedule() -> JointSchedule:
    """The batch doubles every two epochs from 16 on, and the learning rate grows by 1.3."""
    return JointSchedule(
        batch_size=Exponential(16, factor=2, every=2, unit="epoch", maximum=64),
        lr=Exponential(0.02, factor=1.3, every=2, unit="epoch"),
    )


def main() -> list[Tensor]:
    """Train; returns the weights."""
    dataset, model, schedule = make_data(), make_model(), make_schedule()
    planned = plan(schedule, num_examples=len(dataset), epochs=EPOCHS)
    for stage in planned.stages:
        print(f"stage {stage.stage}: {stage.steps} steps with batch size {stage.batch_size} and learning rate {stage.lr:.4g}")

    progress = start = Progress(horizon=planned.horizon)  # of the next step, and of its epoch
    sampler = GlobalBatchSampler(len(dataset), schedule.batch_size, clock=lambda: start, seed=0)
    loader = DataLoader(dataset, batch_sampler=sampler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for epoch in range(EPOCHS):
        for x, y in loader:
            for group in optimizer.param_groups:
                group["lr"] = schedule(progress).lr
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress = progress.advance(len(x))
        progress = start = progress.next_epoch()
        print(f"epoch {epoch}: loss {loss.item():.4f} after {progress.samples:,} samples and {progress.step} steps")
    assert progress.step == planned.steps
    return [weight.detach() for weight in model.parameters()]


if __name__ == "__main__":
    main()
