"""A training process killed at random moments, and resumed each time, trains bit for bit as one that is never killed.

    python tests/integration/kill_resume.py --kills 20 --seed 0

Every life of the run is a process forked from this one, which spares it the imports. SIGKILL goes to its whole group, so that
the workers of its loaders die with it, and the next life resumes from the newest checkpoint. Each life keeps a journal:
whatever step or validation any of them did must be what the run never killed did there, and no step may be missing. At the end
the two runs' weights, optimizer, callback and count of epochs must be the same to the last bit.

With ``--exact`` a life kills itself, where it starts, trains, validates or saves: nothing depends on the speed of the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler, default_collate, get_worker_info

from lightning_bsl import BatchLRScheduler, BatchSizeDataModule, StreamDataModule
from lightning_bsl.schedules import Progress, SqrtScaling

STEP_SECONDS, VALIDATION_SECONDS = 0.004, 0.01  # slow enough for kills to land everywhere
SPREAD, MARGIN = 12, 60  # steps: how far beyond its target a kill may fall, and how far before the end the last target lies
UNREADABLE = "cannot read"


# --- the run


def batch_size(progress: Progress) -> float:
    """Grows by 4 every second epoch, and by 2 every 700 examples, which is inside epochs; even, as BatchNorm fails on 1."""
    return 6 + 4 * (progress.epoch // 2) + 2 * (progress.samples // 700)


def examples(number: int, seed: int) -> TensorDataset:
    x = torch.randn(number, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.prod(dim=1, keepdim=True), torch.arange(number))


class Rows(IterableDataset[Any]):
    """Examples on disk, divided among the workers; it knows its position."""

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        examples = TensorDataset(*torch.load(self.path))
        mine = range(worker.id if worker else 0, len(examples), worker.num_workers if worker else 1)
        while self.position < len(mine):
            self.position += 1
            yield examples[mine[self.position - 1]]
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def write_shards(source: str, folder: Path, data: TensorDataset) -> None:
    """Write examples as a library does. What the lives need of it is imported here, before they are forked."""
    folder.mkdir()
    if source == "litdata":
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(folder), chunk_size=100)
        for i in range(len(data)):
            writer[i] = [*data[i]]
        writer.done()
        writer.merge(1)
    elif source == "datasets":
        import datasets.distributed  # noqa: F401

        for shard in range(4):
            rows = (data[i] for i in range(shard, len(data), 4))
            lines = (json.dumps({"x": x.tolist(), "y": y.tolist(), "i": int(i)}) for x, y, i in rows)
            (folder / f"{shard}.jsonl").write_text("\n".join(lines))
    else:
        import torchdata.stateful_dataloader  # noqa: F401

        torch.save(data.tensors, folder / "data.pt")


def collate(examples: list[Any]) -> Any:
    """A batch of tuples, or of the records of ``datasets``."""
    return default_collate([tuple(row[name] for name in "xyi") if isinstance(row, dict) else row for row in examples])


def stream(source: str, folder: Path) -> Any:
    """A stream of a library over what `write_shards` wrote."""
    if source == "litdata":
        import litdata

        return litdata.StreamingDataset(str(folder), shuffle=True, seed=5)
    if source == "datasets":
        import huggingface_hub

        import datasets

        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        files = sorted(map(str, folder.glob("*.jsonl")))
        options: dict[str, Any] = {"split": "train", "streaming": True, "cache_dir": str(folder / "cache")}
        return datasets.load_dataset("json", data_files={"train": files}, **options).with_format("torch")
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(Rows(folder / "data.pt"), batch_size=16, num_workers=2)


class Moment(NamedTuple):
    """When a life kills itself: the first time that it does so at this step or later."""

    does: Literal["start", "train", "validate", "save"]
    step: int


class Net(LightningModule):
    """All that has a state or draws random numbers: BatchNorm, dropout, Adam with two param groups."""

    def __init__(self, journal: Path, options: argparse.Namespace, moment: Moment | None = None) -> None:
        super().__init__()
        self.moment, self.slow = moment, not options.exact
        # what BatchNorm has seen of a step that is cut in two cannot be undone
        norm = nn.Identity() if options.cap else nn.BatchNorm1d(32)
        self.body = nn.Sequential(nn.Linear(8, 32), norm, nn.ReLU(), nn.Dropout(options.dropout))
        self.head = nn.Linear(32, 1)
        self.register_buffer("ballast", torch.zeros(500_000))  # for a checkpoint to take a while
        self.journal = journal

    def write(self, line: str) -> None:
        with open(self.journal, "ab", buffering=0) as file:
            file.write(f"{line}\n".encode())

    def die(self, does: str) -> None:
        """Kill this process and its workers, if this is the moment."""
        if self.moment is not None and does == self.moment.does and self.global_step >= self.moment.step:
            os.killpg(os.getpgrp(), signal.SIGKILL)

    def on_fit_start(self) -> None:
        self.die("start")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.die("save")

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.head(self.body(batch[0])), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss, indices = self.loss(batch), batch[2].tolist()
        rates = " ".join(group["lr"].hex() for group in self.trainer.optimizers[0].param_groups)
        said = f"size {len(indices)} lr {rates} loss {loss.item().hex()} examples {indices}"
        self.write(f"step {self.global_step} batch {batch_idx}: {said}")
        self.die("train")
        if self.slow:
            time.sleep(STEP_SECONDS)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.write(f"step {self.global_step} validation {batch_idx}: loss {self.loss(batch).item().hex()}")
            self.die("validate")
            if self.slow:
                time.sleep(VALIDATION_SECONDS)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [{"params": self.body.parameters()}, {"params": self.head.parameters(), "lr": 0.002}]
        return torch.optim.Adam(groups, lr=0.01)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that can be read.

    Lightning writes a checkpoint to the temporary folder and moves it to its place. On one file system that is atomic; between
    two it is a copy, which a kill cuts, and what is left of ``last.ckpt`` cannot be read.
    """
    for path in sorted(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            torch.load(path, weights_only=True)
        except Exception as error:
            print(f"{UNREADABLE} {path}: {error}")
        else:
            return path
    return None


def train(folder: Path, journal: Path, options: argparse.Namespace, moment: Moment | None) -> None:
    """One life of the run, from wherever the last one has left it."""
    seed_everything(1)
    scheduler = BatchLRScheduler(batch_size, SqrtScaling(0.005, base_batch_size=6), options.cap)
    saves: list[dict[str, Any]] = [
        {"dirpath": folder / "steps", "every_n_train_steps": 3},
        {"dirpath": folder / "validations", "every_n_epochs": 1, "save_on_train_epoch_end": False},
        {"dirpath": folder / "epochs", "every_n_epochs": 2, "save_on_train_epoch_end": True},
    ]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        val_check_interval=20 if options.source else 0.5,  # a stream has no length
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[scheduler, *(ModelCheckpoint(save_last=True, enable_version_counter=False, **save) for save in saves)],
    )
    train, val = examples(510, 2), examples(96, 3)
    datamodule: Any = BatchSizeDataModule(train, val, eval_batch_size=32, num_workers=2, seed=4)
    if options.source:
        there = stream(options.source, folder.parent / "shards")
        workers = 0 if options.source == "torchdata" else 2  # its loader has its own
        function = None if options.source == "torchdata" else collate
        datamodule = StreamDataModule(there, val, eval_batch_size=32, num_workers=workers, seed=4, collate_fn=function)
    if options.weighted:  # a loader as people write it, with a sampler
        sampler = WeightedRandomSampler([1.0 + i % 3 for i in range(510)], 510)
        datamodule = LightningDataModule.from_datasets(train)
        datamodule.train_dataloader = lambda: DataLoader(
            train, batch_size=32, sampler=sampler, num_workers=2, persistent_workers=True
        )
        datamodule.val_dataloader = lambda: DataLoader(val, batch_size=32, generator=torch.Generator())
    model = Net(journal, options, moment)
    checkpoint = newest_checkpoint(folder)
    model.write(f"from: {checkpoint.relative_to(folder) if checkpoint else 'scratch'}")
    trainer.fit(model, datamodule=datamodule, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "final.pt")


