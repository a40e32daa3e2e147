"""Problems whose constants are known, so that theory and training meet in one run. Their models are in `models.problems`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_bsl.data.datamodule import BatchSizeDataModule
from lightning_bsl.theory import BoundConstants


class _Rows(Dataset[tuple[Tensor, ...]]):
    """Tensors ``[n, ...]`` in memory; one gather makes a whole batch."""

    takes_tensors: ClassVar[bool] = True

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, ...]:
        rows = torch.as_tensor(indices)
        return tuple(tensor.index_select(0, rows) for tensor in self.tensors)


def _identity(batch: Any) -> Any:
    return batch


class QuadraticNoise(BatchSizeDataModule):
    """The noise of the noisy quadratic: vectors xi_i of mean 0, which are all that its examples differ in.

    The loss of example i is f(theta) - <xi_i, theta>, so its gradient is grad f(theta) - xi_i and the gradients' variance is
    ``gradient_variance`` at every theta. The batches are ``(xi,)``, float32 ``[B, dimension]``.

    Args:
        num_examples: n.
        dimension: Of theta.
        gradient_variance: sigma^2, exact over the n examples.
        data_seed: Seed of the vectors.
        **arguments: As of [`BatchSizeDataModule`][lightning_bsl.BatchSizeDataModule].

    Raises:
        ValueError: Fewer than 2 examples, or a variance below 0.

    Example:
        >>> data = QuadraticNoise(num_examples=1000, dimension=3, gradient_variance=2.0)
        >>> noise = data.train_set.tensors[0]
        >>> bool(noise.mean(0).abs().max() < 1e-6), round(noise.square().sum(1).mean().item(), 5)
        (True, 2.0)
    """

    def __init__(
        self,
        num_examples: int = 4096,
        dimension: int = 10,
        gradient_variance: float = 1.0,
        data_seed: int = 0,
        **arguments: Any,
    ) -> None:
        if num_examples < 2:
            raise ValueError(f"`num_examples={num_examples}` must be 2 or more")
        if not gradient_variance >= 0:
            raise ValueError(f"`gradient_variance={gradient_variance}` must be 0 or more")
        noise = np.random.default_rng(data_seed).standard_normal((num_examples, dimension))
        noise -= noise.mean(axis=0)
        noise *= (gradient_variance / (noise**2).sum(axis=1).mean()) ** 0.5
        super().__init__(_Rows(torch.from_numpy(noise).float()), collate_fn=_identity, **arguments)


class LogisticData(BatchSizeDataModule):
    """Examples for logistic regression: features x, float32 ``[B, dimension]``, and labels y, float32 ``[B]`` of 0 and 1.

    Gaussian features, labels drawn from a logistic model, so the two classes overlap.

    Args:
        num_examples: n.
        dimension: Of the features.
        data_seed: Seed of the examples.
        **arguments: As of [`BatchSizeDataModule`][lightning_bsl.BatchSizeDataModule].

    Raises:
        ValueError: Fewer than 2 examples.

    Example:
        >>> x, y = LogisticData(num_examples=100, dimension=3).train_set[0]
        >>> x.shape, y.shape
        (torch.Size([3]), torch.Size([]))
    """

    def __init__(self, num_examples: int = 4096, dimension: int = 10, data_seed: int = 0, **arguments: Any) -> None:
        x, y = (torch.from_numpy(array).float() for array in _logistic(num_examples, dimension, data_seed))
        super().__init__(_Rows(x, y), collate_fn=_identity, **arguments)


def logistic_constants(num_examples: int, dimension: int, data_seed: int, weight_decay: float) -> BoundConstants:
    """L, sigma^2 and f(0) - f* of `LogisticRegression` on [`LogisticData`][lightning_bsl.datasets.LogisticData].

    L is the largest eigenvalue of X^T X / (4 n), plus ``weight_decay``: it bounds the Hessian everywhere. sigma^2 is the mean
    of ||x_i||^2, which bounds the variance everywhere: the derivative of the loss by its logit lies in (-1, 1). f* is found by
    scikit-learn.

    Args:
        num_examples: n.
        dimension: Of the features.
        data_seed: Seed of the examples.
        weight_decay: lambda of the penalty lambda ||theta||^2 / 2, above 0.

    Raises:
        ValueError: ``weight_decay`` is not above 0.
    """
    from sklearn.linear_model import LogisticRegression

    if not weight_decay > 0:
        raise ValueError(f"`weight_decay={weight_decay}` must be above 0: without a penalty there may be no minimum")
    # in the precision that the models get them in
    x, y = (array.astype(np.float32).astype(np.float64) for array in _logistic(num_examples, dimension, data_seed))
    regression = LogisticRegression(C=1 / (num_examples * weight_decay), fit_intercept=False, tol=1e-12, max_iter=10_000).fit(
        x, y
    )
    theta = regression.coef_[0]
    logits = x @ theta
    minimum = np.mean(np.logaddexp(0, logits) - y * logits) + weight_decay / 2 * theta @ theta
    smoothness = np.linalg.eigvalsh(x.T @ x)[-1] / (4 * num_examples) + weight_decay
    variance = (x**2).sum(axis=1).mean()
    return BoundConstants(float(smoothness), float(variance), float(np.log(2) - minimum))


@lru_cache(maxsize=1)
def _logistic(num_examples: int, dimension: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if num_examples < 2:
        raise ValueError(f"`num_examples={num_examples}` must be 2 or more")
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((num_examples, dimension))
    chances = 1 / (1 + np.exp(-x @ draw.standard_normal(dimension)))
    return x, (draw.random(num_examples) < chances).astype(np.float64)
