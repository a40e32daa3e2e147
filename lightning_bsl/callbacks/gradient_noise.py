"""The gradient noise scale, from what training computes anyway."""

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
from lightning_bsl.theory.noise_scale import Estimate, MovingAverage, Pieces, estimate


class _StepGradients:
    """The gradients of the step that is measured, piece by piece.

    Attributes:
        hooks: On the parameters, while a step is measured.
        batch: The piece under way.
        batch_idx: Its index in the epoch.
        norms: Of the parameters' gradients in the backward pass under way.
        pieces: Each piece so far, and the norms of its gradients.
    """

    def __init__(self) -> None:
        self.hooks: list[RemovableHandle] = []
        self.batch: Any = None
        self.batch_idx = 0
        self.norms: list[Tensor] = []
        self.pieces: list[tuple[MicroBatch, Tensor]] = []

    def watch(self, parameters: list[Tensor]) -> None:
        """Note the gradient of each backward pass, before it is added to others or averaged over processes."""
        self.hooks = [each.register_hook(lambda gradient: self.norms.append(_norm(gradient))) for each in parameters]

    def stop(self) -> None:
        """Take the hooks off."""
        for hook in self.hooks:
            hook.remove()

    def forget(self) -> None:
        """There is no step that is measured."""
        self.stop()
        self.hooks, self.batch = [], None
        self.norms.clear()
        self.pieces.clear()


