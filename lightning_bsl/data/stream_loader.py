"""A loader that regroups a stream to the batch sizes of a schedule, and its DataModule."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from lightning_bsl.data.batches import joined, pinned, sliced
from lightning_bsl.data.datamodule import data_parallel
from lightning_bsl.data.sampler import Cut, even_parts, part_size, share_of
from lightning_bsl.data.stream import StreamReader, plain_mark
from lightning_bsl.schedules import JointSchedule, Progress
from lightning_bsl.schedules.checks import check_whole
from lightning_bsl.schedules.functions import Function

LEAST_CHUNK, MOST_CHUNK = 128, 4096  # examples that a worker reads at once
LEAST_CHUNKS = 4  # for each worker, where a library divides them


def stream_process(trainer: Trainer) -> tuple[int, int]:
    """The index of this process among those that each read a stream of their own, and their number.

    Args:
        trainer: The Trainer.

    Raises:
        MisconfigurationException: Tensor parallelism, where several processes need the same examples.
    """
    rank, processes = data_parallel(trainer)
    if processes != trainer.world_size:
        raise MisconfigurationException(
            f"{trainer.world_size // processes} processes train on the same examples (tensor parallelism), but with a stream "
            f"each process reads its own: write `tensor_parallel_size=1`, or give a map-style data set"
        )
    return rank, processes


class ReadStep(NamedTuple):
    """A step that was read from the stream, and not trained yet.

    Args:
        mark: The position in this process's stream before the step.
        examples: Examples of the step, over all processes.
        slices: This process's micro-batches, as slices of its share.
        counts: Examples of each process.
    """

    mark: Any
    examples: int
    slices: tuple[slice, ...]
    counts: tuple[int, ...]


class StreamLoader:
    """Iterates over the micro-batches of this process, step by step, with the batch sizes of a schedule.

    Each process reads a stream of its own. Before each step the processes agree on how many examples each of them gives: equal
    shares while all have examples, and what is left of the longer streams at the end. A process without examples repeats the
    first one of its pass, with weight 0.

    With ``whole_batches`` a micro-batch is a batch of the stream as it is: padded, maybe, or an object of any kind. A step
    then takes the same number of them on each process, so many that full ones hold the batch size or more. It counts the
    examples that they really hold. The run, and an epoch of ``samples_per_epoch``, end with the step that reaches their end.

    Args:
        reader: Reads this process's stream.
        batch_size: The batch size of a step, over all processes: an ``int``, a schedule, a function of progress, or a joint
            schedule.
        cut: How a step is divided among the processes and into micro-batches.
        samples_per_epoch: Examples of an epoch, over all processes; by default an epoch ends with the streams.
        drop_last: Whether to leave out a last step of an epoch that has fewer examples than the batch size; or fewer batches
            than a step takes, with ``whole_batches``.
        whole_batches: Number of examples of a full batch of the stream, if its batches stay whole; the reader's too.
        pin_memory: Whether to copy the batches to pinned memory; without CUDA it has no effect.

    Raises:
        ValueError: While it iterates: a batch with more examples than ``whole_batches``.
        RuntimeError: While it iterates: a process whose stream has no examples.

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
        batch_size: int | Function | JointSchedule,
        cut: Cut = Cut(),  # noqa: B008 (immutable)
        samples_per_epoch: int | None = None,
        drop_last: bool = False,
        whole_batches: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        check_whole("whole_batches", whole_batches, or_none=True)
        if (whole_batches is not None) != reader.source.whole:
            raise ValueError(
                f"`whole_batches={whole_batches}` with a StreamReader(whole={reader.source.whole}): write both or none of them"
            )
        self.whole_batches = whole_batches
        self.reader, self.schedule, self.cut = reader, JointSchedule.of(batch_size), cut
        self.samples_per_epoch, self.drop_last = samples_per_epoch, drop_last
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.clock: Callable[[], Progress] = Progress
        self.behind: Callable[[], int] = int
        self.run_end: int | None = None
        self.position: Any = None
        self.steps: deque[ReadStep] = deque()
        self.handed_out = 0
        self._first: Any = None  # the first batch of a pass, for steps to which this process has no example to give
        self._fresh = False  # whether it is to be kept, since the pass begins
        self._warned = False

    def __iter__(self) -> Iterator[Any]:
        """The micro-batches of an epoch, or of what is left of it."""
        return self._batches()  # nothing is read before the first is asked for: Lightning calls `iter` once more, as a check

    def _begin(self) -> Progress:
        progress, self.handed_out = self.clock(), self.behind()
        # Lightning may begin an iteration twice, and read a step before
        position = self.steps[0].mark if self.steps else self.position
        self.steps.clear()
        self._fresh = not (self.handed_out and position is not None)
        if self.handed_out and position is not None:
            self.reader.seek(position)
            self.position = position
        else:
            self.reader.source.asked_size = self._chunk_size(self.schedule.batch_size_at(progress))
            self.reader.start(progress.epoch)
        return progress

    def _chunk_size(self, batch_size: int) -> int:
        """Examples that a worker reads at once: about a batch, which need not be cut or joined then."""
        source = self.reader.source
        size = min(max(LEAST_CHUNK, -(-batch_size // self.cut.world_size)), MOST_CHUNK)
        if (length := source.divided_length) is not None:  # each worker of each process must get some
            size = min(size, max(1, min(self._gathered(length)) // (LEAST_CHUNKS * max(1, source.num_workers))))
        return size

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
            pieces, sizes = self._taken(self._asked(wanted))
            counts, number = [sum(of_process) for of_process in sizes], sum(map(self._given, sizes))
            examples, mine = sum(counts), counts[self.cut.rank]
            dropped = self.drop_last and number < self._asked(min([size, *ends]))
            if number < self._asked(wanted):
                self._note_end(progress.epoch, 0 if dropped else examples)
            if dropped or not examples:
                return
            slices = self._slices(sizes)
            self.steps.append(ReadStep(mark, examples, slices, tuple(counts)))
            self.handed_out += examples
            progress = progress.advance(examples)
            spare = self._spare(pieces, counts)
            for part in slices:
                if part.stop == part.start:
                    yield spare if self.whole_batches else sliced(spare, 0, 1)
                elif self.whole_batches:
                    yield pieces.popleft()  # a step may hold many
                else:
                    yield pieces[0] if part.stop - part.start == mine else sliced(pieces[0], part.start, part.stop)

    def _asked(self, examples: int) -> int:
        """What a step of so many examples takes from all streams: the number of examples, or of whole batches."""
        if self.whole_batches is None:
            return examples
        return -(-examples // (self.whole_batches * self.cut.world_size)) * self.cut.world_size

    def _given(self, sizes: list[int]) -> int:
        """What a process gave, in the same unit."""
        return sum(sizes) if self.whole_batches is None else len(sizes)

    def _slices(self, sizes: list[list[int]]) -> tuple[slice, ...]:
        """This process's micro-batches; every process has the same number of them."""
        mine = sizes[self.cut.rank]
        if self.whole_batches is None:
            most = max(map(sum, sizes))
            return even_parts(0, sum(mine), -(-most // (self.cut.max_device_batch_size or most)))
        stops = [0, *accumulate(mine)] + [sum(mine)] * (max(map(len, sizes)) - len(mine))
        return tuple(slice(start, stop) for start, stop in pairwise(stops))

    def _taken(self, wanted: int) -> tuple[deque[Any], list[list[int]]]:
        """This process's part of a step, in one batch or in whole batches; and the sizes of what each process gives."""
        rank, processes = self.cut.rank, self.cut.world_size
        pieces: deque[Any] = deque()
        sizes: list[list[int]] = [[] for _ in range(processes)]
        asked: dict[int, int] = {r: part_size(share_of(wanted, r, processes)) for r in range(processes)}
        while any(asked.values()):
            read = self._read(asked.get(rank, 0))
            pieces += [batch for batch, _ in read]
            found = self._gathered([size for _, size in read])
            for of_process, more in zip(sizes, found):
                of_process += more
            having = [r for r, number in asked.items() if self._given(found[r]) == number]
            missing = wanted - sum(map(self._given, sizes))
            asked = {r: part_size(share_of(missing, i, len(having))) for i, r in enumerate(having)} if missing else {}
        if self.whole_batches is None and len(pieces) > 1:
            pieces = deque([joined(list(pieces))])
        return deque(map(pinned, pieces)) if self.pin_memory else pieces, sizes

    def _read(self, number: int) -> list[tuple[Any, int]]:
        """Read so many examples, or whole batches."""
        if self.whole_batches is None:
            before = self.reader.examples
            batch = self.reader.take(number) if number else None
            return [] if batch is None else [(batch, self.reader.examples - before)]
        batches = list(islice(iter(self.reader.take_batch, None), number))
        most = max((size for _, size in batches), default=0)
        if most > self.whole_batches:
            raise ValueError(
                f"the loader gave a batch of {most} examples, but its batches have at most {self.whole_batches} "
                f"(`whole_batches={self.whole_batches}`): write the largest size of its batches"
            )
        return batches

    def _spare(self, pieces: deque[Any], counts: list[int]) -> Any:
        """The batch that this process repeats where it has no examples: of this step, else of the start of the pass.

        A resumed run has the same one. Every process must call it.
        """
        mine = counts[self.cut.rank]
        if mine and self._fresh and self.cut.world_size > 1:
            self._first, self._fresh = pieces[0] if self.whole_batches else sliced(pieces[0], 0, 1), False
        elif not mine and self._first is None:
            self._first = self.reader.first()
        if not all(counts):
            there = self._gathered(mine > 0 or self._first is not None)
            if not all(there):
                empty = [rank for rank, has in enumerate(there) if not has]
                remedy = "write more shards than processes and workers"
                if (source := self.reader.source).litdata:
                    workers = max(1, source.num_workers)
                    remedy = (
                        f"litData divides the batches of its loader (batch_size={source.chunk_size}) among {len(there)} "
                        f"processes x {workers} workers: write a smaller `batch_size` there, or fewer workers"
                    )
                raise RuntimeError(
                    f"the streams of processes {empty} have no examples, so they cannot take part in a step: {remedy}"
                )
        return pieces[-1] if mine else self._first

    def _note_end(self, epoch: int, examples: int) -> None:
        """Warn if the streams have ended before the end of the epoch."""
        number = self.handed_out + examples
        if self.samples_per_epoch is None or number >= self.samples_per_epoch or self._warned:
            return
        self._warned = True
        rank_zero_warn(
            f"the streams ended after {number} examples of epoch {epoch}, before `samples_per_epoch={self.samples_per_epoch}`, "
            f"so the epoch is shorter than planned: write `samples_per_epoch={number}` or less, or leave it out"
        )

    def _gathered(self, mine: Any) -> list[Any]:
        """The same of each process."""
        if self.cut.world_size == 1:
            return [mine]
        values: list[Any] = [None] * self.cut.world_size
        torch.distributed.all_gather_object(values, mine)
        return values


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
        num_workers: Number of worker processes that read ``train``, and of the loaders of ``val`` and ``test``. A loader as
            ``train`` has its own.
        multiprocessing_context: How to start these workers: ``"fork"``, ``"forkserver"`` or ``"spawn"``; by default as usual on
            the platform. In a run of several processes on CPUs (gloo) a forked worker sometimes hangs: write ``"forkserver"``.
        pin_memory: Whether to copy batches to pinned memory; by default if CUDA is available.
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
        multiprocessing_context: str | None = None,
        pin_memory: bool | None = None,
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
        self.multiprocessing_context = multiprocessing_context if num_workers else None
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
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
            self.train_set,
            batched=self.batched,
            collate=self.collate_fn,
            num_workers=self.num_workers,
            multiprocessing_context=self.multiprocessing_context,
            seed=self.seed,
        )
        cut = Cut(*stream_process(self.trainer)) if self.trainer else Cut()
        return StreamLoader(reader, self.batch_size, cut, self.samples_per_epoch, self.drop_last, pin_memory=self.pin_memory)

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
        return DataLoader(
            data,
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            multiprocessing_context=self.multiprocessing_context,
            pin_memory=self.pin_memory,
            collate_fn=self.collate_fn,
        )
