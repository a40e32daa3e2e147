"""Fits on the streams of libraries, whose batch size follows the schedule inside an epoch, beside plain loops."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info

from harness.data import regression
from harness.fits import trained
from harness.loops import train_by_hand, whole_steps
from harness.modules import Regression, assert_close, equal
from harness.processes import Pair
from lightning_bsl import BatchLRScheduler, StreamDataModule
from lightning_bsl.schedules import Milestones

N = 301
CUTS = [70, 155, 210]  # the first examples of the later shards: each library has 4, of different sizes
DATA = regression(N)
GROWING = Milestones([6, 10, 16], at=[4, 21], unit="step")
SHRINKING = Milestones([30, 16, 5], at=[70, 400], unit="samples")
BATCH = 7  # of the libraries' own loaders

STATEFUL = ["litdata", "litdata shuffled", "litdata loader", "torchdata", "torchdata loader", "datasets", "datasets loader"]
OTHERS = ["webdataset", "webdataset loader", "datasets shuffled"]
LIBRARIES = [*STATEFUL, "datasets saved", *OTHERS]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*cannot go to a position", "ignore:.*disabled the `drop_last`"),
    pytest.mark.filterwarnings("ignore:.*set_vital", "ignore::FutureWarning"),
]


class Notes:
    """Counts the examples that a source gives, in all of its processes: a byte in a file for each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, example: Any) -> Any:
        with self.path.open("ab", buffering=0) as file:
            file.write(b".")
        return example

    def read(self) -> int:
        """The number of examples since the last call."""
        number = self.path.stat().st_size if self.path.exists() else 0
        self.path.write_bytes(b"")
        return number


class Shards(IterableDataset[Any]):
    """The rows of arrays on disk; it knows its position."""

    def __init__(self, paths: list[Path], notes: Notes) -> None:
        self.paths, self.notes, self.position = paths, notes, 0

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        paths = self.paths[worker.id :: worker.num_workers] if worker else self.paths
        places = [(array, i) for array in (np.load(path, mmap_mode="r") for path in paths) for i in range(len(array))]
        while self.position < len(places):
            array, i = places[self.position]
            self.position += 1
            row = torch.from_numpy(array[i].copy())
            yield self.notes((row[:3], row[3:4], int(row[4])))
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def as_tensors(examples: list[dict[str, Any]]) -> list[torch.Tensor]:
    """A batch of the records of ``datasets``, whose numbers are Python's."""
    fields = ("x", torch.float64), ("y", torch.float64), ("i", torch.int64)
    return [torch.tensor([example[name] for example in examples], dtype=dtype) for name, dtype in fields]


def write(library: str, folder: Path) -> None:
    """Write the examples as a library does, in shards."""
    parts = np.split(np.arange(N), CUTS)
    records = [[{"x": x.tolist(), "y": y.tolist(), "i": int(i)} for x, y, i in map(DATA.__getitem__, part)] for part in parts]
    folder.mkdir()
    if library == "litdata":
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(folder), chunk_size=77)
        for i in range(N):
            x, y, _ = DATA[i]
            writer[i] = [x, y, i]
        writer.done()
        writer.merge(1)
        return
    if library == "datasets":
        import datasets

        everything = [record for part in records for record in part]
        datasets.Dataset.from_list(everything).save_to_disk(folder / "saved", num_shards=4)
    for shard, part in enumerate(records):
        if library == "torchdata":
            np.save(folder / f"{shard}.npy", np.array([[*record["x"], *record["y"], record["i"]] for record in part]))
        elif library == "datasets":
            (folder / f"{shard}.jsonl").write_text("\n".join(map(json.dumps, part)))
        else:
            import webdataset

            with webdataset.TarWriter(str(folder / f"{shard}.tar")) as tar:
                for record in part:
                    arrays = {f"{name}.npy": np.array(record[name]) for name in ("x", "y")}
                    tar.write({"__key__": f"{record['i']:03d}", "i.cls": record["i"], **arrays})


