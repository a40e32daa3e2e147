"""What a training step changes besides weights and gradients: read, and put back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_bsl.callbacks.loop import logged_metrics


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of the global random generators of this process, in types that ``torch.load(weights_only=True)`` takes."""
    name, keys, *rest = np.random.get_state()
    numpy = (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
    return torch_rng_state(device) | {"numpy": numpy, "python": random.getstate()}


def torch_rng_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators alone, which takes a microsecond where numpy's takes fifty."""
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the global random generators back into ``state``."""
    torch.set_rng_state(state["torch"].cpu())  # a checkpoint may have been loaded onto another device
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy(), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


class StepState:
    """A copy of what ``training_step`` may change besides gradients, to undo a step that failed.

    That is: random generators, buffers, the state of torchmetrics, what was logged, and the LightningModule's own attributes
    that are numbers, strings or tensors.

    Args:
        trainer: The Trainer, in a fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        module = trainer.lightning_module
        self._trainer = trainer
        self._rng = rng_state(trainer.strategy.root_device)
        self._buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        self._logged = dict(logged_metrics(trainer))
        metrics = [each for each in (*module.modules(), *self._logged.values()) if isinstance(each, Metric)]
        self._metrics = [(metric, _metric_state(metric)) for metric in metrics]
        plain = (bool, int, float, str, Tensor, type(None))
        self._attributes = {name: value for name, value in vars(module).items() if isinstance(value, plain)}

    def restore(self) -> None:
        """Put everything back."""
        set_rng_state(self._rng, self._trainer.strategy.root_device)
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
        logged = logged_metrics(self._trainer)
        for name in logged.keys() - self._logged.keys():
            del logged[name]
        for metric, state in self._metrics:
            for name, value in _copied(state).items():
                setattr(metric, name, value)
        vars(self._trainer.lightning_module).update(self._attributes)


def _metric_state(metric: Metric) -> dict[str, Any]:
    return _copied(metric.metric_state) | {name: getattr(metric, name) for name in ("_update_count", "_computed")}


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """Tensors are copied, since metrics add to them in place; of lists, whose elements stay as they are, the list is."""
    copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
    return {name: [*value] if isinstance(value, list) else value for name, value in copies.items()}
