"""What only a GPU can show, in less than eight minutes: ``python scripts/gpu_check.py``; ``--help`` lists the parts.

Each part runs in a process of its own, within a time budget, and then writes one line to ``results.jsonl`` in the folder
``--output``. The same command again runs only the parts that are not done. The end is a Markdown table of all results.

With ``--device cpu`` everything is as small as with ``--toy``. Then the figures say nothing, but that the script runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import benchmark
import lightning
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.memory import garbage_collection_cuda
from torch import Tensor, nn

from lightning_bsl import BatchLRScheduler, BatchSizeDataModule
from lightning_bsl.callbacks.loop import end_workers
from lightning_bsl.callbacks.micro_batches import is_out_of_memory
from lightning_bsl.datasets import CIFAR10, FashionMNIST, ImageDataModule, ImageTensors
from lightning_bsl.models import CausalLM, Classifier, cnn5, distilgpt2, resnet18, wide_resnet28_10
from lightning_bsl.population.grid import fitting
from lightning_bsl.population.workers import usable_cores
from lightning_bsl.schedules import Milestones

T = TypeVar("T")
Row = dict[str, Any]  # "ran": what was run; then the figures by their names
GIB = 1 << 30
IMAGE = 5 << 20  # bytes, about, of what ResNet-18 keeps in float32 of an image of 32x32
NEEDS_CUDA = "skipped: needs CUDA"


@dataclass(frozen=True)
class Place:
    """Where the parts run, and whether they are as small as can be."""

    device: torch.device
    toy: bool

    def size(self, full: T, toy: T) -> T:
        return toy if self.toy else full

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def pixels(self) -> int:
        return self.size(32, 8)

    @property
    def network(self) -> str:
        return f"{self.size('ResNet-18', 'WRN-10-1')}, {self.pixels}x{self.pixels} images"

    @property
    def default_float32(self) -> str:
        return "32-true with TF32 in convolutions" if self.cuda else "32-true"

    def clock(self) -> float:
        """The time, when the device has done all that it was told."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


# --- what the parts share


class Watched(Classifier):
    """Notes its micro-batches, its first gradient, and the steps that the optimizer really took.

    It is interrupted in step ``stop_at``, and runs out of memory above ``memory`` images.
    """

    def __init__(self, net: nn.Module, stop_at: int | None = None, memory: float = math.inf, **options: Any) -> None:
        super().__init__(net, 10, **options)
        self.stop_at, self.memory = stop_at, memory
        self.pieces: list[tuple[int, int, Tensor]] = []  # step, examples, mean loss
        self.gradient: list[Tensor] = []
        self.taken: list[int] = []
        self.failures: list[int] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == self.stop_at:
            raise InterruptedError
        if len(batch[1]) > self.memory:
            self.failures.append(len(batch[1]))
            raise torch.OutOfMemoryError("out of memory, provoked by the check")
        loss = super().training_step(batch, batch_idx)
        self.pieces.append((self.global_step, len(batch[1]), loss.detach()))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.gradient:
            self.gradient = [each.grad.detach().clone() for each in self.parameters() if each.grad is not None]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: self.taken.append(self.global_step))
        return optimizer

    def steps(self) -> tuple[list[int], Tensor]:
        """Examples of each step, and the mean losses."""
        examples, sums = Counter[int](), defaultdict[int, float](float)
        for step, number, loss in self.pieces:
            examples[step] += number
            sums[step] += number * loss.item()
        return [*examples.values()], torch.tensor([sums[step] / number for step, number in examples.items()])


class Marks(Callback):
    """Notes the time, and the number of graphs compiled so far, before each step or before one, and at the end."""

    def __init__(self, place: Place, only: int | None = None) -> None:
        self.place, self.only, self.marks = place, only, list[tuple[float, int]]()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.only in (None, trainer.global_step):
            self.on_train_end()

    def on_train_end(self, *_: Any) -> None:
        self.marks.append((self.place.clock(), int(torch._dynamo.utils.counters["stats"]["unique_graphs"])))

    def between(self) -> list[tuple[float, int]]:
        """Seconds and graphs from each mark to the next."""
        return [(end - begin, then - before) for (begin, before), (end, then) in pairwise(self.marks)]


def make_net(toy: bool, dropout: float = 0.0) -> nn.Module:
    """ResNet-18, or a small network with BatchNorm, too; both with the weights of seed 0."""
    torch.manual_seed(0)
    net = wide_resnet28_10(num_classes=10, depth=10, widen_factor=1) if toy else resnet18(num_classes=10)
    return nn.Sequential(net, nn.Dropout(dropout)) if dropout else net