def stream(name: str, folder: Path, workers: int, notes: Notes, rank: int = 0, processes: int = 1) -> Any:
    """The stream of a process, as the library's documentation makes it."""
    library, _, variant = name.partition(" ")
    paths = sorted(folder.glob("*.*"))
    if library == "litdata":
        import litdata

        # by default it leaves out examples where there are several processes
        source: Any = litdata.StreamingDataset(
            str(folder), shuffle=variant == "shuffled", seed=3, drop_last=False, transform=notes
        )
        return litdata.StreamingDataLoader(source, batch_size=BATCH, num_workers=workers) if variant == "loader" else source
    if library == "webdataset":
        import webdataset

        source = webdataset.WebDataset(list(map(str, paths)), nodesplitter=webdataset.split_by_node, shardshuffle=False)
        source = source.decode().to_tuple("x.npy", "y.npy", "i.cls").map(notes)
        return webdataset.WebLoader(source, batch_size=BATCH, num_workers=workers) if variant == "loader" else source
    if library == "torchdata":
        source = Shards(paths[rank::processes], notes)
    else:
        from datasets.distributed import split_dataset_by_node

        import datasets

        if variant == "saved":
            source = datasets.load_from_disk(folder / "saved").to_iterable_dataset(num_shards=4)
        else:
            files = [str(path) for path in paths]
            options = {"split": "train", "streaming": True, "cache_dir": str(folder / "cache")}
            source = datasets.load_dataset("json", data_files={"train": files}, **options)
        source = split_dataset_by_node(source, rank, processes).map(notes)
        source = source.shuffle(seed=3, buffer_size=11) if variant == "shuffled" else source
    if variant == "loader":
        from torchdata.stateful_dataloader import StatefulDataLoader

        collate = as_tensors if library == "datasets" else None
        return StatefulDataLoader(source, batch_size=BATCH, num_workers=workers, collate_fn=collate)
    return source


class Streams(StreamDataModule):
    """A library's stream; made in ``setup``, when the processes know one another."""

    def __init__(self, name: str, folder: Path, workers: int) -> None:
        loader = "loader" in name
        collate = as_tensors if "datasets" in name and "web" not in name and not loader else None
        batched = None if "web" not in name else loader
        super().__init__(num_workers=0 if loader else workers, collate_fn=collate, batched=batched)
        self.notes = Notes(folder.with_suffix(".notes"))
        self.make: Callable[..., Any] = lambda *place: stream(name, folder, workers, self.notes, *place)

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        self.train_set = self.make(self.trainer.global_rank, self.trainer.world_size)


@contextlib.contextmanager
def offline(folder: Path) -> Iterator[None]:
    """Nothing is asked of the Hub."""
    import huggingface_hub

    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hub")
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """The folder of the shards of a source, written when it is first asked for."""
    root = tmp_path_factory.mktemp("shards")

    def folder(name: str) -> Path:
        library = name.split()[0]
        pytest.importorskip("torchdata" if "loader" in name and library == "datasets" else library)
        if not (root / library).exists():
            write(library, root / library)
        return root / library

    with offline(root) if importlib.util.find_spec("datasets") else contextlib.nullcontext():
        yield folder


def by_epoch(model: Regression) -> list[list[list[int]]]:
    """The examples of the steps of each epoch."""
    return [[step.examples for step in steps] for _, steps in groupby(model.journal, key=lambda step: step.epoch)]


def sizes(schedule: Any, epochs: int) -> list[list[int]]:
    return [[len(step) for step in steps] for steps in whole_steps(schedule, N, epochs)]


