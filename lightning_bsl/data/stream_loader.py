"""A loader that regroups a stream to the batch sizes of a schedule, and its DataModule."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from lightning_bsl.data.datamodule import data_parallel
from lightning_bsl.data.sampler import Cut, part_size, share_of
from lightning_bsl.data.stream import StreamReader, joined, plain_mark, sliced
from lightning_bsl.schedules import JointSchedule, Progress
from lightning_bsl.schedules.checks import check_whole
from lightning_bsl.schedules.functions import Function

LEAST_CHUNK, MOST_CHUNK = 128, 2048  # examples that a worker reads at once


class ReadStep(NamedTuple):
    """A step that was read from the stream, and not trained yet.

    Args:
        mark: The position in this process's stream before the step.
        examples: Examples of the step, over all processes.
        slices: This process's micro-batches, as slices of its share.
    """

    mark: Any
    examples: int
    slices: tuple[slice, ...]


class StreamLoader:
    """Iterates over the micro-batches of this process, step by step, with the batch sizes of a schedule.

    Each process reads a stream of its own. Before each step the processes agree on how many examples each of them gives: equal
    shares while all have examples, and what is left of the longer streams at the end. A process without examples repeats its
    last one, with weight 0.

    Args:
        reader: Reads this process's stream.
        batch_size: The batch size of a step, over all processes: an ``int``, a schedule, or a function of progress.
        cut: How a step is divided among the processes and into micro-batches.
        samples_per_epoch: Examples of an epoch, over all processes; by default an epoch ends with the streams.
        drop_last: Whether to leave out a last step of an epoch that has fewer examples than the batch size.

    Attributes:
        clock: Returns the progress before the next step that is read when an iteration begins.
        behind: Returns the examples of the epoch before it.
        run_end: Examples of the run, where it ends inside an epoch.
        position: The mark from which a resumed run goes on inside an epoch.
        steps: The steps that were read and not trained yet.
        handed_out: Examples of the epoch that were read.
    """

    def __init__(
        self,
        reader: StreamReader,
        batch_size: int | Function,
        cut: Cut = Cut(),  # noqa: B008 (immutable)
        samples_per_epoch: int | None = None,
        drop_last: bool = False,
    ) -> None:
        self.reader, self.schedule, self.cut = reader, JointSchedule(batch_size), cut
        self.samples_per_epoch, self.drop_last = samples_per_epoch, drop_last
        self.clock: Callable[[], Progress] = Progress
        self.behind: Callable[[], int] = int
        self.run_end: int | None = None
        self.position: Any = None
        self.steps: deque[ReadStep] = deque()
        self.handed_out = 0
        self._spare: Any = None  # one example, for a step to which this process has none to give

    def __iter__(self) -> Iterator[Any]:
        """The micro-batches of an epoch, or of what is left of it."""
        return self._batches()  # nothing is read before the first is asked for: Lightning calls `iter` once more, as a check

    def _begin(self) -> Progress:
        progress, self.handed_out = self.clock(), self.behind()
        # Lightning may begin an iteration twice, and read a step before
        position = self.steps[0].mark if self.steps else self.position
        self.steps.clear()
        if self.handed_out and position is not None:
            self.reader.seek(position)
            self.position = position
        else:
            share = -(-self.schedule.batch_size_at(progress) // self.cut.world_size)
            # what a worker reads at once is then about a batch, which need not be cut or joined
            self.reader.source.asked_size = min(max(LEAST_CHUNK, share), MOST_CHUNK)
            self.reader.start(progress.epoch)
        return progress

    def mark(self) -> Any:
        """The position before the first step that is not trained yet; called between steps, and inside one."""
        return plain_mark(self.steps[0].mark if self.steps else self.reader.mark())

    def _batches(self) -> Iterator[Any]:
        progress = self._begin()
        while True:
            size = self.schedule.batch_size_at(progress)
            ends = [] if self.run_end is None else [self.run_end - progress.samples]
            left = [] if self.samples_per_epoch is None else [self.samples_per_epoch - self.handed_out]
            wanted = min([size, *ends, *left])
            if wanted <= 0:
                return
            mark = self.reader.mark(plain=False)
            batch, counts = self._taken(wanted)
            examples, mine = sum(counts), counts[self.cut.rank]
            if not examples or (self.drop_last and examples < min([size, *ends])):
                return
            number = -(-max(counts) // (self.cut.max_device_batch_size or max(counts)))
            stops = [i * mine // number for i in range(number + 1)]
            slices = tuple(slice(start, stop) for start, stop in pairwise(stops))
            self.steps.append(ReadStep(mark, examples, slices))
            self.handed_out += examples
            progress = progress.advance(examples)
            if mine:
                self._spare = batch
            for part in slices:
                if part.stop > part.start:
                    yield batch if number == 1 else sliced(batch, part.start, part.stop)
                elif self._spare is None:
                    raise RuntimeError(
                        f"the stream of process {self.cut.rank} has no examples, so it cannot take part in a step: write more "
                        "shards than processes and workers"
                    )
                else:
                    yield sliced(self._spare, 0, 1)

    def _taken(self, wanted: int) -> tuple[Any, list[int]]:
        """This process's part of a step, and the number of examples that each process gives."""
        rank, processes = self.cut.rank, self.cut.world_size
        if processes == 1:
            before = self.reader.examples
            return self.reader.take(wanted), [self.reader.examples - before]
        batches, counts = [], [0] * processes
        asked: dict[int, int] = {r: part_size(share_of(wanted, r, processes)) for r in range(processes)}
        while any(asked.values()):
            before = self.reader.examples
            if asked.get(rank) and (batch := self.reader.take(asked[rank])) is not None:
                batches.append(batch)
            got = self.reader.examples - before
            found: list[Any] = [None] * processes
            torch.distributed.all_gather_object(found, got)
            counts = [given + more for given, more in zip(counts, found)]
            having = [r for r, number in asked.items() if found[r] == number]
            missing = wanted - sum(counts)
            asked = {r: part_size(share_of(missing, i, len(having))) for i, r in enumerate(having)} if missing else {}
        return (batches[0] if len(batches) == 1 else joined(batches) if batches else None), counts


