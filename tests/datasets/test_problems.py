"""The constants of the problems, against their data and models by automatic differentiation and another optimizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from lightning_bsl.datasets import LogisticData, QuadraticNoise, logistic_constants
from lightning_bsl.models import LogisticRegression, NoisyQuadratic
from lightning_bsl.models.problems import _Problem


def gradients(model: _Problem, *examples: Tensor) -> Tensor:
    """Each example's gradient, ``[n, d]``."""
    rows = zip(*examples)
    return torch.stack([torch.autograd.grad(model.loss(*(each[None] for each in row)), model.theta)[0] for row in rows])


def hessian(model: _Problem, *examples: Tensor) -> Tensor:
    def loss(theta: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(model._parameters, "theta", theta)
            return model.loss(*examples)

    return torch.autograd.functional.hessian(loss, model.theta.detach())


def variance(of: Tensor) -> float:
    return (of - of.mean(0)).square().sum(1).mean().item()


def test_noisy_quadratic() -> None:
    data = QuadraticNoise(num_examples=300, dimension=5, gradient_variance=3.0, data_seed=1)
    model = NoisyQuadratic(dimension=5, smoothness=4.0, condition=8, loss_gap=2.5).double()
    (noise,) = (each.double() for each in data.train_set.tensors)
    eigenvalues = torch.linalg.eigvalsh(hessian(model, noise))
    assert eigenvalues[-1].item() == pytest.approx(4)
    assert eigenvalues[0].item() == pytest.approx(0.5)
    for theta in (model.theta.detach().clone(), torch.randn(5, dtype=torch.float64)):
        model.theta.data.copy_(theta)
        assert variance(gradients(model, noise)) == pytest.approx(3, rel=1e-5)
    start = NoisyQuadratic(dimension=5, smoothness=4.0, condition=8, loss_gap=2.5).double()
    gap = start.loss(noise).item()
    start.theta.data.zero_()
    (gradient,) = torch.autograd.grad(start.loss(noise), start.theta)
    assert gap - start.loss(noise).item() == pytest.approx(2.5, rel=1e-5)
    assert gradient.abs().max().item() < 1e-6  # the minimum


def test_logistic_regression() -> None:
    given = {"num_examples": 200, "dimension": 4, "data_seed": 3}
    constants = logistic_constants(**given, weight_decay=0.05)
    x, y = (each.double() for each in LogisticData(**given).train_set.tensors)
    model = LogisticRegression(dimension=4, weight_decay=0.05).double()

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        model.theta.data.copy_(torch.from_numpy(theta))
        value = model.loss(x, y)
        return value.item(), torch.autograd.grad(value, model.theta)[0].numpy()

    found = minimize(loss, np.zeros(4), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10})
    assert constants.loss_gap == pytest.approx(loss(np.zeros(4))[0] - found.fun, rel=1e-9)
    for scale in (0, 0.3, 3):  # both bound what they bound everywhere, and L is attained at 0
        model.theta.data.copy_(scale * torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        largest = torch.linalg.eigvalsh(hessian(model, x, y))[-1].item()
        assert largest <= constants.smoothness * (1 + 1e-9)
        assert scale or largest == pytest.approx(constants.smoothness)
        assert variance(gradients(model, x, y)) < constants.gradient_variance


@pytest.mark.parametrize("make, message", [
    (lambda: QuadraticNoise(num_examples=1), "num_examples=1"),
    (lambda: QuadraticNoise(gradient_variance=-1), "gradient_variance=-1"),
    (lambda: LogisticData(num_examples=0), "num_examples=0"),
    (lambda: logistic_constants(10, 2, 0, weight_decay=0), "weight_decay=0"),
    (lambda: NoisyQuadratic(dimension=0), "dimension=0"),
    (lambda: NoisyQuadratic(condition=0.5), "condition=0.5"),
    (lambda: NoisyQuadratic(loss_gap=0), "loss_gap=0"),
])  # fmt: skip
def test_refusals(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
