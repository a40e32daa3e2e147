"""The clock that every schedule reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

Unit = Literal["epoch", "step", "samples", "tokens"]
UNITS: tuple[str, ...] = get_args(Unit)


def check_unit(unit: str) -> None:
    """Raise ``ValueError`` unless ``unit`` names one of the clocks of [`Progress`][]."""
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r}; write one of {', '.join(map(repr, UNITS))}")


@dataclass(frozen=True)
class Horizon:
    """How long a run is, in each unit; ``None`` where that is not known.

    Args:
        epoch: Epochs of the run.
        step: Optimizer steps of the run.
        samples: Examples the run consumes.
        tokens_per_sample: Tokens of one example, where the examples are sequences of one length.
    """

    epoch: int | None = None
    step: int | None = None
    samples: int | None = None
    tokens_per_sample: int | None = None

    def length(self, unit: Unit) -> int | None:
        """The run's length in ``unit``, ``None`` where it is not known."""
        check_unit(unit)
        if unit == "tokens":
            return None if self.samples is None else self.samples * self.grain(unit)
        length: int | None = getattr(self, unit)
        return length

    def total(self, unit: Unit) -> int:
        """The run's length in ``unit``.

        Raises:
            ValueError: The length is not known in this unit.
        """
        length = self.length(unit)
        if length is None:
            raise ValueError(
                f"a schedule asks for the run's length in unit {unit!r}, which is not known here: give the schedule a "
                "number of its own (`total=...`, an integer `every=...` or `over=...`), or bound the run in that unit "
                "(`max_epochs` in epochs, `max_steps` in steps; -1 is no bound)"
            )
        return length

    def grain(self, unit: Unit) -> int:
        """What the clock in ``unit`` counts by: 1, or the tokens of one example.

        Raises:
            ValueError: Tokens are asked for and the examples have none.
        """
        if unit != "tokens":
            return 1
        if self.tokens_per_sample is None:
            raise ValueError(
                "a schedule counts in tokens, but it is not known how many an example has: give the DataModule an attribute "
                "`tokens_per_sample` (the text data sets have it), or `plan` that argument; or write `unit='samples'`"
            )
        return self.tokens_per_sample

    def ends_before(self, progress: Progress) -> bool:
        """Whether a run of this length is over at ``progress``."""
        ends = ((self.epoch, progress.epoch), (self.step, progress.step), (self.samples, progress.samples))
        return any(end is not None and count >= end for end, count in ends)


class Progress(NamedTuple):
    """How far a run has come: the only thing a schedule may depend on.

    Args:
        epoch: Completed epochs.
        step: Completed optimizer steps.
        samples: Examples consumed so far, over all processes. This is the papers' SFO complexity.
        horizon: The run's length, for schedules over a fraction of it.

    Example:
        >>> Progress().advance(8).advance(8)
        Progress(epoch=0, step=2, samples=16,
                 horizon=Horizon(epoch=None, step=None, samples=None, tokens_per_sample=None))
    """

    epoch: int = 0
    step: int = 0
    samples: int = 0
    horizon: Horizon = Horizon()

    def count(self, unit: Unit) -> int:
        """The clock's reading in ``unit``.

        Raises:
            ValueError: An unknown unit, or tokens where the examples have none.
        """
        check_unit(unit)
        if unit == "tokens":
            return self.samples * self.horizon.grain(unit)
        reading: int = getattr(self, unit)
        return reading

    def advance(self, examples: int, steps: int = 1) -> Progress:
        """The clock after ``steps`` optimizer steps over ``examples`` examples in all."""
        return Progress(self.epoch, self.step + steps, self.samples + examples, self.horizon)

    def next_epoch(self) -> Progress:
        """The clock at the start of the next epoch."""
        return Progress(self.epoch + 1, self.step, self.samples, self.horizon)

    def since(self, count: int, unit: Unit) -> Progress:
        """The clock of a schedule that starts when this one reads ``count`` in ``unit``.

        Only the clock and the horizon in ``unit`` are shifted. Samples and tokens are one clock: it starts with the first
        whole example when this one reads ``count`` tokens.
        """
        horizon = self.horizon
        if unit == "tokens":
            unit, count = "samples", -(-count // horizon.grain(unit))
        length: int | None = getattr(horizon, unit)
        if length is not None:
            horizon = replace(horizon, **{unit: length - count})
        return self._replace(**{unit: self.count(unit) - count}, horizon=horizon)
