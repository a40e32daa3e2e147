"""Speed, against bounds: ``python scripts/benchmark.py data`` and so on; ``--help`` lists the subjects.

Prints a table, then one line for each bound: ``NAME: ratio X, bound Y``. With ``--toy`` everything is so small that it ends in
seconds; its figures say nothing, but that the subject runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import itertools
import json
import logging
import multiprocessing
import struct
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import pairwise
from operator import truediv
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, get_worker_info
from torchvision import datasets
from torchvision import transforms as T

from lightning_bsl import BatchLRScheduler, FullGradientNorm, GradientNoiseScale, StreamDataModule
from lightning_bsl.app.train import train as train_as_configured
from lightning_bsl.datasets import CIFAR10, Digits, FashionMNIST, ImageDataModule, ImageTensors, TextFolder
from lightning_bsl.datasets.image import identity
from lightning_bsl.models import CausalLM, Classifier, cnn5, distilgpt2
from lightning_bsl.population import Grid, run_grid
from lightning_bsl.population.grid import fitting
from lightning_bsl.population.workers import usable_cores
from lightning_bsl.schedules import Milestones

BATCH_SIZES = (128, 1024, 4096)
TOY_BATCH_SIZES = (16,)
TOY_IMAGES = 64


@dataclass(frozen=True)
class Bound:
    """A ratio that should reach its bound."""

    name: str
    ratio: float
    bound: float

    def __str__(self) -> str:
        return f"{self.name}: ratio {self.ratio:.3g}, bound {self.bound:g}"


def rates(candidates: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Measure candidates in turn, so that a slow spell of the machine hits all of them.

    Args:
        candidates: Functions that return how many items they processed; each is called once more to warm up.
        rounds: Measurements of each.

    Returns:
        Median items per second of each.
    """
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for measured in [False] + rounds * [True]:
        for name, candidate in candidates.items():
            start = time.perf_counter()
            items = candidate()
            if measured:
                found[name].append(items / (time.perf_counter() - start))
    return {name: median(values) for name, values in found.items()}


def paired_ratio(one: Callable[[], int], other: Callable[[], int], rounds: int) -> float:
    """Median ratio of two fast candidates' items per second, measured pair by pair: a slow spell hits both of a pair."""
    return median(pair["one"] / pair["other"] for pair in (rates({"one": one, "other": other}, 1) for _ in range(rounds)))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align a table, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return "\n".join(lines)


# --- data: images per second on their way to the model, against torchvision's data sets and against plain indexing ---


def data(arguments: argparse.Namespace) -> list[Bound]:
    """Compare image pipelines: grey images of 28x28, and colour images of 32x32, augmented as in arXiv 2409.08770."""
    rows, bounds = [], []
    for shape, kind, root, torchvision_set in (
        ("fashion_mnist", FashionMNIST, arguments.fashion_mnist_root, _torchvision_fashion_mnist),
        ("cifar", CIFAR10, arguments.cifar10_root, _torchvision_cifar10),
    ):
        images = training_set(kind, root, arguments.toy)
        theirs = torchvision_set(images)
        for batch_size in TOY_BATCH_SIZES if arguments.toy else BATCH_SIZES:
            candidates = {"ours": partial(_ours, _datamodule(kind, images, batch_size))}
            if shape == "fashion_mnist":
                candidates["bare"] = partial(_bare, images, batch_size)
            for workers in (0, 2):
                loader = _torchvision_loader(theirs, batch_size, workers)
                candidates[f"torchvision {workers}"] = partial(_theirs, loader)
            found = rates(candidates, arguments.rounds)

            name = f"data/{shape}/{batch_size}"
            best = max(found["torchvision 0"], found["torchvision 2"])
            bounds.append(Bound(f"{name}/vs_torchvision", found["ours"] / best, 60 if "bare" in found else 5))
            if "bare" in found:
                bounds.append(
                    Bound(f"{name}/vs_bare", paired_ratio(candidates["ours"], candidates["bare"], 8 * arguments.rounds), 0.5)
                )
            figures = (f"{found[key]:,.0f}" if key in found else "" for key in _PIPELINES)
            rows.append([f"{shape}/{batch_size}", *figures])
    print("images per second, medians")
    print(table(["shape/batch size", *_PIPELINES], rows))
    return bounds


_PIPELINES = ("ours", "bare", "torchvision 0", "torchvision 2")  # the figures: worker processes


def training_set(kind: type[ImageDataModule], root: str | None, toy: bool = False) -> ImageTensors:
    """Return the real training set, or random bytes of the same shape; a few images of it for a toy."""
    if root is not None:
        images, labels = kind(root).read("train")
        return ImageTensors(images[:TOY_IMAGES], labels[:TOY_IMAGES]) if toy else ImageTensors(images, labels)
    shape = (TOY_IMAGES if toy else kind.train_size, kind.in_channels, kind.image_size, kind.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8)
    return ImageTensors(images, torch.randint(kind.num_classes, shape[:1]))