class GradientNoiseScale(Callback):
    """Measures the gradient noise scale ``B_simple = tr(Sigma) / |G|^2``: far below that batch size gradients are mostly noise.

    G is the mean gradient of an example and Sigma the examples' covariance (McCandlish et al., *An Empirical Model of
    Large-Batch Training*, arXiv 1812.06162). Both follow from the gradients' norms at two batch sizes. Where a step consists
    of micro-batches, or of the shares of several processes, these are the pieces and the whole: measuring costs the norms of
    gradients that are there anyway. Elsewhere the gradient over half of the step's batch is computed too. That costs half a
    step more, so it is done at every 50th step only, 1% of the time; the model is in training mode for it, and
    ``training_step`` is called with its logging suppressed. Training goes on bit for bit as if nothing had been measured.

    What is measured is the gradient that ``training_step`` gives, before clipping. A batch size is a number of examples; or,
    with ``per="terms"``, of what the LightningModule's ``loss_terms(batch)`` counts, such as tokens: then Sigma is the
    covariance of the gradients of single terms. ``per="examples"`` takes the gradient of a piece of n examples to have the
    covariance Sigma/n whatever terms they have, which is so for pieces of one example, and for examples with equal terms.
    With BatchNorm a piece is normalised by its own examples, which the noise scale of the pieces then includes.

    Logs ``gradient_noise_scale``, ``gradient_sq_norm`` and ``gradient_variance``, moving averages, every
    ``log_every_n_steps`` of the Trainer and at the end of an epoch. The first is NaN while an average is not above 0: a
    single step's estimates scatter around the true values, below 0 too.

    Args:
        every: Steps from one measurement to the next where the step is in pieces.
        extra_every: Steps from one pass over half a batch to the next where it is not; ``None`` for no such passes.
        smoothing: Weight of the past in the averages, from one measurement to the next.
        per: What a batch size is a number of: ``"examples"`` or ``"terms"``.

    Raises:
        ValueError: ``every`` or ``extra_every`` below 1, ``smoothing`` not between 0 and 1, an unknown ``per``.
        MisconfigurationException: At fit start: sharded parameters, manual optimization, or terms that nobody counts. While
            training: a batch that has to be halved or counted and cannot be.

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
            raise ValueError(f"`smoothing={smoothing}` must lie between 0 and 1")
        if per not in ("examples", "terms"):
            raise ValueError(f"unknown `per={per!r}`; write 'examples' or 'terms'")
        self.every = every
        self.extra_every = extra_every
        self.per = per
        self.smoothing = smoothing
        self._sq_norm, self._variance = MovingAverage(smoothing), MovingAverage(smoothing)
        self._fitting = True  # not validating or testing
        self._step = _StepGradients()
        self._stepped = False
        self._left_out = -1  # a step that is not measured: Lightning adds to the gradients of the one before
        self._counts: Callable[[int], int] | None = None  # the examples of a batch, where no scheduler knows them

    @property
    def gradient_sq_norm(self) -> float | None:
        """The average of ``|G|^2``, ``None`` before the first measurement."""
        return self._sq_norm.value

    @property
    def gradient_variance(self) -> float | None:
        """The average of ``tr(Sigma)``, ``None`` before the first measurement."""
        return self._variance.value

    @property
    def noise_scale(self) -> float | None:
        """The ratio of the averages, in examples or in terms; ``None`` while they are not both above 0."""
        variance, sq_norm = self.gradient_variance or 0.0, self.gradient_sq_norm or 0.0
        return variance / sq_norm if variance > 0 and sq_norm > 0 and variance / sq_norm < math.inf else None

    # --- start and end of a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew with a new run."""
        self._fitting = stage == "fit"
        if self._fitting and trainer.global_step == 0:
            self._sq_norm, self._variance = MovingAverage(self.smoothing), MovingAverage(self.smoothing)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be measured."""
        refuse_sharded(trainer, type(self).__name__, "gradients")
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "with manual optimization GradientNoiseScale cannot see which backward passes make up a step; leave it out"
            )
        if self.per == "terms" and not has_loss_terms(pl_module):
            raise MisconfigurationException(
                f"`per='terms'`, but {type(pl_module).__name__} does not say what its loss is a mean over: give it a method "
                "`loss_terms(batch)` that returns how many terms, such as tokens, or write `per='examples'`"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See who knows how many examples a batch has."""
        self._counts = None if _scheduler(trainer) is not None else batch_counts(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The averages, as plain floats."""
        averages = {"sq_norm": self._sq_norm, "variance": self._variance}
        return {name: {"total": each.total, "weight": each.weight} for name, each in averages.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the averages."""
        if self._fitting:
            for name, average in (("sq_norm", self._sq_norm), ("variance", self._variance)):
                average.total, average.weight = state_dict[name]["total"], state_dict[name]["weight"]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hooks on the parameters."""
        self._step.forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hooks on the parameters."""
        self._step.forget()

    # --- training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a step that the last epoch did not finish."""
        self._step.forget()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the gradients of this step, if it is one to measure."""
        if not self._step.hooks and (self._is_due(trainer, self.every) or self._is_due(trainer, self.extra_every)):
            self._step.watch(_parameters(trainer.optimizers[0]))
        if self._step.hooks:
            self._step.batch, self._step.batch_idx = batch, batch_idx

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Begin the step again: gradients so far were of one that ran out of memory."""
        self._step.pieces.clear()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Begin a piece."""
        self._step.norms.clear()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note a piece."""
        if self._step.hooks and self._step.norms:
            piece = self._micro_batch(trainer, pl_module)
            if piece.examples and piece.terms:  # else it adds nothing
                self._step.pieces.append((piece, torch.stack(self._step.norms)))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure: the gradients are whole, and not clipped yet."""
        self._stepped = True
        step, scheduler = self._step, _scheduler(trainer)
        if not step.hooks:
            return
        step.stop()
        scale = _loss_scale(trainer)
        pieces = Pieces()
        for piece, norms in step.pieces:
            weight = piece.weight
            if scheduler is not None and has_loss_terms(pl_module):  # what a term weighs may have changed in the step
                last = step.pieces[-1][0]
                weight = piece.terms * last.weight / last.terms
            sq_norm = _sq_sum([norms]) / (piece.weight * scale) ** 2
            pieces = pieces.plus(self._size(piece), weight / trainer.world_size, sq_norm)
        gradients = [each.grad for each in _parameters(optimizer) if each.grad is not None]
        sq_norm = _sq_sum(map(_norm, gradients))
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            sq_norm /= scale**2  # such an optimizer undoes the scale of the loss only as it steps
        if scheduler is not None and scheduler.corrected:  # what it made of the sum of the pieces' gradients
            sq_norm /= scheduler.corrected**2
        if trainer.world_size > 1:  # the same numbers everywhere, down to the last bit
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
        """Log."""
        if batch is None and _scheduler(trainer) is None:  # Lightning does not clear the gradients at such a batch
            self._step.forget()
            self._left_out = logged_at(trainer)
        if self._stepped and writes_step(trainer):
            self._log(pl_module, on_step=True, on_epoch=False)
        self._stepped = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log beside the epoch's metrics."""
        self._log(pl_module, on_step=False, on_epoch=True, sync_dist=True)

    # --- parts

    def _is_due(self, trainer: Trainer, every: int | None) -> bool:
        """Whether the step under way is one of every ``every``; so the value is new when the Trainer logs."""
        steps = logged_at(trainer)
        return every is not None and (steps + 1) % every == 0 and steps != self._left_out

    def _size(self, piece: MicroBatch) -> float:
        return piece.terms if self.per == "terms" else piece.examples

    def _micro_batch(self, trainer: Trainer, module: LightningModule) -> MicroBatch:
        """The micro-batch under way."""
        scheduler, step = _scheduler(trainer), self._step
        if scheduler is not None and scheduler.micro_batch is not None:
            return scheduler.micro_batch
        assert self._counts is not None
        examples = self._counts(step.batch_idx)
        terms = terms_or_examples(module, step.batch, examples)
        return MicroBatch(examples, 1 / trainer.accumulate_grad_batches, terms)

    def _measure_half(self, trainer: Trainer, module: LightningModule, piece: MicroBatch, sq_norm: float) -> None:
        """Compute the gradient over half of the batch, and compare it with the step's over all of it."""
        step, examples = self._step, piece.examples
        half = examples // 2
        if half < (2 if any(isinstance(each, _BatchNorm) for each in module.modules()) else 1):
            return
        try:
            part = cut(step.batch, 0, half, examples)
        except MisconfigurationException as error:
            raise MisconfigurationException(
                "GradientNoiseScale cannot halve the batch, which holds other things than tensors and lists whose first "
                f"dimension are its {examples} examples: write `extra_every=None`, and train in micro-batches or in several "
                "processes, or leave it out"
            ) from error
        half_piece = MicroBatch(half, 1.0, terms_or_examples(module, part, half))
        if not 0 < half_piece.terms < piece.terms:
            return  # one of the halves has nothing to train
        try:
            half_sq_norm = self._half_sq_norm(trainer, module, part)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            half_sq_norm = None
            rank_zero_warn("out of memory: GradientNoiseScale leaves out a measurement")
        if half_sq_norm is None:
            garbage_collection_cuda()
        else:
            self._record(estimate(half_sq_norm, self._size(half_piece), sq_norm, self._size(piece)))

    def _half_sq_norm(self, trainer: Trainer, module: LightningModule, part: Any) -> float | None:
        parameters, scale = _parameters(trainer.optimizers[0]), _loss_scale(trainer)
        # a compiled model is not: compiled once more for this size, its other sizes would round differently from then on
        stance = getattr(torch.compiler, "set_stance", None)
        with undisturbed(trainer, module, evaluation=False), stance("force_eager") if stance else nullcontext():
            with trainer.precision_plugin.train_step_context():
                loss = training_loss(module, part, self._step.batch_idx)
            if loss is None:
                return None
            gradients = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
        return _sq_sum(_norm(each) for each in gradients if each is not None) / scale**2

    def _record(self, values: Estimate) -> None:
        if all(map(math.isfinite, values)):  # else the gradients overflowed
            self._sq_norm.add(values.sq_norm)
            self._variance.add(values.variance)

    def _log(self, pl_module: LightningModule, **arguments: Any) -> None:
        if self.gradient_sq_norm is None or self.gradient_variance is None:
            return
        values = {
            # left out, Lightning would log the one before again
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
    return [each for group in optimizer.param_groups for each in group["params"] if each.requires_grad]


def _norm(gradient: Tensor) -> Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return cast(Tensor, torch.linalg.vector_norm(values.detach(), dtype=torch.promote_types(values.dtype, torch.float32)))


def _sq_sum(norms: Iterable[Tensor]) -> float:
    """The sum of the squares, read from the device at once."""
    found = [each.reshape(-1) for each in norms]
    return torch.cat(found).cpu().double().square().sum().item() if found else 0.0


def _loss_scale(trainer: Trainer) -> float:
    """What mixed precision multiplies the loss by."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0
