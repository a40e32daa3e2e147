"""The clock of a run, and the batch size and learning rate of its next step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_bsl.schedules import BatchLR, Horizon, JointSchedule, Progress

_UNITS = ("epoch", "step", "samples")


class RunClock:
    """The progress of a run, now and at the start of the current epoch.

    Attributes:
        progress: The progress now.
        epoch_start: The progress at the start of the current epoch.
        loader_start: The progress at the start of the epoch that the loader serves. After the end of the run it stays at the
            last epoch: Lightning reads the length of the loader once more, and a next epoch may not exist.
        end: The end of the run, from the Trainer's settings.
        begun_at: The step at which this fit began or resumed.

    Example:
        >>> clock = RunClock()
        >>> clock.begin(Horizon(epoch=2), Horizon(epoch=2))
        >>> clock.advance(8, steps=1)
        >>> clock.next_epoch()
        >>> clock.progress[:3], clock.behind, clock.finished
        ((1, 1, 8), 0, False)
    """

    def __init__(self) -> None:
        self.progress = self.epoch_start = self.loader_start = Progress()
        self.end, self.begun_at = Horizon(), 0

    @property
    def behind(self) -> int:
        """Examples of the current epoch that have been trained."""
        return self.progress.samples - self.epoch_start.samples

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        return self.end.ends_before(self.progress)

    def reset(self) -> None:
        """Begin a new run."""
        self.progress = self.epoch_start = self.loader_start = Progress()

    def begin(self, end: Horizon, horizon: Horizon) -> None:
        """Begin a fit, of a new run or of a run that goes on.

        Args:
            end: The end of the run.
            horizon: Length of the run in each unit, as far as it is known.
        """
        self.end = end
        self.begun_at = self.progress.step
        self.epoch_start = self.progress  # after an exception inside an epoch Lightning starts the epoch again
        self.set_horizon(horizon)
        if not self.finished:
            self.loader_start = self.epoch_start

    def set_horizon(self, horizon: Horizon) -> None:
        """Set the length of the run in each unit, for schedules over a fraction of it."""
        self.epoch_start = self.epoch_start._replace(horizon=horizon)
        self.loader_start = self.loader_start._replace(horizon=horizon)
        self.progress = self.progress._replace(horizon=horizon)

    def advance(self, examples: int, steps: int) -> None:
        """Count trained examples and steps.

        Args:
            examples: Number of examples, over all processes.
            steps: Number of optimizer steps.
        """
        self.progress = self.progress.advance(examples, steps)

    def next_epoch(self) -> None:
        """Count a completed epoch."""
        self.epoch_start = self.progress = self.progress.next_epoch()
        if not self.finished:
            self.loader_start = self.epoch_start

    def state_dict(self) -> dict[str, Any]:
        """Current progress, start of the epoch, and horizon: plain integers."""
        readings = {"epoch_start": self.epoch_start, "progress": self.progress}
        state = {name: {unit: getattr(reading, unit) for unit in _UNITS} for name, reading in readings.items()}
        return state | {"horizon": asdict(self.progress.horizon)}

    def load_state_dict(self, state: dict[str, Any], epoch_ended: bool = False) -> None:
        """Restore the progress and the start of the epoch; the horizon stays that of this fit.

        Args:
            state: The value of ``state_dict``.
            epoch_ended: Whether Lightning goes on with the next epoch, although the last one is not counted yet.
        """
        horizon = self.progress.horizon
        self.epoch_start = Progress(**state["epoch_start"], horizon=horizon)
        self.progress = Progress(**state["progress"], horizon=horizon)
        self.begun_at = self.progress.step
        if epoch_ended and self.progress.step > self.epoch_start.step:
            self.epoch_start = self.progress = self.progress.next_epoch()
        if not self.finished:
            self.loader_start = self.epoch_start


class StepSetting:
    """Batch size and learning rate of the next step. They are evaluated only at steps at which they may change.

    Attributes:
        value: Batch size and learning rate.
        settled_until: The next step of the epoch at which they may change.
        logged: The value that was logged last.
    """

    def __init__(self) -> None:
        self.value = self.logged = BatchLR(1, None)
        self.settled_until: float = 0

    def look_up(self, schedule: JointSchedule, progress: Progress, sizes_at: Progress) -> None:
        """Evaluate the schedules.

        Args:
            schedule: Batch size and learning rate.
            progress: The progress before the step.
            sizes_at: The progress at which the batch size is evaluated: the same, or the start of the epoch if the batch size
                can change only there.
        """
        batch_size = schedule.batch_size_at(sizes_at)
        self.value = BatchLR(batch_size, schedule.lr_at(progress, batch_size))
        steps, every_step = schedule.lr_steps_to_change(progress, batch_size)
        if sizes_at is progress:
            steps = min(steps, schedule.batch_steps_to_change(progress, batch_size))
        self.settled_until = progress.step + (1 if every_step else steps)

    def log(
        self,
        module: LightningModule,
        lr: float,
        samples: int,
        tokens_per_sample: int | None,
        constants: Mapping[str, float],
        on_step: bool,
        on_epoch: bool,
    ) -> None:
        """Log batch size, learning rate, samples, and what else follows the batch size.

        Args:
            module: The LightningModule.
            lr: Learning rate of the first param group.
            samples: Examples consumed so far.
            tokens_per_sample: Tokens of an example; if given, ``tokens`` is logged too.
            constants: The constants of the optimizer that follow the batch size, by name.
            on_step: As for ``LightningModule.log``.
            on_epoch: As for ``LightningModule.log``.
        """
        self.logged = self.value
        values = {"batch_size": self.value.batch_size, "lr": lr, "samples": samples}
        if tokens_per_sample is not None:
            values["tokens"] = samples * tokens_per_sample
        for name, value in {**constants, **values}.items():
            module.log(
                name,
                torch.tensor(value, dtype=torch.float64),  # float32 holds exact counts only up to 2**24
                prog_bar=name in ("batch_size", "lr"),
                on_step=on_step,
                on_epoch=on_epoch,
                reduce_fx="max",
                batch_size=1,
            )
