"""Adam for stacked replicas, each with its own learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam


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
            for parameter in updated:
                if not (state := self.state[parameter]):
                    state.update({name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")})
            start = 0
            for lr, number in zip(*(column.tolist() for column in group["lr"].unique_consecutive(return_counts=True))):
                rows, start = slice(start, start + number), start + number
                adam(
                    params=[parameter[rows] for parameter in updated],
                    grads=[cast(Tensor, parameter.grad)[rows] for parameter in updated],
                    exp_avgs=[self.state[parameter]["exp_avg"][rows] for parameter in updated],
                    exp_avg_sqs=[self.state[parameter]["exp_avg_sq"][rows] for parameter in updated],
                    max_exp_avg_sqs=[],
                    state_steps=[torch.tensor(float(group["step"]), device=parameter.device) for parameter in updated],
                    fused=True,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=lr,
                    weight_decay=0.0,
                    eps=group["eps"],
                    maximize=False,
                )
            group["step"] += 1
        return loss

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
