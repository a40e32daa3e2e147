"""What a training step changes besides weights and gradients: read, and put back."""

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


class Snapshot:
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


class StepStart:
    """What a checkpoint must say of the step under way, which a resumed run takes again from its beginning.

    Attributes:
        rng: The generators as they were when the step began; ``None`` between steps. All of them where Lightning may validate,
            and save, inside the step; torch's alone where it cannot, as numpy's take fifty times as long.
        restored: The generators that a checkpoint brought, until training goes on with them.
    """

    def __init__(self) -> None:
        self.rng: dict[str, Any] | None = None
        self.restored: dict[str, Any] | None = None
        self._state: dict[str, Tensor] = {}

    def note(self, trainer: Trainer, split: bool) -> None:
        """Note the beginning of a step.

        Args:
            trainer: The Trainer.
            split: Whether the step has several micro-batches.
        """
        device = trainer.strategy.root_device
        self.rng = rng_state(device) if split else torch_rng_state(device)
        if split:
            module = trainer.lightning_module
            weights = {name for name, _ in module.named_parameters()}
            # buffers, and the metrics that are saved
            state = ((name, value) for name, value in module.state_dict().items() if name not in weights)
            self._state = {name: value.clone() for name, value in state if isinstance(value, Tensor)}

    @contextmanager
    def kept(self, trainer: Trainer) -> Iterator[None]:
        """For a while, have checkpoints save the generators as they are now: training goes on from these."""
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
        """The step is taken."""
        self.rng = None
        self._state.clear()

    def write(self, trainer: Trainer, checkpoint: dict[str, Any]) -> list[Any]:
        """Put the module's state back to the step's beginning in a checkpoint.

        Returns:
            The generators of every process.
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
        """Put the generators into the state that a checkpoint brought, if there was one."""
        if self.restored is not None:
            set_rng_state(self.restored, trainer.strategy.root_device)


def _metric_state(metric: Metric) -> dict[str, Any]:
    return _copied(metric.metric_state) | {name: getattr(metric, name) for name in ("_update_count", "_computed")}


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """Tensors are copied, since metrics add to them in place; of lists, whose elements stay as they are, the list is."""
    copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
    return {name: [*value] if isinstance(value, list) else value for name, value in copies.items()}