def _datamodule(kind: type[ImageDataModule], images: ImageTensors, batch_size: int) -> ImageDataModule:
    datamodule = datamodule_of(kind, images, batch_size)
    trainer: Any = SimpleNamespace(training=True, current_epoch=0, distributed_sampler_kwargs=None, overfit_batches=0)
    datamodule.trainer = trainer  # all that the DataModule asks of one
    return datamodule


def _ours(datamodule: ImageDataModule) -> int:
    """Make the batches of an epoch, as Lightning would: it lets go of one before it asks for the next."""
    loader = datamodule.train_dataloader()
    batches = iter(loader)
    return sum(len(datamodule.on_after_batch_transfer(next(batches), 0)[0]) for _ in range(len(loader)))


def _bare(images: ImageTensors, batch_size: int) -> int:
    """Do no more than needed: permute, index, make floats, normalise."""
    scale, shift = 1 / (255 * FashionMNIST.std[0]), -FashionMNIST.mean[0] / FashionMNIST.std[0]
    order = torch.randperm(len(images))
    for start in range(0, len(images), batch_size):
        rows = order[start : start + batch_size]
        images.images.index_select(0, rows).float().mul_(scale).add_(shift)
        images.labels.index_select(0, rows)
    return len(images)


def _torchvision_fashion_mnist(images: ImageTensors) -> Dataset[Any]:
    """Let torchvision read the images from idx files."""
    with tempfile.TemporaryDirectory() as folder:
        _write_fashion_mnist(images, Path(folder))
        return _read_by_torchvision(Path(folder))


def _write_fashion_mnist(images: ImageTensors, root: Path) -> None:
    """The images as idx files, to train with and to validate with, where torchvision looks for them."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for kind, values in (("images-idx3", images.images[:, 0]), ("labels-idx1", images.labels.byte())):
        header = struct.pack(f">{values.ndim + 1}I", 2048 + values.ndim, *values.shape)
        for split in ("train", "t10k"):
            (raw / f"{split}-{kind}-ubyte").write_bytes(header + values.numpy().tobytes())


def _read_by_torchvision(root: Path) -> Dataset[Any]:
    normalise = T.Normalize(FashionMNIST.mean, FashionMNIST.std)
    return cast("Dataset[Any]", datasets.FashionMNIST(str(root), transform=T.Compose([T.ToTensor(), normalise])))


def _torchvision_cifar10(images: ImageTensors) -> Dataset[Any]:
    """Give the images to torchvision's class, without files and their checksums."""
    theirs = datasets.CIFAR10.__new__(datasets.CIFAR10)
    theirs.data = images.images.permute(0, 2, 3, 1).contiguous().numpy()
    theirs.targets = images.labels.tolist()
    theirs.target_transform = None
    augment = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.RandomRotation(15)]
    theirs.transform = T.Compose([*augment, T.ToTensor(), T.Normalize(CIFAR10.mean, CIFAR10.std)])
    return cast("Dataset[Any]", theirs)