@pytest.mark.quick(workers=[0], schedule=[GROWING], name=["litdata", "torchdata loader", "webdataset", "datasets saved"])
@pytest.mark.quick(workers=[2], schedule=[SHRINKING], name=["litdata loader", "datasets"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("schedule", [GROWING, SHRINKING])
@pytest.mark.parametrize("name", LIBRARIES)
def test_equals_a_plain_loop(name: str, schedule: Any, workers: int, shards: Callable[[str], Path]) -> None:
    data = Streams(name, shards(name), workers)
    model = trained(Regression(), data, BatchLRScheduler(schedule, 0.05), max_epochs=2)
    epochs = by_epoch(model)
    assert [[len(step) for step in steps] for steps in epochs] == sizes(schedule, 2)
    for steps in epochs:
        examples = [i for step in steps for i in step]
        assert sorted(examples) == list(range(N)) and (workers or "shuffled" in name or examples == list(range(N)))
    assert "shuffled" not in name or epochs[0] != epochs[1]
    reference = Regression()
    train_by_hand(reference, DATA, [(step, 0.05) for steps in epochs for step in steps])
    assert_close(model.net, reference.net)


@pytest.mark.quick(workers=[0], name=["litdata shuffled", "torchdata loader", "webdataset loader", "datasets"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", LIBRARIES)
def test_resumes_bit_for_bit(name: str, workers: int, shards: Callable[[str], Path], tmp_path: Path) -> None:
    def run(*callbacks: Any, path: Any = None) -> tuple[Regression, int]:
        torch.manual_seed(1)
        data = Streams(name, shards(name), workers)
        data.notes.read()
        options = {"enable_checkpointing": bool(callbacks), "ckpt_path": path, "max_epochs": 2}
        model = trained(Regression(nn.Dropout(0.2)), data, BatchLRScheduler(GROWING, 0.05), *callbacks, **options)
        return model, data.notes.read()

    whole, read = run(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    assert read == 2 * N
    first = len(by_epoch(whole)[0])
    for step in (7, first - 1, first, first + 3):
        resumed, read = run(path=tmp_path / f"step={step}.ckpt")
        assert resumed.examples == whole.examples[step:]
        assert equal(resumed, whole), step
        left = 2 * N - sum(whole.sizes[:step])
        begun = N if step >= first else 2 * N  # from the start of the epoch
        if name in OTHERS or step == first:
            assert read == begun, step
        elif not workers and "litdata" not in name:
            assert left <= read < left + (BATCH if "loader" in name else 1), step
        else:  # what was read at once and not taken whole is read again
            assert left <= read <= begun, step
            # `Shards` is at its start again where a worker has ended
            assert step != first - 1 or read < begun or name == "torchdata", step


# --- several processes


def together(name: str, folder: str, schedule: Any, workers: int) -> tuple[list[tuple[int, list[int]]], list[Any]]:
    torch.manual_seed(2)
    with offline(Path(folder)) if "datasets" in name else contextlib.nullcontext():
        data, scheduler = Streams(name, Path(folder), workers), BatchLRScheduler(schedule, 0.05)
        model = trained(Regression(), data, scheduler, max_epochs=2, devices=2, strategy="ddp")
    return [(step.step, step.examples) for step in model.journal], [p.tolist() for p in model.net.parameters()]


# workers of processes with gloo are not forked, so each of them imports the libraries, which takes long
CASES: list[Any] = [(name, schedule, 0) for name in LIBRARIES for schedule in (GROWING, SHRINKING)]
CASES += [(name, GROWING, 2) for name in ("litdata", "torchdata loader", "webdataset", "datasets")]


@pytest.mark.quick(name=["webdataset loader"], schedule=[GROWING], workers=[0])
@pytest.mark.quick(name=["litdata"], schedule=[GROWING], workers=[0])
@pytest.mark.parametrize("name, schedule, workers", CASES)
def test_two_processes(name: str, schedule: Any, workers: int, shards: Callable[[str], Path], pair: Pair) -> None:
    (first, weights), (second, same) = pair(together, name, str(shards(name)), schedule, workers)
    assert weights == same
    steps: list[list[int]] = []
    seen: set[int] = set()
    for one, other in zip(first, second, strict=True):
        assert one[0] == other[0]
        # a process whose stream has ended repeats an example, with weight 0
        steps.append([i for i in [*one[1], *other[1]] if i not in seen])
        seen |= set(steps[-1])
        if len(seen) == N:
            seen.clear()
    assert [len(step) for step in steps] == [size for epoch in sizes(schedule, 2) for size in epoch]
    assert sorted(i for step in steps for i in step) == sorted([*range(N)] * 2)
    reference = Regression()
    train_by_hand(reference, DATA, [(step, 0.05) for step in steps])
    for found, expected in zip(weights, reference.net.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected.detach(), rtol=1e-11, atol=1e-12)
