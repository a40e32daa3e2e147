"""LightningModules that note what they are trained with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torchmetrics import MeanMetric

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


class Step(NamedTuple):
    """A batch that was trained: one micro-batch, where a step is split.

    ``step`` counts the optimizer steps before it, ``batch_idx`` the batches of the epoch; ``lrs`` has a rate for each group.
    """

    step: int
    epoch: int
    batch_idx: int
    examples: list[int]
    lrs: tuple[float, ...]

    @property
    def lr(self) -> float:
        """Of the first group."""
        return self.lrs[0]


class Recorder(LightningModule):
    """Keeps a journal of its training batches and of the steps at which it was validated.

    The last tensor of a batch holds the indices of its examples. A subclass says what is trained by ``loss``; training in
    evaluation mode, as `FullGradientNorm` does it, is not noted.

    Args:
        net: What is trained.
        optimizer: From the parameters of ``net`` to an optimizer.
    """

    def __init__(self, net: nn.Module, optimizer: MakeOptimizer = lambda parameters: SGD(parameters, lr=0.1)) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer
        self.journal: list[Step] = []
        self.announced: list[float] = []  # batches of each epoch, as the Trainer says at its start
        self.validated: list[int] = []  # the global step of each validation

    @property
    def examples(self) -> list[list[int]]:
        """The indices of each batch."""
        return [step.examples for step in self.journal]

    @property
    def sizes(self) -> list[int]:
        """The length of each batch."""
        return [len(step.examples) for step in self.journal]

    @property
    def rates(self) -> list[float]:
        """The first group's rate of each batch."""
        return [step.lr for step in self.journal]

    def batch(self, batch: Any) -> list[Tensor]:
        """The tensors of a batch, the indices last."""
        tensors: list[Tensor] = batch
        return tensors

    def loss(self, batch: Any) -> Tensor:
        """The mean loss over the examples."""
        x, y, *_ = self.batch(batch)
        return nn.functional.mse_loss(self.net(x), y)

    def on_train_epoch_start(self) -> None:
        self.announced.append(self.trainer.num_training_batches)

    def note(self, batch: Any, batch_idx: int) -> None:
        """Write a batch into the journal."""
        lrs = tuple(group["lr"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups)
        indices = self.batch(batch)[-1].tolist()
        self.journal.append(Step(self.trainer.global_step, self.trainer.current_epoch, batch_idx, indices, lrs))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.training:
            self.note(batch, batch_idx)
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(self.batch(batch)[-1]))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking and self.trainer.state.fn == "fit":
            self.validated.append(self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        return self.optimizer(list(self.net.parameters()))


def filled(net: nn.Module, seed: int = 3) -> nn.Module:
    """Give a network weights that depend on ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return net


def mlp(*extra: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two layers from 3 features to 1, with ``extra`` modules after the first."""
    return filled(nn.Sequential(nn.Linear(3, 4), *extra, nn.Tanh(), nn.Linear(4, 1)).to(dtype))


def equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same weights, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def assert_close(one: nn.Module, other: nn.Module, rtol: float = 1e-12, atol: float = 1e-13) -> None:
    """Two modules have the same weights but for rounding."""
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


class Regression(Recorder):
    """A curved loss, two layers in float64, momentum; logs the loss of each epoch.

    Args:
        extra: Further modules after the first layer.
    """

    def __init__(self, *extra: nn.Module) -> None:
        super().__init__(mlp(*extra), lambda parameters: SGD(parameters, lr=0.05, momentum=0.9))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.training:
            self.log("loss", loss, on_step=False, on_epoch=True)
        return loss


class Stateful(Recorder):
    """Dropout, BatchNorm, metrics, a frozen parameter and one that takes no part: all that a measurement could disturb.

    The journal has the batches that the Trainer gives; ``steps`` counts the calls of ``training_step``.
    """

    def __init__(self) -> None:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1))
        net[0].bias.requires_grad_(False)
        super().__init__(net)
        self.unused = nn.Parameter(torch.ones(3))
        self.mean = MeanMetric()
        self.steps = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.note(batch, batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        loss = self.loss(batch)
        self.mean.update(loss)
        self.log("train/mean", self.mean, on_step=False, on_epoch=True)
        self.log_dict({"train/loss": loss}, on_step=True, on_epoch=True)
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.net.parameters() if p.requires_grad], lr=0.01)