def _torchvision_loader(theirs: Dataset[Any], batch_size: int, workers: int) -> DataLoader[Any]:
    number = min(len(cast(Sized, theirs)), max(4096, workers * batch_size))  # slow; and each worker needs a batch
    part = Subset(theirs, range(number))
    # Persistent workers: an epoch starts them once, this measurement must not do so for a few batches.
    return DataLoader(part, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def _theirs(loader: DataLoader[Any]) -> int:
    return sum(len(labels) for _, labels in loader)


# --- callback: the price of BatchLRScheduler, where it changes nothing ---


class _Switch(Callback):
    """Takes a callback out of the fit and puts it back, block of steps by block, and times the blocks.

    So the two are compared within a second or two: from one fit to the next a machine's speed changes by more than is
    measured here. Each block has one step that is logged.
    """

    def __init__(self, other: Callback) -> None:
        self.other = other
        self.ticks: list[float] = []
        self._step = -1
        self._hooks: dict[str, Any] = {}  # that it has put into the loop

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = trainer.fit_loop.epoch_loop
        self._hooks = {name: value for name, value in vars(loop).items() if callable(value) and hasattr(type(loop), name)}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step, self._step = self._step, trainer.global_step
        if step != self._step and self._step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.ticks.append(time.perf_counter())
            callbacks = [each for each in trainer.callbacks if each is not self.other]  # type: ignore[attr-defined]
            without, loop = len(self.ticks) % 2, vars(trainer.fit_loop.epoch_loop)
            trainer.callbacks = callbacks if without else [self.other, *callbacks]  # type: ignore[attr-defined]
            for name, hook in self._hooks.items():
                loop.pop(name, None) if without else loop.update({name: hook})

    def seconds(self) -> tuple[list[float], list[float]]:
        """Of the blocks with the callback and of those without, the first pair left out."""
        blocks = [end - start for start, end in pairwise(self.ticks)][2:]
        return blocks[1::2], blocks[::2]


class _Counting(Classifier):
    """Says what its loss is a mean over."""

    def loss_terms(self, batch: tuple[torch.Tensor, torch.Tensor]) -> int:
        return len(batch[1])


def callback(arguments: argparse.Namespace) -> list[Bound]:
    """Compare steps with and without the callback, at a constant batch and rate."""
    rows, bounds = [], []
    fashion, digits = (FashionMNIST, 128, 10, 20), (Digits, 8, 50, 40)
    if arguments.toy:
        fashion, digits = (FashionMNIST, 8, 2, 2), (Digits, 8, 2, 2)
    for (kind, batch_size, block, blocks), model, bound in (
        (fashion, Classifier, 1.02),
        (digits, Classifier, 1.02),
        (digits, _Counting, 1.03),
    ):
        datamodule = datamodule_of(kind, training_set(kind, None, arguments.toy), batch_size)
        scheduler = BatchLRScheduler(batch_size, 0.1)
        with_it, without = _seconds_per_block(datamodule, block, blocks * arguments.rounds, scheduler, make=model)
        ratio = median(one / other for one, other in zip(with_it, without, strict=True))
        name = f"{kind.__name__}/{batch_size}{'/loss_terms' if model is _Counting else ''}"
        rows.append([name, *(f"{1e3 * median(seconds) / block:.3f}" for seconds in (with_it, without)), f"{ratio:.4f}"])
        bounds.append(Bound(f"callback/{name}", ratio, bound))
    print("milliseconds per training step, medians; the ratio is the median of those of neighbouring blocks of steps")
    print(table(["data/batch size", "with", "without", "ratio"], rows))
    return bounds


def datamodule_of(kind: type[ImageDataModule], images: ImageTensors, batch_size: int) -> ImageDataModule:
    datamodule = kind(batch_size=batch_size)
    datamodule.train_set = datamodule.val_set = images
    datamodule.prepare_data = lambda: None  # type: ignore[method-assign]  # no files are looked for
    return datamodule


def _seconds_per_block(
    datamodule: ImageDataModule,
    block: int,
    blocks: int,
    other: Callback,
    *beside: Callback,
    make: Callable[..., Classifier] = Classifier,
) -> tuple[list[float], list[float]]:
    """Seconds of the blocks with the callback ``other``, and of those without; the ones ``beside`` it always take part."""
    torch.manual_seed(0)
    model = make(cnn5(image_size=datamodule.image_size), datamodule.num_classes)
    switch = _Switch(other)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            accelerator="cpu",
            max_epochs=-1,
            max_steps=(blocks + 2) * block + 1,
            limit_val_batches=0,
            log_every_n_steps=block,
            callbacks=[other, switch, *beside],
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model, datamodule)
    return switch.seconds()


# --- switch: the pause in which one batch size gives way to the next, with worker processes ---


