"""A grid of batch sizes, learning rates and seeds, in passes, into one file."""

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

_CPU_BYTES = 64 << 20  # a CPU trains fastest what nearly fits in its caches,
_LEAST, _CPU_MOST = 8, 1 << 30  # and so many at least, as long as they take no more memory than that
_PARSE: dict[str, Callable[[str], Any]] = {"seed": int, "batch_size": int, "steps": int, "examples": int, "extra_steps": int}


@dataclass(frozen=True)
class Grid:
    """What to train (P4, Table 1).

    Args:
        batch_sizes: B.
        lrs: Learning rates.
        seeds: A round each; a number n stands for 0 to n - 1.
        targets: Losses to reach.
        max_examples: Where a replica gives up.
        extra_steps: Steps after each target over which the drop of the loss is measured.
        probe: Examples on which losses are compared with the targets.
        betas: Of Adam.
        eps: Of Adam.
        replicas_per_pass: Replicas that train at once; by default what memory allows, and on a CPU what its caches hold.

    Raises:
        ValueError: An empty list, a value twice, or one that is not above 0.

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
                raise ValueError(f"`{name}={values}` must be above 0")
        for name in ("max_examples", "extra_steps", "probe", "replicas_per_pass"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}={value}` must be 1 or more")
        if self.max_examples < max(self.batch_sizes):
            raise ValueError(f"`max_examples={self.max_examples}` does not make one batch of {max(self.batch_sizes)}")

    @property
    def replicas(self) -> int:
        """How many there are."""
        return len(self.batch_sizes) * len(self.lrs) * len(self.rounds)

    @property
    def rounds(self) -> Sequence[int]:
        """The seeds, one by one."""
        return range(self.seeds) if isinstance(self.seeds, int) else self.seeds


def read_outcomes(path: str | Path) -> list[Outcome]:
    """Read ``replicas.csv``, but for a last line that was cut short.

    Args:
        path: The file; one that is not there has no outcomes.
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
    """Train every replica of a grid that the file does not hold yet, batch size by batch size, pass by pass.

    Args:
        grid: What to train.
        make: Makes the model of a seed, as of `Population`.
        datamodule: The data.
        path: CSV file, a line for each replica and target as soon as it is done. Those that it holds are not repeated; of a
            replica that was interrupted nothing is in it.
        trainer: Makes the Trainer of a pass.
        progress: Called with the number of replicas that are done, and of all, whenever one is.

    Returns:
        All outcomes, those of before too.

    Raises:
        ValueError: The file holds replicas of other targets or extra steps.
    """
    path = Path(path)
    found = read_outcomes(path)
    _check_same(grid, found, path)
    outcomes = _whole(found, grid.targets)
    wanted = {(b, seed, lr) for b in grid.batch_sizes for seed in grid.rounds for lr in grid.lrs}
    done = {(each.batch_size, each.seed, each.lr) for each in outcomes}
    _write(path, outcomes)
    with path.open("ab", buffering=0) as file:

        def end(ended: list[Outcome]) -> None:
            file.write(_lines(ended))  # at once: a kill leaves whole lines but for the last
            outcomes.extend(ended)
            done.add((ended[0].batch_size, ended[0].seed, ended[0].lr))
            progress(len(done & wanted), grid.replicas)

        progress(len(done & wanted), grid.replicas)
        for batch_size in grid.batch_sizes:
            size = grid.replicas_per_pass
            while todo := list(_todo(grid, batch_size, done)):
                size = size or fitting(make(todo[0][0]), datamodule, batch_size, trainer().strategy.root_device)
                together = todo[:size]
                try:
                    _pass(grid, make, datamodule, together, batch_size, trainer(), end)
                except RuntimeError as error:
                    if not is_out_of_memory(error) or len(together) == 1:
                        raise
                    size = -(-len(together) // 2)
    return outcomes


def _todo(grid: Grid, batch_size: int, done: set[tuple[int, int, float]]) -> Iterator[tuple[int, float]]:
    for lr in sorted(grid.lrs, reverse=True):  # those of one rate end at about the same time
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
        raise ValueError("the Trainer ended a pass before its replicas did: leave `max_epochs` and `max_steps` unlimited (-1)")


def replica_bytes(model: LightningModule, datamodule: BatchSizeDataModule, batch_size: int) -> int:
    """About how much memory a replica takes while it trains: weights, gradient, two moments, and what the forward pass keeps.

    Args:
        model: The model of any seed, with ``full_loss``.
        datamodule: The data.
        batch_size: B.
    """
    parameters = 4 * sum(each.numel() * each.element_size() for each in model.parameters())
    data = PopulationData(datamodule, [], 1, probe=1)
    data.probe_size = examples = min(2, datamodule.num_epoch_examples)  # BatchNorm may need two
    return parameters + batch_size * _kept_bytes(Loss(model), data.probe()) // examples


def fitting(model: LightningModule, datamodule: BatchSizeDataModule, batch_size: int, device: torch.device) -> int:
    """Replicas of a pass: what fits in the caches of a CPU, or in half of the free memory of a GPU.

    Args:
        model: As of `replica_bytes`.
        datamodule: The data.
        batch_size: B.
        device: Where they train.
    """
    each = replica_bytes(model, datamodule, batch_size)
    if device.type == "cuda":
        return max(1, torch.cuda.mem_get_info(device)[0] // 2 // each)
    return max(1, _CPU_BYTES // each, min(_LEAST, _CPU_MOST // each))


def _kept_bytes(loss: Loss, batch: Any) -> int:
    """What a forward pass keeps for the backward pass, the parameters apart."""
    kept = {each.data_ptr(): 0 for each in loss.parameters()}

    def note(saved: Tensor) -> Tensor:
        kept.setdefault(saved.data_ptr(), saved.numel() * saved.element_size())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        loss(batch)
    return sum(kept.values())


def _whole(outcomes: Sequence[Outcome], targets: Sequence[float]) -> list[Outcome]:
    """Those of the replicas that have an outcome for each target."""
    found: dict[tuple[int, int, float], set[float]] = {}
    for each in outcomes:
        found.setdefault((each.batch_size, each.seed, each.lr), set()).add(each.target)
    return [each for each in outcomes if found[each.batch_size, each.seed, each.lr] >= set(targets)]


def _check_same(grid: Grid, found: Sequence[Outcome], path: Path) -> None:
    for name, here in (("target", set(grid.targets)), ("extra_steps", {grid.extra_steps})):
        if others := {getattr(each, name) for each in found} - here:
            raise ValueError(f"{path} holds replicas with {name} {sorted(others)}, not {sorted(here)}; choose another folder")


def _lines(outcomes: Sequence[Outcome]) -> bytes:
    return "".join(",".join(map(str, each)) + "\n" for each in outcomes).encode()


def _write(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the file anew, without what an interruption left of a line or a replica."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_bytes((",".join(Outcome._fields) + "\n").encode() + _lines(outcomes))
    os.replace(beside, path)
