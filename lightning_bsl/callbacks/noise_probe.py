"""The measurement of the gradient noise scale on examples that are drawn for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.memory import garbage_collection_cuda
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_bsl.callbacks.full_gradient import TrainingExamples, training_loss, undisturbed
from lightning_bsl.callbacks.loop import end_workers, to_device
from lightning_bsl.callbacks.loss_terms import terms_or_examples
from lightning_bsl.callbacks.micro_batches import is_out_of_memory
from lightning_bsl.data.datamodule import data_parallel
from lightning_bsl.data.sampler import epoch_generator
from lightning_bsl.schedules.checks import check_whole
from lightning_bsl.theory.noise_scale import NoiseEstimate, NoiseScale, jackknife

PIECES = 12  # fewer make the interval wider, more make each of them small, and small batches slow
LEAST_EXAMPLES = 144
BATCHES = 2  # a probe has as many examples as so many batches, since a noise scale above the batch size is to be seen


class ProbedPiece(NamedTuple):
    """One piece of a probe.

    Args:
        size: Its examples or terms.
        weight: Its terms, or its examples if the module does not count terms.
        examples: Its examples.
        sq_norm: Squared norm of the gradient of its mean loss.
        product: Inner product of this gradient with the sum of the gradients of all pieces, each times its weight.
        loss: Its mean loss.
    """

    size: float
    weight: float
    examples: int
    sq_norm: float
    product: float
    loss: float


class NoiseProbe:
    """Measures the gradient noise scale at the current weights, from the gradients of small pieces of random examples.

    The examples are drawn from those of the training loader without replacement. They depend on the step alone, so they are
    other ones each time, and the same ones in a resumed run. The probe uses training mode. It does not change the run.

    It computes the gradients of 12 pieces, or of one per process if there are more processes, and holds them in memory.

    Args:
        size: Least number of examples. With larger batches a probe has twice the examples of a batch, and never more
            than there are.
        per: The same as for [`GradientNoiseScale`][lightning_bsl.GradientNoiseScale].

    Attributes:
        loss: The mean loss of the last probe; NaN before.

    Raises:
        ValueError: ``size`` below 6.
    """

    def __init__(self, size: int = LEAST_EXAMPLES, per: Literal["examples", "terms"] = "examples") -> None:
        check_whole("probe_size", size, least=6, instead=", for three pieces of two examples")
        self.size, self.per = size, per
        self.loss = math.nan
        self._examples: TrainingExamples | None = None
        self._indices: Sequence[Any] = ()
        self._fitting = 0  # number of examples that fit in memory at once; 0 while everything fits

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Prepare the measurement. It is called in ``on_train_start``, on every process.

        Returns:
            The reason why no probe can be taken; ``None`` if it can.

        Raises:
            MisconfigurationException: Manual optimization.
        """
        self.end()
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "with manual optimization `training_step` trains the model, so it cannot measure the gradient noise scale of "
                "other examples: write a trigger that does not measure it"
            )
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            return "`training_step(dataloader_iter)` fetches its batches itself"
        examples = TrainingExamples(trainer)
        if examples.obstacle is not None:
            return examples.obstacle
        indices = examples.indices(distinct=False)
        if len(indices) < 6:
            return f"there are only {len(indices)} training examples"
        self._examples, self._indices = examples, indices
        return None

    def end(self) -> None:
        """Forget the training loader."""
        self._examples, self._indices, self._fitting, self.loss = None, (), 0, math.nan

    @property
    def ready(self) -> bool:
        """Whether probes can be taken."""
        return self._examples is not None

    def measure(
        self, trainer: Trainer, module: LightningModule, step: int, batch_size: int, batch_idx: int = 0
    ) -> list[NoiseEstimate]:
        """Measure now. Every process must call it.

        Args:
            trainer: The Trainer, in a fit.
            module: Its LightningModule.
            step: The optimizer step, which the choice of the examples depends on.
            batch_size: Examples of a step.
            batch_idx: The index that ``training_step`` gets.

        Returns:
            The pseudo-values of [`jackknife`][lightning_bsl.theory.jackknife]; none if there were fewer than three pieces with
            finite gradients, or if they did not fit in memory.
        """
        rank, world_size = data_parallel(trainer)
        least = 2 if any(isinstance(layer, _BatchNorm) for layer in module.modules()) else 1
        number = min(max(self.size, BATCHES * batch_size), len(self._indices))
        each = max(1, min(-(-PIECES // world_size), number // (least * world_size)))  # pieces of a process
        size = number // (each * world_size)
        if size < least or each * world_size < 3:
            return []
        entropy = np.random.SeedSequence([step, 4])
        chosen = np.random.default_rng(entropy).choice(len(self._indices), each * world_size * size, replace=False)
        mine = chosen.reshape(world_size, each, size)[rank].tolist()
        pieces = self._fitted(trainer, module, mine, least, (step, batch_idx))
        if pieces is None:
            return []
        if world_size > 1:
            parts: list[Any] = [None] * world_size
            torch.distributed.all_gather_object(parts, pieces)
            pieces = list(chain.from_iterable(parts))
        finite = all(math.isfinite(value) for piece in pieces for value in piece[:5])
        if len(pieces) < 3 or not finite:  # else the gradients overflowed
            return []
        weight, examples = (sum(getattr(piece, name) for piece in pieces) for name in ("weight", "examples"))
        self.loss = sum(piece.weight * piece.loss for piece in pieces) / weight
        sizes = [piece.size for piece in pieces]
        return jackknife(
            sizes,
            [piece.weight for piece in pieces],
            [piece.sq_norm for piece in pieces],
            [piece.product for piece in pieces],
            population=len(self._indices) * sum(sizes) / examples,
        )

    def _fitted(
        self, trainer: Trainer, module: LightningModule, pieces: list[list[int]], least: int, at: tuple[int, int]
    ) -> list[ProbedPiece] | None:
        """Measure the pieces of this process, with fewer examples at once each time that memory runs out on any process."""
        size = min(self._fitting or len(pieces[0]), len(pieces[0]))
        gradients: list[tuple[ProbedPiece, list[Tensor | None]]] = []
        while True:
            try:
                gradients, fits = list(self._gradients(trainer, module, pieces, size, at)), True
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                fits = False
            if not fits:
                gradients = []
                garbage_collection_cuda()  # after the `except` block: the error kept the frames, and so their tensors, alive
            if trainer.strategy.reduce_boolean_decision(fits):
                return _with_products(trainer, module, gradients)
            if size == 1 or least > 1:  # BatchNorm would have other statistics in smaller parts
                rank_zero_warn(
                    "out of memory: a measurement of the gradient noise scale is left out; it holds the gradients of "
                    f"{len(pieces)} pieces. Measure from micro-batches instead: `GradientNoiseScale(probe_every=None)`"
                )
                return None
            size = self._fitting = -(-size // 2)

    def _gradients(
        self, trainer: Trainer, module: LightningModule, pieces: list[list[int]], size: int, at: tuple[int, int]
    ) -> Iterator[tuple[ProbedPiece, list[Tensor | None]]]:
        """The gradients of the pieces that have terms, with ``size`` examples at once."""
        assert self._examples is not None
        step, batch_idx = at
        parameters, scale = trained_parameters(trainer.optimizers[0]), loss_scale(trainer)
        parts = [[self._indices[i] for i in piece[a : a + size]] for piece in pieces for a in range(0, len(piece), size)]
        owners = [k for k, piece in enumerate(pieces) for _ in range(0, len(piece), size)]
        loader = self._examples.loader(parts, epoch_generator(0, step, stream=5))
        # run a compiled model uncompiled: a compilation for one more size would change the rounding of all later steps
        stance = getattr(torch.compiler, "set_stance", None)
        total: list[Tensor | None] = []
        weight = examples = loss_sum = 0.0
        with undisturbed(trainer, module, evaluation=False), stance("force_eager") if stance else nullcontext():
            try:
                for batch, part, owner, following in zip(loader, parts, owners, [*owners[1:], -1]):
                    batch = self._examples.named(to_device(trainer, batch))
                    terms = terms_or_examples(module, batch, len(part))
                    loss = None
                    if terms:
                        with trainer.precision_plugin.train_step_context():
                            loss = training_loss(module, batch, batch_idx)
                    if loss is not None:
                        gradient = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
                        total = _added(total, gradient, terms, alone=len(part) == len(pieces[owner]))
                        weight, examples = weight + terms, examples + len(part)
                        loss_sum += terms * loss.item()
                    if following != owner:
                        if weight:
                            divisor = scale * (1 if len(part) == len(pieces[owner]) else weight)
                            mean = [g if g is None or divisor == 1 else g / divisor for g in total]
                            number = weight if self.per == "terms" else examples
                            yield ProbedPiece(number, weight, int(examples), 0.0, 0.0, loss_sum / weight), mean
                        total, weight, examples, loss_sum = [], 0.0, 0.0, 0.0
            finally:
                end_workers(loader)


def _added(total: list[Tensor | None], gradient: Sequence[Tensor | None], terms: float, alone: bool) -> list[Tensor | None]:
    """Add a gradient times its terms; or return it as it is, if it is ``alone`` that of the piece."""
    dense = [None if g is None else (g.to_dense() if g.is_sparse else g) for g in gradient]
    full = [None if g is None else g.to(torch.promote_types(g.dtype, torch.float32)) for g in dense]
    if alone:
        return full
    scaled = [None if g is None else g * terms for g in full]
    return [b if a is None else a if b is None else a + b for a, b in zip(total, scaled)] if total else scaled


def _with_products(
    trainer: Trainer, module: LightningModule, gradients: list[tuple[ProbedPiece, list[Tensor | None]]]
) -> list[ProbedPiece]:
    """Add the squared norms of the pieces' gradients, and their products with the sum over all processes."""
    parameters = trained_parameters(trainer.optimizers[0])
    several = data_parallel(trainer)[1] > 1
    sums: list[Tensor] = []
    for i, parameter in enumerate(parameters):
        rows = [gradient[i] for _, gradient in gradients]
        if not several and all(row is None for row in rows):
            continue
        kind = torch.promote_types(parameter.dtype, torch.float32)
        zeros = torch.zeros(parameter.numel(), dtype=kind, device=parameter.device)
        stacked = torch.stack([zeros if row is None else row.flatten() for row in rows] or [zeros])
        weights = torch.tensor([piece.weight for piece, _ in gradients] or [0.0], dtype=kind, device=parameter.device)
        whole = weights @ stacked
        if several:
            torch.distributed.all_reduce(whole)
        sums.append(torch.stack([stacked.square().sum(dim=1), stacked @ whole]))
    if not gradients:
        return []
    sq_norms, products = torch.stack([total.cpu().double() for total in sums]).sum(dim=0).tolist()
    return [
        piece._replace(sq_norm=sq_norm, product=product) for (piece, _), sq_norm, product in zip(gradients, sq_norms, products)
    ]


def logged_values(noise: NoiseScale) -> dict[str, float]:
    """The values that are logged of a measurement, by name."""
    return {
        "gradient_noise_scale": noise.value,
        "gradient_noise_scale_low": noise.low,
        "gradient_noise_scale_high": noise.high,
        "gradient_sq_norm": noise.sq_norm,
        "gradient_variance": noise.variance,
    }


def trained_parameters(optimizer: Optimizer) -> list[Tensor]:
    """The parameters that an optimizer trains."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.requires_grad]


def loss_scale(trainer: Trainer) -> float:
    """The factor by which mixed precision scales the loss."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0
