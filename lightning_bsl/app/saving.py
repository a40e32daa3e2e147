"""Checkpoints and metrics of a run, which a full disk or a kill cannot break."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_bsl.schedules.files import append_whole, written_whole


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place, and moves it there when it is complete.

    Lightning writes it to the folder for temporary files. From another disk the move is a copy, and what cuts that short
    leaves half a checkpoint in the place of a whole one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: The state of the run.
            path: The file; a URL is left to Lightning.
            storage_options: Not used, as in ``TorchCheckpointIO``.

        Raises:
            OSError: It cannot be written; the message names it.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()  # written by itself `torch.save` would hide what the system said
        torch.save(checkpoint, buffer)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(Path(path)) as unfinished:
            unfinished.write_bytes(buffer.getbuffer())


def save_whole(trainer: Trainer) -> None:
    """Let a Trainer write its checkpoints with `WholeCheckpoints`, unless it has a plugin of its own for them.

    Args:
        trainer: The Trainer.
    """
    strategy = trainer.strategy
    if type(strategy) in (SingleDeviceStrategy, DDPStrategy) and type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeCheckpoints()


class MetricsLogger(CSVLogger):
    """Lightning's ``CSVLogger``, whose file has only whole rows and is never empty while it gets another column."""

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """What writes the file."""
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _MetricsWriter(log_dir=self.log_dir)
        return self._experiment  # type: ignore[return-value]


class _MetricsWriter(ExperimentWriter):
    def save(self) -> None:
        """Append the new rows; or write the file anew, if they have other columns."""
        if not self.metrics:
            return
        path, columns = Path(self.metrics_file_path), sorted({*self.metrics_keys, *chain(*self.metrics)})
        there = path.exists()
        if there and columns == self.metrics_keys:
            append_whole(path, _lines(columns, self.metrics))
        else:
            before: list[dict[str, str]] = []
            if there:
                with open(path, newline="") as file:
                    before = list(csv.DictReader(file))
            with written_whole(path) as unfinished:
                unfinished.write_bytes(_lines(columns, [dict(zip(columns, columns)), *before, *self.metrics]))
        self.metrics_keys, self.metrics = columns, []


def _lines(columns: list[str], rows: Iterable[Mapping[str, object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue().encode()
