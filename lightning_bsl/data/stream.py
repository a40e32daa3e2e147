"""Batches of any size from a stream of examples or of small batches."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate
from tqdm import tqdm

from lightning_bsl.data.batches import PLAIN, checksum, joined, size_of, size_of_whole, sliced
from lightning_bsl.data.sampler import epoch_generator
from lightning_bsl.schedules.checks import check_whole

FORMAT = 1  # of a mark
_END = object()  # of a pass
MOST_BYTES = 2**18  # of a tensor that goes through a pipe; a file in shared memory is faster for larger ones


class StreamReader:
    """Regroups a stream to batches of any size: each example once, in the order of the stream.

    ``take`` gives the next batch, ``mark`` the position before the next ``take``. The position follows from what was taken, not
    from what workers have fetched. A new reader over the same stream goes on there after ``seek``.

    A chunk is what the reader gets at once: an example, a batch of the stream, or ``chunk_size`` examples that a worker reads.
    The order is that of the stream; with several workers, of the chunks that they give in turn.

    ``seek`` loads the library's own position if it has one: from a loader with ``state_dict`` and ``load_state_dict``
    (torchdata's ``StatefulDataLoader``, litData's ``StreamingDataLoader``) or a data set with them (with workers this needs
    torchdata). Otherwise it reads all that was taken again and drops it; the stream must then give the same examples in the
    same order in each run. So it is with plain iterables, with webdataset, with the shuffle buffer of ``datasets`` (its own
    position would lose the examples of the buffer), and with data sets combined by litData.

    Args:
        stream: A loader over an ``IterableDataset``, an ``IterableDataset``, or any iterable that can be iterated again.
        batched: Whether an element of the stream is a batch, not an example. By default yes for a torch ``DataLoader`` with a
            batch size, and no for an ``IterableDataset``. For others (plain iterables, webdataset, a ``DataLoader`` without a
            batch size) it must be given.
        whole: Whether the stream gives batches that are neither cut nor joined; ``take_batch`` reads them. The stream may then
            be a loader of any kind, also over a map-style data set, and its batches any objects. An iterator must have a method
            ``reset``, and begin again with each ``iter``. Samplers with a ``generator`` get one that follows from ``seed``.
        collate: Makes a batch of a list of examples; by default ``torch.utils.data.default_collate``. It is called in this
            process, once for each batch.
        num_workers: Number of worker processes that read an ``IterableDataset``. A loader has its own.
        chunk_size: Number of examples that a worker reads at once. About that of a batch is fastest, if batches are large.
        collate_in_workers: Whether the workers make a batch of each chunk; the batches are then joined. By default only without
            ``collate``, since a function that pads, for example, gives batches that do not fit together.
        multiprocessing_context: How to start the workers: ``"fork"``, ``"forkserver"`` or ``"spawn"``.
        seed: The random numbers of the workers follow from it and from the epoch.

    Attributes:
        source: The stream; its ``asked_size`` is ``chunk_size``, and may be changed for the next ``start``.
        epoch: Index of the pass.
        examples: Number of examples of the pass that were taken.
        exhausted: Whether the end of the pass was seen. A ``take`` of exactly the last examples does not see it.

    Raises:
        TypeError: A map-style data set or a loader over one, a generator, or an object that is not iterable.
        ValueError: It is not known whether the stream gives batches, or an argument has no effect on this stream.

    Example:
        >>> reader = StreamReader(range(10), batched=False)
        >>> reader.take(3), reader.take(4)
        (tensor([0, 1, 2]), tensor([3, 4, 5, 6]))
        >>> mark = reader.mark()
        >>> reader.take(9), reader.take(9)
        (tensor([7, 8, 9]), None)
    """

    def __init__(
        self,
        stream: Any,
        *,
        batched: bool | None = None,
        whole: bool = False,
        collate: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        chunk_size: int = 128,
        collate_in_workers: bool | None = None,
        multiprocessing_context: str | None = None,
        seed: int = 0,
    ) -> None:
        self.source = Source(
            stream, batched, whole, collate, num_workers, chunk_size, collate_in_workers, multiprocessing_context, seed
        )
        self.epoch = self.examples = 0
        self.exhausted = False
        self._left = False  # whether the stream may stand inside a pass
        self._iterator: Iterator[Any] | None = None
        self._state: Any = None  # a position of the library; None is the start of the pass
        self._chunks = 0  # chunks that were used up since then; empty ones do not count
        self._chunk: Any = None  # the chunk under way
        self._size = self._taken = 0  # its examples, and how many of them were taken
        self._largest = 0  # examples of the largest chunk, as far as it is known
        self._shorter = False  # whether a chunk was smaller than one before it
        self._last: Any = None  # the last example taken in a tuple, or its checksum; if the library knows no position

    @property
    def has_state(self) -> bool:
        """Whether ``seek`` loads the library's own position."""
        return self.source.has_state

    def start(self, epoch: int = 0) -> None:
        """Begin a pass over the stream; the first ``take`` does it for epoch 0.

        Args:
            epoch: Index of the pass. ``set_epoch`` of the stream and of its data set is called with it, if there is one.
        """
        check_whole("epoch", epoch, least=0)
        self._begin(epoch, None)

    def take(self, n: int) -> Any:
        """The next examples as one batch.

        Args:
            n: Number of examples.

        Returns:
            A batch of ``n`` examples, or fewer at the end of the pass; ``None`` if nothing is left. Its tensors may be parts of
            tensors of the stream.

        Raises:
            ValueError: The batches of the stream cannot be divided or joined.
        """
        check_whole("n", n)
        self._ready()
        source = self.source
        if source.single:
            examples = self._read_examples(n)
            self.examples += len(examples)
            if examples and not source.has_state:
                self._last = (examples[-1],)
            return source.collate(examples) if examples else None
        pieces: list[Any] = []
        missing = n
        while missing and self._has_chunk(missing):
            start, stop = self._taken, min(self._taken + missing, self._size)
            pieces.append(self._chunk if stop - start == self._size else source.part(self._chunk, start, stop))
            missing -= stop - start
            self._taken = stop
            if not source.has_state:
                self._last = (source.part(self._chunk, stop - 1, stop),) if not missing else None
            if stop == self._size:
                self._drop_chunk()
                self._chunks += 1
        self.examples += n - missing
        if not pieces:
            return None
        if source.lists:
            return source.collate([example for piece in pieces for example in piece])
        return pieces[0] if len(pieces) == 1 else joined(pieces)

    def take_batch(self) -> tuple[Any, int] | None:
        """The next whole batch of the stream, and the number of its examples; ``None`` at the end of the pass.

        Raises:
            ValueError: The number of examples is not known.
        """
        self._ready()
        if not self._has_chunk(0):
            return None
        batch, size = self._chunk, self._size
        self._drop_chunk()
        self._chunks += 1
        self.examples += size
        if not self.source.has_state:
            self._last = (batch,)
        return batch, size

    def first(self) -> Any:
        """The first example of the pass as a batch, or its first whole batch; it is read again.

        Returns:
            The batch; ``None`` if the stream has no examples.
        """
        mark = self.mark()
        self._begin(self.epoch, None)
        first = self.take_batch() if self.source.whole else (self.take(1),)
        self.seek(mark)
        return first and first[0]

    def mark(self, plain: bool = True) -> dict[str, Any]:
        """The position before the next ``take``: numbers, strings, lists, dicts and tensors only.

        Args:
            plain: Whether it is to be saved. If not, it costs less, and ``plain_mark`` makes it one that can be saved.

        Raises:
            TypeError: The position of the library holds other objects.
        """
        self._ready()
        self._settle()
        mark = {
            "format": FORMAT,
            "epoch": self.epoch,
            "examples": self.examples,
            "exhausted": self.exhausted,
            "num_workers": self.source.num_workers,
            "chunk_size": self.source.chunk_size,
            "state": self._state,
            "chunks": self._chunks,
            "taken": self._taken,
            "last": self._last,
        }
        return plain_mark(mark) if plain else mark

    def seek(self, mark: Mapping[str, Any]) -> None:
        """Go on at a position. A ``chunk_size`` is then that of the position, until the next ``start``.

        Args:
            mark: What ``mark`` returned, for the same stream and the same number of workers.

        Raises:
            ValueError: The position is from another number of workers or another batch size of the loader; or the stream has
                fewer examples than were taken.
        """
        if mark.get("format") != FORMAT:
            raise ValueError(f"this is no position of a stream: its `format` is {mark.get('format')!r}, not {FORMAT}")
        mark = plain_mark(mark)
        self.source.check(mark)
        if mark["exhausted"]:  # a library might begin again
            self.close()
            self.epoch, self.examples, self.exhausted = mark["epoch"], mark["examples"], True
            return
        self._begin(mark["epoch"], mark["state"], mark["chunk_size"])
        self._skip(mark)
        self.examples, self._last = mark["examples"], mark["last"]

    def close(self) -> None:
        """End the workers. A later ``take`` begins the pass again."""
        self._iterator = None
        self.source.close()
        self.exhausted, self._left = False, True
        self._drop_chunk()

    def _ready(self) -> None:
        if self._iterator is None and not self.exhausted:
            self._begin(self.epoch, None)

    def _begin(self, epoch: int, state: Any, chunk_size: int | None = None) -> None:
        again = self._left or not self.exhausted or epoch <= self.epoch  # the last pass was left, or is repeated
        self._iterator, self._left = None, False
        self._drop_chunk()
        self.epoch, self.examples, self.exhausted = epoch, 0, False
        self._state, self._chunks, self._last = state, 0, None
        self._iterator = self.source.open(epoch, state, again, chunk_size)
        self._largest, self._shorter = self.source.chunk_size or 0, False

    def _read_examples(self, n: int) -> list[Any]:
        examples = [] if self._iterator is None else list(islice(self._iterator, n))
        self.exhausted = self.exhausted or len(examples) < n
        self._chunks += len(examples)
        return examples

    def _has_chunk(self, missing: int) -> bool:
        """Read a chunk if none is under way. False at the end of the pass."""
        if self._chunk is None and not self.exhausted:
            if not self.source.whole and (missing < self._largest or not self._largest):
                self._settle()  # the next chunk may be taken in part, and the library's position is then behind it
            self._read_chunk()
        return self._chunk is not None

    def _read_chunk(self) -> None:
        assert self._iterator is not None
        # not `for`: its `iter` would make some libraries' iterators begin again
        while (item := next(self._iterator, _END)) is not _END:
            chunk, size = self.source.opened(item)
            self._shorter = self._shorter or size < self._largest
            self._largest = max(self._largest, size)
            if size:
                self._chunk, self._size = chunk, size
                return
        self.exhausted = True

    def _drop_chunk(self) -> None:
        self._chunk, self._size, self._taken = None, 0, 0

    def _settle(self) -> None:
        """Ask the library for its position, if it has given nothing that was not taken."""
        if self._chunk is None and self._chunks and not self.exhausted:
            state = self.source.position(self._shorter)
            if state is not None:
                self._state, self._chunks = state, 0

    def _skip(self, mark: Mapping[str, Any]) -> None:
        """Read and drop what was taken after the library's position."""
        number, start = mark["examples"], time.monotonic()
        from_start = mark["state"] is None and number > 0 and not self.source.has_state
        if from_start:
            rank_zero_warn(
                f"{type(self.source.stream).__name__} cannot go to a position: the {number} examples that were taken before "
                "are read again and dropped"
            )
        last = None
        with tqdm(total=number, desc="Skipping", unit=" examples", disable=not from_start or not _is_first()) as bar:
            left = mark["chunks"]
            while left:
                if self.source.single:
                    examples = self._read_examples(min(left, 256))
                    left -= len(examples)
                    bar.update(len(examples))
                    last = examples[-1] if examples else None
                else:
                    self._read_chunk()
                    self._chunks += 1
                    left -= 1
                    bar.update(self._size)
                    if not self.exhausted:
                        last = self.source.part(self._chunk, self._size - 1, self._size)
                    self._drop_chunk()
                if self.exhausted:
                    break
            if mark["taken"] and not self.exhausted:
                self._read_chunk()
                self._taken = mark["taken"]
                bar.update(self._taken)
                if self._size >= self._taken:
                    last = self.source.part(self._chunk, self._taken - 1, self._taken)
        if self.exhausted or self._size < self._taken:
            raise ValueError(f"the stream ended before its position of {number} examples: it is not the one that was marked")
        if from_start:
            rank_zero_info(f"Skipped {number} examples in {time.monotonic() - start:.1f} s")
            if mark["last"] is not None and mark["last"] != checksum(last):
                rank_zero_warn(
                    f"example {number} of the stream is not the one that was taken before. If examples are changed at random, "
                    "this is as it should be. If their order is random, some are now trained twice and others never: give the "
                    "stream a seed"
                )


