"""Streams regrouped to batches of any size, and resumed at any position."""

from __future__ import annotations

import io
import json
import multiprocessing
import random
import re
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info

from harness.data import regression
from harness.files import flat
from lightning_bsl.data.sampler import Cut
from lightning_bsl.data.stream import StreamReader, plain_mark
from lightning_bsl.data.stream_loader import StreamLoader, stream_process
from lightning_bsl.schedules import Progress

NUMBER = 61  # examples of the streams of libraries
Point = namedtuple("Point", "x name")


def ids(batch: Any) -> list[int]:
    """The examples of a batch, each of which is its number."""
    values = batch["i"] if isinstance(batch, dict) else batch
    return [int(value) for value in values]


def taken(reader: StreamReader, sizes: Any) -> list[list[int]]:
    """The batches of a pass."""
    batches = []
    for size in sizes:
        if (batch := reader.take(size)) is None:
            break
        batches.append(ids(batch))
    return batches


def saved(mark: dict[str, Any]) -> dict[str, Any]:
    """A mark from a checkpoint, which is read without running code."""
    file = io.BytesIO()
    torch.save(mark, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def sizes(seed: int) -> Iterator[int]:
    draw = random.Random(seed)
    while True:
        yield draw.choice((1, 2, 3, 5, 8, 13))


def read(make: Callable[[], StreamReader], seed: int = 0, epoch: int = 0) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """The batches of a pass of random sizes, and the mark before each of them and after the last."""
    reader = make()
    reader.start(epoch)
    batches: list[list[int]] = []
    marks = [reader.mark()]
    for size in sizes(seed):
        if (batch := reader.take(size)) is None:
            break
        batches.append(ids(batch))
        marks.append(reader.mark())
    assert reader.exhausted and reader.mark()["exhausted"] and reader.examples == sum(map(len, batches))
    reader.close()
    return batches, [saved(mark) for mark in marks]


class Numbers(IterableDataset[int]):
    """Numbers, divided among the workers; another order in each epoch."""

    def __init__(self, number: int = NUMBER) -> None:
        self.number, self.epoch = number, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def mine(self) -> list[int]:
        numbers = list(range(self.number))
        random.Random(self.epoch).shuffle(numbers)
        worker = get_worker_info()
        return numbers[worker.id :: worker.num_workers] if worker else numbers

    def __iter__(self) -> Iterator[int]:
        yield from self.mine()


class Stateful(Numbers):
    """Knows its position, and goes on at it, also after a pass that was left. A mark must not follow its state."""

    def __init__(self, number: int = NUMBER) -> None:
        super().__init__(number)
        self.state = {"position": 0}
        self.reads = 0

    def __iter__(self) -> Iterator[int]:
        numbers = self.mine()
        while self.state["position"] < len(numbers):
            self.state["position"] += 1
            self.reads += 1
            yield numbers[self.state["position"] - 1]
        self.state["position"] = 0

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class StatefulIterator:
    """Knows its position where its data set does not."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> StatefulIterator:
        return self

    def __next__(self) -> int:
        if self.position == NUMBER:
            raise StopIteration
        self.position += 1
        return self.position - 1

    def state_dict(self) -> dict[str, Any]:
        return {"position": np.int64(self.position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Iterated(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return StatefulIterator()


class Batches:
    """Numbers in batches of given sizes."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from torch.arange(sum(self.counts)).split(self.counts)


# --- regrouping


@given(st.lists(st.integers(0, 12), max_size=20), st.lists(st.integers(1, 30), min_size=1, max_size=20), st.data())
def test_any_sizes_of_any_chunks(counts: list[int], wanted: list[int], data: Any) -> None:
    numbers = list(range(sum(counts)))
    position, batches, marks = 0, [], []
    reader = StreamReader(Batches(counts), batched=True)
    for size in [*wanted, *[10] * len(numbers)]:
        marks.append((position, saved(reader.mark())))
        if (batch := reader.take(size)) is None:
            break
        assert batch.tolist() == numbers[position : position + size]
        batches.append(batch)
        position += size
    assert flat(batch.tolist() for batch in batches) == numbers
    assert reader.exhausted == (len(marks) > len(batches)) and (not reader.exhausted or reader.take(1) is None)
    position, mark = data.draw(st.sampled_from(marks))
    again = StreamReader(Batches(counts), batched=True)
    again.seek(mark)
    assert flat(taken(again, [7] * 100)) == numbers[position:]


@given(st.integers(0, 40), st.lists(st.integers(1, 12), min_size=1, max_size=12))
def test_any_sizes_of_examples(number: int, wanted: list[int]) -> None:
    reader = StreamReader(range(number), batched=False)
    batches = taken(reader, wanted)
    position = 0
    for size, batch in zip(wanted, batches):
        assert batch == list(range(number))[position : position + size]
        position += size
    again = StreamReader(range(number), batched=False)
    again.seek(saved(reader.mark()))
    assert flat(taken(again, [5] * 10)) == list(range(number))[position:]


@dataclass
class Nested:
    """Batches of all kinds of fields, and the same fields of examples ``start`` to ``stop``."""

    size: int = 4

    def of(self, start: int, stop: int) -> Any:
        x = torch.arange(start, stop, dtype=torch.float32)
        names = [f"name {i}" for i in range(start, stop)]
        point = Point(x * 2, tuple(names))
        return {"x": x, "pair": (x[:, None].expand(-1, 2), [x.to(torch.bfloat16), point]), "names": names,
                "array": x.numpy(), "none": None, "numbers": [float(value) for value in x]}  # fmt: skip

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, 20, self.size):
            yield self.of(start, min(start + self.size, 20))


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_nested_batches(size: int) -> None:
    stream = Nested(size)
    reader = StreamReader(stream, batched=True)
    position = 0
    for wanted in (1, 5, 2, 4, 3, 9):
        stop = min(position + wanted, 20)
        assert equal(reader.take(wanted), stream.of(position, stop))
        position = stop