def pictures(place: Place, number: int, augment: bool = False) -> ImageDataModule:
    """Random images in the form of CIFAR-10."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (number, 3, place.pixels, place.pixels), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (number,), generator=generator)
    data = benchmark.datamodule_of(CIFAR10, ImageTensors(images, labels), batch_size=1)  # a schedule sets another
    data.augment = augment
    return data


def growing(sizes: Sequence[int], each: int) -> Milestones:
    """So many steps of each size."""
    return Milestones(sizes, at=[each * stage for stage in range(1, len(sizes))], unit="step")


def fit(place: Place, model: LightningModule, data: LightningDataModule, *callbacks: Callback, **options: Any) -> Trainer:
    """Fit without validation, for ``max_steps``; ``ckpt_path`` may be among the options of the Trainer."""
    path = options.pop("ckpt_path", None)
    defaults = {"accelerator": "gpu" if place.cuda else "cpu", "devices": 1, "max_epochs": -1, "limit_val_batches": 0}
    trainer = Trainer(**{**benchmark.QUIET, **defaults, **options}, callbacks=[*callbacks])
    trainer.fit(model, data, ckpt_path=path)
    return trainer


def precision(place: Place, name: str, scale: float = 1024.0, interval: int = 2000) -> dict[str, Any]:
    """Arguments of the Trainer; fp16 with a loss scaler works on a CPU too, where Lightning would take bf16."""
    if name != "16-mixed":
        return {"precision": name}
    scaler = torch.amp.GradScaler(place.device.type, init_scale=scale, growth_interval=interval)
    return {"plugins": MixedPrecision("16-mixed", place.device.type, scaler)}


def off(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The norm of the difference over that of ``other``."""
    ones, others = (torch.cat([each.detach().flatten().double().cpu() for each in of]) for of in (one, other))
    return float((ones - others).norm() / others.norm())


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether weights and buffers are the same, bit for bit."""
    others = other.state_dict()
    return all(torch.equal(value.cpu(), others[name].cpu()) for name, value in one.state_dict().items())


# --- the parts: each yields its rows


def amp(place: Place) -> Iterator[Row]:
    """bf16 and fp16 against float32, the batch growing in micro-batches; steps that a loss scaler skips"""
    sizes, cap, each = place.size(((64, 128, 256, 512), 96, 8), ((4, 8), 6, 3))
    data, steps = pictures(place, sum(sizes) * each), len(sizes) * each
    ran = f"{place.network}, batch {sizes[0]} to {sizes[-1]}, micro-batches of {cap}, {steps} steps"

    def train(name: str, *scale: Any) -> tuple[Watched, Row]:
        model, scheduler = Watched(make_net(place.toy)), BatchLRScheduler(growing(sizes, each), 0.01, cap)
        trainer = fit(place, model, data, scheduler, max_steps=steps, **precision(place, name, *scale))
        planned = model.steps()[0] == [size for size in sizes for _ in range(each)] and trainer.global_step == steps
        kept = planned and (scheduler.progress.step, scheduler.progress.samples) == (steps, sum(sizes) * each)
        finite = all(bool(parameter.isfinite().all()) for parameter in model.parameters())
        row: Row = {"plan kept": kept, "finite weights": finite}
        if (scaler := getattr(trainer.precision_plugin, "scaler", None)) is not None:
            row |= {"scale at the end": scaler.get_scale(), "steps skipped": steps - len(model.taken)}
        return model, row

    reference, _ = train("32-true")
    expected = reference.steps()[1]
    for name in ("bf16-mixed", "16-mixed"):
        model, row = train(name)
        relative = ((model.steps()[1] - expected) / expected).abs()
        found = {"first loss off by": float(relative[0]), "losses off by at most": float(relative.max())}
        gradient = {"first gradient off by": off(model.gradient, reference.gradient)}
        yield {"ran": f"{name} over 32-true, {ran}"} | found | gradient | row
    power = place.size(24, 20)
    _, row = train("16-mixed", 2.0**power, 4)  # it overflows at first, and again when the scale has grown
    yield {"ran": f"16-mixed with a first scale of 2^{power}, {ran}"} | row


def oom(place: Place) -> Iterator[Row]:
    """a real lack of memory, survived by max_device_batch_size="auto" """

    def train(data: ImageDataModule, number: int, cap: Any) -> tuple[Watched, BatchLRScheduler]:
        model = Watched(make_net(place.toy), memory=math.inf if place.cuda else 5)
        scheduler = BatchLRScheduler(number, 0.01, max_device_batch_size=cap)
        fit(place, model, data, scheduler, max_steps=2)
        return model, scheduler

    def errors(model: Watched | None = None) -> int:
        return int(torch.cuda.memory_stats()["num_ooms"]) if place.cuda else len(model.failures if model else ())

    free, total = torch.cuda.mem_get_info() if place.cuda else (0, 1)
    for share in (min(0.9 * free, 8 * GIB) / total, 1.0) if place.cuda else (0.0,):
        number, memory = 21, "errors provoked above 5 images"
        if place.cuda:
            torch.cuda.set_per_process_memory_fraction(share)
            torch.cuda.reset_peak_memory_stats()
            number = min(3 * min(free, int(share * total)) // IMAGE, 32_767)  # fewer than 2^31 values in a layer
            memory = f"at most {share * total / GIB:.1f} GiB"
        data, before, begin = pictures(place, 2 * number), errors(), place.clock()
        model, scheduler = train(data, number, "auto")
        found = scheduler.state_dict()["micro_batch_size"]
        row: Row = {"ran": f"{place.network}, 32-true, two steps of {number:,} images, {memory}"}
        row |= {
            "errors of the allocator": errors(model) - before,
            "micro-batch found": found or "none: the whole step fits",
            "steps": scheduler.progress.step,
        }
        row["seconds"] = place.clock() - begin
        if place.cuda:
            row["peak GiB"] = torch.cuda.max_memory_allocated() / GIB
        if share < 1 and found:  # the whole card would take long
            garbage_collection_cuda()
            fixed, _ = train(data, number, found)
            row["weights off those of such micro-batches by"] = off([*model.parameters()], [*fixed.parameters()])
        yield row
        del model, data
        garbage_collection_cuda()


def compiling(place: Place) -> Iterator[Row]:
    """torch.compile over ten batch sizes, against eager"""
    sizes, each = place.size(((16, 24, 32, 48, 64, 96, 128, 192, 256, 384), 4), (tuple(range(2, 12)), 2))
    data, nets = pictures(place, sum(sizes) * each), {"cnn5": partial(cnn5, 3, image_size=place.pixels)}
    if not place.toy:
        nets["ResNet-18"] = partial(make_net, toy=False)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # in which nothing is compiled yet
        for name, net in nets.items():
            found = []
            for compiled in (False, True):
                torch.manual_seed(0)
                model, timing = Watched(net(), compile=compiled), Marks(place)
                fit(place, model, data, BatchLRScheduler(growing(sizes, each), 0.01), timing, max_steps=len(sizes) * each)
                found.append((model.steps()[1], timing.between()))
            (expected, eager), (losses, steps) = found
            graphs = [sizes[i // each] for i, (_, number) in enumerate(steps) for _ in range(number)]
            row: Row = {"ran": f"{name}, {place.pixels}x{place.pixels} images, 32-true, {each} steps each of {sizes}"}
            row |= {"graphs compiled": len(graphs), "at batch": str(graphs)}
            row |= {"seconds of these steps": sum(seconds for seconds, number in steps if number)}
            row |= {"losses off by at most": float(((losses - expected) / expected).abs().max())}
            for way, timed in (("eager", eager), ("compiled", steps)):
                row[f"ms of a step of {sizes[-1]}, {way}"] = 1e3 * min(seconds for seconds, _ in timed[-each:])
            yield row


def transfer(place: Place) -> Iterator[Row]:
    """images per second of the DataModule to the GPU: pinned memory, workers, prefetching"""
    data = pictures(place, place.size(49_152, 64))

    def epoch(loader: Any) -> int:
        moved = (data.on_after_batch_transfer(move_data_to_device(batch, place.device), 0) for batch in loader)
        images = sum(len(x) for x, _ in moved)
        place.clock()
        return images

    workers = [number for number in (0, 2, 8) if number <= usable_cores()]
    for batch_size, number in itertools.product(place.size((256, 2048), (16,)), place.size(workers, [0, 1])):
        row: Row = {"ran": f"images/s of {place.pixels}x{place.pixels}, batch {batch_size}, {number} workers"}
        for pinned, prefetch in itertools.product((False, True), (2, 8) if number else (None,)):
            name = ("pinned" if pinned else "not pinned") + (f", prefetch {prefetch}" if prefetch else "")
            if pinned and not place.cuda:
                row[name] = NEEDS_CUDA
                continue
            data.batch_size, data.num_workers, data.pin_memory = batch_size, number, pinned
            loader = data.train_dataloader()
            loader.prefetch_factor = prefetch
            row[name] = benchmark.rates({name: partial(epoch, loader)}, rounds=2)[name]
            end_workers(loader)
            data.teardown("fit")  # the next loader is another one
        yield row


def resume(place: Place) -> Iterator[Row]:
    """a run that was interrupted in its middle equals the whole run, bit for bit"""
    sizes, cap, each, saved = place.size(((32, 64, 128), 48, 10, 14), ((4, 8, 12), 6, 2, 3))
    data, steps = pictures(place, 2 * sum(sizes) * each // 3, augment=True), len(sizes) * each  # one epoch and a half
    data.num_workers = place.size(2, 0)

    def train(name: str, *callbacks: Callback, stop_at: int | None = None, **options: Any) -> Watched:
        model = Watched(make_net(place.toy, dropout=0.3), stop_at)
        scheduler, options = BatchLRScheduler(growing(sizes, each), 0.05, cap), options | precision(place, name, 2.0**18, 4)
        fit(place, model, data, scheduler, *callbacks, max_steps=steps, deterministic=True, **options)
        return model

    for name in ("32-true", "bf16-mixed", "16-mixed"):
        with tempfile.TemporaryDirectory() as folder:
            save = ModelCheckpoint(folder, "middle", every_n_train_steps=saved)
            whole, again = train(name), train(name)
            with suppress(InterruptedError):
                train(name, save, stop_at=saved + 2, enable_checkpointing=True)
            resumed = train(name, ckpt_path=Path(folder, "middle.ckpt"))
        ran = f"{place.network}, augmented, dropout, {name}, deterministic algorithms, batch {sizes[0]} to {sizes[-1]}"
        row: Row = {"ran": f"{ran}, micro-batches of {cap}, {steps} steps, resumed after {saved}"}
        row |= {"two whole runs are equal": same(again, whole), "the resumed run equals them": same(resumed, whole)}
        yield row | {"steps of theirs": len(whole.taken), "of the resumed run": len(resumed.taken)}


def ddp(place: Place) -> Iterator[Row]:
    """NCCL with one process, against a run without DDP"""
    sizes, cap, each = place.size(((32, 64, 128), 48, 8), ((4, 8), 6, 2))
    data, steps = pictures(place, sum(sizes) * each), len(sizes) * each
    models = []
    for strategy in ("auto", DDPStrategy(process_group_backend="nccl" if place.cuda else "gloo")):
        model, scheduler = Watched(make_net(place.toy)), BatchLRScheduler(growing(sizes, each), 0.05, cap)
        fit(place, model, data, scheduler, max_steps=steps, strategy=strategy, deterministic=True)
        models.append(model)
    backend = f"{torch.distributed.get_backend()} with {torch.distributed.get_world_size()} process"
    torch.distributed.destroy_process_group()
    ran = f"{place.network}, 32-true, deterministic algorithms, batch {sizes[0]} to {sizes[-1]}, micro-batches of {cap}"
    yield {"ran": f"{ran}, {steps} steps, {backend}", "equal weights": same(*models)}


def over_bare(place: Place, make: Callable[[], Any], data: LightningDataModule, batch: Any, name: str, steps: int) -> Row:
    """Examples per second of fits with us, and of bare loops over one batch that is on the device; the better of two each."""
    size, warm = len(batch if isinstance(batch, Tensor) else batch[0]), place.size(8, 1)

    def ours() -> float:
        watch = Marks(place, only=warm)
        fit(place, make(), data, BatchLRScheduler(size, 0.01), watch, max_steps=warm + steps, precision=name)
        return steps * size / watch.between()[0][0]

    def bare() -> float:
        model, there, begin = make(), move_data_to_device(batch, place.device), 0.0
        model.configure_model()
        model.to(place.device).train()
        optimizer = model.configure_optimizers()
        for step in range(warm + steps):
            if step == warm:
                begin = place.clock()
            with torch.autocast(place.device.type, torch.bfloat16, enabled=name == "bf16-mixed"):
                loss = model.full_loss(there)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return steps * size / (place.clock() - begin)

    try:
        rates = [(ours(), bare()) for _ in range(2)]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"not measured": "out of memory"}
    with_us, alone = map(max, zip(*rates, strict=True))
    return {"with us": with_us, "bare loop": alone, "ratio": with_us / alone}


def images(place: Place) -> Iterator[Row]:
    """images per second of ResNet-18 with us, over a bare PyTorch loop"""
    data = pictures(place, place.size(49_152, 64))
    for batch_size in place.size((128, 1024, 4096), (16,)):
        batch = torch.randn(batch_size, 3, place.pixels, place.pixels), torch.randint(10, (batch_size,))
        for name, form in (("32-true", place.default_float32), ("bf16-mixed", "bf16-mixed, channels last")):

            def make(channels_last: bool = name == "bf16-mixed") -> Classifier:
                return Classifier(make_net(place.toy), 10, channels_last=channels_last)

            row = over_bare(place, make, data, batch, name, place.size(max(8, 16_384 // batch_size), 2))
            yield {"ran": f"images/s, {place.network}, {form}, batch {batch_size}, not augmented"} | row
            garbage_collection_cuda()


def tokens(place: Place) -> Iterator[Row]:
    """tokens per second of a network of DistilGPT2's size with us, over a bare PyTorch loop"""
    length, vocabulary = place.size((1024, 50_257), (16, 100))
    sizes: Any = place.size({}, {"n_layer": 1, "n_embd": 8, "n_head": 2})
    text: Any = torch.randint(vocabulary, (place.size(512, 16), length))

    def make() -> CausalLM:
        return CausalLM(distilgpt2(vocabulary, length, **sizes), partial(torch.optim.AdamW, lr=0.001, fused=True))

    parameters = sum(parameter.numel() for parameter in make().parameters())
    for batch_size in place.size((8, 16, 32), (4,)):
        steps = place.size(max(8, 128 // batch_size), 2)
        row = over_bare(place, make, BatchSizeDataModule(text), text[:batch_size], "bf16-mixed", steps)
        row |= {name: row[name] * length for name in ("with us", "bare loop") if name in row}
        yield {"ran": f"tokens/s, GPT-2 of {parameters:,} parameters, bf16-mixed, batch {batch_size} x {length}"} | row
        garbage_collection_cuda()


def population(place: Place) -> Iterator[Row]:
    """replica-steps per second of 1,000 replicas: a whole grid, and bare steps of all replicas at once"""
    wanted, seconds, small = place.size(1000, 4), place.size(1.0, 0.01), benchmark.training_set(FashionMNIST, None, place.toy)
    for width in place.size((8, 40), (2,)):  # 40 is that of conf/surge/cnn5.yaml
        for batch_size in place.size((1, 12, 64), (1, 12)):
            data = benchmark.datamodule_of(FashionMNIST, small, batch_size)
            at_once = min(wanted, fitting(benchmark.adam_model(width), data, batch_size, place.device))
            step, threads = benchmark.stacked_step, torch.get_num_threads()
            bare = benchmark.bare_rate(width, batch_size, place.device, seconds, step, at_once, threads, processes=1)
            garbage_collection_cuda()
            steps, said, options = max(5, int(2 * seconds * bare / wanted)), list[str](), argparse.Namespace(gpu=place.cuda)
            grid = benchmark.grid_rate(data, options, width, batch_size, steps, wanted, said.append)
            garbage_collection_cuda()
            ran = f"replica-steps/s, cnn5 of width {width}, 28x28 images, {place.default_float32}, batch {batch_size}"
            row: Row = {"ran": f"{ran}, {wanted:,} replicas of {steps} steps", "grid": grid, "bare stacked steps": bare}
            yield row | {"replicas of a bare step": at_once, "form": "; ".join(said) or "not measured"}


PARTS: dict[str, tuple[Callable[[Place], Iterator[Row]], int]] = {  # and the seconds that each may take
    **{"amp": (amp, 40), "oom": (oom, 50), "compile": (compiling, 100), "transfer": (transfer, 45), "resume": (resume, 50)},
    **{"ddp": (ddp, 25), "images": (images, 55), "tokens": (tokens, 40), "population": (population, 60)},
}
AS_USERS_HAVE_IT = ("images", "tokens", "population")  # with TF32 in convolutions, torch's default; the others compare numbers


# --- running the parts


def in_a_process(name: str, place: Place, budget: float) -> dict[str, Any]:
    """Run a part in a fork of this process, which never touches the GPU; returns the line of its results.

    So each part begins with an empty GPU, cannot spoil another one, and ends when its time is over.
    """
    context, begin = multiprocessing.get_context("fork"), time.monotonic()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run_part, args=(name, place, theirs))
    process.start()
    theirs.close()  # so that the end of the other process is noticed here
    line: dict[str, Any] = {"rows": []}
    try:
        while "ended" not in line:
            if not ours.poll(max(0.0, begin + budget - time.monotonic())):
                line |= {"error": f"cut off after {budget:.0f} s"}
                break
            told = ours.recv()
            line["rows"] += [told.pop("row")] if "row" in told else []
            line |= told
    except EOFError:
        process.join()
        line["error"] = f"the process ended with exit code {process.exitcode}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # with the workers of its loaders
        process.kill()
        process.join()
    line.pop("ended", None)
    return line | {"seconds": round(time.monotonic() - begin, 1)}


def run_part(name: str, place: Place, pipe: Connection) -> None:
    """Run a part in this process, and tell what it finds."""
    os.setpgid(0, 0)
    try:
        if place.cuda and not torch.cuda.is_available():
            pipe.send({"skipped": NEEDS_CUDA, "ended": True})
            return
        pipe.send({"device": torch.cuda.get_device_name(place.device) if place.cuda else "CPU"})
        if name not in AS_USERS_HAVE_IT:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        for row in PARTS[name][0](place):
            pipe.send({"row": row})
        pipe.send({"ended": True})
    except Exception as error:
        traceback.print_exc()
        pipe.send({"error": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}", "ended": True})


def read(path: Path, place: Place) -> dict[str, dict[str, Any]]:
    """The last line of each part that was run at such a place; a line that was cut short is left out."""
    lines: dict[str, dict[str, Any]] = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):
            line = json.loads(text)
            if (line["place"], line["toy"]) == (place.device.type, place.toy):
                lines[line["part"]] = line
    return lines


def is_done(line: dict[str, Any]) -> bool:
    return not {"error", "skipped"} & line.keys()


def append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_short = path.exists() and not path.read_text().endswith("\n")
    with path.open("a") as file:
        file.write("\n" * cut_short + json.dumps(line) + "\n")


def markdown(lines: dict[str, dict[str, Any]]) -> str:
    """A table of all rows, in the order of the parts."""
    texts = ["| part | ran | results |", "|---|---|---|"]
    for name, line in ((name, lines[name]) for name in PARTS if name in lines):
        for row in line["rows"]:
            figures = (f"{figure}: {shown(value)}" for figure, value in row.items() if figure != "ran")
            texts.append(f"| {name} | {row['ran']} | {'; '.join(figures)} |")
        if not is_done(line):
            texts.append(f"| {name} | | {(line.get('error') or line['skipped']).replace('|', '/')} |")
    return "\n".join(texts)


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def names_of_parts(text: str) -> list[str]:
    if unknown := [name for name in text.split(",") if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"there is no part {', '.join(unknown)}: write some of {','.join(PARTS)}")
    return text.split(",")


def main() -> int:
    """Run what the command line asks for; returns 1 if a part failed."""
    about = "\n".join(
        f"  {name:<11} {(part.__doc__ or '').strip()}, at most {budget} s" for name, (part, budget) in PARTS.items()
    )
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nparts:\n{about}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="folder of results.jsonl; gpu_check by default")
    parser.add_argument("--parts", type=names_of_parts, default=[*PARTS], metavar="A,B", help="only these; all by default")
    parser.add_argument("--again", action="store_true", help="run parts that are done once more")
    parser.add_argument("--patience", type=benchmark.positive, default=1, help="factor of the time budgets, for a slow GPU")
    parser.add_argument("--toy", action="store_true", help="as small as can be, to see whether it runs")
    arguments = parser.parse_args()
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", "out of memory with micro-batches")

    place = Place(torch.device(arguments.device), arguments.toy or arguments.device == "cpu")
    path, failed = arguments.output / "results.jsonl", False
    versions = {"torch": torch.__version__, "lightning": lightning.__version__}
    for name in arguments.parts:
        if not arguments.again and name in (before := read(path, place)) and is_done(before[name]):
            print(f"{name}: done before", flush=True)
            continue
        line = in_a_process(name, place, arguments.patience * PARTS[name][1])
        append(path, {"part": name, "place": place.device.type, "toy": place.toy, **versions, **line})
        failed |= "error" in line
        print(f"{name}: {line.get('error') or line.get('skipped') or 'done'}, {line['seconds']} s", flush=True)
    lines = read(path, place)
    devices = ", ".join(sorted({line["device"] for line in lines.values() if "device" in line}))
    print(f"\n{devices or 'no device'}; torch {torch.__version__}, Lightning {lightning.__version__}{', toy' * place.toy}\n")
    print(markdown(lines))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
