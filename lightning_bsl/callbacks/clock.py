"""How far a run has come, and what its next step is taken with."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_bsl.schedules import BatchLR, Horizon, JointSchedule, Progress

_UNITS = ("epoch", "step", "samples")


class RunClock:
    """The progress of a run, and that of the start of its epoch.

    Attributes:
        progress: What has been trained so far.
        epoch_start: The progress at the start of the epoch under way.
        loader_start: The progress at the start of the epoch that the loader serves. It stays at the last epoch when the run is
            over, as Lightning asks the loader for its length once more, and there may be no next epoch to measure.
        end: Where the run ends: as far as the Trainer bounds it.
        begun_at: The step at which this fit began, or goes on.

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
        """Examples of the epoch under way that have been trained."""
        return self.progress.samples - self.epoch_start.samples

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        return self.end.ends_before(self.progress)

    def reset(self) -> None:
        """Begin a new run."""
        self.progress = self.epoch_start = self.loader_start = Progress()

    def begin(self, end: Horizon, horizon: Horizon) -> None:
        """Begin a fit: of a new run, or of one that goes on.

        Args:
            end: Where the run ends.
            horizon: Its length in each unit, as far as it is known, for schedules over a fraction of it.
        """
        self.end = end
        self.begun_at = self.progress.step
        self.epoch_start = self.progress  # Lightning begins an epoch anew that an exception ended
        self.set_horizon(horizon)
        if not self.finished:
            self.loader_start = self.epoch_start

    def set_horizon(self, horizon: Horizon) -> None:
        """Say how long the run is in each unit."""
        self.epoch_start = self.epoch_start._replace(horizon=horizon)
        self.loader_start = self.loader_start._replace(horizon=horizon)
        self.progress = self.progress._replace(horizon=horizon)

    def advance(self, examples: int, steps: int) -> None:
        """Count what was trained.

        Args:
            examples: Over all processes.
            steps: Optimizer steps.
        """
        self.progress = self.progress.advance(examples, steps)

    def next_epoch(self) -> None:
        """Count an epoch as ended."""
        self.epoch_start = self.progress = self.progress.next_epoch()
        if not self.finished:
            self.loader_start = self.epoch_start

    def state_dict(self) -> dict[str, Any]:
        """Both readings and the horizon: plain integers."""
        clocks = {"epoch_start": self.epoch_start, "progress": self.progress}
        state = {name: {unit: getattr(clock, unit) for unit in _UNITS} for name, clock in clocks.items()}
        return state | {"horizon": asdict(self.progress.horizon)}

    def load_state_dict(self, state: dict[str, Any], epoch_ended: bool = False) -> None:
        """Restore both readings; the horizon stays that of this fit.

        Args:
            state: What ``state_dict`` returned.
            epoch_ended: Whether Lightning goes on with the next epoch though it was not counted yet.
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
    """What the step to come is taken with; looked up no more often than it may change.

    Attributes:
        value: Batch size and learning rate.
        settled_until: The step at which they may next change, inside the epoch.
        logged: The setting that was logged last.
    """

    def __init__(self) -> None:
        self.value = self.logged = BatchLR(1, None)
        self.settled_until: float = 0

    def look_up(self, schedule: JointSchedule, progress: Progress, sizes_at: Progress) -> None:
        """Ask the schedules.

        Args:
            schedule: Batch size and learning rate.
            progress: The progress before the step.
            sizes_at: The progress at which the batch size is asked: the same, or the epoch's start where the batch size can
                change only there.
        """
        batch_size = schedule.batch_size_at(sizes_at)
        self.value = BatchLR(batch_size, schedule.lr_at(progress, batch_size))
        steps, every_step = schedule.lr_steps_to_change(progress, batch_size)
        if sizes_at is progress:
            steps = min(steps, schedule.batch_steps_to_change(progress, batch_size))
        self.settled_until = progress.step + (1 if every_step else steps)

    def log(
        self, module: LightningModule, lr: float, samples: int, tokens_per_sample: int | None, on_step: bool, on_epoch: bool
    ) -> None:
        """Log the setting and the samples.

        Args:
            module: The LightningModule.
            lr: What the first param group was trained with.
            samples: Examples consumed so far.
            tokens_per_sample: Tokens of an example, where they are to be logged too.
            on_step: As of ``LightningModule.log``.
            on_epoch: As of ``LightningModule.log``.
        """
        self.logged = self.value
        values = {"batch_size": self.value.batch_size, "lr": lr, "samples": samples}
        if tokens_per_sample is not None:
            values["tokens"] = samples * tokens_per_sample
        for name, value in values.items():
            module.log(
                name,
                torch.tensor(value, dtype=torch.float64),  # float32 counts examples only up to 2**24
                prog_bar=name not in ("samples", "tokens"),
                on_step=on_step,
                on_epoch=on_epoch,
                reduce_fx="max",
                batch_size=1,
            )
