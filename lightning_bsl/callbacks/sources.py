"""The training data of a fit: where the next step's examples come from, and how the loaders follow the plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.parsing import lightning_hasattr
from torch.utils.data import DataLoader

from lightning_bsl.callbacks.clock import RunClock
from lightning_bsl.callbacks.loaders import (
    REMEDY,
    Ask,
    Asks,
    Epoch,
    as_combined,
    draws_batches,
    obstacle,
    scheduled_index,
    size_of,
)
from lightning_bsl.callbacks.micro_batches import MemoryCeiling, Parts, StepSplitter
from lightning_bsl.callbacks.planned_data import PlannedData
from lightning_bsl.callbacks.reloaded_data import ReloadedData
from lightning_bsl.callbacks.stream_data import StreamData
from lightning_bsl.data.datamodule import data_parallel
from lightning_bsl.data.lengths import Lengths
from lightning_bsl.data.sampler import Cut, GlobalBatchSampler
from lightning_bsl.data.stream_loader import StreamLoader
from lightning_bsl.schedules import JointSchedule, Plan, Progress
from lightning_bsl.schedules.plan import Measure, Stretch


class DataSource(Protocol):
    """The training loaders of a fit.

    Attributes:
        loaders: The loaders that Lightning trains on.
        index: Index of the loader that follows the schedule.
        cut: How a step is divided.
        lengths: Lengths of the examples, if they are known.
        measure: How many examples a step takes, if it is not as many as the batch size says.
        whole_batches: Examples of a batch of the loader, if steps are made of its whole batches.
        asked_at: The epoch in which the user's loaders were made.
        grows_inside: Whether the batch size can change inside an epoch.
        exact: Whether every loader can resume inside an epoch.
    """

    loaders: CombinedLoader
    index: int
    cut: Cut
    lengths: Lengths | None
    measure: Measure | None
    whole_batches: int | None
    asked_at: int
    grows_inside: bool
    exact: bool

    def epoch(self, trainer: Trainer) -> Epoch | None:
        """The facts about an epoch that a plan needs; ``None`` if its length is not known."""
        ...

    def sizes_at(self) -> Progress:
        """The progress at which the next step's batch size is evaluated."""
        ...

    def step_examples(self, batch_size: int) -> int:
        """Number of examples of the step that begins now, over all processes."""
        ...

    def parts(self, examples: int, batch_size: int) -> Parts:
        """How the step that begins now is divided.

        Args:
            examples: Examples of the step, over all processes.
            batch_size: The scheduled batch size.
        """
        ...

    def most_batches(self, batch_size: int) -> int:
        """The largest number of micro-batches that a step can have."""
        ...

    def batches(self, stretch: Stretch, start: int) -> int:
        """Number of this process's micro-batches in a stretch of a plan, ``start`` examples after the start of its epoch."""
        ...

    def sizes(self, stretch: Stretch, start: int) -> Iterator[tuple[int, list[int]]]:
        """For each step of a stretch, or each kind of step: its examples, and the examples of this process's micro-batches."""
        ...

    def count(self) -> int | None:
        """Number of examples of the current batch, if it may differ from the plan; else ``None``."""
        ...

    def consumed(self, splitter: StepSplitter) -> int:
        """Number of examples of the completed step, over all processes."""
        ...

    def splits(self, plan: Plan) -> bool:
        """Whether a step of the plan has several micro-batches."""
        ...

    def is_stale(self) -> bool:
        """Whether Lightning must ask for the loaders again: the epoch that begins has another length or batch size."""
        ...

    def batches_done(self) -> int | None:
        """Number of trained batches of the epoch; ``None`` to keep Lightning's own count."""
        ...

    def again(self, ask: Ask, due: bool) -> CombinedLoader:
        """The loaders for another epoch.

        Args:
            ask: Makes the user's loaders.
            due: Whether the user wants new loaders.
        """
        ...

    @property
    def handed_out(self) -> int:
        """Number of examples of the epoch that the workers have fetched."""
        ...

    def follow(self, schedule: JointSchedule) -> None:
        """Follow another schedule, from the first example that the workers have not fetched yet."""
        ...

    def drawn(self) -> object:
        """The order of the current epoch, if a sampler of the user draws it."""
        ...

    def check(self, plan: Plan | None) -> None:
        """Refuse loaders that will not follow the plan."""
        ...

    def positions(self, trainer: Trainer) -> list[Any] | None:
        """The position of each process in its stream, before the step under way; ``None`` if the order is known.

        Every process must call it.
        """
        ...

    def close(self) -> None:
        """End the loaders' workers."""
        ...


