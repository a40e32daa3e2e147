"""Where the next step's examples come from, and what Lightning's training loaders are told of the plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Protocol, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.parsing import lightning_hasattr
from torch.utils.data import DataLoader

from lightning_bsl.callbacks.clock import RunClock
from lightning_bsl.callbacks.loaders import REMEDY, Ask, Asks, Epoch, as_combined, obstacle, scheduled_index, size_of
from lightning_bsl.callbacks.micro_batches import MemoryCeiling, Parts, StepSplitter
from lightning_bsl.callbacks.planned_data import PlannedData
from lightning_bsl.callbacks.reloaded_data import ReloadedData
from lightning_bsl.data.lengths import Lengths
from lightning_bsl.data.sampler import Cut
from lightning_bsl.schedules import JointSchedule, Plan, Progress
from lightning_bsl.schedules.functions import Function
from lightning_bsl.schedules.plan import Measure, Run


class DataSource(Protocol):
    """The training loaders of a fit, and what is known of them.

    Attributes:
        loaders: What Lightning trains on.
        index: Which of them follows the schedule.
        cut: How its steps are cut.
        lengths: The lengths of its examples, where they are known.
        measure: What batch sizes count, where these are not examples.
        asked_at: The epoch in which the user's loaders were asked for last.
        grows_inside: Whether the batch size can change inside an epoch.
        exact: Whether every loader goes on inside an epoch where a run was interrupted.
    """

    loaders: CombinedLoader
    index: int
    cut: Cut
    lengths: Lengths | None
    measure: Measure | None
    asked_at: int
    grows_inside: bool
    exact: bool

    def epoch(self, trainer: Trainer) -> Epoch | None:
        """What the plan must know of an epoch; ``None`` where its length is not known."""
        ...

    def sizes_at(self) -> Progress:
        """The progress at which the next step's batch size is asked."""
        ...

    def step_examples(self, batch_size: int) -> int:
        """Examples of the step that begins now, over all processes."""
        ...

    def parts(self, examples: int, batch_size: int) -> Parts:
        """How the step that begins now is cut.

        Args:
            examples: Of the step, over all processes.
            batch_size: What the schedule says.
        """
        ...

    def most_batches(self, batch_size: int) -> int:
        """Most micro-batches that a step may have."""
        ...

    def batches(self, run: Run, start: int) -> int:
        """This process's micro-batches in a run of a plan, ``start`` examples after the start of its epoch."""
        ...

    def sizes(self, run: Run, start: int) -> Iterator[tuple[int, list[int]]]:
        """Of the steps of a run, or of each kind of them: their examples, and those of this process's micro-batches."""
        ...

    def count(self) -> int | None:
        """Examples of the batch under way, where it is not cut by us."""
        ...

    def consumed(self, splitter: StepSplitter) -> int:
        """Examples of the step that is complete, over all processes."""
        ...

    def splits(self, plan: Plan) -> bool:
        """Whether any step of a plan has several micro-batches."""
        ...

    def is_stale(self) -> bool:
        """Whether Lightning must ask for the loaders again: the epoch that begins has another length or batch size."""
        ...

    def batches_done(self) -> int | None:
        """Batches of the epoch that are trained; ``None`` where Lightning's own count is to stand."""
        ...

    def again(self, ask: Ask, due: bool) -> CombinedLoader:
        """The loaders for another epoch.

        Args:
            ask: Asks for the user's loaders.
            due: Whether the user wants to be asked for them again.
        """
        ...

    @property
    def handed_out(self) -> int:
        """Examples of the epoch before the first one that was not handed out to a worker yet."""
        ...

    def follow(self, schedule: JointSchedule) -> None:
        """Follow another schedule from the first example on that was not handed out yet."""
        ...

    def drawn(self) -> object:
        """The order of the epoch at hand, where a sampler of the user draws it."""
        ...

    def check(self, plan: Plan | None) -> None:
        """Refuse loaders that will not follow the plan."""
        ...

    def close(self) -> None:
        """End what the loaders hold: their workers."""
        ...


class Wishes(Protocol):
    """What a source must know of the fit."""

    asks: Asks
    undo: ExitStack
    seed: int
    in_tokens: bool


def source_of(
    trainer: Trainer,
    module: LightningModule,
    ask: Ask,
    clock: RunClock,
    splitter: StepSplitter,
    schedule: JointSchedule,
    name: Any,
    fit: Wishes,
) -> DataSource:
    """The source of what Lightning is to train on.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        ask: Asks for the user's training loaders.
        clock: The run's clock.
        splitter: Cuts the steps.
        schedule: Batch size and learning rate.
        name: Key or index of the loader that follows the schedule, where there are several.
        fit: What the user asked of the Trainer; the seed of the order of the examples; whether batch sizes are in tokens; what
            is closed at the end of the fit.

    Raises:
        MisconfigurationException: The loader cannot follow the schedule; the message says why, and what to do.
    """
    given = as_combined(ask())
    index = scheduled_index(trainer, module, given, ask, name)
    loader = given.flattened[index]
    reason = obstacle(loader)
    if reason is None:
        batch_size = cast(Function, schedule.batch_size)
        return PlannedData(trainer, given, index, clock, splitter, batch_size, fit.seed, fit.asks, fit.in_tokens)
    if fit.in_tokens:
        raise MisconfigurationException(
            f'the training loader {reason}, so batch sizes in tokens (`batch_size_unit="tokens"`) cannot be planned: {REMEDY}'
        )
    follows = isinstance(size_of(loader), int) and lightning_hasattr(module, "batch_size")
    if not follows or type(loader).__iter__ is not DataLoader.__iter__ or len(given.flattened) > 1 or schedule.largest:
        raise MisconfigurationException(
            f"the training loader {reason}, so BatchLRScheduler cannot put its own sampler in: {REMEDY}"
        )
    if splitter.limit is not None or isinstance(splitter, MemoryCeiling):
        raise MisconfigurationException(
            f"the training loader {reason}, so nobody knows how to cut its steps for `max_device_batch_size`: {REMEDY}"
        )
    return ReloadedData(trainer, module, ask, index, clock, schedule, fit.asks, fit.undo)
