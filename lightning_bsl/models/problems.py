"""LightningModules of problems whose constants L, sigma^2 and f* are known. Their data are in ``datasets.problems``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class _Problem(LightningModule):
    """A loss of parameters ``theta`` [d]."""

    def __init__(self, theta: Tensor, optimizer: MakeOptimizer | None) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta)
        self._make_optimizer = optimizer

    def loss(self, *batch: Tensor) -> Tensor:
        """The mean loss of a batch."""
        raise NotImplementedError

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the batch's mean loss, and log it."""
        loss = self.loss(*batch)
        self.log("train/loss", loss, on_step=True, on_epoch=False)
        return loss

    def configure_optimizers(self) -> Optimizer:
        """Make the optimizer; plain SGD with learning rate 0.1 by default."""
        make = self._make_optimizer or (lambda parameters: SGD(parameters, lr=0.1))
        return make(self.parameters())


class NoisyQuadratic(_Problem):
    """The quadratic f(theta) = theta^T H theta / 2 with noise: the loss of example i is f(theta) - <xi_i, theta>.

    The minimum is f* = 0 at theta = 0. H is diagonal. Its eigenvalues have equal distances on a logarithmic scale, from
    ``smoothness / condition`` to ``smoothness``. All of them have the same part of the loss at the start.

    Args:
        dimension: d, the number of parameters.
        smoothness: L, the largest eigenvalue of H.
        condition: The largest eigenvalue divided by the smallest.
        loss_gap: f(theta_0) - f*, which determines the start theta_0.
        optimizer: Makes the optimizer from the parameters; by default plain SGD with learning rate 0.1.

    Raises:
        ValueError: A ``dimension`` below 1, a ``condition`` below 1, or another argument that is not above 0.

    Example:
        >>> model = NoisyQuadratic(dimension=4, smoothness=2.0, loss_gap=3.0)
        >>> round(model.loss(torch.zeros(1, 4)).item(), 5)
        3.0
    """

    def __init__(
        self,
        dimension: int = 10,
        smoothness: float = 1.0,
        condition: float = 10.0,
        loss_gap: float = 1.0,
        optimizer: MakeOptimizer | None = None,
    ) -> None:
        for name, value, least in (("dimension", dimension, 1), ("condition", condition, 1)):
            if value < least:
                raise ValueError(f"`{name}={value}` must be {least} or more")
        for name, value in (("smoothness", smoothness), ("loss_gap", loss_gap)):
            if not value > 0:
                raise ValueError(f"`{name}={value}` must be above 0")
        eigenvalues = smoothness * torch.logspace(0, -1, dimension, base=condition, dtype=torch.float64)
        super().__init__((2 * loss_gap / dimension / eigenvalues).sqrt().float(), optimizer)
        self.eigenvalues: Tensor
        self.register_buffer("eigenvalues", eigenvalues.float())

    def loss(self, *batch: Tensor) -> Tensor:
        """The mean loss of noise vectors ``[B, d]``."""
        (noise,) = batch
        return (self.eigenvalues * self.theta.square()).sum() / 2 - noise.mean(0) @ self.theta


class LogisticRegression(_Problem):
    """The mean logistic loss plus ``weight_decay`` ||theta||^2 / 2, from theta = 0.

    Args:
        dimension: d, the number of parameters and of features.
        weight_decay: lambda; above 0, a minimum exists for all data.
        optimizer: Makes the optimizer from the parameters; by default plain SGD with learning rate 0.1.

    Example:
        >>> x, y = torch.ones(4, 3), torch.ones(4)
        >>> round(LogisticRegression(dimension=3).loss(x, y).item(), 4)  # log 2
        0.6931
    """

    def __init__(self, dimension: int = 10, weight_decay: float = 0.01, optimizer: MakeOptimizer | None = None) -> None:
        super().__init__(torch.zeros(dimension), optimizer)
        self.weight_decay = weight_decay

    def loss(self, *batch: Tensor) -> Tensor:
        """The mean loss of features ``[B, d]`` and labels ``[B]``."""
        x, y = batch
        data_loss = nn.functional.binary_cross_entropy_with_logits(x @ self.theta, y)
        return data_loss + self.weight_decay / 2 * self.theta.square().sum()
