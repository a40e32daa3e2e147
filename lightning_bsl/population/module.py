"""Many replicas of one model, trained as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
from lightning_bsl.population.optimizer import PopulationAdam

Status = Literal["reached", "not_reached", "diverged"]

_FIRST_CHECK = 10  # steps; then whenever they have grown by _CHECK, so that S is as exact for every rate and batch size
_CHECK = 0.05
_MEMORY = 64  # examples over which the running loss is a mean; it only says who need not be checked yet
_FAR = 1.3


class Outcome(NamedTuple):
    """What one replica did towards one target: a row of ``replicas.csv``.

    Attributes:
        seed: Of its initialisation and of the order of its examples.
        batch_size: B, in examples.
        lr: Learning rate.
        target: Target loss.
        status: Whether it was reached; ``diverged`` if the loss was no finite number at some check before all was measured.
        steps: S, optimizer steps to the target; those that were done, where it was not reached.
        examples: E = S B.
        loss: Loss of the probe after ``steps``.
        extra_steps: Steps after the target was reached.
        loss_drop: How much the loss of the probe fell in them; ``nan`` unless reached.
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
    row: int  # of its seed in a batch
    reached: int = 0  # targets
    pending: list[tuple[float, int, float]] = field(default_factory=list)  # target, S, loss: its extra steps are not done
    outcomes: list[tuple[Any, ...]] = field(default_factory=list)


class Loss(nn.Module):
    """A LightningModule as a function of a batch: its ``full_loss``.

    Args:
        module: The LightningModule.

    Raises:
        TypeError: It has no such method.
    """

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        if not callable(getattr(module, "full_loss", None)):
            raise TypeError(
                f"{type(module).__name__} has no `full_loss(batch)`: give it that method, which returns the mean loss of a "
                "batch and neither logs nor updates metrics"
            )
        self.module = module

    def forward(self, batch: Any) -> Tensor:
        """The mean loss of a batch."""
        loss: Tensor = self.module.full_loss(batch)  # type: ignore[operator]
        return loss