class Source:
    """A stream as a library reads it: its iterator, what comes out of it, and the library's own position.

    Args:
        stream: The same as for ``StreamReader``, as are the others.
        batched: Whether an element is a batch.
        whole: Whether it is neither cut nor joined.
        collate: Makes a batch of examples.
        num_workers: Number of worker processes.
        chunk_size: Number of examples that a worker reads at once.
        collate_in_workers: Whether the workers make batches.
        multiprocessing_context: How to start the workers.
        seed: Seed of the workers.
    """

    def __init__(
        self,
        stream: Any,
        batched: bool | None,
        whole: bool,
        collate: Callable[[list[Any]], Any] | None,
        num_workers: int,
        chunk_size: int,
        collate_in_workers: bool | None,
        multiprocessing_context: str | None,
        seed: int,
    ) -> None:
        check_whole("num_workers", num_workers, least=0)
        check_whole("chunk_size", chunk_size)
        self._torch_loader = loader = loader_of(stream)
        _check_stream(stream, loader, num_workers, whole)
        self.stream, self.whole = stream, whole
        self.batched = _gives_batches(stream, loader, True if whole and batched is None else batched)
        if whole and not self.batched:
            raise ValueError("`batched=False` with `whole=True`: leave `batched` out, since whole batches are taken")
        if self.batched and collate is not None:
            raise ValueError("`collate` has no effect on a stream of batches: leave it out, or give a stream of examples")
        self.dataset = stream if loader is None else loader.dataset
        self.num_workers: int = num_workers if loader is None else loader.num_workers
        self.loader: Any = None if loader is None else stream
        self.loader_class = _class_of_loader(stream, num_workers) if loader is None else None  # of a loader that is made here
        self.asked_size = chunk_size
        self.chunk_size: int | None = None if loader is None else loader.batch_size  # examples read at once, if it is fixed
        if self.sized:
            self.chunk_size = chunk_size
        self.single = not self.batched and self.loader_class is None  # whether an element is one example
        in_workers = num_workers > 0 and (collate is None if collate_in_workers is None else collate_in_workers)
        self.lists = self.sized and not in_workers  # whether an element is a list of examples
        self.collate = collate or default_collate
        self.multiprocessing_context = multiprocessing_context
        self.seed = seed
        self.litdata = _is_from(self.dataset, "litdata")
        self._iterator: Any = None
        self.has_state = self._knows_position()
        self._stale = False  # whether positions of this pass are not to be trusted
        self._first: tuple[Any] | None = None  # the position of the data set before the first pass

    @property
    def sized(self) -> bool:
        """Whether the reader chooses how many examples are read at once."""
        return self.loader_class is not None and not self.batched

    @property
    def divided_length(self) -> int | None:
        """Examples of this process, if the library divides what is read at once, not examples, among processes and workers."""
        if not (self.litdata and self.sized and hasattr(self.dataset, "get_len")):
            return None
        length: int | None = self.dataset.get_len(max(1, self.num_workers), 1)
        return length

    def open(self, epoch: int, state: Any, again: bool, chunk_size: int | None) -> Iterator[Any]:
        """Begin a pass.

        Args:
            epoch: Index of the pass.
            state: The library's position to begin at; the start of the pass if it is ``None``.
            again: Whether the pass before was left, or is repeated.
            chunk_size: Number of examples to read at once, instead of the one asked for.
        """
        self._release()
        # a worker of `datasets` that has loaded a position and given nothing yet reports the start of its shards
        self._stale = state is not None and self.num_workers > 0 and hasattr(self.dataset, "_ex_iterable")
        if self.sized:
            self.chunk_size = chunk_size or self.asked_size
        if self.num_workers == 0 and _is_stateful(self.dataset) and not self.litdata:
            # read in this process, a data set may stand where a pass was left, or where an earlier position was loaded
            if self._first is None:
                self._first = (copy.deepcopy(self.dataset.state_dict()),)
            elif again:
                self.dataset.load_state_dict(copy.deepcopy(self._first[0]))
        for part in self._parts():
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch + 1 if self.litdata else epoch)  # litData counts from 1, and mixes both counts otherwise
            if isinstance(part, Sampler) and isinstance(getattr(part, "generator", 0), (torch.Generator, type(None))):
                part.generator = epoch_generator(self.seed, epoch, stream=1)  # type: ignore[attr-defined]
        if self._here:
            self._iterate_here(state)
        else:
            self._iterate_loader(epoch, state)
        iterator: Iterator[Any] = self._iterator
        return iterator

    def _parts(self) -> list[Any]:
        """The stream, its data set, and its samplers."""
        parts = [self.stream, self.dataset]
        if self._torch_loader is not None and not isinstance(self.dataset, IterableDataset):
            batches = self._torch_loader.batch_sampler
            parts += [self._torch_loader.sampler, batches, getattr(batches, "sampler", None)]
        return [part for i, part in enumerate(parts) if not any(part is other for other in parts[:i])]

    def close(self) -> None:
        """End the workers."""
        self._release()
        if self._torch_loader is not None:
            self._torch_loader._iterator = None  # some loaders hold it, and with it the workers

    def opened(self, item: Any) -> tuple[Any, int]:
        """An element of the stream, and the number of its examples.

        Args:
            item: What the iterator gave.
        """
        chunk = item.opened() if isinstance(item, _Packed) else item
        if self.lists:
            return chunk, len(chunk)
        batch_size = self.stream.batch_size if isinstance(self.stream, DataLoader) else None
        return chunk, (size_of_whole if self.whole else size_of)(chunk, batch_size)

    def part(self, chunk: Any, start: int, stop: int) -> Any:
        """Some examples of an element; all of them if it stays whole.

        Args:
            chunk: The element.
            start: The first example.
            stop: The first example after them.
        """
        if self.whole:
            return chunk
        return chunk[start:stop] if self.lists else sliced(chunk, start, stop)

    def position(self, shorter: bool) -> Any:
        """A copy of the library's position; ``None`` if it has none here.

        Args:
            shorter: Whether an element had fewer examples than one before it.
        """
        if not self.has_state or self._stale:
            return None
        if self._here:
            iterator = self._iterator
            state = {
                "stream": self.stream.state_dict() if _is_stateful(self.stream) else None,
                "iterator": iterator.state_dict() if iterator is not self.stream and _is_stateful(iterator) else None,
            }
            return _copied(state)
        state = self.loader.state_dict()
        # litData counts a short batch as a whole one, and begins again where its count says that all was given
        if self.litdata and (shorter or state["num_samples_yielded"] >= len(self.dataset)):
            return None
        # torchdata asks a worker that ended once more, and many data sets then begin again; those of `datasets` do not
        if not hasattr(self.dataset, "_ex_iterable") and _has_ended_worker(state):
            return None
        return _copied(state)

    def check(self, mark: Mapping[str, Any]) -> None:
        """Refuse the position of another reader.

        Args:
            mark: The position.
        """
        if (number := mark["num_workers"]) != self.num_workers:
            raise ValueError(
                f"the position was marked with num_workers={number}, but num_workers={self.num_workers} now: the order of the "
                f"stream depends on it; write num_workers={number}"
            )
        size = mark["chunk_size"]
        if size != self.chunk_size and not (self.sized and size is not None):
            raise ValueError(
                f"the position was marked in a stream with batch_size={size}, but it has batch_size={self.chunk_size} now; "
                f"write batch_size={size}"
            )
        state = mark["state"]
        of_stream = state is not None and not (self._here and state.get("stream", True) is None)
        if of_stream and not self.has_state:
            raise ValueError(
                f"the position was marked in a stream with `load_state_dict`, but {type(self.stream).__name__} is read without "
                "it: give the same kind of stream (torchdata must be installed, if it was)"
            )

    @property
    def _here(self) -> bool:
        """Whether this process iterates the stream itself."""
        return self.loader_class is None and self._torch_loader is None

    def _release(self) -> None:
        iterator, self._iterator = self._iterator, None
        if self.loader_class is not None:
            self.loader = None  # it may hold the workers
        if hasattr(iterator, "close"):
            iterator.close()

    def _iterate_here(self, state: Any) -> None:
        if state is not None and state["stream"] is not None:
            self.stream.load_state_dict(_copied(state["stream"]))
        self._iterator = iter(self.stream)
        if state is not None and state["iterator"] is not None:
            self._iterator.load_state_dict(_copied(state["iterator"]))
        self.has_state = self._knows_position()  # an iterator may have it where the data set has not

    def _iterate_loader(self, epoch: int, state: Any) -> None:
        # with a generator of its own a new iterator does not draw from the global one, and the workers' numbers repeat
        generator = epoch_generator(self.seed, epoch)
        if self._torch_loader is not None:
            self._torch_loader.generator = generator
        else:
            self.loader = self._made(generator)
        if self.litdata and hasattr(self.loader, "current_epoch"):
            # it counts its passes itself, from 1, and goes on with one that was left
            self.loader.current_epoch, self.loader.restore = epoch, False
        if state is not None:
            self.loader.load_state_dict(_copied(state))
        self._iterator = iter(self.loader)

    def _made(self, generator: torch.Generator) -> Any:
        collate = _same if self.batched or self.lists else self.collate
        arguments: dict[str, Any] = {"batch_size": self.chunk_size}
        if self.batched and self.litdata:  # its loader needs a batch size
            arguments, collate = {"batch_size": 1}, _only
        if self.num_workers:
            arguments["multiprocessing_context"] = self.multiprocessing_context
            collate = partial(_packed, collate)
        assert self.loader_class is not None
        return self.loader_class(
            self.stream, num_workers=self.num_workers, generator=generator, collate_fn=collate, **arguments
        )

    def _knows_position(self) -> bool:
        kind = type(self.loader) if self.loader_class is None else self.loader_class
        if self.litdata:
            names = [c.__name__ for c in type(self.dataset).__mro__]
            return hasattr(kind, "load_state_dict") and "StreamingDataset" in names
        if _has_shuffle_buffer(self.dataset):
            return False
        return _is_stateful(self.stream) or _is_stateful(self._iterator) if self._here else _is_stateful(kind)