# --- its lives


class Line(NamedTuple):
    """What a journal or a checkpoint says of something, as text: equal texts are equal bits."""

    subject: str
    said: str

    @property
    def step(self) -> int:
        return int(self.subject.split()[1])

    @property
    def validates(self) -> bool:
        return "validation" in self.subject


class Life:
    """A process that trains, to its end or to the moment at which it kills itself."""

    def __init__(self, folder: Path, number: int, options: argparse.Namespace, moment: Moment | None = None) -> None:
        self.journal = folder / f"journal {number}.txt"
        self.output = folder / "output.txt"
        self.temporary = Path(options.temporary)
        self.status: int | None = None
        shutil.rmtree(self.temporary, ignore_errors=True)
        for path in (folder, self.temporary):
            path.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()  # or the child prints what is left there once more
        self.pid = os.fork()
        if self.pid == 0:
            self._live(folder, options, moment)
        with contextlib.suppress(OSError):  # the child does it too: who comes first is not known
            os.setpgid(self.pid, self.pid)

    def _live(self, folder: Path, options: argparse.Namespace, moment: Moment | None) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            output = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            tempfile.tempdir = str(self.temporary)
            train(folder, self.journal, options, moment)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def running(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is None

    def kill(self) -> bool:
        """Kill the process and its workers; whether that is what ended it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.status is None:
            self.status = os.waitpid(self.pid, 0)[1]
        if os.WIFEXITED(self.status) and os.WEXITSTATUS(self.status):
            raise RuntimeError(f"the training failed:\n{self.output.read_text()[-3000:]}")
        return os.WIFSIGNALED(self.status)

    def wait(self, step: int | None = None) -> None:
        """Wait until the process does ``step`` or a later one, or ends."""
        while self.running() and (step is None or self.step() < step):
            time.sleep(0.005)
        if not self.running():
            self.kill()  # its workers may still be there

    def lines(self) -> list[Line]:
        """The journal, but for a last line that was cut."""
        text = self.journal.read_text() if self.journal.exists() else ""
        lines = [Line(*line.split(": ")) for line in text.split("\n")[:-1]]
        return [line for line in lines if line.subject != "from"]

    def step(self) -> int:
        """The last step in the journal; -1 before the first."""
        lines = self.lines()
        return lines[-1].step if lines else -1

    def phase(self) -> str:
        """What it was doing when it was killed, as far as one can see."""
        if any(path.is_file() for path in self.temporary.iterdir()):
            return "saving"
        if not (lines := self.lines()):
            return "starting"
        return "validating" if lines[-1].validates else "training"


def draw_moments(kills: int, seed: int, steps: int, start: float, seconds: float) -> list[tuple[int, float]]:
    """When to kill: so many seconds after a step is done. The step is -1 for some, which are killed as they start.

    Args:
        kills: How many.
        seed: Of the draw.
        steps: Steps of the whole run.
        start: Seconds until its first step.
        seconds: Seconds that the steps take.
    """
    rng = random.Random(seed)
    targets = sorted(rng.randrange(steps - MARGIN) for _ in range(kills))
    spread = seconds / steps * SPREAD
    return [(-1, rng.uniform(0, start)) if rng.random() < 0.2 else (step, rng.uniform(0, spread)) for step in targets]


def draw_exact_moments(kills: int, seed: int, steps: int) -> list[Moment]:
    """When lives kill themselves: each kind in turn, at steps that rise.

    Args:
        kills: How many.
        seed: Of the draw.
        steps: Steps of the whole run.
    """
    rng = random.Random(seed)
    kinds = ("train", "save", "validate", "start")
    targets = sorted(rng.randrange(1, steps - MARGIN) for _ in range(kills))
    return [Moment(kinds[number % len(kinds)], 0 if number % 4 == 3 else step) for number, step in enumerate(targets)]


# --- the comparison


def flatten(value: Any, name: str = "") -> Iterator[Line]:
    """Every value in a checkpoint."""
    if isinstance(value, dict):
        for key in value:
            yield from flatten(value[key], f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from flatten(item, f"{name}/{i}")
    elif isinstance(value, Tensor):
        yield Line(name, f"{value.dtype} {tuple(value.shape)} {value.contiguous().numpy().tobytes().hex()}")
    else:
        yield Line(name, value.hex() if isinstance(value, float) else repr(value))


def read_state(path: Path) -> list[Line]:
    """What a checkpoint says of the training: not its files, nor the validations that Lightning has counted."""
    checkpoint = torch.load(path, weights_only=True)
    kept = {key: checkpoint[key] for key in ("epoch", "global_step", "state_dict", "optimizer_states")}
    kept["epochs"] = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    kept["callback"] = checkpoint["callbacks"]["BatchLRScheduler"]
    return list(flatten(kept))


def differences(expected: Iterable[Line], actual: Iterable[Line]) -> list[str]:
    """Where two runs differ: what they say differently, what only one of them says."""
    right, seen, found = dict(expected), set(), []
    for subject, said in actual:
        seen.add(subject)
        if right.get(subject) != said:
            found.append(f"{subject}: {said[:300]} instead of {right.get(subject, 'nothing')[:300]}")
    return found + [f"{subject}: missing" for subject in right if subject not in seen]


def compare_runs(folder: Path, options: argparse.Namespace) -> int:
    """Train without and with kills; the number of differences."""
    if options.source:
        write_shards(options.source, folder / "shards", examples(510, 2))
    began = time.monotonic()
    whole = Life(folder / "whole", 0, options)
    whole.wait(step=0)
    started = time.monotonic()
    whole.wait()
    ended = time.monotonic()
    steps = whole.step()
    print(f"never killed: {steps} steps in {ended - began:.1f} s, {started - began:.2f} s of them to start", flush=True)

    lives: list[Life] = []
    phases: Counter[str] = Counter()
    if options.exact:
        for moment in draw_exact_moments(options.kills, options.seed, steps):
            lives.append(Life(folder / "killed", len(lives), options, moment))
            lives[-1].wait()
            phases[moment.does if os.WIFSIGNALED(lives[-1].status) else "missed"] += 1
    else:
        for step, delay in draw_moments(options.kills, options.seed, steps, started - began, ended - started):
            lives.append(Life(folder / "killed", len(lives), options))
            lives[-1].wait(step)
            time.sleep(delay)
            phases[lives[-1].phase() if lives[-1].kill() else "missed"] += 1
    lives.append(Life(folder / "killed", len(lives), options))
    lives[-1].wait()

    lines = [line for life in lives for line in life.lines()]
    steps_done = [line for line in lines if not line.validates]
    begun = [life.lines()[0].step for life in lives[1:] if life.lines()]
    # Lightning does not make up for the validation that is due at a checkpoint saved just before it
    skipped = {line for line in whole.lines() if line.validates and line.step in begun} - set(lines)
    found = differences((line for line in whole.lines() if line not in skipped), lines)
    found += differences(read_state(folder / "whole/final.pt"), read_state(folder / "killed/final.pt"))
    if phases["missed"]:
        found.append(f"{phases['missed']} kills came after the end")
    print(*found[:10], sep="\n", end="\n" if found else "")
    printed = lives[-1].output.read_text()
    facts = {
        f"kills ({', '.join(f'{number} {phase}' for phase, number in phases.items())})": options.kills,
        "resumes": sum(step > 0 for step in begun),
        "steps done again": len(steps_done) - len(set(steps_done)),
        "validations skipped": len({line.step for line in skipped}),
        "unreadable checkpoints": len({line for line in printed.splitlines() if line.startswith(UNREADABLE)}),
        "s": round(time.monotonic() - began),
    }
    print(*(f"{number} {what}" for what, number in facts.items()), sep=", ", end=": ")
    print(f"DIFFERENT, first {found[0]}" if found else "equal")
    return len(found)


def run(arguments: list[str] | None = None) -> int:
    """Compare runs as the arguments say; returns the number of differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--exact", action="store_true", help="lives kill themselves at steps, not at moments of the clock")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--weighted", action="store_true", help="a DataLoader with a WeightedRandomSampler, not our DataModule")
    parser.add_argument("--source", choices=["litdata", "torchdata", "datasets"], help="a stream of a library")
    parser.add_argument("--cap", type=int, help="`max_device_batch_size`; the model then has no BatchNorm")
    parser.add_argument("--temporary", help="folder for Lightning's temporary files, say on another file system")
    parser.add_argument("--keep", help="folder to copy journals and checkpoints to")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir=options.temporary) as options.temporary:
        found = compare_runs(Path(folder), options)
        if options.keep:
            shutil.copytree(folder, options.keep, dirs_exist_ok=True)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # to fork is safe only while there is one thread
    warnings.simplefilter("ignore")
    sys.exit(run() > 0)