class Population(LightningModule):
    """Trains R replicas (seed x learning rate) of one model, stacked: one forward pass, one backward pass, one Adam.

    Every replica has its own initialisation, order of examples, learning rate and end: it trains until its loss on the
    probe of `PopulationData` has reached every target, then ``extra_steps`` more, and leaves. It equals the same run
    trained alone, up to the rounding of sums taken in another order. A loss that is no number stays in its replica.

    The probe is checked after 10 steps and whenever the steps have grown by 5%, so S is rounded up by 5% at most, alike
    for all. A replica whose training loss, as a running mean, lies above 1.3 times the target is not checked.

    BatchNorm normalises by the statistics of the batch, in the probe too: running statistics are not kept. Dropout draws for
    each replica anew. Networks with other buffers that change while training are not supported. Replicas of one learning
    rate should be neighbours: they are updated at once.

    Args:
        make: Makes the model of a seed: a LightningModule with ``full_loss(batch)``, the mean loss of a batch, computed
            from tensors alone (no logging, no metrics, no branches on values). Where that is a mean over something else
            than examples, ``loss_terms(batch)`` says over how many; the losses of the steps count by it in the running mean.
        replicas: Seed and learning rate of each.
        batch_size: B.
        targets: Losses to reach, any order.
        max_steps: Where to give up.
        extra_steps: Steps after each target over which the drop of the loss is measured; P4 takes 10 and 50.
        betas: Of Adam; (0, 0) is the sign of the gradient.
        eps: Of Adam.
        on_end: Called with the outcomes of each replica that leaves, one for each target.

    Raises:
        TypeError: A model without ``full_loss``.
        ValueError: No replicas, no targets, counts below 1; precision 16-mixed, whose scaler ties replicas together; while
            training, a batch without loss terms.

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
    ) -> None:
        super().__init__()
        if not replicas or not targets:
            raise ValueError(f"{len(replicas)} replicas and {len(targets)} targets: give at least one of each")
        for name, value in (("batch_size", batch_size), ("max_steps", max_steps), ("extra_steps", extra_steps)):
            if value < 1:
                raise ValueError(f"`{name}={value}` must be 1 or more")
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
        self._terms = 0.0  # of an example, summed over the steps
        self._next_check = min(_FIRST_CHECK, max_steps)
        self._on_end = on_end

        initial = []
        for seed in seeds:
            loss = Loss(make(seed))
            replace_all_batch_norm_modules_(loss)  # vmap cannot update running statistics
            initial.append(dict(loss.named_parameters()))
        self._model: tuple[Loss] = (loss,)  # in a tuple: it is no part of this module, whose parameters are the stacked ones
        self.names = list(initial[0])
        self.stacked = nn.ParameterList(
            nn.Parameter(torch.stack([initial[each.row][name].detach() for each in self.replicas]), like.requires_grad)
            for name, like in initial[0].items()
        )
        self.running_loss: Tensor
        self.rows: Tensor
        self.register_buffer("running_loss", torch.full((len(self.replicas),), math.nan), persistent=False)
        self.register_buffer("rows", torch.tensor([each.row for each in self.replicas]), persistent=False)

    def configure_optimizers(self) -> PopulationAdam:
        """Make the Adam of all replicas."""
        lr = torch.tensor([each.lr for each in self.replicas], dtype=torch.float64)
        return PopulationAdam([each for each in self.stacked if each.requires_grad], lr, self.betas, self.eps)

    def on_fit_start(self) -> None:
        """Refuse what ties the replicas together."""
        if self.trainer.precision == "16-mixed":
            raise ValueError(
                'precision "16-mixed" skips a step of all replicas where one overflows; write "bf16-mixed" or "32-true"'
            )
        if self.trainer.gradient_clip_val is not None:
            raise ValueError(
                "gradient_clip_val would clip the gradients of all replicas together; write gradient_clip_val=None"
            )
        if self.trainer.world_size > 1:
            raise ValueError(f"{self.trainer.world_size} processes: a population trains on one device; write devices=1")
        if not isinstance(data := self._data, PopulationData) or data.seeds != self.seeds or data.batch_size != self.batch_size:
            raise ValueError(f"give a PopulationData with seeds={self.seeds} and batch_size={self.batch_size} to `fit`")
        self._model[0].to(self.device, self.stacked[0].dtype)
        self._probe = tree_map(lambda leaf: leaf.to(self.device), data.probe())

    def losses(self, batch: Any, replicas: Sequence[int] | None = None) -> Tensor:
        """Each replica's mean loss on a batch of its own.

        Args:
            batch: Tensors ``[R, B, ...]``; or, if ``replicas`` are given, one batch ``[B, ...]`` for all of those.
            replicas: Indices of some; all by default.

        Returns:
            Losses ``[R]``.
        """
        stacked = list(self.stacked) if replicas is None else [each[replicas] for each in self.stacked]

        def loss(parameters: dict[str, Tensor], batch: Any) -> Tensor:
            value: Tensor = functional_call(self._model[0], parameters, (batch,))
            return value

        each = vmap(loss, in_dims=(0, 0 if replicas is None else None), randomness="different")
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels would run replica by replica
            values: Tensor = each(dict(zip(self.names, stacked)), batch)
        return values

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of the replicas' losses, whose gradient is each one's own.

        Args:
            batch: Tensors ``[S, B, ...]``, one row for each seed.
            batch_idx: Of Lightning's loop.
        """
        weight = self._weight(batch)
        losses = self.losses(tree_map(lambda leaf: leaf[self.rows], batch))
        with torch.no_grad():
            now = losses.detach().to(self.running_loss)
            self.running_loss = now if self.steps == 0 else self.running_loss + weight * (now - self.running_loss)
        return losses.sum()

    def _weight(self, batch: Any) -> Any:
        """What a step's losses count for in the running means: a number, or one for each replica ``[R]``."""
        module = self._model[0].module
        if not has_loss_terms(module):
            return min(1.0, self.batch_size / _MEMORY)
        terms = [count_terms(module, tree_map(itemgetter(row), batch)) for row in range(len(self.seeds))]
        if not all(terms):
            raise ValueError(
                f"in step {self.steps} the batch of seed {self.seeds[terms.index(0.0)]} has no loss terms, so there is "
                "nothing to train: leave such examples out of the data set, or write a larger `batch_size`"
            )
        self._terms += sum(terms) / (len(terms) * self.batch_size)
        per_example = self._terms / (self.steps + 1)
        return (self.rows.new_tensor(terms, dtype=self.running_loss.dtype) / (per_example * _MEMORY)).clamp(max=1)[self.rows]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare with the targets, where it is time to, and let replicas leave."""
        self.steps += 1
        last = self.steps >= self.max_steps
        check = self.steps == self._next_check
        due = {i for i, each in enumerate(self.replicas) if any(s + self.extra_steps == self.steps for _, s, _ in each.pending)}
        if check:
            grown = self.steps + max(1, int(_CHECK * self.steps))
            self._next_check = min(grown, self.max_steps) if not last else -1
            running = self.running_loss.tolist()
            due |= {
                i
                for i, each in enumerate(self.replicas)
                if each.reached < len(self.targets) and (last or not _FAR * self.targets[each.reached] < running[i] < math.inf)
            }
        if due:
            chosen = sorted(due)
            for i, loss in zip(chosen, self._probe_losses(chosen)):
                self._judge(self.replicas[i], loss, check, last)
            self._let_go()

    @torch.no_grad()
    def _probe_losses(self, replicas: Sequence[int]) -> list[float]:
        self._model[0].eval()
        values: list[float] = []
        # a few at once: the probe is larger than a step's batch, though nothing is kept for a backward pass
        number = max(1, 4 * len(self.replicas) * self.batch_size // self._data.probe_size)
        for start in range(0, len(replicas), number):
            with self.trainer.precision_plugin.forward_context():
                values += self.losses(self._probe, replicas[start : start + number]).tolist()
        self._model[0].train()
        return values

    def _judge(self, replica: _Replica, loss: float, check: bool, last: bool) -> None:
        def note(target: float, status: Status, steps: int, at: float, drop: float = math.nan) -> None:
            numbers = (steps, steps * self.batch_size, at, self.extra_steps, drop)
            replica.outcomes.append(Outcome(replica.seed, self.batch_size, replica.lr, target, status, *numbers))

        if not math.isfinite(loss):
            for target in [*(target for target, _, _ in replica.pending), *self.targets[replica.reached :]]:
                note(target, "diverged", self.steps, loss)
            replica.pending, replica.reached = [], len(self.targets)
            return
        for target, steps, before in replica.pending:
            if steps + self.extra_steps == self.steps:
                note(target, "reached", steps, before, before - loss)
        replica.pending = [each for each in replica.pending if each[1] + self.extra_steps > self.steps]
        while check and replica.reached < len(self.targets) and loss <= self.targets[replica.reached]:
            replica.pending.append((self.targets[replica.reached], self.steps, loss))
            replica.reached += 1
        if last:
            for target in self.targets[replica.reached :]:
                note(target, "not_reached", self.steps, loss)
            replica.reached = len(self.targets)

    def _let_go(self) -> None:
        """Cut the replicas that are done out of the stacked tensors, so that they cost nothing."""
        left = [i for i, each in enumerate(self.replicas) if each.pending or each.reached < len(self.targets)]
        for i, each in enumerate(self.replicas):
            if i not in left:
                self._on_end([Outcome(*outcome) for outcome in each.outcomes])
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
        """The parameters of one of the replicas that still train, by their names in its model.

        Args:
            index: In ``replicas``.
        """
        return {
            name.removeprefix("module."): stacked.detach()[index].clone() for name, stacked in zip(self.names, self.stacked)
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add how far each replica is."""
        checkpoint["population"] = {
            "steps": self.steps,
            "next_check": self._next_check,
            "running_loss": self.running_loss,
            "terms": self._terms,
            "seeds": self.seeds,
            "replicas": [{**asdict(each), "outcomes": [tuple(outcome) for outcome in each.outcomes]} for each in self.replicas],
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Cut the replicas that were done, before the parameters are loaded."""
        kept = checkpoint["population"]
        names = {(each.seed, each.lr): i for i, each in enumerate(self.replicas)}
        wanted = [(each["seed"], each["lr"]) for each in kept["replicas"]]
        if kept["seeds"] != self.seeds or not names.keys() >= set(wanted):
            raise ValueError(f"the checkpoint is of other replicas: {wanted} of the seeds {kept['seeds']}, not {list(names)}")
        self._keep(torch.tensor([names[each] for each in wanted], device=self.device))
        self.stacked.to(checkpoint["state_dict"]["stacked.0"].dtype)  # Lightning converts only after it has loaded
        self.replicas = [_Replica(**each) for each in kept["replicas"]]
        self.steps, self._next_check, self._terms = kept["steps"], kept["next_check"], kept["terms"]
        self.running_loss = kept["running_loss"].to(self.device)
        if isinstance(self._data, PopulationData):
            self._data.start = self.steps

    @property
    def _data(self) -> Any:
        return getattr(self.trainer, "datamodule", None)