class StreamDataModule(LightningDataModule):
    """A DataModule for streams, whose batch size can follow a schedule.

    With the callback [`BatchLRScheduler`][lightning_bsl.BatchLRScheduler] the batch size follows its schedule, inside an epoch
    too. Without it, the batch size is ``batch_size``. The examples keep the order of the stream, and each is trained once. A
    stream without an end is one epoch, unless ``samples_per_epoch`` cuts it.

    With several processes each reads a stream of its own: the stream itself must give each process other examples, as litData,
    webdataset (``split_by_node``) and ``datasets`` (``split_dataset_by_node``) do.

    Args:
        train: An iterable of examples, or a loader of small batches (``batched=True``).
        val: Validation set, of any kind.
        test: Test set.
        batch_size: Global batch size without a schedule.
        eval_batch_size: Batch size for validation and test, per process.
        num_workers: Number of worker processes that read ``train``, and of the loaders of ``val`` and ``test``.
        collate_fn: As for ``torch.utils.data.DataLoader``.
        batched: Whether ``train`` gives small batches, not examples. A torch ``DataLoader`` says so itself.
        seed: Seed of the workers' random numbers.
        samples_per_epoch: Examples of an epoch, over all processes.
        drop_last: Whether to leave out a last step of an epoch that has fewer examples than the batch size.

    Raises:
        ValueError: A size below 1.

    Example:
        >>> datamodule = StreamDataModule([torch.tensor([float(i)]) for i in range(10)], batched=False, batch_size=4)
        >>> [len(batch) for batch in datamodule.train_dataloader()]
        [4, 4, 2]
    """

    tokens_per_sample: int | None = None  # length of the sequences, if all have the same: needed by schedules in tokens

    def __init__(
        self,
        train: Any = None,
        val: Any = None,
        test: Any = None,
        *,
        batch_size: int = 32,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        batched: bool | None = None,
        seed: int = 0,
        samples_per_epoch: int | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            check_whole(name, value)
        check_whole("samples_per_epoch", samples_per_epoch, or_none=True)
        self.train_set, self.val_set, self.test_set = train, val, test
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.collate_fn, self.batched, self.seed = collate_fn, batched, seed
        self.samples_per_epoch, self.drop_last = samples_per_epoch, drop_last

    def train_dataloader(self) -> StreamLoader:
        """The training loader, with batches of ``batch_size``.

        Raises:
            ValueError: There is no training stream.
        """
        if self.train_set is None:
            raise ValueError("there is no training stream; give `train`, or set `train_set` in `setup`")
        reader = StreamReader(
            self.train_set, batched=self.batched, collate=self.collate_fn, num_workers=self.num_workers, seed=self.seed
        )
        cut = Cut(*data_parallel(self.trainer)) if self.trainer else Cut()
        return StreamLoader(reader, self.batch_size, cut, self.samples_per_epoch, self.drop_last)

    def val_dataloader(self) -> Any:
        """The validation loader; an empty list without a validation set."""
        return self._eval_dataloader(self.val_set)

    def test_dataloader(self) -> Any:
        """The test loader; an empty list without a test set."""
        return self._eval_dataloader(self.test_set)

    def _eval_dataloader(self, data: Any) -> Any:
        if data is None:
            return []
        if not (hasattr(data, "__getitem__") or isinstance(data, IterableDataset)):
            return data
        return DataLoader(data, batch_size=self.eval_batch_size, num_workers=self.num_workers, collate_fn=self.collate_fn)