class _Gaps(Callback):
    """Notes the seconds from the end of a batch to the start of the next, where that is of another size."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._size = self._end = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._size not in (0, len(batch[1])):
            self.seconds.append(time.perf_counter() - self._end)
        self._size = len(batch[1])

    def on_train_batch_end(self, *_: Any) -> None:
        self._end = time.perf_counter()


class _Reloading(LightningDataModule):
    """As one writes it by hand: the Trainer asks for the loader of every epoch anew."""

    def __init__(self, images: ImageTensors, sizes: Sequence[int]) -> None:
        super().__init__()
        self.images, self.sizes = images, sizes

    def train_dataloader(self) -> DataLoader[Any]:
        size = self.sizes[self.trainer.current_epoch] if self.trainer else self.sizes[0]
        collate: Any = identity
        return DataLoader(self.images, size, shuffle=True, num_workers=2, persistent_workers=True, collate_fn=collate)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] / 255, batch[1]


def switch(arguments: argparse.Namespace) -> list[Bound]:
    """Compare the pause with that of a new loader, where the batch grows between epochs and inside of them."""
    # they divide the examples of an epoch, so that there are no short batches
    sizes = (8, 16, 32) if arguments.toy else (64, 128, 256, 512, 1024, 2048)
    images = _random_images(arguments.toy)
    stages = range(1, len(sizes))
    schedules = {
        "epoch_end": Milestones(sizes, at=list(stages)),
        "inside_epoch": Milestones(sizes, at=[(2 * stage - 1) * len(images) // 2 for stage in stages], unit="samples"),
    }
    candidates = {name: partial(_gaps_of_ours, images, schedule) for name, schedule in schedules.items()}
    candidates["new loader"] = partial(_gaps_of_theirs, images, sizes)
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(arguments.rounds):
        for name, candidate in candidates.items():
            found[name].append(median(candidate()))
    print("milliseconds from the last batch of one size to the first of the next, medians")
    print(table(["", "gap"], [[name, f"{1e3 * median(gaps):.2f}"] for name, gaps in found.items()]))
    theirs = found.pop("new loader")
    return [Bound(f"switch/{name}", median(map(truediv, ours, theirs)), 0.25) for name, ours in found.items()]


def _random_images(toy: bool) -> ImageTensors:
    number = TOY_IMAGES if toy else 4096
    return ImageTensors(torch.randint(256, (number, 1, 28, 28), dtype=torch.uint8), torch.randint(10, (number,)))


def _gaps_of_ours(images: ImageTensors, schedule: Milestones) -> list[float]:
    datamodule = datamodule_of(FashionMNIST, images, int(schedule.values[0]))
    datamodule.num_workers = 2
    return _gaps(datamodule, len(schedule.values), callbacks=[BatchLRScheduler(schedule)])


def _gaps_of_theirs(images: ImageTensors, sizes: Sequence[int]) -> list[float]:
    return _gaps(_Reloading(images, sizes), len(sizes), callbacks=[], reload_dataloaders_every_n_epochs=1)


def _gaps(datamodule: LightningDataModule, epochs: int, callbacks: list[Callback], **options: Any) -> list[float]:
    gaps = _Gaps()
    Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_val_batches=0,
        callbacks=[gaps, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(Classifier(cnn5(width=4), 10), datamodule)
    return gaps.seconds


# --- stream: examples per second of a regrouped stream, against the bare stream in batches of the same size ---


class _Rows(IterableDataset[tuple[torch.Tensor, int]]):
    """Grey images of 28x28, shared among the workers."""

    def __init__(self, number: int) -> None:
        self.images = torch.randint(256, (number, 1, 28, 28), dtype=torch.uint8)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for i in range(first, len(self.images), step):
            yield self.images[i].float() / 255, i % 10


def stream(arguments: argparse.Namespace) -> list[Bound]:
    """Compare the loader of StreamDataModule with a DataLoader over the same stream, at the sizes that a growing batch has."""
    rows, bounds = [], []
    source = _Rows(TOY_IMAGES if arguments.toy else 60_000)
    for workers in (0, 2):
        for batch_size in (8,) if arguments.toy else (8, 64, 512, 4096):
            ours = StreamDataModule(source, batch_size=batch_size, num_workers=workers).train_dataloader()
            bare = DataLoader(source, batch_size=batch_size, num_workers=workers)
            candidates = {"regrouped": partial(_examples, ours), "bare": partial(_examples, bare)}
            found = rates(candidates, arguments.rounds)
            name = f"stream/{workers}_workers/{batch_size}"
            rows.append([name, *(f"{found[key]:,.0f}" for key in candidates)])
            bounds.append(Bound(name, found["regrouped"] / found["bare"], 0.9))
    print("examples per second, medians")
    print(table(["workers/batch size", "regrouped", "bare"], rows))
    return bounds


def _examples(loader: Any) -> int:
    return sum(len(labels) for _, labels in loader)


# --- noise_scale: the price of GradientNoiseScale, where steps have several pieces and where they have one ---


def noise_scale(arguments: argparse.Namespace) -> list[Bound]:
    """Compare steps with and without the callback, at its default settings."""
    rows, bounds = [], []
    for kind, batch_size, cap, block, blocks, bound in (
        (FashionMNIST, 128, 64, 10, 20, 1.02),  # one measurement in each block
        (Digits, 64, None, 100, 4, 1.05),  # one probe in each block
        (Digits, 8, None, 100, 4, 1.25),
    ):
        if arguments.toy:
            batch_size, cap, block, blocks = min(batch_size // 2, 8), cap and 4, min(block, 10), 2
        datamodule = datamodule_of(kind, training_set(kind, None, arguments.toy), batch_size)
        scheduler = BatchLRScheduler(batch_size, 0.1, max_device_batch_size=cap)
        measuring = GradientNoiseScale(probe_every=None if cap else block)
        with_it, without = _seconds_per_block(datamodule, block, blocks * arguments.rounds, measuring, scheduler)
        ratio = median(one / other for one, other in zip(with_it, without, strict=True))
        name = f"{kind.__name__}/{batch_size}{'' if cap is None else '/micro-batches'}"
        rows.append([name, *(f"{1e3 * median(seconds) / block:.3f}" for seconds in (with_it, without)), f"{ratio:.4f}"])
        bounds.append(Bound(f"noise_scale/{name}", ratio, bound))
    print("milliseconds per training step, medians; the ratio is the median of those of neighbouring blocks of steps")
    print(table(["data/batch size", "with", "without", "ratio"], rows))
    return bounds


# --- lengths: micro-batches cut by the lengths of documents, against those cut by number ---

_MODULES = [  # of the standard library, whose documentation `pydoc` shows
    *(
        "argparse",
        "array",
        "ast",
        "asyncio",
        "base64",
        "builtins",
        "calendar",
        "collections",
        "configparser",
        "contextlib",
        "csv",
    ),
    *(
        "datetime",
        "decimal",
        "difflib",
        "email",
        "enum",
        "fractions",
        "functools",
        "gzip",
        "hashlib",
        "heapq",
        "html",
        "inspect",
    ),
    *("io", "ipaddress", "itertools", "json", "locale", "logging", "math", "multiprocessing", "operator", "optparse", "os"),
    *(
        "pathlib",
        "pickle",
        "pprint",
        "queue",
        "random",
        "re",
        "sched",
        "shutil",
        "socket",
        "statistics",
        "string",
        "subprocess",
    ),
    *("sys", "tarfile", "tempfile", "textwrap", "threading", "time", "tokenize", "typing", "unittest", "warnings", "zipfile"),
]


def lengths(arguments: argparse.Namespace) -> list[Bound]:
    """Train on documents of uneven lengths; no micro-batch may have more padded tokens than the bound."""
    longest, bound, batch_size = (32, 128, 16) if arguments.toy else (512, 4096, 64)
    steps = 2 if arguments.toy else 20
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "text")
        root.mkdir()
        documents = _documentation(_MODULES[:6] if arguments.toy else _MODULES)
        (root / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        vocab_size = 512 if arguments.toy else 2048
        options: dict[str, Any] = {"block_size": longest, "tokenizer": "train", "vocab_size": vocab_size, "pack": False}
        found = {name: _Padding() for name in ("by number", "by length")}

        def train(name: str) -> int:
            torch.manual_seed(0)
            data: Any = TextFolder(root, cache_dir=Path(folder, "cache"), max_device_tokens=bound, **options)
            cap = None
            if name == "by number":  # a loader says nothing of lengths
                data.prepare_data()
                data.setup()
                data, cap = DataLoader(data.train_set, shuffle=True, collate_fn=data.collate_fn), bound // longest
            net = distilgpt2(vocab_size, n_positions=longest, n_layer=2, n_embd=64, n_head=4, dropout=0.0)
            scheduler = BatchLRScheduler(batch_size, 0.001, max_device_batch_size=cap)
            Trainer(
                accelerator="cpu",
                max_epochs=-1,
                max_steps=steps,
                limit_val_batches=0,
                callbacks=[scheduler, found[name]],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            ).fit(CausalLM(net), data)
            return steps * batch_size

        per_second = rates({name: partial(train, name) for name in found}, arguments.rounds)
    print(f"{len(documents):,} documents, steps of {batch_size}, at most {bound} padded tokens in a micro-batch; medians")
    rows = [[name, f"{per_second[name]:.1f}", f"{each.share:.3f}", f"{each.most}"] for name, each in found.items()]
    print(table(["micro-batches", "examples per second", "padding", "most padded tokens"], rows))
    return [Bound("lengths/by_length_over_by_number", per_second["by length"] / per_second["by number"], 1.4)]


class _Padding(Callback):
    """Counts how much of the batches is padding."""

    def __init__(self) -> None:
        self.tokens = self.padded = self.most = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        mask = batch["attention_mask"]
        self.tokens += int(mask.sum())
        self.padded += mask.numel()
        self.most = max(self.most, mask.numel())

    @property
    def share(self) -> float:
        return 1 - self.tokens / self.padded


def _documentation(modules: Sequence[str]) -> list[str]:
    """The documentation of modules, and of their classes, methods and functions."""
    texts: dict[str, None] = {}  # each once, in their order
    for name in modules:
        module = importlib.import_module(name)
        objects = [each for _, each in sorted(vars(module).items()) if inspect.isclass(each) or inspect.isroutine(each)]
        methods = [each for one in objects if inspect.isclass(one) for _, each in sorted(vars(one).items())]
        for each in (module, *objects, *filter(inspect.isroutine, methods)):
            if text := inspect.getdoc(each):
                texts[text] = None
    return list(texts)


# --- gradient_norm: a full gradient norm over the passes it cannot do without, and the usual way to it over ours ---


def gradient_norm(arguments: argparse.Namespace) -> list[Bound]:
    """Compare FullGradientNorm with a bare loop, and a pass through torchvision's data set with it."""
    images = _random_images(arguments.toy)
    batch_size = 32 if arguments.toy else 1024
    measuring = _Measuring(FullGradientNorm(every=10**9, batch_size=batch_size))
    rows, bounds = [], []

    def compare(trainer: Trainer, module: LightningModule) -> None:
        net = cast(torch.nn.Module, module.net)
        batches = [((x / 255 - FashionMNIST.mean[0]) / FashionMNIST.std[0], y) for x, y in _chunks(images, batch_size)]
        loader = _augmenting_loader(images, batch_size)

        def ours() -> int:
            measuring.callback.measure(trainer, module)
            return len(images)

        candidates: dict[str, Callable[[], int]] = {
            "ours": ours,
            "bare": partial(_full_gradient, net, batches),
            "torchvision": partial(_full_gradient, net, loader),
        }
        found = rates(candidates, arguments.rounds)
        rows.append(["fashion_mnist", *(f"{found[name]:,.0f}" for name in candidates)])
        over_bare = paired_ratio(candidates["bare"], ours, 2 * arguments.rounds)
        bounds.append(Bound("gradient_norm/fashion_mnist/over_bare", over_bare, 1.15))
        bounds.append(Bound("gradient_norm/fashion_mnist/torchvision_over_ours", found["ours"] / found["torchvision"], 3))

    measuring.compare = compare
    datamodule = datamodule_of(FashionMNIST, images, 32 if arguments.toy else 128)
    torch.manual_seed(0)
    Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        callbacks=[measuring.callback, measuring],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Classifier(cnn5(), 10), datamodule)
    print("examples per second of a full gradient norm, medians")
    print(table(["data", "ours", "bare", "torchvision"], rows))
    return bounds