def _is_first() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _same(item: Any) -> Any:
    return item


class _Packed(NamedTuple):
    """A chunk on its way from a worker: as bytes, with its large tensors beside them.

    A queue opens a file for each tensor, which takes about a millisecond; but a pipe takes longer for many bytes.
    """

    pickled: bytes
    large: list[Tensor]

    def opened(self) -> Any:
        """The chunk."""
        unpickler = pickle.Unpickler(io.BytesIO(self.pickled))
        unpickler.persistent_load = self.large.__getitem__  # type: ignore[method-assign]
        return unpickler.load()


class _Pickler(pickle.Pickler):
    """Writes the values of small tensors, and nothing of a larger tensor that they are a part of."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.large: list[Tensor] = []

    def persistent_id(self, item: Any) -> int | None:
        if not (_is_simple(item) and item.nbytes > MOST_BYTES):
            return None
        self.large.append(item)
        return len(self.large) - 1

    def reducer_override(self, item: Any) -> Any:
        if not _is_simple(item):
            return NotImplemented
        return _tensor, (item.detach().contiguous().reshape(-1).view(torch.uint8).numpy(), item.dtype, tuple(item.shape))


def _is_simple(item: Any) -> bool:
    return (
        type(item) is Tensor
        and item.device.type == "cpu"
        and item.layout == torch.strided
        and not (item.is_conj() or item.is_neg())
    )


def _tensor(values: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(values).view(dtype).reshape(shape)


def _packed(collate: Callable[[Any], Any], items: Any) -> Any:
    pickler = _Pickler(buffer := io.BytesIO())
    pickler.dump(collate(items))
    return _Packed(buffer.getvalue(), pickler.large)


def _only(items: list[Any]) -> Any:
    return items[0]


def _is_stateful(source: Any) -> bool:
    return hasattr(source, "state_dict") and hasattr(source, "load_state_dict")


def _is_from(source: Any, library: str) -> bool:
    return any(c.__module__.split(".")[0] == library for c in type(source).__mro__)


def loader_of(stream: Any) -> Any:
    """The torch loader that a stream is, or that a pipeline (webdataset's ``WebLoader``) begins with."""
    if isinstance(stream, DataLoader):
        return stream
    pipeline = getattr(stream, "pipeline", None)
    return pipeline[0] if isinstance(pipeline, list) and pipeline and isinstance(pipeline[0], DataLoader) else None


def _class_of_loader(stream: Any, num_workers: int) -> Any:
    """The class of loader that reads a data set; ``None`` if this process iterates it."""
    if _is_from(stream, "litdata"):  # it counts its position in its loader
        return importlib.import_module("litdata").StreamingDataLoader
    if not num_workers:
        return None
    if _is_stateful(stream) and importlib.util.find_spec("torchdata"):
        return importlib.import_module("torchdata.stateful_dataloader").StatefulDataLoader
    return DataLoader


def _has_ended_worker(state: Any) -> bool:
    """Whether a worker of a ``StatefulDataLoader`` has come to its end."""
    workers = (state.get("_snapshot") or {}).get("_worker_snapshots") or {}
    return any((worker.get("fetcher_state") or {}).get("fetcher_ended") for worker in workers.values())


def _has_shuffle_buffer(dataset: Any) -> bool:
    """Whether examples wait in a buffer of ``datasets``, which its position leaves out."""
    stages = [getattr(dataset, "_ex_iterable", None)]
    while stages:
        stage = stages.pop()
        if type(stage).__name__ == "BufferShuffledExamplesIterable":
            return True
        stages += [getattr(stage, "ex_iterable", None)] if hasattr(stage, "ex_iterable") else getattr(stage, "ex_iterables", [])
    return False


def _check_stream(stream: Any, loader: Any, num_workers: int, whole: bool) -> None:
    name = type(stream).__name__
    dataset = stream if loader is None else loader.dataset
    map_style = loader is not None or isinstance(stream, Dataset) or hasattr(stream, "__getitems__")
    if map_style and not isinstance(dataset, IterableDataset) and not whole:
        raise TypeError(f"{name} reads a map-style data set: its batches follow a plan without this class")
    if not hasattr(stream, "__iter__"):
        raise TypeError(f"{name} cannot be iterated: give an IterableDataset, a loader over one, or another iterable")
    again = isinstance(stream, IterableDataset) or (whole and hasattr(stream, "reset"))
    if isinstance(stream, Iterator) and not again:
        raise TypeError(f"a {name} can be iterated once only: give an object whose `__iter__` begins again")
    if num_workers and loader is not None:
        raise ValueError(f"`num_workers={num_workers}` has no effect on a loader: give it to the loader, or leave it out")
    if num_workers and not isinstance(stream, IterableDataset):
        raise ValueError(
            f"with `num_workers={num_workers}` each worker would read all of the {name}: write num_workers=0, or give an "
            "IterableDataset that divides its examples by `torch.utils.data.get_worker_info()`"
        )


def _gives_batches(stream: Any, loader: Any, batched: bool | None) -> bool:
    """Whether the elements of a stream are batches."""
    if isinstance(stream, DataLoader) and stream.batch_size is not None:
        if batched is False:
            raise ValueError(f"`batched=False`, but the loader gives batches of batch_size={stream.batch_size}: leave it out")
        return True
    if batched is not None:
        return batched
    # a pipeline may hold a stage that makes batches
    if loader is None and isinstance(stream, IterableDataset) and not hasattr(stream, "pipeline"):
        return False
    raise ValueError(
        f"it is not known whether {type(stream).__name__} gives examples or batches: write batched=True if it gives batches, "
        "batched=False if it gives examples"
    )


def _copied(state: Any, path: str = "state") -> Any:
    """A copy of a library's position, which may change its own. It must be loadable with ``weights_only=True``."""
    if isinstance(state, PLAIN):
        return state
    if isinstance(state, Mapping):
        return {key: _copied(value, f"{path}[{key!r}]") for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        values = [_copied(value, f"{path}[{i}]") for i, value in enumerate(state)]
        return values if isinstance(state, list) else tuple(values)
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, np.generic):
        return state.item()
    raise TypeError(
        f"the position of the stream holds a {type(state).__name__} in {path}: `state_dict` must give numbers, strings, lists, "
        "dicts and tensors only, so that a checkpoint can be read without running code"
    )


def plain_mark(mark: Mapping[str, Any]) -> dict[str, Any]:
    """A mark that can be saved: with the checksum of the last example, not with the example."""
    last = mark["last"]
    return {**mark, "last": checksum(last[0]) if isinstance(last, tuple) else last}
