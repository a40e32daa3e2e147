"""Train a grid of batch sizes, learning rates and seeds in passes, and write the outcomes to one file."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_bsl.callbacks.micro_batches import is_out_of_memory
from lightning_bsl.data import BatchSizeDataModule
from lightning_bsl.population.data import PopulationData
from lightning_bsl.population.forms import Form, FormChoice
from lightning_bsl.population.module import Loss, Outcome, Population
from lightning_bsl.population.workers import Workers, start_method, usable_cores
from lightning_bsl.schedules.checks import check_whole
from lightning_bsl.schedules.files import append_whole, written_whole

# a CPU is fastest with replicas that take about 64 MiB together, near the size of its caches;
# a pass has at least 8 replicas, if they take no more than 1 GiB
_CPU_BYTES = 64 << 20
_LEAST, _CPU_MOST = 8, 1 << 30
_LARGEST = 1e300  # a rate or a loss: sums of larger numbers are infinite
_log = logging.getLogger(__name__)
_PARSE: dict[str, Callable[[str], Any]] = {"seed": int, "batch_size": int, "steps": int, "examples": int, "extra_steps": int}


@dataclass(frozen=True)
class Grid:
    """A grid of runs (Li et al. 2024, arXiv 2405.14578, Table 1). A replica is one run: a batch size, a learning rate, a seed.

    Args:
        batch_sizes: Batch sizes B, in examples.
        lrs: Learning rates.
        seeds: Seeds, one for each round; an int n means 0 to n - 1.
        targets: Losses to reach.
        max_examples: Number of examples after which a replica stops; with ``added_steps``, the E of a limit of E / B +
            ``added_steps`` steps. So the limit has the form of the steps to a loss, S = E_min / B + S_min (McCandlish et al.
            2018, arXiv 1812.06162), and is as far from them at small batch sizes as at large ones.
        extra_steps: Steps after each target over which the drop of the loss is measured.
        added_steps: Steps that a replica may take beside those of ``max_examples``.
        probe: Number of examples on which losses are compared with the targets.
        betas: The betas of Adam.
        eps: The eps of Adam.
        replicas_per_pass: Number of replicas that a process trains at once; by default what memory allows (on a CPU, its
            caches).

    Raises:
        ValueError: An empty list, a value twice, or a value that is not above 0; ``max_examples`` below the largest batch size.

    Example:
        >>> Grid([1, 2], [0.001], 10, [1.0], max_examples=6000).replicas
        20
    """

    batch_sizes: Sequence[int]
    lrs: Sequence[float]
    seeds: Sequence[int] | int
    targets: Sequence[float]
    max_examples: int
    extra_steps: int = 10
    added_steps: int = 0
    probe: int = 100
    betas: Sequence[float] = (0.9, 0.999)
    eps: float = 1e-8
    replicas_per_pass: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "lrs", "seeds", "targets"):
            values = list(self.rounds if name == "seeds" else getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ValueError(f"`{name}={values}` must hold at least one value, and none twice")
            if name != "seeds" and not all(0 < value < math.inf for value in values):
                raise ValueError(f"`{name}={values}` must hold finite values above 0")
        for name in ("max_examples", "extra_steps", "probe", "replicas_per_pass"):
            value = getattr(self, name)
            check_whole(name, value, or_none=True)
        check_whole("added_steps", self.added_steps, least=0)
        if not self.max_steps(max(self.batch_sizes)):
            raise ValueError(
                f"`max_examples={self.max_examples}` does not make one batch of {max(self.batch_sizes)}: write "
                f"{max(self.batch_sizes)} or more"
            )

    def max_steps(self, batch_size: int) -> int:
        """The number of steps after which a replica stops.

        Args:
            batch_size: B, in examples.
        """
        return self.max_examples // batch_size + self.added_steps

    @property
    def replicas(self) -> int:
        """The number of replicas."""
        return len(self.batch_sizes) * len(self.lrs) * len(self.rounds)

    @property
    def rounds(self) -> Sequence[int]:
        """The seeds, one by one."""
        return range(self.seeds) if isinstance(self.seeds, int) else self.seeds


def read_outcomes(path: str | Path) -> list[Outcome]:
    """Read ``replicas.csv``. Incomplete lines, as an interruption may leave them, and numbers that no grid has are skipped.

    Args:
        path: The file.

    Returns:
        The outcomes; an empty list if there is no file.

    Example:
        >>> read_outcomes("no/such/replicas.csv")
        []
    """
    if not Path(path).exists():
        return []
    outcomes = []
    with open(path, newline="") as file:
        for row in csv.DictReader(line for line in file if line.endswith("\n")):  # half of the last number is a number
            try:
                values = {name: _PARSE.get(name, str if name == "status" else float)(row[name]) for name in Outcome._fields}
            except (TypeError, ValueError, KeyError):
                continue
            if not (0 < values["lr"] < _LARGEST and 0 < values["target"] < _LARGEST and values["batch_size"] > 0):
                continue
            outcomes.append(Outcome(**values))
    return outcomes


def run_grid(
    grid: Grid,
    make: Callable[[int], LightningModule],
    datamodule: BatchSizeDataModule,
    path: str | Path,
    trainer: Callable[[], Trainer],
    progress: Callable[[int, int], Any] = lambda done, of: None,
    *,
    jobs: int | None = None,
    form: Form | None = None,
    say: Callable[[str], Any] = _log.info,
) -> list[Outcome]:
    """Train all replicas of a grid that are not in the file yet, in passes: some replicas of a batch size at once.

    On a CPU, worker processes with one thread each train the passes. On a GPU passes run one after the other.

    Args:
        grid: The grid.
        make: Makes the model of a seed, as for [`Population`][lightning_bsl.population.Population].
        datamodule: The data.
        path: CSV file. It gets a line for each replica and target when the replica is done. Replicas that are in the file are
            not trained again; an interrupted replica leaves no lines.
        trainer: Makes the Trainer of a pass.
        progress: Called with the numbers of completed and of all replicas, when a replica is done.
        jobs: Number of worker processes; with 1 the passes run in this process. By default the cores that this process may
            use, and 1 where processes must be spawned but ``make`` or ``trainer`` cannot be pickled.
        form: The form of the steps, as for `Population`; by default the faster one, which is measured for each batch size. Only
            with a form is a grid reproducible to the last bit.
        say: Called with a line of text for each choice of a form; by default it is logged.

    Returns:
        All outcomes, including those that were in the file before.

    Raises:
        ValueError: The file has replicas with other targets or extra steps; several jobs on a GPU.
        RuntimeError: Out of memory with a single replica; a worker process was killed. Errors in workers are raised here too.

    Example:
        >>> import tempfile
        >>> from lightning_bsl.datasets import Digits
        >>> from lightning_bsl.models import Classifier, cnn5
        >>> grid = Grid([8], [0.01], seeds=1, targets=[2.2], max_examples=1600, extra_steps=1)
        >>> make = lambda seed: Classifier(cnn5(image_size=8, width=4), num_classes=10)
        >>> quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/replicas.csv"
        ...     outcomes = run_grid(grid, make, Digits(), path, lambda: Trainer(max_epochs=-1, accelerator="cpu", **quiet))
        >>> [outcome.batch_size for outcome in outcomes]
        [8]
    """
    path = Path(path)
    check_whole("jobs", jobs, instead=", or None for one on each core", or_none=True)
    recorded = read_outcomes(path)
    _check_same(grid, recorded, path)
    outcomes = _whole(recorded, grid.targets)
    wanted = {(b, seed, lr) for b in grid.batch_sizes for seed in grid.rounds for lr in grid.lrs}
    done = {(outcome.batch_size, outcome.seed, outcome.lr) for outcome in outcomes}
    _write(path, outcomes)
    if not wanted - done:
        progress(grid.replicas, grid.replicas)
        return outcomes
    for batch_size in grid.batch_sizes:  # it sets up the data, and refuses what does not fit, before anything trains
        PopulationData(datamodule, [], batch_size, grid.probe)
    device = trainer().strategy.root_device
    if device.type != "cpu" and (jobs or 1) > 1:
        raise ValueError(f"`jobs={jobs}`: the passes of a {device.type} device run one after the other; write jobs=1")
    said: set[tuple[int, Form]] = set()

    def tell(news: list[Outcome] | _Chosen) -> None:
        if isinstance(news, list):
            append_whole(path, _lines(news))  # a kill can leave at most one incomplete line
            outcomes.extend(news)
            done.add((news[0].batch_size, news[0].seed, news[0].lr))
            progress(len(done & wanted), grid.replicas)
        elif (news.batch_size, news.form) not in said:  # the other workers measure it, too
            said.add((news.batch_size, news.form))
            say(str(news))

    progress(len(done & wanted), grid.replicas)
    train = _Train(grid, make, datamodule, trainer, form)
    most = 1 if device.type != "cpu" else min(jobs or usable_cores(), len(wanted - done))
    passes = _Passes(grid, done, lambda batch_size: fitting(make(grid.rounds[0]), datamodule, batch_size, device), most)
    _run(passes, train, tell, most, jobs is not None)
    return outcomes


def _run(passes: _Passes, train: _Train, tell: Callable[[Any], Any], jobs: int, wished: bool) -> None:
    """Train all passes, in workers where they pay."""
    if jobs > 1 and not (start_method() == "spawn" and passes.is_one):  # an import of torch takes longer than a small pass
        try:
            workers = Workers(jobs, train)
        except ValueError as error:
            if wished:
                raise
            _log.info("all passes run in this process: %s", error)
        else:
            with workers:
                workers.run(passes.take, tell, passes.failed)
            return
    passes.jobs = 1
    while (task := passes.take()) is not None:
        try:
            train(task, tell)
        except RuntimeError as error:
            passes.failed(task, error)


class _Pass(NamedTuple):
    batch_size: int
    replicas: Sequence[tuple[int, float]]  # seeds and rates


class _Chosen(NamedTuple):
    batch_size: int
    replicas: int
    form: Form
    ratio: float

    def __str__(self) -> str:
        other = "the loop" if self.form == "stacked" else "the stacked form"
        return f"batch {self.batch_size}: {self.form}, {self.ratio:.1f}x {other} ({self.replicas} replicas)"


@dataclass
class _Passes:
    """The passes of a grid that are still to be trained: batch size after batch size.

    Args:
        grid: The grid.
        done: Batch size, seed and rate of the replicas that are done.
        fitting: The number of replicas of a batch size that fit into a pass.
        jobs: Number of processes.
    """

    grid: Grid
    done: set[tuple[int, int, float]]
    fitting: Callable[[int], int]
    jobs: int

    def __post_init__(self) -> None:
        self._todo = {
            # replicas of one learning rate end at about the same time; the slow ones first, so that processes end together
            batch_size: [
                (seed, lr)
                for lr in sorted(self.grid.lrs)
                for seed in self.grid.rounds
                if (batch_size, seed, lr) not in self.done
            ]
            for batch_size in self.grid.batch_sizes
        }
        self._todo = {batch_size: replicas for batch_size, replicas in self._todo.items() if replicas}
        self._passes: list[_Pass] = []

    @property
    def is_one(self) -> bool:
        """Whether everything fits into one pass."""
        ((batch_size, replicas), *others) = self._todo.items()
        return not others and len(replicas) <= self._size(batch_size)

    def take(self) -> _Pass | None:
        """The next pass; ``None`` if all are taken."""
        if not self._passes and self._todo:
            self._divide()
        return self._passes.pop(0) if self._passes else None

    def failed(self, task: _Pass, error: BaseException) -> None:
        """Take back a pass whose memory was short, in halves. Another error is raised."""
        if not isinstance(error, RuntimeError) or not is_out_of_memory(error) or len(task.replicas) == 1:
            raise error
        self._passes = self._in_passes(task, -(-len(task.replicas) // 2)) + [
            smaller for other in self._passes for smaller in self._in_passes(other, -(-len(task.replicas) // 2))
        ]

    def _divide(self) -> None:
        """Divide the replicas of the next batch size into passes of about the same number."""
        batch_size = next(iter(self._todo))
        size, replicas = self._size(batch_size), self._todo.pop(batch_size)
        # where later batch sizes leave no work for the other processes, all of them share each stretch of learning rates
        shares = self.jobs if len(self._todo) < self.jobs - 1 else 1
        stretches = -(-len(replicas) // (size * shares))
        for stretch in range(stretches):
            part = replicas[len(replicas) * stretch // stretches : len(replicas) * (stretch + 1) // stretches]
            self._passes += [_Pass(batch_size, part[share::shares]) for share in range(min(shares, len(part)))]

    def _size(self, batch_size: int) -> int:
        return self.grid.replicas_per_pass or self.fitting(batch_size)

    def _in_passes(self, task: _Pass, size: int) -> list[_Pass]:
        left = [pair for pair in task.replicas if (task.batch_size, *pair) not in self.done]
        return [task._replace(replicas=left[start : start + size]) for start in range(0, len(left), size)]


@dataclass
class _Train:
    """Trains a pass, in this process or in a worker, and tells what happens: outcomes of a replica, or a `_Chosen`."""

    grid: Grid
    make: Callable[[int], LightningModule]
    datamodule: BatchSizeDataModule
    trainer: Callable[[], Trainer]
    form: Form | None
    choices: dict[int, FormChoice] = field(default_factory=dict)

    def __call__(self, task: _Pass, tell: Callable[[Any], Any]) -> None:
        grid, (batch_size, replicas) = self.grid, task
        if batch_size not in self.choices:
            self.choices[batch_size] = FormChoice(lambda *choice: tell(_Chosen(batch_size, *choice)))
        population = Population(
            self.make,
            replicas,
            batch_size,
            grid.targets,
            max_steps=grid.max_steps(batch_size),
            extra_steps=grid.extra_steps,
            betas=grid.betas,
            eps=grid.eps,
            on_end=tell,
            form=self.form or self.choices[batch_size],
        )
        trainer = self.trainer()
        trainer.fit(population, datamodule=PopulationData(self.datamodule, population.seeds, batch_size, grid.probe))
        if trainer.interrupted:
            raise KeyboardInterrupt
        if not trainer.should_stop:
            raise ValueError(
                "the Trainer ended a pass before its replicas were done: write `max_epochs=-1`, and leave `max_steps` out"
            )


def replica_bytes(model: LightningModule, datamodule: BatchSizeDataModule, batch_size: int) -> int:
    """Estimate the memory of a replica in training: weights, gradient, two moments, and tensors that the forward pass keeps.

    Args:
        model: The model of any seed, with ``full_loss``.
        datamodule: The data.
        batch_size: B, in examples.

    Returns:
        The number of bytes.
    """
    parameters = 4 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    data = PopulationData(datamodule, [], 1, probe=1)
    data.probe_size = examples = min(2, datamodule.num_epoch_examples)  # BatchNorm may need two
    return parameters + batch_size * _kept_bytes(Loss(model), data.probe()) // examples


def fitting(model: LightningModule, datamodule: BatchSizeDataModule, batch_size: int, device: torch.device) -> int:
    """The number of replicas of a pass: as many as fit in the caches of a CPU, or in half of the free memory of a GPU.

    Args:
        model: The model of any seed, with ``full_loss``.
        datamodule: The data.
        batch_size: B, in examples.
        device: The device on which they train.
    """
    size = replica_bytes(model, datamodule, batch_size)
    if device.type == "cuda":
        return max(1, torch.cuda.mem_get_info(device)[0] // 2 // size)
    return max(1, _CPU_BYTES // size, min(_LEAST, _CPU_MOST // size))


def _kept_bytes(loss: Loss, batch: Any) -> int:
    """Bytes of the tensors that a forward pass keeps for the backward pass, without the parameters."""
    kept = {parameter.data_ptr(): 0 for parameter in loss.parameters()}

    def note(saved: Tensor) -> Tensor:
        kept.setdefault(saved.data_ptr(), saved.numel() * saved.element_size())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        loss(batch)
    return sum(kept.values())


def _whole(outcomes: Sequence[Outcome], targets: Sequence[float]) -> list[Outcome]:
    """The outcomes of replicas that have an outcome for every target."""
    reached: dict[tuple[int, int, float], set[float]] = {}
    for outcome in outcomes:
        reached.setdefault((outcome.batch_size, outcome.seed, outcome.lr), set()).add(outcome.target)
    return [outcome for outcome in outcomes if reached[outcome.batch_size, outcome.seed, outcome.lr] >= set(targets)]


def _check_same(grid: Grid, recorded: Sequence[Outcome], path: Path) -> None:
    for name, expected in (("target", set(grid.targets)), ("extra_steps", {grid.extra_steps})):
        if others := {getattr(outcome, name) for outcome in recorded} - expected:
            raise ValueError(
                f"{path} holds replicas with {name} {sorted(others)}, not {sorted(expected)}; choose another folder"
            )


def _lines(outcomes: Sequence[Outcome]) -> bytes:
    return "".join(",".join(map(str, outcome)) + "\n" for outcome in outcomes).encode()


def _write(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the file again, without incomplete lines and replicas."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as unfinished:
        unfinished.write_bytes((",".join(Outcome._fields) + "\n").encode() + _lines(outcomes))