def test_a_whole_chunk_is_not_copied() -> None:
    chunks = list(torch.arange(12).split(4))
    reader = StreamReader(chunks, batched=True)
    assert reader.take(4) is chunks[0]
    part = reader.take(3)
    assert part.data_ptr() == chunks[1].data_ptr()
    assert reader.take(5).tolist() == [7, 8, 9, 10, 11]


def padded(examples: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Example ``i`` is ``i % 5 + 1`` long; a batch is as long as its longest example."""
    rows = [torch.full((i % 5 + 1,), i) for i in examples]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), examples


@pytest.mark.parametrize("workers", [0, 2])
def test_collate_is_called_once_for_a_batch(workers: int) -> None:
    reader = StreamReader(Numbers(), collate=padded, num_workers=workers, chunk_size=4)
    seen: list[int] = []
    for size in (3, 9, 1, 20, 50):
        rows, numbers = reader.take(size)
        assert torch.equal(rows, padded(numbers)[0])
        seen += numbers
    assert sorted(seen) == list(range(NUMBER))


class Rows(IterableDataset[Any]):
    """Parts of one large tensor, and other objects."""

    def __iter__(self) -> Iterator[Any]:
        for row in torch.arange(400, dtype=torch.bfloat16).view(4, 100):
            yield {"row": row, "column": row[::2], "scalar": row[3], "empty": row[:0], "name": "a", "number": 3}


def test_examples_come_out_of_workers_as_they_are() -> None:
    reader = StreamReader(Rows(), collate=list, num_workers=1, chunk_size=3)
    assert equal(reader.take(9), list(Rows()))


# --- positions


@pytest.mark.parametrize("make", [Numbers, Stateful, Iterated])
@pytest.mark.parametrize("epoch", [0, 2])
def test_from_every_mark(make: Callable[[], Any], epoch: int, recwarn: pytest.WarningsRecorder) -> None:
    batches, marks = read(lambda: StreamReader(make()), epoch=epoch)
    for i, mark in enumerate(marks):
        reader = StreamReader(make())
        reader.seek(mark)
        assert reader.examples == sum(map(len, batches[:i])) and reader.epoch == epoch
        assert flat(taken(reader, sizes(i))) == flat(batches[i:])
        assert reader.take(1) is None and reader.exhausted
        reader.start(epoch + 1)
        assert flat(taken(reader, sizes(i))) == (list(range(NUMBER)) if make is Iterated else in_epoch(epoch + 1))
    skipped = [str(warning.message) for warning in recwarn if "read again" in str(warning.message)]
    assert len(skipped) == (sum(mark["examples"] > 0 and not mark["exhausted"] for mark in marks) if make is Numbers else 0)
    assert not [warning for warning in recwarn if "is not the one" in str(warning.message)]


def in_epoch(epoch: int) -> list[int]:
    numbers = Numbers()
    numbers.set_epoch(epoch)
    return list(numbers)


def test_a_known_position_is_not_read_again() -> None:
    _, marks = read(lambda: StreamReader(Stateful()))
    stream = Stateful()
    reader = StreamReader(stream)
    reader.seek(marks[5])
    reader.take(4)
    assert reader.has_state and stream.reads == 4


def test_marks_stay_as_they_are() -> None:
    reader = StreamReader(Stateful())
    reader.take(5)
    mark = reader.mark()
    before = saved(mark)
    reader.take(7)
    again = StreamReader(Stateful())
    again.seek(mark)
    again.take(9)
    assert equal(mark, before)


@pytest.mark.parametrize("make", [Numbers, Stateful])
def test_a_pass_begins_anew(make: Callable[[], Any]) -> None:
    stream = make()
    reader = StreamReader(stream)
    first, second = in_epoch(0), in_epoch(1)
    assert ids(reader.take(5)) == first[:5]
    reader.start(0)  # the pass was left
    assert ids(reader.take(5)) == first[:5]
    reader.start(1)
    assert ids(reader.take(70)) == second and reader.take(1) is None
    reader.start(1)
    assert ids(reader.take(70)) == second
    reader.close()
    assert ids(reader.take(7)) == second[:7]


def test_another_order_is_noticed(recwarn: pytest.WarningsRecorder) -> None:
    reader = StreamReader(range(30), batched=False)
    reader.take(9)
    same, other = StreamReader(range(30), batched=False), StreamReader(range(29, -1, -1), batched=False)
    same.seek(reader.mark())
    assert not [warning for warning in recwarn if "is not the one" in str(warning.message)]
    with pytest.warns(UserWarning, match="example 9 of the stream is not the one"):
        other.seek(reader.mark())


def test_what_is_skipped_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    reader = StreamReader(Batches([4] * 10), batched=True)
    reader.take(30)
    again = StreamReader(Batches([4] * 10), batched=True)
    with pytest.warns(UserWarning, match="Batches cannot go to a position: the 30 examples"):
        again.seek(reader.mark())
    assert "30/30" in capfd.readouterr().err


# --- workers


@pytest.mark.parametrize("kind", ["own", "loader"])
@pytest.mark.parametrize("make", [Numbers, Stateful])
def test_workers_end(kind: str, make: Callable[[], Any]) -> None:
    stream = make()
    if kind == "loader":
        library = pytest.importorskip("torchdata.stateful_dataloader")
        stream = library.StatefulDataLoader(stream, batch_size=4, num_workers=1)
    reader = StreamReader(stream, num_workers=int(kind == "own"))
    before = len(multiprocessing.active_children())
    reader.take(3)
    assert len(multiprocessing.active_children()) == before + 1
    reader.close()
    assert len(multiprocessing.active_children()) == before


def tensors(examples: list[int]) -> dict[str, torch.Tensor]:
    return {"i": torch.tensor(examples)}


class Grouped(Numbers):
    """Gives batches of 3."""

    def __iter__(self) -> Iterator[torch.Tensor]:  # type: ignore[override]
        yield from torch.tensor(self.mine()).split(3)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "kind", ["batches of a data set", "collated in workers", "examples of a loader", "examples of a stateful"]
)
def test_other_ways_to_read(kind: str, workers: int) -> None:
    def make() -> StreamReader:
        if kind == "batches of a data set":
            return StreamReader(Grouped(), batched=True, num_workers=workers)
        if kind == "collated in workers":
            return StreamReader(Numbers(), collate=tensors, collate_in_workers=True, num_workers=workers, chunk_size=5)
        if kind == "examples of a loader":
            return StreamReader(DataLoader(Numbers(), batch_size=None, num_workers=workers), batched=False)
        library = pytest.importorskip("torchdata.stateful_dataloader")
        loader = library.StatefulDataLoader(Stateful(), batch_size=None, num_workers=workers)
        return StreamReader(loader, batched=False)

    batches, marks = read(make)
    assert flat(batches) == in_epoch(0)
    for i in (0, 1, 5, len(marks) - 1):
        reader = make()
        reader.seek(marks[i])
        assert reader.has_state == (kind == "examples of a stateful")
        assert flat(taken(reader, sizes(i))) == flat(batches[i:])
        reader.close()


def test_the_chunk_size_is_that_of_the_position() -> None:
    reader = StreamReader(Numbers(), num_workers=2, chunk_size=3)
    reader.take(7)
    reader.source.asked_size = 5  # from the next pass on
    mark = reader.mark()
    other = StreamReader(Numbers(), num_workers=2, chunk_size=4)
    other.seek(mark)
    assert ids(other.take(40)) == ids(reader.take(40))
    reader.start(1)
    other.start(1)
    bare = StreamReader(Numbers(), num_workers=2, chunk_size=5)
    bare.start(1)
    assert ids(reader.take(40)) == ids(bare.take(40)) != ids(other.take(40))


@pytest.mark.slow
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_workers_of_other_kinds(context: str) -> None:
    def make() -> StreamReader:
        return StreamReader(Stateful(), num_workers=1, chunk_size=4, multiprocessing_context=context)

    batches, marks = read(make)
    reader = make()
    reader.seek(marks[4])
    assert flat(taken(reader, sizes(0))) == flat(batches[4:])


class Random(IterableDataset[float]):
    """Draws from the generator of its worker."""

    def __iter__(self) -> Iterator[float]:
        for _ in range(30):
            yield random.random()


def test_the_random_numbers_of_workers_repeat(recwarn: pytest.WarningsRecorder) -> None:
    def make(seed: int) -> StreamReader:
        return StreamReader(Random(), num_workers=1, chunk_size=4, seed=seed)

    reader, again = make(1), make(1)
    state = torch.get_rng_state()
    reader.take(11)
    again.seek(reader.mark())
    assert torch.equal(again.take(30), reader.take(30))
    assert torch.equal(torch.get_rng_state(), state)
    assert not [warning for warning in recwarn if "is not the one" in str(warning.message)]
    other = make(2)
    other.seek(reader.mark())  # at the end nothing is read
    reader.start(0)
    reader.take(5)
    with pytest.warns(UserWarning, match="example 5 of the stream is not the one"):
        other.seek(reader.mark())


class Slow(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(2000):
            time.sleep(2e-4)
            yield torch.zeros(64)


@pytest.mark.slow
def test_as_fast_as_a_loader_of_the_same_batches() -> None:
    def seconds(batches: Iterable[Any]) -> float:
        start = time.perf_counter()
        assert sum(len(batch) for batch in batches) == 4000
        return time.perf_counter() - start

    bare, regrouped = [], []
    for _ in range(3):
        bare.append(seconds(DataLoader(Slow(), batch_size=200, num_workers=2)))
        reader = StreamReader(Slow(), num_workers=2)
        regrouped.append(seconds(iter(lambda reader=reader: reader.take(200), None)))  # type: ignore[misc]
    assert min(bare) / min(regrouped) > 0.9


# --- whole batches


class Graph:
    """A batch that cannot be divided."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)


class Resettable:
    """An iterator as those of some libraries: it begins again with ``iter`` at its end."""

    def __init__(self) -> None:
        self.batches = self.made()

    def made(self) -> Iterator[Graph]:
        return (Graph(numbers.tolist()) for numbers in torch.arange(NUMBER).split(4))

    def reset(self) -> None:
        self.batches = self.made()

    def __iter__(self) -> Resettable:
        self.reset()
        return self

    def __next__(self) -> Graph:
        return next(self.batches)


class OwnLoader(DataLoader[Any]):
    """Over a map-style data set, which it iterates in its own way."""

    def __iter__(self) -> Any:
        yield from super().__iter__()


def whole_stream(kind: str) -> Any:
    dataset = list(range(NUMBER))
    if kind == "own loader":
        return OwnLoader(dataset, batch_size=4, shuffle=True, num_workers=0)
    if kind == "own loader, workers":
        return OwnLoader(dataset, batch_size=4, shuffle=True, num_workers=2)
    if kind == "stateful loader":
        library = pytest.importorskip("torchdata.stateful_dataloader")
        return library.StatefulDataLoader(dataset, batch_size=4, shuffle=True)
    if kind == "padded":
        return DataLoader(Numbers(), batch_size=4, collate_fn=padded)
    return {"iterator": Resettable, "list": lambda: [Graph([*range(i, i + i % 4)]) for i in range(0, NUMBER, 3)]}[kind]()


def numbers_of(batch: Any) -> list[int]:
    return batch[1] if isinstance(batch, tuple) else [int(i) for i in batch]


@pytest.mark.filterwarnings("ignore:.*cannot go to a position")
@pytest.mark.quick(kind=["own loader", "stateful loader", "padded", "iterator", "list"])
@pytest.mark.parametrize("kind", ["own loader", "own loader, workers", "stateful loader", "padded", "iterator", "list"])
def test_whole_batches_of_any_loader(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    def pass_of(reader: StreamReader) -> list[list[int]]:
        batches = [(numbers_of(batch), size) for batch, size in iter(reader.take_batch, None)]
        assert all(len(numbers) == size for numbers, size in batches)
        return [numbers for numbers, _ in batches]

    reader = StreamReader(whole_stream(kind), whole=True)
    first = pass_of(reader)
    reader.start(1)
    marks = [reader.mark()]
    second = []
    for batch, _ in iter(reader.take_batch, None):
        second.append(numbers_of(batch))
        marks.append(saved(reader.mark()))
    reader.close()
    bare = [numbers_of(batch) for batch in whole_stream(kind)]
    assert sorted(flat(first)) == sorted(flat(second)) == sorted(flat(bare))
    assert [len(batch) for batch in first] == [len(batch) for batch in bare if len(batch)]
    assert (first != second) == (kind not in ("iterator", "list"))
    for i in (0, 1, 5, len(marks) - 1):
        again = StreamReader(whole_stream(kind), whole=True)
        again.seek(marks[i])
        assert pass_of(again) == second[i:] and again.has_state == (kind == "stateful loader")
        again.close()
    assert not [warning for warning in recwarn if "is not the one" in str(warning.message)]


def steps_of(loader: StreamLoader) -> tuple[list[list[list[int]]], list[int]]:
    """The micro-batches of each step of an epoch, and the examples that each step counts."""
    counts, steps = [], []
    for batch in loader:
        if loader.steps:
            step = loader.steps.popleft()
            parts, counts = [*step.slices], [*counts, step.examples]
            steps.append([])
        part = parts[len(steps[-1])]
        assert part.start == sum(map(len, steps[-1]))
        assert len(batch) == part.stop - part.start or part.stop == part.start
        steps[-1].append(numbers_of(batch) if part.stop > part.start else [])
    return steps, counts


def whole_loader(batches: Any, batch_size: Any, m: int = 4, **arguments: Any) -> StreamLoader:
    return StreamLoader(StreamReader(batches, whole=True), batch_size, whole_batches=m, **arguments)


@pytest.mark.parametrize(
    "batch_size, arguments, expected",
    [
        (8, {}, [[4, 4], [3, 4], [4, 1], [2]]),
        (5, {}, [[4, 4], [3, 4], [4, 1], [2]]),  # rounded up
        (lambda progress: 4 if progress.samples < 8 else 16, {}, [[4], [4], [3, 4, 4, 1], [2]]),
        (12, {"drop_last": True}, [[4, 4, 3], [4, 4, 1]]),
        (8, {"samples_per_epoch": 13}, [[4, 4], [3, 4]]),
        (8, {"samples_per_epoch": 15}, [[4, 4], [3, 4]]),
        (8, {"samples_per_epoch": 16}, [[4, 4], [3, 4], [4]]),
        (8, {"run_end": 9}, [[4, 4], [3]]),
        (16, {"run_end": 16}, [[4, 4, 3, 4], [4]]),  # the batch of 3 leaves one example
    ],
)
def test_a_step_takes_whole_batches(batch_size: Any, arguments: dict[str, Any], expected: list[list[int]]) -> None:
    counts = [4, 4, 3, 4, 4, 1, 2]
    run_end = arguments.pop("run_end", None)
    loader = whole_loader(Batches(counts), batch_size, **arguments)
    loader.run_end = run_end
    steps, examples = steps_of(loader)
    assert [[len(part) for part in step] for step in steps] == expected
    assert examples == [sum(step) for step in expected]
    assert flat(flat(step) for step in steps) == list(range(sum(examples)))


class Together:
    """Two processes as threads, which exchange objects."""

    def __init__(self) -> None:
        self.barrier, self.values, self.ranks = threading.Barrier(2), [None, None], threading.local()

    def gather(self, found: list[Any], mine: Any) -> None:
        self.values[self.ranks.rank] = mine
        self.barrier.wait(10)
        found[:] = self.values
        self.barrier.wait(10)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        def call(rank: int) -> Any:
            self.ranks.rank = rank
            return function(rank)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(call, range(2)))


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=12),
    st.lists(st.integers(1, 3), min_size=1, max_size=12),
    st.lists(st.integers(1, 20), min_size=12, max_size=12),
    st.booleans(),
)
def test_processes_take_whole_batches_together(one: list[int], other: list[int], wanted: list[int], is_whole: bool) -> None:
    streams, together = (one, other), Together()

    def run(rank: int) -> Any:
        reader = StreamReader(Batches(streams[rank]), **({"whole": True} if is_whole else {"batched": True}))
        size = lambda progress: wanted[min(progress.step, 11)]  # noqa: E731
        cut = Cut(rank, 2, None if is_whole else 2)
        return steps_of(StreamLoader(reader, size, cut, whole_batches=3 if is_whole else None))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_gather_object", together.gather)
        (first, counts), (second, same) = together.run(run)
    assert counts == same and [len(step) for step in first] == [len(step) for step in second]
    for step, parts in enumerate(zip(first, second)):
        assert sum(len(part) for of_process in parts for part in of_process) == counts[step]
        number = sum(bool(part) for of_process in parts for part in of_process)
        if step < len(counts) - 1:  # full while any process has batches
            asked = wanted[min(step, 11)]
            assert number == 2 * -(-asked // 6) if is_whole else counts[step] == asked
    for steps, stream in ((first, one), (second, other)):
        assert flat(flat(step) for step in steps) == list(range(sum(stream)))
        if is_whole:
            assert [len(part) for step in steps for part in step if part] == stream


def test_a_process_that_resumes_at_its_end_repeats_its_first_batch() -> None:
    streams, together = ([2, 3], [3] * 9), Together()

    def run(rank: int, position: Any = None) -> Any:
        loader = StreamLoader(StreamReader(Batches(streams[rank]), whole=True), 6, Cut(rank, 2), whole_batches=3)
        if position is not None:
            loader.clock, loader.behind, loader.position = lambda: Progress(0, 2, 11), lambda: 11, position[rank]
        batches: list[list[int]] = []
        marks: list[Any] = []
        for batch in loader:
            if len(loader.steps) > len(marks):
                marks.append(saved(plain_mark(loader.steps[-1].mark)))
            batches.append(batch.tolist())
        return batches, marks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_gather_object", together.gather)
        (whole, marks), (_, others) = together.run(run)
        position = marks[2], others[2]
        assert position[0]["examples"] == 5
        (resumed, _), _ = together.run(lambda rank: run(rank, position))
    assert whole == [[0, 1], [2, 3, 4], *[[0, 1]] * 8][: len(whole)] and resumed == whole[2:]


def test_a_process_without_examples() -> None:
    together = Together()

    def run(rank: int) -> str:
        with pytest.raises(RuntimeError) as caught:
            list(StreamLoader(StreamReader(Batches([5] * rank), batched=True), 4, Cut(rank, 2)))
        return str(caught.value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_gather_object", together.gather)
        messages = together.run(run)
    assert messages[0] == messages[1] and "processes [0] have no examples" in messages[0]


def test_an_epoch_that_ends_early_is_noted(recwarn: pytest.WarningsRecorder) -> None:
    for loader in (whole_loader(Batches([4, 3]), 4, samples_per_epoch=9), StreamLoader(StreamReader(Numbers(7)), 4, Cut(), 9)):
        with pytest.warns(UserWarning, match="after 7 examples of epoch 0, before `samples_per_epoch=9`") as record:
            assert sum(map(len, loader)) == sum(map(len, loader)) == 7
        assert len(record) == 1
    assert sum(map(len, StreamLoader(StreamReader(Numbers(7)), 4, Cut(), 7))) == 7
    assert not [warning for warning in recwarn if "streams ended" in str(warning.message)]


# --- libraries


@dataclass
class Library:
    """A library's stream.

    Attributes:
        bare: What the library's own loader gives in batches of 4, with a number of workers.
        reader: A reader of the stream, which gets 4 examples at once.
        has_state: Whether it knows its position.
    """

    bare: Callable[[int], Any]
    reader: Callable[[int], StreamReader]
    has_state: Callable[[int], bool]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same examples as each library writes them, in 4 shards of different sizes."""
    folder = tmp_path_factory.mktemp("shards")
    parts = np.split(np.arange(NUMBER), [14, 31, 45])
    for shard, part in enumerate(parts):
        lines = [json.dumps({"i": int(i), "name": f"name {i}"}) for i in part]
        (folder / f"{shard}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def tars(shards: Path) -> list[str]:
    webdataset = pytest.importorskip("webdataset")
    paths = []
    for path in sorted(shards.glob("*.jsonl")):
        paths.append(str(path.with_suffix(".tar")))
        with webdataset.TarWriter(paths[-1]) as writer:
            for line in path.read_text().splitlines():
                example = json.loads(line)
                writer.write({"__key__": f"{example['i']:03d}", "i.cls": example["i"], "name.txt": example["name"]})
    return paths


@pytest.fixture(scope="module")
def optimized(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("litdata")
    from litdata.streaming.writer import BinaryWriter

    folder = str(tmp_path_factory.mktemp("optimized"))
    writer = BinaryWriter(folder, chunk_size=13)
    for i in range(NUMBER):
        writer[i] = {"i": i, "x": np.full(3, i)}
    writer.done()
    writer.merge(1)
    return folder


def number_of(example: dict[str, Any]) -> dict[str, Any]:
    return {"i": example["i.cls"], "name": example["name.txt"]}


def library(name: str, request: pytest.FixtureRequest) -> Library:
    kind, _, variant = name.partition(" ")
    if kind == "litdata":
        litdata = pytest.importorskip("litdata")
        folder = request.getfixturevalue("optimized")

        def streaming() -> Any:
            if variant == "combined":
                parts = [litdata.StreamingDataset(folder), litdata.StreamingDataset(folder)]
                return litdata.CombinedStreamingDataset(parts, seed=3, iterate_over_all=True)
            return litdata.StreamingDataset(folder, shuffle=variant == "shuffled", seed=3)

        def loader(workers: int) -> Any:
            return litdata.StreamingDataLoader(streaming(), batch_size=4, num_workers=workers)

        if variant == "loader":
            return Library(loader, lambda workers: StreamReader(loader(workers)), lambda _: True)
        return Library(
            loader,
            lambda workers: StreamReader(streaming(), num_workers=workers, chunk_size=4),
            lambda _: variant != "combined",
        )
    if kind == "webdataset":
        webdataset = pytest.importorskip("webdataset")
        paths = request.getfixturevalue("tars")

        def pipeline() -> Any:
            return webdataset.WebDataset(paths, shardshuffle=False).decode().map(number_of)

        def web_loader(workers: int) -> Any:
            if variant == "batches":  # as its documentation recommends: batches of the workers, divided and batched again
                loader = webdataset.WebLoader(pipeline().batched(5), batch_size=None, num_workers=workers)
                return loader.unbatched().batched(4)
            return webdataset.WebLoader(pipeline(), batch_size=4, num_workers=workers)

        if variant in ("loader", "batches"):
            return Library(web_loader, lambda workers: StreamReader(web_loader(workers), batched=True), lambda _: False)
        return Library(
            web_loader,
            lambda workers: StreamReader(pipeline(), batched=False, num_workers=workers, chunk_size=4),
            lambda _: False,
        )
    if kind == "datasets":
        datasets = pytest.importorskip("datasets")
        paths = [str(path) for path in sorted(request.getfixturevalue("shards").glob("*.jsonl"))]

        def streamed() -> Any:
            stream = datasets.load_dataset("json", data_files={"train": paths}, split="train", streaming=True)
            return stream.shuffle(seed=1, buffer_size=7) if variant == "shuffled" else stream

        if variant == "loader":
            torchdata = pytest.importorskip("torchdata.stateful_dataloader")

            def stateful_loader(workers: int) -> Any:
                return torchdata.StatefulDataLoader(streamed(), batch_size=4, num_workers=workers, snapshot_every_n_steps=3)

            return Library(stateful_loader, lambda workers: StreamReader(stateful_loader(workers)), lambda _: True)
        return Library(
            lambda workers: DataLoader(streamed(), batch_size=4, num_workers=workers),
            lambda workers: StreamReader(streamed(), num_workers=workers, chunk_size=4),
            lambda _: variant != "shuffled",
        )
    stream = {"plain": Numbers, "stateful": Stateful}[kind]

    def torch_loader(workers: int) -> Any:
        return DataLoader(stream(), batch_size=4, num_workers=workers)

    if variant == "loader":
        return Library(torch_loader, lambda workers: StreamReader(torch_loader(workers)), lambda _: False)
    return Library(
        torch_loader,
        lambda workers: StreamReader(stream(), num_workers=workers, chunk_size=4),
        lambda _: kind == "stateful",
    )


LIBRARIES = [
    "plain", "plain loader", "stateful", "litdata", "litdata shuffled", "litdata loader", "litdata combined", "webdataset",
    "webdataset loader", "webdataset batches", "datasets", "datasets shuffled", "datasets loader",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*cannot go to a position", "ignore:.*set_vital", "ignore::FutureWarning")
@pytest.mark.quick(workers=[0], name=list(LIBRARIES)[::2])
@pytest.mark.quick(workers=[2], name=["litdata", "datasets loader"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", LIBRARIES)
def test_each_library(name: str, workers: int, request: pytest.FixtureRequest, recwarn: pytest.WarningsRecorder) -> None:
    there = library(name, request)
    expected = flat(ids(batch) for batch in there.bare(workers))
    batches, marks = read(lambda: there.reader(workers))
    assert sorted(flat(batches)) == sorted(expected)
    assert sorted(flat(batches)) == sorted([*range(NUMBER)] * (2 if "combined" in name else 1))
    if not ("shuffled" in name and workers):
        assert flat(batches) == expected
    every = 1 if request.config.option.markexpr == "slow" else 6
    positions = [*range(0, len(marks), every), len(marks) - 2, len(marks) - 1]
    for i in positions:
        reader = there.reader(workers)
        reader.seek(marks[i])
        assert reader.has_state == there.has_state(workers)
        assert flat(taken(reader, sizes(i))) == flat(batches[i:]), marks[i]
        assert reader.take(1) is None and reader.exhausted
        reader.close()

    reader.start(1)  # after a position was loaded
    second, marks = read(lambda: there.reader(workers), epoch=1)
    assert flat(taken(reader, sizes(0))) == flat(second) and sorted(flat(second)) == sorted(expected)
    assert (second == batches) != (name.split()[0] in ("plain", "stateful") or "shuffled" in name)
    reader.seek(marks[7])
    assert flat(taken(reader, sizes(1))) == flat(second[7:])
    reader.start(0)
    assert flat(taken(reader, sizes(1))) == flat(batches)
    reader.close()
    assert not [warning for warning in recwarn if "is not the one" in str(warning.message)]


@pytest.mark.parametrize("kind", ["litdata", "litdata loader"])
def test_litdata_gives_each_process_some_of_few_examples(kind: str, optimized: str) -> None:
    litdata = pytest.importorskip("litdata")
    from litdata.utilities.env import _DistributedEnv

    together = Together()

    def run(rank: int) -> Any:
        stream = litdata.StreamingDataset(optimized, drop_last=False)
        stream.distributed_env = _DistributedEnv(2, rank, 1)
        if kind == "litdata loader":
            loader = StreamLoader(StreamReader(litdata.StreamingDataLoader(stream, batch_size=40)), 8, Cut(rank, 2))
            with pytest.raises(RuntimeError) as caught:
                list(loader)
            return str(caught.value)
        loader = StreamLoader(StreamReader(stream), 8, Cut(rank, 2))
        return [i for batch in loader for i in ids(batch)], loader.reader.examples

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_gather_object", together.gather)
        one, other = together.run(run)
    if kind == "litdata loader":
        assert one == other and re.search(r"\(batch_size=40\) among 2 processes x 1 workers: write a smaller `batch_size`", one)
    else:
        assert sorted({*one[0], *other[0]}) == list(range(NUMBER)) and one[1] + other[1] == NUMBER
        assert abs(one[1] - other[1]) < NUMBER / 4


def test_tensor_parallelism_is_refused() -> None:
    trainer: Any = SimpleNamespace(world_size=4, distributed_sampler_kwargs={"rank": 1, "num_replicas": 4})
    assert stream_process(trainer) == (1, 4)
    trainer.distributed_sampler_kwargs["num_replicas"] = 2
    with pytest.raises(MisconfigurationException, match=r"2 processes train on the same examples.*`tensor_parallel_size=1`"):
        stream_process(trainer)


def test_batches_are_pinned_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pins: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (pins.append(len(tensor)), tensor)[1])
    reader = StreamReader(Nested(), batched=True)
    batches = list(StreamLoader(reader, 7, Cut(max_device_batch_size=4), pin_memory=True))
    assert pins == [7] * 4 + [7] * 4 + [6] * 4 and [len(batch["x"]) for batch in batches] == [3, 4, 3, 4, 3, 3]
    assert equal(batches[1], Nested().of(3, 7))


# --- refusals


class Opaque(Stateful):
    def state_dict(self) -> dict[str, Any]:
        return {"draw": [random.Random()]}


def reader_of(stream: Any, **arguments: Any) -> Callable[[], Any]:
    return lambda: StreamReader(stream, **arguments)


def moved(mark: dict[str, Any], stream: Any, **arguments: Any) -> Callable[[], Any]:
    return lambda: StreamReader(stream, **arguments).seek(mark)


def first(*batches: Any, n: int = 3) -> Callable[[], Any]:
    return lambda: StreamReader(batches, batched=True).take(n)


EIGHT = torch.arange(8)
REFUSALS = {
    "map-style data set": (reader_of(regression(8)), TypeError, "TensorDataset reads a map-style data set"),
    "map-style loader": (reader_of(DataLoader(TensorDataset(EIGHT))), TypeError, "DataLoader reads a map-style data set"),
    "no iterable": (reader_of(5), TypeError, "int cannot be iterated"),
    "a generator": (reader_of(iter([1, 2]), batched=False), TypeError, "list_iterator can be iterated once only"),
    "unknown iterable": (reader_of([EIGHT]), ValueError, "whether list gives examples or batches: write batched=True"),
    "unknown loader": (reader_of(DataLoader(Numbers(), batch_size=None)), ValueError, "whether DataLoader gives examples or"),
    "examples of a loader": (reader_of(DataLoader(Numbers(), batch_size=3), batched=False), ValueError, "batch_size=3"),
    "collate of batches": (reader_of([EIGHT], batched=True, collate=list), ValueError, "`collate` has no effect on a"),
    "workers of a loader": (reader_of(DataLoader(Numbers(), 3), num_workers=1), ValueError, "`num_workers=1` has no effect"),
    "workers of a list": (reader_of([1, 2], batched=False, num_workers=2), ValueError, "worker would read all of the list"),
    "workers": (reader_of(Numbers(), num_workers=-1), ValueError, "`num_workers=-1` must be 0 or more"),
    "examples that stay whole": (reader_of(Numbers(), whole=True, batched=False), ValueError, "leave `batched` out"),
    "whole batches once": (reader_of(iter([EIGHT]), whole=True), TypeError, "list_iterator can be iterated once only"),
    "whole rows": (lambda: StreamReader([{"x": EIGHT, "y": EIGHT[:3]}], whole=True).take_batch(), ValueError,
                   "has no known number of examples, since its parts .*; let the loader give tensors whose first dimension"),
    "whole text": (lambda: StreamReader([{"x": EIGHT, "y": "a"}], whole=True).take_batch(), ValueError,
                   r"has no known number of examples: batch\['y'\] is a str.*; let the loader give tensors"),
    "large batches": (lambda: list(whole_loader(Batches([4, 5]), 8)), ValueError,
                      "a batch of 5 examples, but its batches have at most 4 "),
    "a reader of examples": (lambda: StreamLoader(StreamReader(Numbers()), 8, whole_batches=4), ValueError,
                             r"`whole_batches=4` with a StreamReader\(whole=False\)"),
    "chunks": (reader_of(Numbers(), chunk_size=0), ValueError, "`chunk_size=0` must be 1 or more"),
    "no examples": (lambda: StreamReader(Numbers()).take(0), ValueError, "`n=0` must be 1 or more"),
    "an epoch": (lambda: StreamReader(Numbers()).start(-1), ValueError, "`epoch=-1` must be 0 or more"),
    "rows": (first({"x": EIGHT, "y": EIGHT[:3]}), ValueError, r"\(batch\['x'\]: 8, batch\['y'\]: 3\); give a stream"),
    "a scalar": (first([EIGHT[0], EIGHT]), ValueError, r"batch\[0\]: 0, batch\[1\]: 8"),
    "nothing": (first({}), ValueError, "no tensors"),
    "text": (first({"x": EIGHT, "name": "a"}), ValueError, r"batch\['name'\] is a str, but must be a tensor"),
    "lists": (first([[1, 2], [3, 4]]), ValueError, "whether batch, a list of lists, holds fields or examples"),
    "lengths": (first(EIGHT.view(2, 4), EIGHT.view(4, 2)), ValueError, r"not alike \(\(2, 4\), \(1, 2\)\); give a stream"),
    "arrays": (first(np.zeros((2, 4)), np.zeros((4, 2))), ValueError, "cannot be joined"),
    "keys": (first({"x": EIGHT[:2]}, {"y": EIGHT[:2]}), ValueError, r"not alike \(\['x'\], \['y'\]\)"),
    "fields": (first([EIGHT[:2]], [EIGHT[:2]] * 2), ValueError, "not alike"),
    "none": (first([EIGHT[:2], None], [EIGHT[:2]] * 2), ValueError, "NoneType, Tensor"),
    "a list of examples": (
        lambda: StreamReader(DataLoader(Rows(), 2, collate_fn=lambda rows: [row["row"] for row in rows])).take(1),
        ValueError, "batch_size=2, but its batches have parts with 100 rows"),
    "more workers": (moved(StreamReader(Numbers()).mark(), Numbers(), num_workers=2), ValueError,
                     "marked with num_workers=0, but num_workers=2 now: .* write num_workers=0"),
    "batch size": (moved(StreamReader(DataLoader(Numbers(), 3)).mark(), DataLoader(Numbers(), 4)), ValueError,
                   "batch_size=3, but it has batch_size=4 now; write batch_size=3"),
    "no mark": (moved({"epoch": 3}, Numbers()), ValueError, "no position of a stream"),
    "short": (moved(StreamReader(Numbers()).mark() | {"examples": 99, "chunks": 99}, Numbers()), ValueError,
              "ended before its position of 99 examples"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*cannot go to a position")
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    call, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        call()


def test_a_position_that_a_checkpoint_cannot_hold() -> None:
    reader = StreamReader(Opaque())
    reader.take(3)
    with pytest.raises(TypeError, match=r"holds a Random in state\['stream'\]\['draw'\]\[0\]"):
        reader.mark()
