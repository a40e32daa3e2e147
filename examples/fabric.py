"""Grow the batch size and the learning rate in a loop of Lightning Fabric: `python examples/fabric.py` or, in two processes,
`python examples/fabric.py 2`.

The batch size is global: each process takes its share of every step. So the run is the same on any number of processes, up to
rounding.
"""

from __future__ import annotations

import sys

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bsl.data import GlobalBatchSampler
from lightning_bsl.schedules import Exponential, JointSchedule, Progress, plan

EPOCHS = 6


def main(devices: int = 1) -> list[Tensor]:
    """Train; returns the weights.

    Args:
        devices: The number of processes.
    """
    x = torch.randn(1000, 20, generator=torch.Generator().manual_seed(0))
    dataset = TensorDataset(x, x.sum(dim=1, keepdim=True).relu())
    schedule = JointSchedule(
        batch_size=Exponential(16, factor=2, every=2, unit="epoch", maximum=64),
        lr=Exponential(0.02, factor=1.3, every=2, unit="epoch"),
    )
    planned = plan(schedule, num_examples=len(dataset), epochs=EPOCHS)

    fabric = Fabric(accelerator="cpu", devices=devices)
    fabric.launch()
    progress = start = Progress(horizon=planned.horizon)  # of the next step, and of its epoch
    sampler = GlobalBatchSampler(
        len(dataset), schedule.batch_size, clock=lambda: start, seed=0, rank=fabric.global_rank, world_size=fabric.world_size
    )
    # the sampler has given this process its share already
    loader = fabric.setup_dataloaders(DataLoader(dataset, batch_sampler=sampler), use_distributed_sampler=False)
    fabric.seed_everything(0, verbose=False)
    network = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1))
    model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.0))
    for epoch in range(EPOCHS):
        for inputs, targets in loader:
            for group in optimizer.param_groups:
                group["lr"] = schedule(progress).lr
            shares = fabric.all_gather(torch.tensor([len(inputs)]))  # of each process
            assert isinstance(shares, Tensor)
            examples = int(shares.sum())
            # the processes' gradients are averaged: a share of the sum over the step makes that the mean over its examples
            loss = nn.functional.mse_loss(model(inputs), targets) * (len(inputs) * fabric.world_size / examples)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            progress = progress.advance(examples)
        progress = start = progress.next_epoch()
        fabric.print(f"epoch {epoch}: batch size {schedule(progress).batch_size} is next, {progress.samples:,} samples trained")
    weights = [weight.detach() for weight in network.parameters()]
    fabric.print(f"sum of the weights: {sum(weight.double().sum().item() for weight in weights):.6f}")
    return weights


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