class FitSettings(Protocol):
    """The settings of a fit that a source needs; ``Fit`` has them."""

    asks: Asks
    undo: ExitStack
    seed: int
    in_tokens: bool
    whole_batches: bool | int
    multiple: int

    @property
    def positions(self) -> list[Any] | None:
        """The positions in a stream from which the fit resumes."""
        ...


def source_of(
    trainer: Trainer,
    module: LightningModule,
    ask: Ask,
    clock: RunClock,
    splitter: StepSplitter,
    schedule: JointSchedule,
    name: Any,
    fit: FitSettings,
) -> DataSource:
    """Make the data source of a fit.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        ask: Makes the user's training loaders.
        clock: The clock of the run.
        splitter: Splits the steps.
        schedule: Batch size and learning rate.
        name: Key or index of the loader that follows the schedule, if there are several.
        fit: The settings of the fit.

    Raises:
        MisconfigurationException: The loader cannot follow the schedule; the message says why, and what to write instead.
    """
    combined = as_combined(ask())
    if fit.whole_batches:
        return _of_whole_batches(trainer, combined, clock, splitter, schedule, fit)
    if any(isinstance(loader, StreamLoader) for loader in combined.flattened):
        if fit.in_tokens:
            raise MisconfigurationException(
                "the examples of a stream have to be read before they are known, so no step can be planned in tokens "
                '(`batch_size_unit="tokens"`): write batch sizes in examples'
            )
        return StreamData(trainer, combined, clock, splitter, schedule, fit.positions)
    index = scheduled_index(trainer, module, combined, ask, name)
    loader = combined.flattened[index]
    reason = obstacle(loader)
    if reason is None:
        return PlannedData(trainer, combined, index, clock, splitter, schedule, fit.seed, fit.asks, fit.in_tokens)
    if fit.in_tokens:
        raise MisconfigurationException(
            f'the training loader {reason}, so batch sizes in tokens (`batch_size_unit="tokens"`) cannot be planned: {REMEDY}'
        )
    follows = isinstance(size_of(loader), int) and lightning_hasattr(module, "batch_size")
    if not follows or type(loader).__iter__ is not DataLoader.__iter__ or len(combined.flattened) > 1 or schedule.largest:
        raise MisconfigurationException(
            f"the training loader {reason}, so BatchLRScheduler cannot replace its sampler: {REMEDY}"
        )
    if splitter.limit is not None or isinstance(splitter, MemoryCeiling):
        raise MisconfigurationException(
            f"the training loader {reason}, so its steps cannot be split for `max_device_batch_size`: {REMEDY}"
        )
    return ReloadedData(trainer, module, ask, index, clock, schedule, fit.asks, fit.undo)


def _of_whole_batches(
    trainer: Trainer,
    combined: CombinedLoader,
    clock: RunClock,
    splitter: StepSplitter,
    schedule: JointSchedule,
    fit: FitSettings,
) -> DataSource:
    """Make the data source of a fit whose steps are whole batches of the loader."""
    option = f"`whole_batches={fit.whole_batches}`"
    loaders = combined.flattened
    if len(loaders) != 1:
        raise MisconfigurationException(f"{option} with {len(loaders)} training loaders: give one loader, or leave it out")
    loader: Any = loaders[0]
    if isinstance(loader, StreamLoader) or isinstance(getattr(loader, "batch_sampler", None), GlobalBatchSampler):
        raise MisconfigurationException(
            f"{option} is for loaders that keep their batches, but those of this loader follow the schedule, as a "
            "BatchSizeDataModule or StreamDataModule makes them: leave it out, and write `max_device_batch_size` to limit a "
            "micro-batch"
        )
    for name, clash in (
        ("batch_size_unit='tokens'", fit.in_tokens),
        (f"accumulate_grad_batches={fit.asks.accumulate}", fit.asks.accumulate > 1),
        (f"max_device_batch_size={splitter.limit or 'auto'!r}", splitter.limit or isinstance(splitter, MemoryCeiling)),
    ):
        if clash:
            raise MisconfigurationException(
                f"{option} and `{name}`: a step is made of as many whole batches of the loader as the schedule says, so leave "
                f"`{name.split('=')[0]}` out"
            )
    size = size_of(loader) if fit.whole_batches is True else fit.whole_batches
    if not isinstance(size, int) or size < 1:
        raise MisconfigurationException(
            f"{option}, but {type(getattr(loader, 'batch_sampler', None) or loader).__name__} has no attribute `batch_size`: "
            "write the number of examples of its largest batch, as `whole_batches=64`"
        )
    fit.multiple = size * data_parallel(trainer)[1]
    schedule = replace(schedule, multiple=fit.multiple)
    if draws_batches(loader):
        return PlannedData(trainer, combined, 0, clock, splitter, schedule, fit.seed, fit.asks, whole_batches=size)
    return StreamData(trainer, combined, clock, splitter, schedule, fit.positions, size, fit.seed)
