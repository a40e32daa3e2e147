"""A callback that measures the gradient noise scale, mostly from gradients that training computes anyway."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.memory import garbage_collection_cuda
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_bsl.callbacks.batch_lr import BatchLRScheduler
from lightning_bsl.callbacks.compatibility import refuse_sharded
from lightning_bsl.callbacks.full_gradient import training_loss, undisturbed
from lightning_bsl.callbacks.loaders import batch_counts
from lightning_bsl.callbacks.loop import logged_at, writes_step
from lightning_bsl.callbacks.loss_terms import has_loss_terms, terms_or_examples
from lightning_bsl.callbacks.micro_batches import MicroBatch, cut, is_out_of_memory
from lightning_bsl.theory.noise_scale import MovingAverage, NoiseEstimate, Pieces, estimate_noise


class _StepGradients:
    """The gradient norms of the step that is measured, for each piece (micro-batch).

    Attributes:
        hooks: The hooks on the parameters, while a step is measured.
        batch: The batch of the current piece.
        batch_idx: Index of this batch in the epoch.
        norms: Norms of the parameters' gradients in the current backward pass.
        pieces: The pieces so far, each with the norms of its gradients.
    """

    def __init__(self) -> None:
        self.hooks: list[RemovableHandle] = []
        self.batch: Any = None
        self.batch_idx = 0
        self.norms: list[Tensor] = []
        self.pieces: list[tuple[MicroBatch, Tensor]] = []

    def watch(self, parameters: list[Tensor]) -> None:
        """Record the gradient norms of each backward pass, before gradients are accumulated or averaged over processes."""
        self.hooks = [parameter.register_hook(lambda gradient: self.norms.append(_norm(gradient))) for parameter in parameters]

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


class GradientNoiseScale(Callback):
    """Measures the gradient noise scale ``B_simple = tr(Sigma) / |G|^2``. Gradients of much smaller batches are mostly noise.

    G is the mean gradient over the examples, and Sigma the covariance of the gradients of single examples (McCandlish et al.
    2018, *An Empirical Model of Large-Batch Training*, arXiv 1812.06162). Both follow from the gradient norms at two batch
    sizes. If a step has several micro-batches or processes, the two batch sizes are those of the pieces and of the whole step,
    and only norms must be computed. If not, the gradient over half of the batch is computed too. This costs half a step, so by
    default it is done at every 50th step, which takes 1% more time. It uses training mode, and ``training_step`` logs nothing
    during it. Training itself goes on bit for bit as without measurements.

    The callback measures the gradient of ``training_step``, before clipping. Batch sizes count examples. With ``per="terms"``
    they count the terms that the LightningModule's ``loss_terms(batch)`` returns, such as tokens; Sigma is then the covariance
    of the gradients of single terms. ``per="examples"`` assumes that the gradient of n examples has the covariance Sigma/n,
    which is right for pieces of one example and for examples with equal numbers of terms. With BatchNorm each piece is
    normalised by its own examples, and the noise scale includes the effect.

    The callback logs the moving averages ``gradient_noise_scale``, ``gradient_sq_norm`` and ``gradient_variance``, every
    ``log_every_n_steps`` of the Trainer and at the end of an epoch. The first is NaN while an average is not above 0: the
    estimates of a single step scatter around the true values, and may be below 0.

    Args:
        every: Steps between two measurements of steps with several pieces.
        extra_every: Steps between two computations of the gradient over half a batch, in steps of one piece; ``None`` for no
            such computations.
        smoothing: Weight of the past in the moving averages, between 0 and 1.
        per: What batch sizes count: ``"examples"`` or ``"terms"``.

    Raises:
        ValueError: ``every`` or ``extra_every`` below 1, ``smoothing`` not between 0 and 1, an unknown ``per``.
        MisconfigurationException: At the start of a fit: sharded parameters, manual optimization, ``per="terms"`` without a
            method ``loss_terms``, or a loader whose batches have an unknown number of examples. While training: a batch that
            cannot be halved.

    Example:
        >>> trainer = Trainer(max_epochs=9, callbacks=[GradientNoiseScale()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        every: int = 10,
        extra_every: int | None = 50,
        smoothing: float = 0.95,
        per: Literal["examples", "terms"] = "examples",
    ) -> None:
        for name, value in (("every", every), ("extra_every", extra_every)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}={value}` must be 1 or more")
        if not 0 < smoothing < 1:
            raise ValueError(f"`smoothing={smoothing}` must lie between 0 and 1: write the weight of the past, such as 0.95")
        if per not in ("examples", "terms"):
            raise ValueError(f"unknown `per={per!r}`; write 'examples' or 'terms'")
        self.every = every
        self.extra_every = extra_every
        self.per = per
        self.smoothing = smoothing
        self._sq_norm, self._variance = MovingAverage(smoothing), MovingAverage(smoothing)
        self._fitting = True  # False in validation and test, where checkpoints must not change the averages
        self._step = _StepGradients()
        self._stepped = False
        self._left_out = -1  # a step that is not measured, since its gradients add to those of the step before
        self._counts: Callable[[int], int] | None = None  # batch index -> examples, in a fit without BatchLRScheduler

    @property
    def gradient_sq_norm(self) -> float | None:
        """The moving average of ``|G|^2``; ``None`` before the first measurement."""
        return self._sq_norm.value

    @property
    def gradient_variance(self) -> float | None:
        """The moving average of ``tr(Sigma)``; ``None`` before the first measurement."""
        return self._variance.value

    @property
    def noise_scale(self) -> float | None:
        """The ratio of the two averages, in examples or in terms; ``None`` while they are not both above 0."""
        variance, sq_norm = self.gradient_variance or 0.0, self.gradient_sq_norm or 0.0
        return variance / sq_norm if variance > 0 and sq_norm > 0 and variance / sq_norm < math.inf else None

    # --- start and end of a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the averages if a new run begins."""
        self._fitting = stage == "fit"
        if self._fitting and trainer.global_step == 0:
            self._sq_norm, self._variance = MovingAverage(self.smoothing), MovingAverage(self.smoothing)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse fits that cannot be measured."""
        refuse_sharded(trainer, type(self).__name__, "gradients")
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
        """Find out how to count the examples of a batch."""
        self._counts = None if _scheduler(trainer) is not None else batch_counts(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The averages, as plain floats."""
        averages = {"sq_norm": self._sq_norm, "variance": self._variance}
        return {name: {"total": average.total, "weight": average.weight} for name, average in averages.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the averages."""
        if self._fitting:
            for name, average in (("sq_norm", self._sq_norm), ("variance", self._variance)):
                average.total, average.weight = state_dict[name]["total"], state_dict[name]["weight"]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks from the parameters."""
        self._step.forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks from the parameters."""
        self._step.forget()

    # --- training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop a step that the last epoch did not finish."""
        self._step.forget()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start to record gradient norms, if this step is to be measured."""
        if not self._step.hooks and (self._is_due(trainer, self.every) or self._is_due(trainer, self.extra_every)):
            self._step.watch(_parameters(trainer.optimizers[0]))
        if self._step.hooks:
            self._step.batch, self._step.batch_idx = batch, batch_idx

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
        step, scheduler = self._step, _scheduler(trainer)
        if not step.hooks:
            return
        step.stop()
        scale = _loss_scale(trainer)
        pieces = Pieces()
        for piece, norms in step.pieces:
            weight = piece.weight
            if scheduler is not None and has_loss_terms(pl_module):  # the weight of a term may have changed inside the step
                last = step.pieces[-1][0]
                weight = piece.terms * last.weight / last.terms
            sq_norm = _sq_sum([norms]) / (piece.weight * scale) ** 2
            pieces = pieces.plus(self._size(piece), weight / trainer.world_size, sq_norm)
        gradients = [parameter.grad for parameter in _parameters(optimizer) if parameter.grad is not None]
        sq_norm = _sq_sum(map(_norm, gradients))
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
            if self._is_due(trainer, self.every):
                self._record(pieces.estimate(sq_norm))
        elif pieces.number == 1 and trainer.world_size == 1 and self._is_due(trainer, self.extra_every):
            self._measure_half(trainer, pl_module, step.pieces[0][0], sq_norm / pieces.weight**2)
        step.forget()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the averages."""
        if batch is None and _scheduler(trainer) is None:  # Lightning does not clear the gradients at a batch that is None
            self._step.forget()
            self._left_out = logged_at(trainer)
        if self._stepped and writes_step(trainer):
            self._log(pl_module, on_step=True, on_epoch=False)
        self._stepped = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the averages together with the epoch's metrics."""
        self._log(pl_module, on_step=False, on_epoch=True, sync_dist=True)

    # --- parts

    def _is_due(self, trainer: Trainer, every: int | None) -> bool:
        """Whether the current step is one to measure; it is counted like ``log_every_n_steps``, so logged values are new."""
        steps = logged_at(trainer)
        return every is not None and (steps + 1) % every == 0 and steps != self._left_out

    def _size(self, piece: MicroBatch) -> float:
        return piece.terms if self.per == "terms" else piece.examples

    def _micro_batch(self, trainer: Trainer, module: LightningModule) -> MicroBatch:
        """The current micro-batch."""
        scheduler, step = _scheduler(trainer), self._step
        if scheduler is not None and scheduler.micro_batch is not None:
            return scheduler.micro_batch
        assert self._counts is not None
        examples = self._counts(step.batch_idx)
        terms = terms_or_examples(module, step.batch, examples)
        return MicroBatch(examples, 1 / trainer.accumulate_grad_batches, terms)

    def _measure_half(self, trainer: Trainer, module: LightningModule, piece: MicroBatch, sq_norm: float) -> None:
        """Compute the gradient over half of the batch, and compare its norm with that of the whole batch."""
        step, examples = self._step, piece.examples
        half = examples // 2
        if half < (2 if any(isinstance(layer, _BatchNorm) for layer in module.modules()) else 1):
            return
        try:
            part = cut(step.batch, 0, half, examples)
        except MisconfigurationException as error:
            raise MisconfigurationException(
                "GradientNoiseScale cannot halve the batch: not all of its tensors and lists have its "
                f"{examples} examples as first dimension. Write `extra_every=None`, and train in micro-batches or in several "
                "processes; or leave the callback out"
            ) from error
        half_piece = MicroBatch(half, 1.0, terms_or_examples(module, part, half))
        if not 0 < half_piece.terms < piece.terms:
            return  # one of the halves has no terms
        try:
            half_sq_norm = self._half_sq_norm(trainer, module, part)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            half_sq_norm = None
            rank_zero_warn(
                "out of memory: GradientNoiseScale leaves out a measurement; with `extra_every=None` it computes no gradients "
                "of its own"
            )
        if half_sq_norm is None:
            garbage_collection_cuda()
        else:
            self._record(estimate_noise(half_sq_norm, self._size(half_piece), sq_norm, self._size(piece)))

    def _half_sq_norm(self, trainer: Trainer, module: LightningModule, part: Any) -> float | None:
        parameters, scale = _parameters(trainer.optimizers[0]), _loss_scale(trainer)
        # run a compiled model uncompiled: a compilation for one more size would change the rounding of all later steps
        stance = getattr(torch.compiler, "set_stance", None)
        with undisturbed(trainer, module, evaluation=False), stance("force_eager") if stance else nullcontext():
            with trainer.precision_plugin.train_step_context():
                loss = training_loss(module, part, self._step.batch_idx)
            if loss is None:
                return None
            gradients = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
        return _sq_sum(_norm(gradient) for gradient in gradients if gradient is not None) / scale**2

    def _record(self, estimate: NoiseEstimate) -> None:
        if all(map(math.isfinite, estimate)):  # else the gradients overflowed
            self._sq_norm.add(estimate.sq_norm)
            self._variance.add(estimate.variance)

    def _log(self, pl_module: LightningModule, **arguments: Any) -> None:
        if self.gradient_sq_norm is None or self.gradient_variance is None:
            return
        values = {
            # NaN, since without a value Lightning would log the previous one again
            "gradient_noise_scale": math.nan if self.noise_scale is None else self.noise_scale,
            "gradient_sq_norm": self.gradient_sq_norm,
            "gradient_variance": self.gradient_variance,
        }
        for name, value in values.items():
            pl_module.log(name, value, batch_size=1, **arguments)


def _scheduler(trainer: Trainer) -> BatchLRScheduler | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, BatchLRScheduler)), None)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.requires_grad]


def _norm(gradient: Tensor) -> Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return cast(Tensor, torch.linalg.vector_norm(values.detach(), dtype=torch.promote_types(values.dtype, torch.float32)))


def _sq_sum(norms: Iterable[Tensor]) -> float:
    """The sum of the squares, copied from the device in one transfer."""
    flat = [norm.reshape(-1) for norm in norms]
    return torch.cat(flat).cpu().double().square().sum().item() if flat else 0.0


def _loss_scale(trainer: Trainer) -> float:
    """The factor by which mixed precision scales the loss."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0
