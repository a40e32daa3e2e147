"""Train a grid of batch sizes, learning rates and seeds in passes, and write the outcomes to one file."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_bsl.callbacks.micro_batches import is_out_of_memory
from lightning_bsl.data import BatchSizeDataModule
from lightning_bsl.population.data import PopulationData
from lightning_bsl.population.module import Loss, Outcome, Population
from lightning_bsl.schedules.checks import check_whole

# a CPU is fastest with replicas that take about 64 MiB together, near the size of its caches;
# a pass has at least 8 replicas, if they take no more than 1 GiB
_CPU_BYTES = 64 << 20
_LEAST, _CPU_MOST = 8, 1 << 30
_PARSE: dict[str, Callable[[str], Any]] = {"seed": int, "batch_size": int, "steps": int, "examples": int, "extra_steps": int}


@dataclass(frozen=True)
class Grid:
    """A grid of runs (Li et al. 2024, arXiv 2405.14578, Table 1). A replica is one run: a batch size, a learning rate, a seed.

    Args:
        batch_sizes: Batch sizes B, in examples.
        lrs: Learning rates.
        seeds: Seeds, one for each round; an int n means 0 to n - 1.
        targets: Losses to reach.
        max_examples: Number of examples after which a replica stops.
        extra_steps: Steps after each target over which the drop of the loss is measured.
        probe: Number of examples on which losses are compared with the targets.
        betas: The betas of Adam.
        eps: The eps of Adam.
        replicas_per_pass: Number of replicas that train at once; by default what memory allows (on a CPU, its caches).

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
        if self.max_examples < max(self.batch_sizes):
            raise ValueError(
                f"`max_examples={self.max_examples}` does not make one batch of {max(self.batch_sizes)}: write "
                f"{max(self.batch_sizes)} or more"
            )

    @property
    def replicas(self) -> int:
        """The number of replicas."""
        return len(self.batch_sizes) * len(self.lrs) * len(self.rounds)

    @property
    def rounds(self) -> Sequence[int]:
        """The seeds, one by one."""
        return range(self.seeds) if isinstance(self.seeds, int) else self.seeds


def read_outcomes(path: str | Path) -> list[Outcome]:
    """Read ``replicas.csv``. Incomplete lines, as an interruption may leave them, are skipped.

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
        for row in csv.DictReader(file):
            try:
                values = {name: _PARSE.get(name, str if name == "status" else float)(row[name]) for name in Outcome._fields}
            except (TypeError, ValueError, KeyError):
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
) -> list[Outcome]:
    """Train all replicas of a grid that are not in the file yet, for one batch size after another.

    Args:
        grid: The grid.
        make: Makes the model of a seed, as for [`Population`][lightning_bsl.population.Population].
        datamodule: The data.
        path: CSV file. It gets a line for each replica and target when the replica is done. Replicas that are in the file are
            not trained again; an interrupted replica leaves no lines.
        trainer: Makes the Trainer of a pass.
        progress: Called with the numbers of completed and of all replicas, when a replica is done.

    Returns:
        All outcomes, including those that were in the file before.

    Raises:
        ValueError: The file has replicas with other targets or extra steps.
        RuntimeError: Out of memory with a single replica.

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
    recorded = read_outcomes(path)
    _check_same(grid, recorded, path)
    outcomes = _whole(recorded, grid.targets)
    wanted = {(b, seed, lr) for b in grid.batch_sizes for seed in grid.rounds for lr in grid.lrs}
    done = {(outcome.batch_size, outcome.seed, outcome.lr) for outcome in outcomes}
    _write(path, outcomes)
    with path.open("ab", buffering=0) as file:

        def end(ended: list[Outcome]) -> None:
            file.write(_lines(ended))  # in one write, so that a kill can leave at most one incomplete line
            outcomes.extend(ended)
            done.add((ended[0].batch_size, ended[0].seed, ended[0].lr))
            progress(len(done & wanted), grid.replicas)

        progress(len(done & wanted), grid.replicas)
        for batch_size in grid.batch_sizes:
            size = grid.replicas_per_pass
            while todo := list(_todo(grid, batch_size, done)):
                size = size or fitting(make(todo[0][0]), datamodule, batch_size, trainer().strategy.root_device)
                replicas = todo[:size]
                try:
                    _pass(grid, make, datamodule, replicas, batch_size, trainer(), end)
                except RuntimeError as error:
                    if not is_out_of_memory(error) or len(replicas) == 1:
                        raise
                    size = -(-len(replicas) // 2)
    return outcomes


def _todo(grid: Grid, batch_size: int, done: set[tuple[int, int, float]]) -> Iterator[tuple[int, float]]:
    for lr in sorted(grid.lrs, reverse=True):  # replicas of one learning rate end at about the same time
        for seed in grid.rounds:
            if (batch_size, seed, lr) not in done:
                yield seed, lr


def _pass(
    grid: Grid,
    make: Callable[[int], LightningModule],
    datamodule: BatchSizeDataModule,
    replicas: Sequence[tuple[int, float]],
    batch_size: int,
    trainer: Trainer,
    end: Callable[[list[Outcome]], Any],
) -> None:
    population = Population(
        make,
        replicas,
        batch_size,
        grid.targets,
        max_steps=grid.max_examples // batch_size,
        extra_steps=grid.extra_steps,
        betas=grid.betas,
        eps=grid.eps,
        on_end=end,
    )
    trainer.fit(population, datamodule=PopulationData(datamodule, population.seeds, batch_size, grid.probe))
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
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes((",".join(Outcome._fields) + "\n").encode() + _lines(outcomes))
    os.replace(temporary, path)
