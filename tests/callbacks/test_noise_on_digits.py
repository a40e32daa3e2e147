"""The measured noise scale beside that of the gradients of all single examples, at seven moments of a run on the digits."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from harness.fits import fit
from lightning_bsl import GradientNoiseScale
from lightning_bsl.datasets import Digits
from lightning_bsl.models import Classifier, cnn5
from lightning_bsl.theory.noise_scale import NoiseScale

MOMENTS = (50, 100, 200, 300, 400, 700, 1000)  # the step that is measured, counted from 1
OPTIMIZERS = {"adam": partial(torch.optim.Adam, lr=1e-3), "sgd": partial(torch.optim.SGD, lr=0.1)}


def noise_of_all(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """The variance of the gradients of single examples, over the squared norm of their mean."""
    weights = {name: value.detach() for name, value in net.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(net, weights, (x[None],)), y[None])

    total, squares = torch.zeros(()), 0.0
    for part in torch.arange(len(x)).split(60):
        rows = vmap(grad(loss), (None, 0, 0))(weights, x[part], y[part])
        gradients = torch.cat([row.reshape(len(part), -1) for row in rows.values()], dim=1).double()
        total, squares = total + gradients.sum(dim=0), squares + gradients.square().sum().item()
    sq_norm = (total / len(x)).square().sum().item()
    return (squares - len(x) * sq_norm) / (len(x) - 1) / sq_norm


class Beside(Callback):
    """Computes the noise scale of all examples before a step that is measured, and notes both after it."""

    def __init__(self, noise: GradientNoiseScale) -> None:
        self.noise = noise
        data = Digits()
        data.setup("fit")
        every: Any = data.train_set
        self.data = data.on_after_batch_transfer(every.__getitems__(range(len(every))), 0)
        self.found: dict[int, tuple[float, NoiseScale]] = {}
        self.truth = math.nan
        self.known: list[bool] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step + 1 in MOMENTS:
            self.truth = noise_of_all(pl_module.net, *self.data)  # type: ignore[arg-type]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.known.append(self.noise.noise_scale is not None and math.isfinite(self.noise.noise_scale))
        if trainer.global_step in MOMENTS:
            assert self.noise.measured is not None
            self.found[trainer.global_step] = self.truth, self.noise.measured


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "probe_size"), [(8, 144), (64, 144), (8, 1440)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_noise_scale_beside_all_examples(optimizer: str, batch_size: int, probe_size: int) -> None:
    torch.manual_seed(0)
    noise = GradientNoiseScale(probe_size=probe_size)
    beside = Beside(noise)
    model = Classifier(cnn5(image_size=8), 10, optimizer=OPTIMIZERS[optimizer])
    fit(model, Digits(batch_size=batch_size), noise, beside, max_epochs=-1, max_steps=1000, limit_val_batches=0)
    cells = [f"{truth:.0f} / {n.value:.0f} [{n.low:.0f}, {n.high:.0f}]" for truth, n in beside.found.values()]
    print(f"| {batch_size}, {optimizer}, {probe_size} | {' | '.join(cells)} |")
    assert all(beside.known[100:])
    assert [*beside.found] == [*MOMENTS]
    assert sum(n.low <= truth <= n.high for truth, n in beside.found.values()) >= 6
    narrow = [(truth, n.value) for truth, n in beside.found.values() if n.within(1.5)]
    assert all(truth / 1.5 <= value <= truth * 1.5 for truth, value in narrow)
    assert narrow or probe_size < 1440
