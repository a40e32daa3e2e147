"""Adam for stacked replicas, each with its own learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer


class PopulationAdam(Optimizer):
    """Adam (Kingma & Ba, arXiv 1412.6980) over parameters ``[R, ...]`` of R replicas, with R learning rates.

    Each replica gets the same update as from ``torch.optim.Adam`` alone. With ``betas=(0, 0)`` the update is the sign of the
    gradient (Li et al. 2024, arXiv 2405.14578). Neighbours with the same learning rate are updated together, so sort the
    replicas by learning rate.

    Args:
        params: Stacked parameters ``[R, ...]``.
        lr: Learning rates ``[R]``.
        betas: Decay rates of the first and the second moment.
        eps: Added to the square root of the second moment.

    Raises:
        ValueError: ``lr`` is not a vector, or a beta is outside [0, 1).

    Example:
        >>> stacked = torch.nn.Parameter(torch.zeros(2, 3))
        >>> optimizer = PopulationAdam([stacked], torch.tensor([0.1, 0.5]), betas=(0.0, 0.0))
        >>> stacked.grad = torch.ones(2, 3)
        >>> _ = optimizer.step()
        >>> stacked[:, 0].tolist()
        [-0.10000000149011612, -0.5]
    """

    def __init__(self, params: Iterable[Tensor], lr: Tensor, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        if lr.ndim != 1:
            raise ValueError(f"lr has shape {list(lr.shape)}; give a vector [R], one learning rate for each replica")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={tuple(betas)}: both must be at least 0 and below 1")
        super().__init__(params, {"lr": lr.cpu(), "betas": tuple(betas), "eps": eps, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every replica by one step.

        Args:
            closure: Computes the loss again, as for every optimizer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            updated = [parameter for parameter in group["params"] if parameter.grad is not None]
            tensors = [[parameter, cast(Tensor, parameter.grad), *self._moments(parameter)] for parameter in updated]
            lrs, numbers = (column.tolist() for column in group["lr"].unique_consecutive(return_counts=True))
            rows = zip(*(zip(*(tensor.split(numbers) for tensor in of)) for of in tensors))
            for lr, of_rows in zip(lrs, rows):
                _adam(group, lr, of_rows)
            group["step"] += 1
        return loss

    def updates(self) -> Iterator[Callable[[Sequence[Tensor | None]], None]]:
        """One function for each replica: it updates this replica with its gradients, one for each parameter.

        In place of gradients of the stacked parameters: call the functions, then `step` without gradients, which counts. So a
        replica is updated while its weights and gradients are in the caches.
        """
        (group,) = self.param_groups
        stacked = [[parameter.detach(), *self._moments(parameter)] for parameter in group["params"]]
        rows = zip(*(zip(*(tensor.unbind() for tensor in of)) for of in stacked))

        def update(lr: float, row: Sequence[Sequence[Tensor]], gradients: Sequence[Tensor | None]) -> None:
            used = zip(row, gradients, strict=True)
            _adam(group, lr, [[of[0], gradient, *of[1:]] for of, gradient in used if gradient is not None])

        return (partial(update, lr, row) for lr, row in zip(group["lr"].tolist(), rows))

    def _moments(self, parameter: Tensor) -> list[Tensor]:
        if not (state := self.state[parameter]):
            state.update({name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")})
        return [state["exp_avg"], state["exp_avg_sq"]]

    def keep(self, rows: Tensor) -> None:
        """Keep the state of some replicas only. The parameters must be cut already.

        Args:
            rows: Indices of the replicas to keep, int64.
        """
        for group in self.param_groups:
            group["lr"] = group["lr"][rows.cpu()]
            for parameter in group["params"]:
                for name, moment in self.state[parameter].items():
                    self.state[parameter][name] = moment[rows]


def _laid_out(gradient: Tensor, weight: Tensor) -> Tensor:
    """A gradient in the memory layout of its weight: the kernel reads both as they lie."""
    return gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)


@torch.no_grad()
def _adam(group: Mapping[str, Any], lr: float, tensors: Sequence[Sequence[Tensor]]) -> None:
    """One step for rows of some parameters: for each of them the weights, the gradient and the two moments."""
    for dtype in {of[0].dtype for of in tensors}:
        weights, gradients, first, second = (list(of) for of in zip(*(of for of in tensors if of[0].dtype == dtype)))
        gradients = [_laid_out(gradient, weight) for gradient, weight in zip(gradients, weights)]
        step = torch.tensor(group["step"] + 1.0, device=weights[0].device)
        # the kernel of Adam(fused=True) itself: what `torch.optim.adam.adam` does around it takes three times as long for small
        # models, and there is a call for each learning rate or replica
        torch._fused_adam_(
            weights,
            gradients,
            first,
            second,
            [],
            [step] * len(weights),
            lr=lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