class _Measuring(Callback):
    """Compares inside of a fit, where ``measure`` works."""

    def __init__(self, callback: FullGradientNorm) -> None:
        self.callback = callback
        self.compare: Callable[[Trainer, LightningModule], None]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.compare(trainer, pl_module)


def _chunks(images: ImageTensors, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(images.images.split(size), images.labels.split(size), strict=True))


def _full_gradient(net: torch.nn.Module, batches: Any) -> int:
    """Add up gradients, as written by hand; nothing else."""
    parameters, examples = list(net.parameters()), 0
    totals = [torch.zeros_like(each) for each in parameters]
    for x, y in batches:
        gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(net(x), y), parameters)
        torch._foreach_add_(totals, gradients, alpha=len(y))
        examples += len(y)
    torch.stack(torch._foreach_norm(totals)).norm().item()
    return examples


def _augmenting_loader(images: ImageTensors, batch_size: int) -> DataLoader[Any]:
    """torchvision's data set and augmentation, as in training: the usual code measures through the training loader."""
    theirs = cast(Any, _torchvision_fashion_mnist(images))
    augment = [T.RandomCrop(28, padding=4), T.RandomHorizontalFlip(), T.RandomRotation(15)]
    theirs.transform = T.Compose([*augment, T.ToTensor(), T.Normalize(FashionMNIST.mean, FashionMNIST.std)])
    return DataLoader(theirs, batch_size, shuffle=True)


