"""A stream that is regrouped to the batch sizes of the plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from lightning_bsl.callbacks.clock import RunClock
from lightning_bsl.callbacks.loaders import Ask, Epoch, as_combined, limit_of
from lightning_bsl.callbacks.micro_batches import Parts, StepSplitter
from lightning_bsl.data.lengths import Lengths
from lightning_bsl.data.sampler import Cut
from lightning_bsl.data.stream import StreamReader
from lightning_bsl.data.stream_loader import StreamLoader, stream_process
from lightning_bsl.schedules import JointSchedule, Plan, Progress
from lightning_bsl.schedules.plan import Measure, Stretch


def check_shared(loader: Any, processes: int) -> None:
    """Refuse a loader whose sampler gives every process the same examples.

    Args:
        loader: The loader.
        processes: Number of processes.

    Raises:
        MisconfigurationException: Such a loader with several processes.
    """
    sampler = getattr(loader, "sampler", None) if type(getattr(loader, "batch_sampler", None)) is BatchSampler else None
    if processes > 1 and isinstance(sampler, (RandomSampler, SequentialSampler)):
        raise MisconfigurationException(
            f"a {type(loader).__name__} with a {type(sampler).__name__} gives each of the {processes} processes the same "
            "examples: give it a `sampler=torch.utils.data.DistributedSampler(...)`"
        )


class StreamData:
    """The stream of a `StreamDataModule`, or a loader whose batches stay whole.

    The batch size may change at any step. The position in the stream is that of the last trained step.

    Args:
        trainer: The Trainer.
        combined: The user's loaders: one ``StreamLoader``; or with ``whole_batches`` any one that can be iterated again.
        clock: The clock of the run.
        splitter: Has the largest size of a micro-batch.
        schedule: Batch size and learning rate.
        positions: The positions of a checkpoint, one for each process; ``None`` for a new run.
        whole_batches: Examples of a full batch of the loader, if steps are made of its whole batches.
        seed: Seed of the samplers and workers of such a loader.

    Raises:
        TypeError: A loader that cannot be iterated again.
        MisconfigurationException: There are other loaders beside the stream, tensor parallelism, or a checkpoint of another
            number of processes.
    """

    index = 0
    loader: StreamLoader
    grows_inside = exact = True
    lengths: Lengths | None = None
    measure: Measure | None = None

    def __init__(
        self,
        trainer: Trainer,
        combined: CombinedLoader,
        clock: RunClock,
        splitter: StepSplitter,
        schedule: JointSchedule,
        positions: list[Any] | None,
        whole_batches: int | None = None,
        seed: int = 0,
    ) -> None:
        rank, processes = stream_process(trainer)
        if len(combined.flattened) > 1:
            raise MisconfigurationException(
                f"there are {len(combined.flattened)} training loaders, one of them a stream: give the stream alone"
            )
        if positions is not None and len(positions) != processes:
            raise MisconfigurationException(
                f"the checkpoint was saved by {len(positions)} processes, each in a stream of its own, and {processes} cannot "
                f"go on in them: write `devices={len(positions)}`, or load the weights alone"
            )
        self.clock, self.cut = clock, Cut(rank, processes, whole_batches or splitter.limit)
        self.whole_batches, self._seed = whole_batches, seed
        self.asked_at = clock.epoch_start.epoch
        self._schedule = schedule
        self.loaders = self._followed(combined, None if positions is None else positions[rank])

    def _followed(self, combined: CombinedLoader, position: Any = None) -> CombinedLoader:
        loader = combined.flattened[0]
        if self.whole_batches is not None:
            check_shared(loader, self.cut.world_size)
            reader = StreamReader(loader, whole=True, seed=self._seed)
            loader = StreamLoader(reader, 1, whole_batches=self.whole_batches)
            combined.flattened = [loader]
        self.loader = loader
        loader.schedule, loader.cut = self._schedule, self.cut
        loader.clock, loader.behind = (lambda: self.clock.progress), (lambda: self.clock.behind)
        loader.run_end, loader.position = self.clock.end.samples, position
        return combined

    def epoch(self, trainer: Trainer) -> Epoch | None:
        """The facts that a plan needs, if the number of examples of an epoch is given."""
        number = self.loader.samples_per_epoch
        return None if number is None else Epoch(number, limit_of(trainer), self.loader.drop_last)

    def sizes_at(self) -> Progress:
        """The current progress: the batch size can change inside an epoch."""
        return self.clock.progress

    def step_examples(self, batch_size: int) -> int:
        """The examples that were read for the step."""
        return self.loader.steps[0].examples

    def parts(self, examples: int, batch_size: int) -> Parts:
        """The micro-batches of this process, whose share may be another one than that of the other processes."""
        step = self.loader.steps[0]
        return Parts(step.slices, counts=step.counts)

    def most_batches(self, batch_size: int) -> int:
        """The number of micro-batches if one process gives the whole step, as at the end of the streams."""
        return -(-batch_size // (self.cut.max_device_batch_size or batch_size))

    def batches(self, stretch: Stretch, start: int) -> int:
        """The number of micro-batches."""
        return self.cut.batches(stretch)

    def sizes(self, stretch: Stretch, start: int) -> Iterator[tuple[int, list[int]]]:
        """The sizes of the micro-batches."""
        return self.cut.sizes(stretch)

    def count(self) -> None:
        """Return ``None``: the micro-batches are as they were read."""

    def consumed(self, splitter: StepSplitter) -> int:
        """The examples of the step; with its last micro-batch the position moves behind it."""
        if splitter.last:
            self.loader.steps.popleft()
        return splitter.examples

    def splits(self, plan: Plan) -> bool:
        """Whether a step of the plan may have several micro-batches."""
        return any(self.most_batches(stage.batch_size) > 1 for stage in plan.stages)

    def is_stale(self) -> bool:
        """Return ``False``: the length of an epoch is not announced."""
        return False

    def batches_done(self) -> int | None:
        """Return ``None``: keep Lightning's own count."""
        return None

    def again(self, ask: Ask, due: bool) -> CombinedLoader:
        """The same loader; or a new one, if it is due."""
        if due:
            self.close()
            self.asked_at = self.clock.loader_start.epoch
            self.loaders = self._followed(as_combined(ask()))
        return self.loaders

    @property
    def handed_out(self) -> int:
        """Examples of the epoch that were read."""
        return self.loader.handed_out

    def follow(self, schedule: JointSchedule) -> None:
        """Give the loader another schedule. It reads the schedule at each step that it reads."""
        self.loader.schedule = self._schedule = schedule

    def drawn(self) -> object:
        """Return ``None``: the order is that of the stream."""

    def check(self, plan: Plan | None) -> None:
        """Nothing to check: the loader follows the schedule."""

    def positions(self, trainer: Trainer) -> list[Any]:
        """The position of each process, before the step under way. Every process must call it."""
        mark = self.loader.mark() if self.clock.behind else None  # an epoch begins with the stream
        if self.cut.world_size == 1:
            return [mark]
        marks: list[Any] = [None] * self.cut.world_size
        torch.distributed.all_gather_object(marks, mark)
        return marks

    def close(self) -> None:
        """End the workers."""
        self.loader.reader.close()
