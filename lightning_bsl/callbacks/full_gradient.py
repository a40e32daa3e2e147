"""The measurement of the full gradient: that of the mean loss over the whole training set."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from tqdm import tqdm

from lightning_bsl.callbacks.batch_lr import BatchLRScheduler
from lightning_bsl.callbacks.compatibility import refuse_sharded
from lightning_bsl.callbacks.loaders import as_combined
from lightning_bsl.callbacks.loop import end_workers, to_device
from lightning_bsl.callbacks.loss_terms import terms_or_examples
from lightning_bsl.callbacks.micro_batches import cut, halved_to_fit
from lightning_bsl.callbacks.snapshot import Snapshot
from lightning_bsl.data.datamodule import data_parallel
from lightning_bsl.data.orders import SamplerOrder, order_of
from lightning_bsl.data.sampler import GlobalBatchSampler, Permutation, epoch_generator, share_of
from lightning_bsl.data.whole_batches import BatchOrder
from lightning_bsl.schedules.checks import check_whole


class FullGradient(NamedTuple):
    """One measurement of the full gradient.

    Args:
        norm: Euclidean norm of the gradient of the mean loss, over all trainable parameters; NaN if the loss has no terms.
        loss: The mean loss; NaN if it has no terms.

    Example:
        >>> FullGradient(norm=0.5, loss=1.25).norm
        0.5
    """

    norm: float
    loss: float


class TrainingExamples:
    """The examples of the training loader, for a measurement that reads them with a loader of its own.

    Args:
        trainer: The Trainer, from ``on_train_start`` on.
        seed: Seed of the random numbers that a sampler draws.
        whole: Whether the module has a loss of its own for the measurement, which takes a batch of the loader alone.

    Attributes:
        obstacle: The reason why the examples cannot be read; ``None`` if they can.
        unreadable: Whether the reason is the loader itself, not its place among others.
    """

    def __init__(self, trainer: Trainer, seed: int = 0, whole: bool = False) -> None:
        self.seed = seed
        self._trainer = trainer
        combined = as_combined(trainer.train_dataloader)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        schedulers = (callback for callback in callbacks if isinstance(callback, BatchLRScheduler))
        scheduled = next((scheduler.training_loader for scheduler in schedulers), None)
        flat = [getattr(loader, "original", loader) for loader in combined.flattened]  # a CountingLoader wraps the original
        self._loader: Any = scheduled if scheduled is not None else flat[0] if flat else None
        in_collection = combined.iterables is not combined.flattened[0] if flat else False
        self._names: Any = combined.iterables if in_collection and not whole else None
        values = self._names.values() if isinstance(self._names, Mapping) else self._names or ()
        nested = self._names is not None and [id(item) for item in values] != [id(item) for item in combined.flattened]
        loader, self.obstacle, self.unreadable = self._loader, None, False
        if len(flat) != 1 and not whole:
            self.obstacle = f"there are {len(flat)} training loaders, so the mean loss over the training set is not defined"
        elif nested:
            self.obstacle = "the training loader is in a collection inside a collection"
        elif not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
            self.unreadable = True
            self.obstacle = (
                "it needs a training DataLoader over a data set that has a length (`__len__` and `__getitem__`), and which "
                "makes batches of examples (`batch_size` is not None)"
            )

    def loader(self, batches: Sequence[Sequence[Any]], generator: torch.Generator, persistent: bool = False) -> DataLoader[Any]:
        """A loader of these batches of examples, otherwise like the training loader.

        Args:
            batches: The indices of each batch.
            generator: Seeds the workers.
            persistent: Whether the workers stay between two passes.
        """
        loader = self._loader
        if getattr(loader.dataset, "takes_tensors", False):
            batches = [torch.tensor(batch) for batch in batches]  # type: ignore[misc]
        return DataLoader(
            loader.dataset,
            batch_sampler=cast(Any, batches),
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            persistent_workers=persistent and loader.num_workers > 0,
            pin_memory=loader.pin_memory,
            generator=generator,
        )

    def named(self, batch: Any) -> Any:
        """The batch in the collection that ``training_step`` expects."""
        if self._names is None:
            return batch
        return dict.fromkeys(self._names, batch) if isinstance(self._names, Mapping) else type(self._names)([batch])

    def indices(self, distinct: bool = True) -> Sequence[Any]:
        """The examples that the loader trains on.

        Args:
            distinct: Whether each counts once. Else as often as the sampler gives it in its first epoch.
        """
        trainer, loader = self._trainer, self._loader
        batches: Any = loader.batch_sampler
        if type(batches) is BatchSampler or isinstance(batches, GlobalBatchSampler):
            order = order_of(loader, self.seed, world_size=data_parallel(trainer)[1])
            if isinstance(order, Permutation):
                return range(order.num_examples)
        # iterate over a copy: the user's sampler may count its iterations
        planned = cast(SamplerOrder, batches.order) if isinstance(batches, GlobalBatchSampler) else None
        sampler = batches.sampler if type(batches) is BatchSampler else batches
        sampler = copy.deepcopy(sampler if planned is None else planned.sampler, {id(loader.dataset): loader.dataset})
        of_batches = type(batches) is not BatchSampler if planned is None else isinstance(planned, BatchOrder)
        kind = BatchOrder if of_batches else SamplerOrder
        indices: list[Any] = kind(sampler, self.seed if planned is None else planned.seed)(0)
        if planned is None and data_parallel(trainer)[1] > 1:  # the sampler of a process gives only its own part
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, indices)
            indices = [index for part in parts for index in part]
        if not distinct:
            return indices
        indices = list(dict.fromkeys(indices))
        return sorted(indices) if all(isinstance(index, int) for index in indices) else indices


class FullGradientMeasurer:
    """Measures the gradient of the mean loss over the examples of a training loader.

    Each example of the loader's sampler counts once: all examples of a permutation, or those of the first epoch of a sampler
    that draws (weighted, a subset). The mean is over examples, or over the terms that the module's ``loss_terms`` counts.

    Args:
        subset: Number of random examples, the same ones every time; by default all.
        batch_size: Number of examples at once, on each process; it is halved if they do not fit in memory.
        seed: Seed of the choice of the subset, and of the random numbers that a sampler draws.

    Raises:
        ValueError: ``subset`` or ``batch_size`` below 1.
    """

    def __init__(self, subset: int | None = None, batch_size: int = 1024, seed: int = 0) -> None:
        for name, value in (("subset", 1 if subset is None else subset), ("batch_size", batch_size)):
            check_whole(name, value)
        self.subset, self.batch_size, self.seed = subset, batch_size, seed
        self.loader: DataLoader[Any] | None = None
        self._fitting = batch_size  # number of examples that fit in memory at once
        self._examples: TrainingExamples | None = None

    def refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse fits that cannot be measured, as far as ``on_fit_start`` can see them.

        Raises:
            MisconfigurationException: Sharded parameters, or manual optimization without ``full_loss``.
        """
        refuse_sharded(trainer, "FullGradientNorm", "parameters")
        if not pl_module.automatic_optimization and not hasattr(pl_module, "full_loss"):
            raise MisconfigurationException(
                "with manual optimization `training_step` takes optimizer steps, so FullGradientNorm cannot call it: give "
                f"{type(pl_module).__name__} a method `full_loss(batch)` that returns the mean loss"
            )

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the loader of the measurement. It is called in ``on_train_start``.

        Raises:
            ValueError: A subset larger than the training set.
            MisconfigurationException: A training loader that cannot be measured.
        """
        self.refuse(trainer, pl_module)
        own = hasattr(pl_module, "full_loss")
        examples = self._examples = TrainingExamples(trainer, self.seed, whole=own)
        if examples.obstacle is not None:
            remedy = "give such a loader, or leave it out"
            if not examples.unreadable:
                remedy = (
                    f"give {type(pl_module).__name__} a method `full_loss(batch)` that returns the mean loss; its batches are "
                    "those of the scheduled loader (or of the first one, without BatchLRScheduler)"
                )
            raise MisconfigurationException(f"FullGradientNorm cannot measure the full gradient: {examples.obstacle}; {remedy}")
        indices = examples.indices()
        if self.subset is not None:
            number = len(indices)
            if self.subset > number:
                raise ValueError(
                    f"`subset={self.subset}` is more than the {number} training examples: write {number} or less, or leave "
                    "it out"
                )
            chosen = torch.randperm(number, generator=epoch_generator(self.seed, 0, stream=2))[: self.subset]
            indices = [indices[i] for i in chosen.sort().values.tolist()]
        share = indices[share_of(len(indices), *data_parallel(trainer))]
        batches = [share[start : start + self.batch_size] for start in range(0, len(share), self.batch_size)]
        # its own generator: a new iterator must not draw from the global one
        self.loader = examples.loader(batches, torch.Generator(), persistent=True)

    def end(self) -> None:
        """End the loader's workers: left to the garbage collector, each of them takes five seconds."""
        if self.loader is not None:
            end_workers(self.loader)
        self.loader = None

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> FullGradient:
        """Measure now. Every process must call it.

        Args:
            trainer: The Trainer, in a fit.
            pl_module: Its LightningModule.
        """
        parameters = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        totals = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        loss_total = torch.zeros((), dtype=totals[0].dtype, device=pl_module.device)
        number = 0.0
        with undisturbed(trainer, pl_module):
            for batch, count in self._batches(trainer):
                number += self._add(pl_module, batch, count, parameters, totals, loss_total)
        if data_parallel(trainer)[1] > 1:
            # as two numbers, since Apple GPUs have no float64
            numbers = torch.tensor(divmod(number, 2**20), dtype=loss_total.dtype, device=loss_total.device)
            for total in (*totals, loss_total, numbers):
                torch.distributed.all_reduce(total)
            high, low = numbers.tolist()
            number = high * 2**20 + low
        norm = torch.linalg.vector_norm(torch.stack([norm.cpu().double() for norm in torch._foreach_norm(totals)]))
        if not number:
            return FullGradient(math.nan, math.nan)  # no terms
        return FullGradient(norm.item() / number, loss_total.item() / number)

    def _add(
        self, module: LightningModule, batch: Any, count: int, parameters: Sequence[Tensor], totals: list[Tensor], loss: Tensor
    ) -> float:
        """Add a batch's loss and gradients, both times its number of terms; return this number."""
        mean_loss = getattr(module, "full_loss", None) or partial(training_loss, module)
        done, added = 0, 0.0

        def add(size: int) -> None:
            nonlocal done, added
            while done < count:
                examples = min(size, count - done)
                part = batch if examples == count else cut(batch, done, examples, count)
                terms = terms_or_examples(module, part, examples)
                if terms:  # without terms the loss may be NaN
                    part_loss = mean_loss(part)
                    gradients = torch.autograd.grad(part_loss, parameters, allow_unused=True)
                    pairs = [(total, gradient) for total, gradient in zip(totals, gradients) if gradient is not None]
                    parts = [gradient.to(total.dtype) for total, gradient in pairs]
                    torch._foreach_add_([total for total, _ in pairs], parts, alpha=terms)
                    loss.add_(part_loss.detach() * terms)
                done, added = done + examples, added + terms

        size = min(count, self._fitting)
        fitted, _ = halved_to_fit(size, add)
        if fitted < size:
            self._fitting = fitted
        return added

    def _batches(self, trainer: Trainer) -> Iterator[tuple[Any, int]]:
        """This process's batches, on its device, each with its number of examples."""
        assert self.loader is not None and self._examples is not None
        silent = trainer.progress_bar_callback is None or not trainer.is_global_zero
        sampler = cast("list[list[int]]", self.loader.batch_sampler)
        for batch, indices in zip(tqdm(self.loader, "full gradient", len(sampler), leave=False, disable=silent), sampler):
            yield to_device(trainer, self._examples.named(batch)), len(indices)


@contextmanager
def undisturbed(trainer: Trainer, module: LightningModule, evaluation: bool = True) -> Iterator[None]:
    """A context for a measurement: nothing is logged, and at the end everything is as before.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        evaluation: Whether to use evaluation mode.
    """
    before, modes = Snapshot(trainer), [(layer, layer.training) for layer in module.modules()]
    quiet = {"log": _log_nothing, "log_dict": _log_nothing}
    stage = trainer.state.stage
    try:
        vars(module).update(quiet)
        if evaluation:
            module.eval()
            trainer.validating = True  # DataModules read it to decide whether to augment
        with torch.enable_grad():
            yield
    finally:
        trainer.state.stage = stage
        for name in quiet:
            del vars(module)[name]
        for layer, training in modes:
            layer.training = training
        before.restore()


def training_loss(module: LightningModule, batch: Any, batch_idx: int = 0) -> Tensor:
    """The loss of a batch, as ``training_step`` returns it."""
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    output = module.training_step(batch, batch_idx) if takes_index else module.training_step(batch)
    return cast(Tensor, output["loss"] if isinstance(output, Mapping) else output)


def _log_nothing(*_: Any, **__: Any) -> None:
    """Replace ``log``."""