# --- train: a whole run of train.py against the papers' way to it, and against the arithmetic that neither can do without ---


def train(arguments: argparse.Namespace) -> list[Bound]:
    """Compare runs with a batch that doubles every epoch and a full gradient norm after each; nothing is validated."""
    if arguments.toy:
        arguments.images, arguments.epochs, arguments.width = TOY_IMAGES, 2, 2
    images = training_set(FashionMNIST, arguments.fashion_mnist_root, arguments.toy)
    images = ImageTensors(images.images[: arguments.images], images.labels[: arguments.images])
    device = torch.device("cuda" if arguments.gpu else "cpu")
    sizes = [(8 if arguments.toy else 128) * 2**epoch for epoch in range(arguments.epochs)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_fashion_mnist(images, folder)
        candidates = {
            "ours": partial(_train_ours, folder, arguments, sizes),
            "the papers' way": partial(_train_the_papers_way, folder, arguments.width, device, sizes),
            "arithmetic": partial(_train_bare, images, arguments.width, device, sizes),
        }
        epochs = rates(candidates, arguments.rounds)
    seconds = {name: 1 / epochs[name] for name in candidates}
    print(f"seconds per epoch of {len(images):,} images, the whole run counted, medians; network of width {arguments.width}")
    rows = [[name, f"{each:.3f}", f"{each / seconds['arithmetic']:.3f}"] for name, each in seconds.items()]
    print(table(["", "seconds", "over arithmetic"], rows))
    return [Bound("train/fashion_mnist/over_the_papers_way", seconds["ours"] / seconds["the papers' way"], 0.5)]


_RUNS = itertools.count()


def _train_ours(root: Path, arguments: argparse.Namespace, sizes: Sequence[int]) -> int:
    """All that scripts/train.py does, from composing the configuration to drawing the figure; returns the epochs."""
    overrides = [
        "data=fashion_mnist",
        f"data.root={root}",
        f"data.samples_per_epoch={arguments.images}",
        f"+model.net.width={arguments.width}",
        f"scheduler.batch_size.start={sizes[0]}",
        "scheduler.batch_size.every=1",
        "scheduler.lr.every=1",
        "callbacks=full_gradient_norm",
        f"trainer={'gpu' if arguments.gpu else 'cpu'}",
        f"trainer.max_epochs={len(sizes)}",
        "trainer.enable_progress_bar=false",
        "+trainer.limit_val_batches=0",
        f"output_dir={root / f'run_{next(_RUNS)}'}",
    ]
    with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "conf"), version_base="1.3"):
        cfg = compose("train", overrides)
    with contextlib.redirect_stdout(io.StringIO()):
        train_as_configured(cfg)
    return len(sizes)


def _train_the_papers_way(root: Path, width: int, device: torch.device, sizes: Sequence[int]) -> int:
    """A loader with two workers for each epoch, each image through PIL; and a second pass over it for the gradient."""
    images, net = _read_by_torchvision(root), cnn5(width=width).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for size in sizes:
        loader = DataLoader(images, size, shuffle=True, num_workers=2)
        _train_epoch(net, optimizer, ((x.to(device), y.to(device)) for x, y in loader))
        _full_gradient(net, ((x.to(device), y.to(device)) for x, y in loader))
    return len(sizes)


