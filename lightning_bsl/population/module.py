"""Many replicas of one model, trained together as one LightningModule."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import repeat
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import functional_call, replace_all_batch_norm_modules_, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from lightning_bsl.callbacks.loss_terms import count_terms, has_loss_terms
from lightning_bsl.population.data import PopulationData
from lightning_bsl.population.forms import FORMS, Form, FormChoice
from lightning_bsl.population.optimizer import PopulationAdam
from lightning_bsl.schedules.checks import check_whole

Status = Literal["reached", "not_reached", "diverged"]

# The first check of the probe is after _FIRST_CHECK steps, the next ones each time that the steps have grown by _CHECK. So S
# has the same relative error for all learning rates and batch sizes.
_FIRST_CHECK = 10
_CHECK = 0.05
# A replica is not checked while its running loss, a mean over about _MEMORY examples, is above _FAR times the target.
_MEMORY = 64
_FAR = 1.3


class Outcome(NamedTuple):
    """The result of one replica for one target: a row of ``replicas.csv``.

    Attributes:
        seed: Seed of the initialisation and of the order of the examples.
        batch_size: B, in examples.
        lr: Learning rate.
        target: Target loss.
        status: ``"reached"``, ``"not_reached"``, or ``"diverged"`` if the loss was not finite at a check before the end.
        steps: S, optimizer steps until the target; if it was not reached, all steps.
        examples: E = S B.
        loss: Loss on the probe after ``steps``.
        extra_steps: Number of steps after the target over which the drop of the loss is measured.
        loss_drop: Drop of the loss on the probe in the extra steps; NaN unless reached.

    Example:
        >>> Outcome(0, 8, 0.01, 2.0, "reached", 50, 400, 1.98, 10, 0.1).status
        'reached'
    """

    seed: int
    batch_size: int
    lr: float
    target: float
    status: Status
    steps: int
    examples: int
    loss: float
    extra_steps: int
    loss_drop: float


@dataclass
class _Replica:
    seed: int
    lr: float
    row: int  # index of its seed in a batch
    reached: int = 0  # number of targets
    # (target, S, loss) of targets whose extra steps are not done yet
    pending: list[tuple[float, int, float]] = field(default_factory=list)
    outcomes: list[tuple[Any, ...]] = field(default_factory=list)


class Loss(nn.Module):
    """A LightningModule as a function of a batch: its ``full_loss``.

    Args:
        module: The LightningModule.

    Raises:
        TypeError: The module has no method ``full_loss``.
    """

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        if not callable(getattr(module, "full_loss", None)):
            raise TypeError(
                f"{type(module).__name__} has no `full_loss(batch)`: give it this method; it must return the mean loss of a "
                "batch, and neither log nor update metrics"
            )
        self.module = module

    def forward(self, batch: Any) -> Tensor:
        """The mean loss of a batch."""
        loss: Tensor = self.module.full_loss(batch)  # type: ignore[operator]
        return loss


class Population(LightningModule):
    """Trains R replicas (pairs of a seed and a learning rate) of one model together, with stacked parameters and one Adam.

    A step has one of two forms. ``"stacked"`` computes all replicas at once, by ``torch.func.vmap``; it is faster where a
    replica's arithmetic is small. ``"loop"`` computes one replica after the other, with the kernels that the model has alone.
    Both are measured on the first batch for a fraction of a second, and the faster form is kept.

    Every replica has its own initialisation, order of examples, learning rate and end. It trains until its loss on the probe of
    [`PopulationData`][lightning_bsl.population.PopulationData] has reached all targets, and ``extra_steps`` steps more; then it
    is removed. It is the same run as if it trained alone, up to the rounding of sums in another order. A loss that is not
    finite does not affect other replicas.

    The probe is checked after 10 steps, and each time that the number of steps has grown by 5%. So S is at most 5% too large,
    for all replicas alike. A replica is not checked while the running mean of its training loss is above 1.3 times the target.

    BatchNorm uses the statistics of the batch, for the probe too; there are no running statistics. Dropout masks differ between
    the replicas. Networks with other buffers that change in training are not supported. Put replicas of the same learning rate
    next to each other, since they are updated together.

    Args:
        make: Makes the model of a seed: a LightningModule with a method ``full_loss(batch)``, which returns the mean loss of a
            batch, computed from tensors alone (no logging, no metrics, no branches on values). If this is a mean over something
            else than examples, the method ``loss_terms(batch)`` must return the number of terms; it is the weight of a step in
            the running mean.
        replicas: Pairs (seed, learning rate).
        batch_size: B, in examples.
        targets: Losses to reach, in any order.
        max_steps: Number of steps after which a replica stops.
        extra_steps: Steps after each target over which the drop of the loss is measured; 10 and 50 in Li et al. 2024 (arXiv
            2405.14578).
        betas: The betas of Adam; with (0, 0) the update is the sign of the gradient.
        eps: The eps of Adam.
        on_end: Called with the outcomes of each replica that is done, one for each target.
        form: The form of all steps; or a `FormChoice`, which several populations of a batch size may share. By default it is
            measured. The forms differ in the rounding of sums.

    Raises:
        TypeError: A model without ``full_loss``.
        ValueError: No replicas, no targets, an unknown form, or a number below 1. At the start of a fit: precision 16-mixed,
            gradient clipping, several processes, or other data than a matching ``PopulationData``. While training: a batch
            without loss terms.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bsl.datasets import Digits
        >>> from lightning_bsl.models import Classifier, cnn5
        >>> make = lambda seed: Classifier(cnn5(image_size=8, width=4), num_classes=10)
        >>> outcomes = []
        >>> population = Population(make, [(0, 0.01), (1, 0.01)], 8, [2.0], max_steps=200, on_end=outcomes.extend)
        >>> quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        >>> trainer = Trainer(max_epochs=1, **quiet)
        >>> trainer.fit(population, PopulationData(Digits(), [0, 1], batch_size=8))
        >>> sorted((outcome.seed, outcome.status) for outcome in outcomes)
        [(0, 'reached'), (1, 'reached')]
    """

    def __init__(
        self,
        make: Callable[[int], LightningModule],
        replicas: Sequence[tuple[int, float]],
        batch_size: int,
        targets: Sequence[float],
        *,
        max_steps: int,
        extra_steps: int = 10,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        on_end: Callable[[list[Outcome]], Any] = list,
        form: Form | FormChoice | None = None,
    ) -> None:
        super().__init__()
        if isinstance(form, str) and form not in FORMS:
            raise ValueError(f"`form={form!r}` must be one of {', '.join(FORMS)}, or None to measure which is faster")
        if not replicas or not targets:
            raise ValueError(f"{len(replicas)} replicas and {len(targets)} targets: give at least one of each")
        for name, value in (("batch_size", batch_size), ("max_steps", max_steps), ("extra_steps", extra_steps)):
            check_whole(name, value)
        seeds = list(dict.fromkeys(seed for seed, _ in replicas))
        self.seeds = seeds
        self.replicas = [_Replica(seed, lr, seeds.index(seed)) for seed, lr in replicas]
        self.batch_size = batch_size
        self.targets = sorted(targets, reverse=True)
        self.max_steps = max_steps
        self.extra_steps = extra_steps
        self.betas = betas
        self.eps = eps
        self.steps = 0
        self._terms = 0.0  # terms per example, summed over the steps
        self._next_check = min(_FIRST_CHECK, max_steps)
        self._on_end = on_end
        self._choice = FormChoice() if form is None else form

        initial = []
        for seed in seeds:
            loss = Loss(make(seed))
            replace_all_batch_norm_modules_(loss)  # without running statistics, which vmap cannot update
            initial.append(dict(loss.named_parameters()))
        self._model: tuple[Loss] = (loss,)  # in a tuple, so that its parameters are not parameters of this module
        self._parameters_of_model = list(loss.parameters())
        self.names = list(initial[0])
        self.stacked = nn.ParameterList(
            nn.Parameter(torch.stack([initial[replica.row][name].detach() for replica in self.replicas]), like.requires_grad)
            for name, like in initial[0].items()
        )
        self.running_loss: Tensor
        self.rows: Tensor
        self.register_buffer("running_loss", torch.full((len(self.replicas),), math.nan), persistent=False)
        self.register_buffer("rows", torch.tensor([replica.row for replica in self.replicas]), persistent=False)

    def configure_optimizers(self) -> PopulationAdam:
        """Make the Adam of all replicas."""
        lr = torch.tensor([replica.lr for replica in self.replicas], dtype=torch.float64)
        return PopulationAdam([weights for weights in self.stacked if weights.requires_grad], lr, self.betas, self.eps)

    def on_fit_start(self) -> None:
        """Refuse settings with which replicas would affect each other, and other data."""
        if self.trainer.precision == "16-mixed":
            raise ValueError(
                'precision "16-mixed" skips a step of all replicas if one of them overflows; write "bf16-mixed" or "32-true"'
            )
        if self.trainer.gradient_clip_val is not None:
            raise ValueError(
                f"gradient_clip_val={self.trainer.gradient_clip_val} would clip the gradients of all replicas together; write "
                "gradient_clip_val=None"
            )
        if self.trainer.world_size > 1:
            raise ValueError(f"{self.trainer.world_size} processes: a population trains on one device; write devices=1")
        if not isinstance(data := self._data, PopulationData) or data.seeds != self.seeds or data.batch_size != self.batch_size:
            raise ValueError(f"give a PopulationData with seeds={self.seeds} and batch_size={self.batch_size} to `fit`")
        self._model[0].to(self.device, self.stacked[0].dtype)
        self._probe = tree_map(lambda leaf: leaf.to(self.device), data.probe())

    def losses(self, batch: Any, replicas: Sequence[int] | None = None) -> Tensor:
        """The mean loss of each replica, in the stacked form.

        Args:
            batch: Tensors ``[R, B, ...]``, with one batch per replica; or, if ``replicas`` are given, one batch ``[B, ...]``
                for all of them.
            replicas: Indices of some replicas; by default all.

        Returns:
            Losses ``[R]``.
        """
        if replicas is None:
            return self._stacked_losses(list(self.stacked), batch, 0)
        return self._stacked_losses([weights[replicas] for weights in self.stacked], batch, None)

    def _stacked_losses(self, stacked: Sequence[Tensor], batch: Any, batch_dim: int | None) -> Tensor:
        def loss(parameters: dict[str, Tensor], batch: Any) -> Tensor:
            value: Tensor = functional_call(self._model[0], parameters, (batch,))
            return value

        losses = vmap(loss, in_dims=(0, batch_dim), randomness="different")
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels would run one replica after another
            values: Tensor = losses(dict(zip(self.names, stacked)), batch)
        return values

    def looped_losses(self, batches: Iterable[Any], replicas: Iterable[int] | None = None) -> Iterator[Tensor]:
        """The mean loss of one replica after the other, in the loop form. Gradients are those of ``self._model``.

        Args:
            batches: A batch ``[B, ...]`` for each replica.
            replicas: Indices of some replicas; by default all.

        Yields:
            Losses, with the parameters of the model still those of the replica.
        """
        weights = list(zip(*(stacked.detach().unbind() for stacked in self.stacked)))
        for index, batch in zip(range(len(weights)) if replicas is None else replicas, batches):
            for parameter, of_replica in zip(self._parameters_of_model, weights[index]):
                parameter.data = of_replica
            if torch.is_autocast_enabled(self.device.type):
                torch.clear_autocast_cache()  # it knows converted weights by their parameter, which has other weights now
            yield self._model[0](batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of the replicas' losses.

        In the stacked form its gradient for a replica's parameters is that of the replica's own loss. In the loop form it has
        none: each replica is updated here.

        Args:
            batch: Tensors ``[S, B, ...]``, one row for each seed.
            batch_idx: Index of the batch.
        """
        weight = self._weight(batch)
        form = self._choice
        if isinstance(form, FormChoice):
            form = form.of(len(self.replicas), partial(self._seconds, batch))
        if form == "stacked":
            losses = self.losses(tree_map(itemgetter(self.rows), batch))
        else:
            losses = self._train_looped([tree_map(itemgetter(row), batch) for row in range(len(self.seeds))])
        with torch.no_grad():
            now = losses.detach().to(self.running_loss)
            self.running_loss = now if self.steps == 0 else self.running_loss + weight * (now - self.running_loss)
        return losses.sum()

    def _train_looped(self, batches: Sequence[Any]) -> Tensor:
        """Update one replica after the other; the optimizer's own step then only counts."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, PopulationAdam)
        losses = []
        of_replicas = (batches[replica.row] for replica in self.replicas)
        for loss, update in zip(self.looped_losses(of_replicas), optimizer.updates()):
            update(self._gradients(loss))
            losses.append(loss.detach())
        return torch.stack(losses)

    def _gradients(self, loss: Tensor, of: Sequence[Tensor] | None = None) -> tuple[Tensor | None, ...]:
        """The gradients of trained parameters, by default the model's."""
        trained = [parameter for parameter in of or self._parameters_of_model if parameter.requires_grad]
        if not torch.is_autocast_enabled(self.device.type):
            return torch.autograd.grad(loss, trained, allow_unused=True)
        with torch.autocast(self.device.type, enabled=False):  # a backward pass belongs outside of autocast
            return torch.autograd.grad(loss, trained, allow_unused=True)

    def _seconds(self, batch: Any, form: Form, number: int) -> float:
        """The time that a form takes for the gradients of the first replicas, which change nothing."""
        chosen = range(number)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            begun = self._clock()
            if form == "loop":
                for loss in self.looped_losses((tree_map(itemgetter(self.replicas[i].row), batch) for i in chosen), chosen):
                    self._gradients(loss)
            else:
                weights = [stacked.detach()[:number].requires_grad_(stacked.requires_grad) for stacked in self.stacked]
                losses = self._stacked_losses(weights, tree_map(itemgetter(self.rows[:number]), batch), 0)
                self._gradients(losses.sum(), weights)
            return self._clock() - begun

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients of the stacked form. In the loop form there are none left to compute."""
        if loss.requires_grad:
            super().backward(loss, *args, **kwargs)

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _weight(self, batch: Any) -> Any:
        """The weight of a step in the running means of the loss: a number, or a tensor ``[R]``."""
        module = self._model[0].module
        if not has_loss_terms(module):
            return min(1.0, self.batch_size / _MEMORY)
        terms = [count_terms(module, tree_map(itemgetter(row), batch)) for row in range(len(self.seeds))]
        if not all(terms):
            raise ValueError(
                f"in step {self.steps} the batch of seed {self.seeds[terms.index(0.0)]} has no loss terms, so there is nothing "
                "to train: leave such examples out of the data set, or write a larger `batch_size`"
            )
        self._terms += sum(terms) / (len(terms) * self.batch_size)
        per_example = self._terms / (self.steps + 1)
        return (self.rows.new_tensor(terms, dtype=self.running_loss.dtype) / (per_example * _MEMORY)).clamp(max=1)[self.rows]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare losses with the targets if a check is due, and remove replicas that are done."""
        self.steps += 1
        last = self.steps >= self.max_steps
        check = self.steps == self._next_check
        due = {
            i
            for i, replica in enumerate(self.replicas)
            if any(steps + self.extra_steps == self.steps for _, steps, _ in replica.pending)
        }
        if check:
            grown = self.steps + max(1, int(_CHECK * self.steps))
            self._next_check = min(grown, self.max_steps) if not last else -1
            running = self.running_loss.tolist()
            due |= {
                i
                for i, replica in enumerate(self.replicas)
                if replica.reached < len(self.targets)
                and (last or not _FAR * self.targets[replica.reached] < running[i] < math.inf)
            }
        if due:
            chosen = sorted(due)
            for i, loss in zip(chosen, self._probe_losses(chosen)):
                self._judge(self.replicas[i], loss, check, last)
            self._remove_done()

    @torch.no_grad()
    def _probe_losses(self, replicas: Sequence[int]) -> list[float]:
        self._model[0].eval()
        values: list[float] = []
        with self.trainer.precision_plugin.forward_context():
            # on a CPU the loop is faster for so many examples, whatever is faster for the batches
            if self.device.type == "cpu":
                values = [loss.item() for loss in self.looped_losses(repeat(self._probe), replicas)]
            else:
                # a few replicas at once: the probe is larger than a step's batch, but nothing is kept for a backward pass
                number = max(1, 4 * len(self.replicas) * self.batch_size // self._data.probe_size)
                for start in range(0, len(replicas), number):
                    values += self.losses(self._probe, replicas[start : start + number]).tolist()
        self._model[0].train()
        return values

    def _judge(self, replica: _Replica, loss: float, check: bool, last: bool) -> None:
        def record(target: float, status: Status, steps: int, loss_then: float, drop: float = math.nan) -> None:
            numbers = (steps, steps * self.batch_size, loss_then, self.extra_steps, drop)
            replica.outcomes.append(Outcome(replica.seed, self.batch_size, replica.lr, target, status, *numbers))

        if not math.isfinite(loss):
            for target in [*(target for target, _, _ in replica.pending), *self.targets[replica.reached :]]:
                record(target, "diverged", self.steps, loss)
            replica.pending, replica.reached = [], len(self.targets)
            return
        for target, steps, before in replica.pending:
            if steps + self.extra_steps == self.steps:
                record(target, "reached", steps, before, before - loss)
        replica.pending = [entry for entry in replica.pending if entry[1] + self.extra_steps > self.steps]
        while check and replica.reached < len(self.targets) and loss <= self.targets[replica.reached]:
            replica.pending.append((self.targets[replica.reached], self.steps, loss))
            replica.reached += 1
        if last:
            for target in self.targets[replica.reached :]:
                record(target, "not_reached", self.steps, loss)
            replica.reached = len(self.targets)

    def _remove_done(self) -> None:
        """Remove replicas that are done from the stacked tensors, so that they take no more time."""
        left = [i for i, replica in enumerate(self.replicas) if replica.pending or replica.reached < len(self.targets)]
        for i, replica in enumerate(self.replicas):
            if i not in left:
                self._on_end([Outcome(*outcome) for outcome in replica.outcomes])
        if not left:
            self.trainer.should_stop = True
        elif len(left) < len(self.replicas):
            rows = torch.tensor(left, device=self.device)
            self._keep(rows)
            optimizer = self.optimizers(use_pl_optimizer=False)
            assert isinstance(optimizer, PopulationAdam)
            optimizer.keep(rows)

    def _keep(self, rows: Tensor) -> None:
        self.replicas = [self.replicas[i] for i in rows.tolist()]
        for parameter in self.stacked:
            parameter.grad = None
            parameter.data = parameter.data[rows]
        self.running_loss, self.rows = self.running_loss[rows], self.rows[rows]

    def replica_state_dict(self, index: int) -> dict[str, Tensor]:
        """The parameters of a replica that still trains, by their names in its model.

        Args:
            index: Index of the replica in ``replicas``.
        """
        return {
            name.removeprefix("module."): stacked.detach()[index].clone() for name, stacked in zip(self.names, self.stacked)
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the progress of each replica."""
        checkpoint["population"] = {
            "steps": self.steps,
            "next_check": self._next_check,
            "running_loss": self.running_loss,
            "terms": self._terms,
            "seeds": self.seeds,
            "replicas": [
                {**asdict(replica), "outcomes": [tuple(outcome) for outcome in replica.outcomes]} for replica in self.replicas
            ],
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Remove the replicas that were done, before Lightning loads the parameters."""
        state = checkpoint["population"]
        indices = {(replica.seed, replica.lr): i for i, replica in enumerate(self.replicas)}
        wanted = [(replica["seed"], replica["lr"]) for replica in state["replicas"]]
        if state["seeds"] != self.seeds or not indices.keys() >= set(wanted):
            raise ValueError(
                f"the checkpoint is of other replicas: {wanted} of the seeds {state['seeds']}, not {list(indices)}; make the "
                "population with the same replicas"
            )
        self._keep(torch.tensor([indices[pair] for pair in wanted], device=self.device))
        self.stacked.to(checkpoint["state_dict"]["stacked.0"].dtype)  # Lightning converts only after loading
        self.replicas = [_Replica(**replica) for replica in state["replicas"]]
        self.steps, self._next_check, self._terms = state["steps"], state["next_check"], state["terms"]
        self.running_loss = state["running_loss"].to(self.device)
        if isinstance(self._data, PopulationData):
            self._data.start = self.steps

    @property
    def _data(self) -> Any:
        return getattr(self.trainer, "datamodule", None)
