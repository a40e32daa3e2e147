"""A callback that measures the gradient noise scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_bsl.callbacks.batch_lr import scheduler_of
from lightning_bsl.callbacks.compatibility import check_sharding
from lightning_bsl.callbacks.loaders import batch_counts
from lightning_bsl.callbacks.loop import logged_at, writes_step
from lightning_bsl.callbacks.loss_terms import has_loss_terms, terms_or_examples
from lightning_bsl.callbacks.micro_batches import MicroBatch
from lightning_bsl.callbacks.noise_probe import LEAST_EXAMPLES, NoiseProbe, logged_values, loss_scale, trained_parameters
from lightning_bsl.data.sampler import Cut
from lightning_bsl.schedules.checks import check_whole
from lightning_bsl.theory.noise_scale import NoiseEstimate, NoiseScale, Pieces, noise_interval

_WHERE_SEEN = (
    "With ModelParallelStrategy it sees the gradients of parameters that `fully_shard` shards, and that are used in the "
    "forward pass of a module that holds them, called as `module(...)`: use them there, or leave GradientNoiseScale out"
)


class _StepGradients:
    """The gradient norms of the step that is measured, for each piece (micro-batch).

    Attributes:
        hooks: The hooks on the parameters, while a step is measured.
        batch: The batch of the current piece.
        batch_idx: Index of this batch in the epoch.
        number: The number of steps before this one.
        norms: Norms of the parameters' gradients in the current backward pass.
        pieces: The pieces so far, each with the norms of its gradients.
        watched: The watched tensors by ``id``, and whether there was a gradient of each.
    """

    def __init__(self) -> None:
        self.hooks: list[RemovableHandle] = []
        self.batch: Any = None
        self.batch_idx = 0
        self.number = 0
        self.norms: list[Tensor] = []
        self.pieces: list[tuple[MicroBatch, Tensor]] = []
        self.watched: dict[int, bool] = {}

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Record the gradient norms of each backward pass, before gradients are accumulated or averaged over processes."""
        for parameter in parameters:
            if parameter.requires_grad and not _is_sharded(parameter) and id(parameter) not in self.watched:
                self.watched[id(parameter)] = False
                self.hooks.append(parameter.register_hook(partial(self._record, id(parameter))))

    def watch_sharded(self, module: Module, parameters: Iterable[Tensor]) -> None:
        """Watch the tensors that ``fully_shard`` puts in the place of parameters: only theirs are whole gradients.

        Each forward pass of a module watches its parameters and those of the modules in it. The sharded parameters themselves
        get averaged gradients without a backward pass.
        """
        self.hooks = [layer.register_forward_pre_hook(self._watch_layer) for layer in module.modules()]
        self.hooks += [parameter.register_hook(_refuse_sharded_gradient) for parameter in parameters]

    def _watch_layer(self, layer: Module, inputs: Any) -> None:
        if torch.is_grad_enabled():
            self.watch(layer.parameters())

    def _record(self, key: int, gradient: Tensor) -> None:
        self.watched[key] = True
        self.norms.append(_norm(gradient))

    def stop(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()

    def forget(self) -> None:
        """Stop measuring the current step, and drop its norms."""
        self.stop()
        self.hooks, self.batch = [], None
        self.norms.clear()
        self.pieces.clear()
        self.watched.clear()


class GradientNoiseScale(Callback):
    """Measures the gradient noise scale ``N = tr(Sigma) / |G|^2``. Gradients of much smaller batches are mostly noise.

    G is the mean gradient over the training examples, and Sigma the covariance of the gradients of single examples (McCandlish
    et al. 2018, *An Empirical Model of Large-Batch Training*, arXiv 1812.06162). Both follow from the gradient norms at two
    batch sizes.

    **Steps of several micro-batches or processes.** The two batch sizes are those of the pieces and of the whole step, and only
    norms must be computed. The measurements of the last ``window`` steps are averaged.

    **Steps of one piece.** At every ``probe_every``-th step, and the first time after half as many, the gradients of other
    training examples are computed: of 144 random ones or of two batches, whichever is more, in 12 pieces. A probe takes the
    place of the one before. It costs a few steps, uses training mode, and ``training_step`` logs nothing during it. It
    needs memory for 12 gradients. It needs a training loader that a measurement can read again; with another one there is a
    warning, and only steps of several pieces are measured.

    **Sharded parameters.** With ``ModelParallelStrategy`` and ``fully_shard`` the processes and micro-batches are measured as
    with DDP. All parameters that are trained must be sharded, and used in the forward passes of their modules.

    Training itself goes on bit for bit as without measurements. The callback measures the gradient of ``training_step``, before
    clipping. Batch sizes count examples. With ``per="terms"`` they count the terms that the LightningModule's
    ``loss_terms(batch)`` returns, such as tokens; Sigma is then the covariance of the gradients of single terms.
    ``per="examples"`` assumes that the gradient of n examples has the covariance Sigma/n, which is right for pieces of one
    example and for examples with equal numbers of terms. With BatchNorm each piece is normalised by its own examples, and the
    noise scale includes the effect.

    The callback logs ``gradient_noise_scale``, its 95% interval ``gradient_noise_scale_low`` and
    ``gradient_noise_scale_high``, ``gradient_sq_norm`` and ``gradient_variance``, every ``log_every_n_steps`` of the
    Trainer and at the end of an epoch, from the first measurement on. An estimate of ``|G|^2`` may be 0 or below by chance,
    mostly where N is above the number of examples that were measured. Then ``gradient_noise_scale`` is ``tr(Sigma)`` over
    the upper end of the interval of ``|G|^2`` about 0: it says that N is probably larger, and is never NaN. The upper end
    is infinite while ``|G|^2`` cannot be told from 0. The interval says how well the measured gradients determine N. It
    does not say how much N has changed since the measurement.

    Args:
        every: Steps between two measurements of steps of several pieces.
        probe_every: Steps between two probes, in steps of one piece; ``None`` for no probes.
        probe_size: Least number of examples of a probe.
        window: Number of steps whose measurements are averaged, in steps of several pieces. N is about that of half as many
            steps ago.
        per: What batch sizes count: ``"examples"`` or ``"terms"``.

    Raises:
        ValueError: ``every``, ``probe_every`` or ``window`` below 1, ``probe_size`` below 6, an unknown ``per``.
        MisconfigurationException: At the start of a fit: manual optimization, ``per="terms"`` without a method ``loss_terms``,
            or a loader whose batches have an unknown number of examples; FSDPStrategy, DeepSpeed, tensor parallelism, or
            parameters that ``fully_shard`` leaves whole. At the first measurement: sharded parameters whose gradients it did
            not see.

    Example:
        >>> trainer = Trainer(max_epochs=9, callbacks=[GradientNoiseScale()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        every: int = 10,
        probe_every: int | None = 100,
        probe_size: int = LEAST_EXAMPLES,
        window: int = 100,
        per: Literal["examples", "terms"] = "examples",
    ) -> None:
        for name, value in (("every", every), ("probe_every", probe_every), ("window", window)):
            check_whole(name, value, or_none=True)
        if per not in ("examples", "terms"):
            raise ValueError(f"unknown `per={per!r}`; write 'examples' or 'terms'")
        self.every = every
        self.probe_every = probe_every
        self.window = window
        self.per = per
        self.probe = NoiseProbe(probe_size, per)
        self._measurements: list[tuple[int, NoiseEstimate]] = []  # the step of each, and its values
        self._measured: NoiseScale | None = None
        self._fitting = True  # False in validation and test, where checkpoints must not change the measurements
        self._step = _StepGradients()
        self._stepped = False
        self._sharded = False  # whether parameters are sharded by `fully_shard`
        self._left_out = -1  # a step that is not measured, since its gradients add to those of the step before
        self._counts: Callable[[int], int] | None = None  # batch index -> examples, in a fit without BatchLRScheduler

    @property
    def measured(self) -> NoiseScale | None:
        """All that is known of the noise scale now; ``None`` before the first measurement."""
        if self._measured is None and self._measurements:
            self._measured = noise_interval([estimate for _, estimate in self._measurements])
        return self._measured

    @property
    def noise_scale(self) -> float | None:
        """The noise scale, in examples or in terms; ``None`` before the first measurement."""
        return None if self.measured is None else self.measured.value

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the noise scale; ``None`` before the first measurement."""
        return None if self.measured is None else (self.measured.low, self.measured.high)

    @property
    def gradient_sq_norm(self) -> float | None:
        """The estimate of ``|G|^2``; ``None`` before the first measurement."""
        return None if self.measured is None else self.measured.sq_norm

    @property
    def gradient_variance(self) -> float | None:
        """The estimate of ``tr(Sigma)``; ``None`` before the first measurement."""
        return None if self.measured is None else self.measured.variance

    # --- start and end of a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the measurements if a new run begins."""
        self._fitting = stage == "fit"
        if self._fitting and trainer.global_step == 0:
            self._measurements, self._measured = [], None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse fits that cannot be measured."""
        trained = [parameter for optimizer in trainer.optimizers for parameter in trained_parameters(optimizer)]
        check_sharding(trainer, pl_module, trained, type(self).__name__)
        self._sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        if self._sharded and self.probe_every is not None and trainer.world_size == 1:
            raise MisconfigurationException(
                f"`probe_every={self.probe_every}`: with one process a probe needs whole gradients, which "
                "ModelParallelStrategy does not keep; write `probe_every=None`, or leave the strategy out"
            )
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "with manual optimization GradientNoiseScale does not know which backward passes belong to a step; leave it out"
            )
        if self.per == "terms" and not has_loss_terms(pl_module):
            raise MisconfigurationException(
                f"`per='terms'`, but {type(pl_module).__name__} has no method that counts the terms of its loss: give it a "
                "method `loss_terms(batch)` that returns their number, such as the number of tokens, or write `per='examples'`"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out how to count the examples of a batch, and prepare the probes."""
        self._counts = None if scheduler_of(trainer) is not None else batch_counts(trainer)
        if self.probe_every is not None and trainer.world_size == 1:
            obstacle = self.probe.begin(trainer, pl_module)
            if obstacle is not None and trainer.accumulate_grad_batches == 1:
                rank_zero_warn(
                    f"GradientNoiseScale measures only steps of several micro-batches, since it cannot read the training "
                    f"examples again: {obstacle}. Write `probe_every=None` if this is meant, or give such a loader"
                )

    def state_dict(self) -> dict[str, Any]:
        """The measurements that count, as plain numbers."""
        return {"measurements": [[step, *estimate] for step, estimate in self._measurements]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the measurements."""
        if self._fitting:
            self._measured = None
            self._measurements = [(step, NoiseEstimate(*values)) for step, *values in state_dict["measurements"]]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks from the parameters: after an exception Lightning does not call ``teardown``."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks from the parameters, and end the probes."""
        self._step.forget()
        self.probe.end()

    # --- training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop a step that the last epoch did not finish."""
        self._step.forget()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start to record gradient norms, if this step is to be measured."""
        # a step that cannot have several pieces is not watched without need, since that takes time
        if not self._step.hooks and ((self._is_due(trainer) and _may_split(trainer)) or self._probe_is_due(trainer)):
            parameters = trained_parameters(trainer.optimizers[0])
            if self._sharded:
                self._step.watch_sharded(pl_module, parameters)
            else:
                self._step.watch(parameters)
        if self._step.hooks:
            self._step.batch, self._step.batch_idx, self._step.number = batch, batch_idx, logged_at(trainer)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drop the pieces so far: they are of an attempt that ran out of memory."""
        self._step.pieces.clear()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Begin a piece."""
        self._step.norms.clear()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record a piece."""
        if self._step.hooks and self._step.norms:
            piece = self._micro_batch(trainer, pl_module)
            if piece.examples and piece.terms:  # a piece without examples or terms adds nothing to the gradient
                self._step.pieces.append((piece, torch.stack(self._step.norms)))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure: the gradients are complete, and not clipped yet."""
        self._stepped = True
        step, scheduler = self._step, scheduler_of(trainer)
        if not step.hooks:
            return
        step.stop()
        scale = loss_scale(trainer)
        pieces = Pieces()
        for piece, norms in step.pieces:
            weight = piece.weight
            if scheduler is not None and has_loss_terms(pl_module):  # the weight of a term may have changed inside the step
                last = step.pieces[-1][0]
                weight = piece.terms * last.weight / last.terms
            sq_norm = _sq_sum([norms]) / (piece.weight * scale) ** 2
            pieces = pieces.plus(self._size(piece), weight / trainer.world_size, sq_norm)
        gradients = [parameter.grad for parameter in trained_parameters(optimizer) if parameter.grad is not None]
        seen = sum(step.watched.values())
        if self._sharded and seen != len(gradients):
            raise MisconfigurationException(
                f"{len(gradients)} parameters have gradients, and GradientNoiseScale saw those of {seen}. {_WHERE_SEEN}"
            )
        sq_norm = _sq_sum(map(_held_norm, gradients))
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            sq_norm /= scale**2  # such an optimizer removes the loss scale only when it steps
        if scheduler is not None and scheduler.corrected:  # undo the scheduler's correction of the gradients
            sq_norm /= scheduler.corrected**2
        if trainer.world_size > 1:  # the same numbers on every process, to the last bit
            sums = torch.tensor([*pieces, sq_norm / trainer.world_size], dtype=torch.float64)
            sums = cast(Tensor, trainer.strategy.reduce(sums.to(trainer.strategy.root_device), reduce_op="sum"))
            *values, sq_norm = sums.tolist()
            pieces = Pieces(*values)
        if pieces.number > 1:
            if self._is_due(trainer):
                self._record(pieces.estimate(sq_norm))
        elif pieces.number == 1 and self.probe.ready and self._probe_is_due(trainer):
            examples = step.pieces[0][0].examples
            values = self.probe.measure(trainer, pl_module, step.number, examples, step.batch_idx)
            if values:
                self._measurements, self._measured = [(step.number, value) for value in values], None
        step.forget()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the measurements."""
        if batch is None and scheduler_of(trainer) is None:  # Lightning does not clear the gradients at a batch that is None
            self._step.forget()
            self._left_out = logged_at(trainer)
        if self._stepped and writes_step(trainer):
            self._log(pl_module, on_step=True, on_epoch=False)
        self._stepped = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the measurements together with the epoch's metrics."""
        self._log(pl_module, on_step=False, on_epoch=True, sync_dist=True)

    # --- parts

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether the current step is measured if it has several pieces."""
        # counted like `log_every_n_steps`, so logged values are new
        steps = logged_at(trainer)
        return (steps + 1) % self.every == 0 and steps != self._left_out

    def _probe_is_due(self, trainer: Trainer) -> bool:
        """Whether there is a probe if the current step has one piece."""
        steps, every = logged_at(trainer) + 1, self.probe_every
        return every is not None and (steps % every == 0 or steps == every // 2) and steps - 1 != self._left_out

    def _size(self, piece: MicroBatch) -> float:
        return piece.terms if self.per == "terms" else piece.examples

    def _micro_batch(self, trainer: Trainer, module: LightningModule) -> MicroBatch:
        """The current micro-batch."""
        scheduler, step = scheduler_of(trainer), self._step
        if scheduler is not None and scheduler.micro_batch is not None:
            return scheduler.micro_batch
        assert self._counts is not None
        examples = self._counts(step.batch_idx)
        terms = terms_or_examples(module, step.batch, examples)
        return MicroBatch(examples, 1 / trainer.accumulate_grad_batches, terms)

    def _record(self, estimate: NoiseEstimate) -> None:
        """Add the measurement of a step, and forget those that the window has left."""
        at = self._step.number
        if all(map(math.isfinite, estimate)):  # else the gradients overflowed
            kept = [(step, value) for step, value in self._measurements if step > at - self.window]
            self._measurements, self._measured = [*kept, (at, estimate)], None

    def _log(self, pl_module: LightningModule, **arguments: Any) -> None:
        for name, value in (logged_values(self.measured) if self.measured is not None else {}).items():
            pl_module.log(name, value, batch_size=1, **arguments)


def _may_split(trainer: Trainer) -> bool:
    """Whether steps may have several pieces."""
    scheduler = scheduler_of(trainer)
    if scheduler is None:
        return trainer.world_size > 1 or trainer.accumulate_grad_batches > 1
    if trainer.world_size > 1 or scheduler.max_device_batch_size is not None:
        return True
    cut = getattr(getattr(scheduler.training_loader, "batch_sampler", None), "cut", None)
    return not isinstance(cut, Cut) or cut.accumulate > 1 or cut.by_length


def _norm(gradient: Tensor) -> Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return cast(Tensor, torch.linalg.vector_norm(values.detach(), dtype=torch.promote_types(values.dtype, torch.float32)))


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")  # a DTensor, which each version of torch has in another place


def _refuse_sharded_gradient(gradient: Tensor) -> None:
    raise MisconfigurationException(
        "the loss uses a process's part of a parameter, outside forward passes or by tensor parallelism, so no process "
        f"computes the whole gradient of its own examples. {_WHERE_SEEN}"
    )


def _held_norm(gradient: Tensor) -> Tensor:
    """The norm of what this process holds. The mean of its square over the processes is the squared norm of the gradient."""
    if not _is_sharded(gradient):
        return _norm(gradient)
    sharded = cast(Any, gradient)
    parts = math.prod(sharded.device_mesh.size(i) for i, each in enumerate(sharded.placements) if each.is_shard())
    return _norm(sharded.to_local()) * math.sqrt(parts)  # other dimensions of the mesh hold copies


def _sq_sum(norms: Iterable[Tensor]) -> float:
    """The sum of the squares, copied from the device in one transfer."""
    flat = [norm.reshape(-1) for norm in norms]
    return torch.cat(flat).cpu().double().square().sum().item() if flat else 0.0
