"""The gradient of the mean loss over the whole training set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.memory import garbage_collection_cuda
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from lightning_bsl.callbacks.ceiling import cut, is_out_of_memory
from lightning_bsl.callbacks.loop import to_device
from lightning_bsl.callbacks.refusals import refuse_sharded
from lightning_bsl.callbacks.state import StepState
from lightning_bsl.data.datamodule import data_parallel
from lightning_bsl.data.sampler import epoch_generator, share_of
from lightning_bsl.schedules.progress import Unit


class FullGradient(NamedTuple):
    """One measurement.

    Args:
        norm: Euclidean norm of the gradient of the mean loss, over all trainable parameters.
        loss: The mean loss.
    """

    norm: float
    loss: float


class FullGradientNorm(Callback):
    """Measures ||grad f||, f being the mean loss over the training set: what P1 to P3 judge schedules by.

    The model is in evaluation mode (no dropout, BatchNorm by its running statistics), images are not augmented, every example
    counts alike, and the processes share the work. The value therefore does not depend on the batch size of the measurement
    but for rounding. Training goes on bit for bit as if nothing had been measured. One measurement costs a forward and a
    backward pass over the data, at the full precision of the weights.

    The loss is what ``training_step`` returns, its logging suppressed; or, if the LightningModule has such a method,
    ``full_loss(batch)``: the mean loss of a batch.

    Logs ``full_gradient_norm`` and ``full_loss``, at the end of every ``every``-th epoch or after every ``every``-th step.

    Args:
        every: How often, in units.
        unit: ``"epoch"`` or ``"step"`` (optimizer steps).
        subset: Only that many random examples, the same ones every time; all by default.
        batch_size: Examples at once, on each process; halved where they do not fit in memory.
        seed: Seed of the choice of the subset.

    Raises:
        ValueError: A number below 1 or another unit; at fit start, a subset larger than the training set.
        MisconfigurationException: At fit start: a training set without a length, sharded parameters, or manual optimization
            without ``full_loss``.

    Example:
        >>> trainer = Trainer(max_epochs=9, callbacks=[FullGradientNorm(every=3)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self, every: int = 1, unit: Unit = "epoch", subset: int | None = None, batch_size: int = 1024, seed: int = 0
    ) -> None:
        for name, value in (("every", every), ("subset", 1 if subset is None else subset), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{name}={value}` must be 1 or more")
        if unit not in ("epoch", "step"):
            raise ValueError(f"unknown unit {unit!r}; write 'epoch' or 'step'")
        self.every = every
        self.unit = unit
        self.subset = subset
        self.batch_size = batch_size
        self.seed = seed
        self._measured_at = 0  # the step of the last measurement
        self._fitting = batch_size  # examples that fit in memory at once
        self._loader: DataLoader[Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be measured."""
        refuse_sharded(trainer, self, "parameters")
        if not pl_module.automatic_optimization and not hasattr(pl_module, "full_loss"):
            raise MisconfigurationException(
                "with manual optimization `training_step` takes optimizer steps, so FullGradientNorm cannot call it: give "
                f"{type(pl_module).__name__} a method `full_loss(batch)` that returns the mean loss"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the training set."""
        self._measured_at = trainer.global_step
        self._loader = self._make_loader(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after every ``every``-th step."""
        step = trainer.global_step
        if self.unit == "step" and step % self.every == 0 and step != self._measured_at:
            self._measured_at = step
            values = self.measure(trainer, pl_module)
            self._log(pl_module, values, logger=False)
            for logger in trainer.loggers:  # at once: the Trainer's own logging would skip most steps
                logger.log_metrics({"full_gradient_norm": values.norm, "full_loss": values.loss}, step=step - 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure at the end of every ``every``-th epoch."""
        if self.unit == "epoch" and (trainer.current_epoch + 1) % self.every == 0:
            self._log(pl_module, self.measure(trainer, pl_module), logger=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the loader's workers: left to the garbage collector, each of them takes five seconds."""
        self._loader = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As at the end of a fit: Lightning does not call ``teardown`` then."""
        self.teardown(trainer, pl_module, "fit")

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> FullGradient:
        """Measure now; every process has to.

        Args:
            trainer: The Trainer, in a fit.
            pl_module: Its LightningModule.
        """
        parameters = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        totals = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        loss_total = torch.zeros((), dtype=totals[0].dtype, device=pl_module.device)
        with undisturbed(trainer, pl_module):
            for batch, count in self._batches(trainer):
                self._add(pl_module, batch, count, parameters, totals, loss_total)
        if data_parallel(trainer)[1] > 1:
            for total in (*totals, loss_total):
                torch.distributed.all_reduce(total)
        examples = self.subset or len(cast(Sized, self._training_set(trainer).dataset))
        # there is no float64 on Apple GPUs
        norm = torch.linalg.vector_norm(torch.stack([each.cpu().double() for each in torch._foreach_norm(totals)]))
        return FullGradient(norm.item() / examples, loss_total.item() / examples)

    def _add(
        self, module: LightningModule, batch: Any, count: int, parameters: Sequence[Tensor], totals: list[Tensor], loss: Tensor
    ) -> None:
        """Add a batch's loss and gradients, both times its examples."""
        if count <= self._fitting:
            try:
                own = getattr(module, "full_loss", None) or partial(training_loss, module)
                batch_loss = own(batch)
                gradients = torch.autograd.grad(batch_loss, parameters, allow_unused=True)
                found = [(total, gradient) for total, gradient in zip(totals, gradients) if gradient is not None]
                torch._foreach_add_([total for total, _ in found], [each.to(total.dtype) for total, each in found], alpha=count)
                loss += batch_loss.detach() * count
                return
            except RuntimeError as error:
                if not is_out_of_memory(error) or count == 1:
                    raise
            garbage_collection_cuda()  # only now is the error gone, which held the frames and thereby their tensors
            self._fitting = -(-count // 2)
        for start in range(0, count, self._fitting):
            part = min(self._fitting, count - start)
            self._add(module, cut(batch, start, part, count), part, parameters, totals, loss)

    def _batches(self, trainer: Trainer) -> Iterator[tuple[Any, int]]:
        """This process's share of the examples, on its device, and how many of them there are in each batch."""
        loader = self._loader = self._loader or self._make_loader(trainer)
        silent = trainer.progress_bar_callback is None or not trainer.is_global_zero
        sampler = cast("list[list[int]]", loader.batch_sampler)
        for batch, indices in zip(tqdm(loader, "full gradient", len(sampler), leave=False, disable=silent), sampler):
            yield to_device(trainer, batch), len(indices)

    def _make_loader(self, trainer: Trainer) -> DataLoader[Any]:
        loader = self._training_set(trainer)
        number = len(cast(Sized, loader.dataset))
        indices = torch.arange(number)
        if self.subset is not None:
            indices = torch.randperm(number, generator=epoch_generator(self.seed, 0, stream=2))[: self.subset].sort().values
        share = indices[share_of(len(indices), *data_parallel(trainer))].split(self.batch_size)
        as_tensors = getattr(loader.dataset, "takes_tensors", False)
        return DataLoader(
            loader.dataset,
            batch_sampler=list(share) if as_tensors else [each.tolist() for each in share],
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            persistent_workers=loader.num_workers > 0,
            pin_memory=loader.pin_memory,
            generator=torch.Generator(),  # of its own: making an iterator must not draw from the global one
        )

    def _training_set(self, trainer: Trainer) -> DataLoader[Any]:
        """The training loader, for what it says of the training set."""
        for loader in CombinedLoader(trainer.train_dataloader).flattened:
            dataset = getattr(loader, "dataset", None)
            if isinstance(loader, DataLoader) and hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset):
                if self.subset is not None and self.subset > len(cast(Sized, dataset)):
                    raise ValueError(f"`subset={self.subset}` is more than the {len(cast(Sized, dataset))} training examples")
                return loader
        raise MisconfigurationException(
            "FullGradientNorm needs a training DataLoader over a data set that has a length (`__len__` and `__getitem__`)"
        )

    def _log(self, pl_module: LightningModule, values: FullGradient, logger: bool) -> None:
        for name, value in (("full_gradient_norm", values.norm), ("full_loss", values.loss)):
            pl_module.log(name, value, prog_bar=name == "full_gradient_norm", logger=logger, sync_dist=True)


@contextmanager
def undisturbed(trainer: Trainer, module: LightningModule, evaluation: bool = True) -> Iterator[None]:
    """Evaluation mode unless told otherwise, nothing logged; afterwards everything is as it was before."""
    before, modes = StepState(trainer), [(each, each.training) for each in module.modules()]
    quiet = {"log": _say_nothing, "log_dict": _say_nothing}
    stage = trainer.state.stage
    try:
        vars(module).update(quiet)
        if evaluation:
            module.eval()
            trainer.validating = True  # DataModules look here whether to augment
        with torch.enable_grad():
            yield
    finally:
        trainer.state.stage = stage
        for name in quiet:
            del vars(module)[name]
        for each, training in modes:
            each.training = training
        before.restore()


def training_loss(module: LightningModule, batch: Any, batch_idx: int = 0) -> Tensor:
    """What ``training_step`` returns as the loss of a batch."""
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    output = module.training_step(batch, batch_idx) if takes_index else module.training_step(batch)
    return cast(Tensor, output["loss"] if isinstance(output, Mapping) else output)


def _say_nothing(*_: Any, **__: Any) -> None:
    """Stand in for ``log``."""