def _train_bare(images: ImageTensors, width: int, device: torch.device, sizes: Sequence[int]) -> int:
    """The forward and backward passes and the steps, on floats in memory."""
    net = cnn5(width=width).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = ((images.images / 255 - FashionMNIST.mean[0]) / FashionMNIST.std[0]).to(device)
    y = images.labels.to(device)
    for size in sizes:
        _train_epoch(net, optimizer, ((x[rows], y[rows]) for rows in torch.randperm(len(x), device=device).split(size)))
        _full_gradient(net, zip(x.split(1024), y.split(1024), strict=True))
    return len(sizes)


def _train_epoch(net: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: Any) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()


# --- population: a whole grid, against bare loops and against the same runs one by one through Lightning ---


def population(arguments: argparse.Namespace) -> list[Bound]:
    """Compare replica-steps per second of a whole grid, its beginning and end counted, with those of bare steps."""
    rows, bounds = [], []
    widths, batch_sizes, seconds = arguments.width, arguments.batch_sizes, arguments.seconds
    if arguments.toy:
        arguments.replicas, widths, batch_sizes, seconds = 2, [2], [1, 12], 0.01
    images = training_set(FashionMNIST, arguments.fashion_mnist_root, arguments.toy)
    device = torch.device("cuda" if arguments.gpu else "cpu")
    jobs = 1 if arguments.gpu else usable_cores()
    for width, batch_size in itertools.product(widths, batch_sizes):
        data = datamodule_of(FashionMNIST, images, batch_size)
        replicas = min(arguments.replicas, jobs * fitting(adam_model(width), data, batch_size, device))
        bare = partial(bare_rate, width, batch_size, device, seconds)
        candidates = {
            "stacked": partial(bare, stacked_step, replicas, torch.get_num_threads(), 1),
            "loop": partial(bare, _loop_step, -(-replicas // jobs), 1, jobs),
            "alone": partial(_alone_rate, data, arguments, width, seconds),
        }
        floor = max(candidate() for candidate in candidates.values())
        steps = max(5, int(4 * seconds * floor / replicas))
        said: list[str] = []
        candidates["grid"] = partial(grid_rate, data, arguments, width, batch_size, steps, replicas, said.append)
        measured = [{name: candidate() for name, candidate in candidates.items()} for _ in range(arguments.rounds)]
        of_floor = median(rates["grid"] / max(rates["stacked"], rates["loop"]) for rates in measured)
        of_alone = median(rates["grid"] / rates["alone"] for rates in measured)
        medians = [f"{median(rates[name] for rates in measured):,.0f}" for name in ("grid", "stacked", "loop", "alone")]
        chosen = "/".join(sorted({line.split(": ")[1].split(",")[0] for line in said})) or "not measured"
        rows.append(
            [f"cnn5 of width {width}/{batch_size}", *medians, f"{of_floor:.2f}", f"{of_alone:.1f}", str(replicas), chosen]
        )
        bounds += [
            Bound(f"population/{width}/{batch_size}", of_floor, 0.85),
            Bound(f"population/{width}/{batch_size}/over_one_by_one", of_alone, 1),
        ]
        if not arguments.toy:
            print(*rows[-1], flush=True)
    print("replica-steps per second, medians: grid, bare stacked step, bare loops on all cores, one by one in Lightning")
    print(
        table(["model/batch size", "grid", "stacked", "loop", "one by one", "of floor", "of alone", "replicas", "form"], rows)
    )
    return bounds


QUIET: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def adam_model(width: int, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(cnn5(width=width), 10, partial(torch.optim.Adam, lr=0.001))


def stacked_step(width: int, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    """A step of all replicas at once."""
    nets = [cnn5(width=width).to(x.device) for _ in x]
    parameters, _ = stack_module_state(nets)
    optimizer = torch.optim.Adam(parameters.values(), lr=0.001, fused=True)

    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(functional_call(nets[0], weights, (x,)), y)

    def step() -> None:
        optimizer.zero_grad()
        vmap(loss)(parameters, x, y).sum().backward()
        optimizer.step()

    return step


def _loop_step(width: int, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    """A step of one replica after the other."""
    nets = [cnn5(width=width).to(x.device) for _ in x]
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.001, fused=True) for net in nets]

    def step() -> None:
        for net, optimizer, images, labels in zip(nets, optimizers, x, y):
            _train_epoch(net, optimizer, [(images, labels)])

    return step


def bare_rate(
    width: int,
    batch_size: int,
    device: torch.device,
    seconds: float,
    make_step: Callable[[int, torch.Tensor, torch.Tensor], Callable[[], Any]],
    replicas: int,
    threads: int,
    processes: int,
) -> float:
    """Replica-steps per second of steps without data, in processes that begin together."""

    def measure() -> float:
        x = torch.randn(replicas, batch_size, 1, 28, 28, device=device)
        step = make_step(width, x, torch.randint(0, 10, (replicas, batch_size), device=device))
        step()  # which sets up something
        if processes > 1:
            barrier.wait()
        begin, steps = time.perf_counter(), 0
        while steps < 2 or time.perf_counter() - begin < seconds:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            steps += 1
        return steps * replicas / (time.perf_counter() - begin)

    if processes == 1:
        return measure()
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(processes), context.SimpleQueue()

    def child() -> None:
        torch.set_num_threads(threads)
        found.put(measure())

    children = [context.Process(target=child) for _ in range(processes)]
    for process in children:
        process.start()
    rate: float = sum(found.get() for _ in children)
    for process in children:
        process.join()
    return rate


def grid_rate(
    data: ImageDataModule,
    arguments: argparse.Namespace,
    width: int,
    batch_size: int,
    steps: int,
    replicas: int,
    say: Callable[[str], Any],
) -> float:
    rates_of = next(number for number in (10, 2, 1) if replicas >= 5 * number or number == 1)
    grid = Grid(
        batch_sizes=[batch_size],
        lrs=[1e-5 * (i + 1) for i in range(rates_of)],
        seeds=-(-replicas // rates_of),
        targets=[1e-9],  # not to be reached
        max_examples=steps * batch_size,
        probe=min(len(cast(Sized, data.train_set)), 100),
    )
    trainer = partial(_trainer_of, arguments)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run_grid(grid, partial(adam_model, width), data, Path(folder) / "replicas.csv", trainer, say=say)
    return grid.replicas * steps / (time.perf_counter() - begin)


def _trainer_of(arguments: argparse.Namespace, **options: Any) -> Trainer:
    return Trainer(accelerator="gpu" if arguments.gpu else "cpu", devices=1, max_epochs=-1, **QUIET, **options)


def _alone_rate(data: ImageDataModule, arguments: argparse.Namespace, width: int, seconds: float) -> float:
    """Steps per second of a run by itself, in the same time as the others."""
    trainer = _trainer_of(arguments, max_time=timedelta(seconds=max(seconds, 0.2)), limit_val_batches=0)
    begin = time.perf_counter()
    trainer.fit(adam_model(width), data)
    return trainer.global_step / (time.perf_counter() - begin)


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return number


def _add_common(parser: argparse.ArgumentParser, rounds: Any, toy: Any) -> None:
    """What may stand before the subject or after it."""
    parser.add_argument("--rounds", type=positive, default=rounds, help="measurements of each candidate; 5 by default")
    parser.add_argument("--toy", action="store_true", default=toy, help="as small as can be, to see whether it runs")


def main() -> None:
    """Run the subject named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_common(parser, rounds=5, toy=False)
    subjects = parser.add_subparsers(required=True, metavar="SUBJECT")

    def add(name: str, run: Callable[[argparse.Namespace], list[Bound]], about: str) -> argparse.ArgumentParser:
        subject = subjects.add_parser(name, help=about)
        _add_common(subject, rounds=argparse.SUPPRESS, toy=argparse.SUPPRESS)  # what was said before it holds
        subject.set_defaults(run=run)
        return subject

    subject = add("data", data, "the image pipelines")
    subject.add_argument("--fashion-mnist-root", help="folder of the real Fashion-MNIST; random images by default")
    subject.add_argument("--cifar10-root", help="folder of the real CIFAR-10; random images by default")

    add("callback", callback, "training steps with BatchLRScheduler and without")
    add("switch", switch, "the pause in which the batch size changes, with two worker processes")
    add("stream", stream, "a stream that is regrouped, against the bare stream")
    add("noise_scale", noise_scale, "training steps with GradientNoiseScale and without, in micro-batches and in one piece")
    add("lengths", lengths, "training on documents: micro-batches cut by length, over those cut by number")
    add("gradient_norm", gradient_norm, "the time of a full gradient norm")

    subject = add("train", train, "whole runs, against the papers' way and the arithmetic alone")
    subject.add_argument("--fashion-mnist-root", help="folder of the real Fashion-MNIST; random images by default")
    subject.add_argument("--images", type=int, default=6000, help="so many images of the set")
    subject.add_argument("--epochs", type=int, default=4)
    subject.add_argument("--width", type=int, default=40, help="of cnn5; with 4 a CPU has little arithmetic to do")
    subject.add_argument("--gpu", action="store_true", help="train on a GPU")

    subject = add("population", population, "a grid of many replicas, against bare steps and against one by one")
    subject.add_argument("--fashion-mnist-root", help="folder of the real Fashion-MNIST; random images by default")
    subject.add_argument("--replicas", type=int, default=100, help="at most, and no more than fit; 1000 on a GPU")
    subject.add_argument("--width", type=int, nargs="+", default=[8, 40], help="of cnn5; with 8 there is little arithmetic")
    subject.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 12, 64, 364])
    subject.add_argument("--seconds", type=float, default=4, help="of each bare measurement; a grid takes four times as long")
    subject.add_argument("--gpu", action="store_true", help="train on a GPU")

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    arguments = parser.parse_args()
    for bound in arguments.run(arguments):
        print(bound)


if __name__ == "__main__":
    main()
