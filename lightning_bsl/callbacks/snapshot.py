"""Save and restore what a training step changes besides weights and gradients."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torchmetrics import Metric

from lightning_bsl.callbacks.loop import logged_metrics


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of the global random generators of this process, in types that ``torch.load(weights_only=True)`` accepts."""
    name, keys, *rest = np.random.get_state()
    numpy = (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
    return torch_rng_state(device) | {"numpy": numpy, "python": random.getstate()}


def torch_rng_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators alone: they take one microsecond, numpy's takes fifty."""
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the global random generators from ``state``."""
    torch.set_rng_state(state["torch"].cpu())  # a checkpoint may be loaded to another device
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy(), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


class Snapshot:
    """A copy of what ``training_step`` may change besides gradients, to undo a failed step.

    It holds random generators, buffers, states of torchmetrics, logged values, and those attributes of the LightningModule that
    are numbers, strings or tensors.

    Args:
        trainer: The Trainer, in a fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        module = trainer.lightning_module
        self._trainer = trainer
        self._rng = rng_state(trainer.strategy.root_device)
        self._buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        self._logged = dict(logged_metrics(trainer))
        metrics = [metric for metric in (*module.modules(), *self._logged.values()) if isinstance(metric, Metric)]
        self._metrics = [(metric, _metric_state(metric)) for metric in metrics]
        plain = (bool, int, float, str, Tensor, type(None))
        self._attributes = {name: value for name, value in vars(module).items() if isinstance(value, plain)}

    def restore(self) -> None:
        """Restore everything."""
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


class StepStart:
    """The state at the start of the current step. A resumed run repeats the step from its start.

    Attributes:
        rng: States of the random generators at the start of the step; ``None`` between steps. All generators if a checkpoint
            may be saved inside the step, else only torch's, which are much faster to read.
        restored: States of the random generators from a checkpoint.
    """

    def __init__(self) -> None:
        self.rng: dict[str, Any] | None = None
        self.restored: dict[str, Any] | None = None
        self._state: dict[str, Tensor] = {}

    def note(self, trainer: Trainer, split: bool) -> None:
        """Record the start of a step.

        Args:
            trainer: The Trainer.
            split: Whether the step has several micro-batches.
        """
        device = trainer.strategy.root_device
        self.rng = rng_state(device) if split else torch_rng_state(device)
        if split:
            module = trainer.lightning_module
            weights = {name for name, _ in module.named_parameters()}
            # buffers, and the saved states of metrics
            state = ((name, value) for name, value in module.state_dict().items() if name not in weights)
            self._state = {name: value.clone() for name, value in state if isinstance(value, Tensor)}

    @contextmanager
    def kept(self, trainer: Trainer) -> Iterator[None]:
        """A context in which checkpoints save the current states of the generators, from which training goes on."""
        inside_step = self.rng is not None
        if not inside_step:
            self.rng = rng_state(trainer.strategy.root_device)
        try:
            with isolate_rng():
                yield
        finally:
            if not inside_step:
                self.rng = None

    def clear(self) -> None:
        """Forget the state: the step is complete."""
        self.rng = None
        self._state.clear()

    def write(self, trainer: Trainer, checkpoint: dict[str, Any]) -> list[Any]:
        """Replace the module's state in a checkpoint by that at the start of the step.

        Returns:
            The states of the random generators of every process.
        """
        weights = checkpoint["state_dict"]
        weights.update({name: value for name, value in self._state.items() if name in weights})
        state = rng_state(trainer.strategy.root_device) | (self.rng or {})
        states: list[Any] = [state]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, state)
        return states

    def restore(self, trainer: Trainer) -> None:
        """Restore the random generators from the checkpoint, if there is one."""
        if self.restored is not None:
            set_rng_state(self.restored, trainer.strategy.root_device)


def _metric_state(metric: Metric) -> dict[str, Any]:
    return _copied(metric.metric_state) | {name: getattr(metric, name) for name in ("_update_count", "_computed")}


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """Copy tensors, since metrics change them in place, and lists, but not the tensors in lists, which are never changed."""
    copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
    return {name: [*value] if isinstance(value, list) else value for name, value in copies.items()}
