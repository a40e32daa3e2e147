"""The clock that every schedule reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

Unit = Literal["epoch", "step", "samples", "tokens"]
UNITS: tuple[str, ...] = get_args(Unit)


def check_unit(unit: str) -> None:
    """Raise ``ValueError`` unless ``unit`` names one of the clocks of a ``Progress``."""
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r}; write one of {', '.join(map(repr, UNITS))}")


@dataclass(frozen=True)
class Horizon:
    """The length of a run in each unit; ``None`` where it is not known.

    Args:
        epoch: Epochs of the run.
        step: Optimizer steps of the run.
        samples: Examples that the run consumes.
        tokens_per_sample: Tokens of one example, where all examples are sequences of the same length.

    Example:
        >>> Horizon(epoch=3, samples=300, tokens_per_sample=512).total("tokens")
        153600
    """

    epoch: int | None = None
    step: int | None = None
    samples: int | None = None
    tokens_per_sample: int | None = None

    def length(self, unit: Unit) -> int | None:
        """The length of the run in ``unit``; ``None`` where it is not known."""
        check_unit(unit)
        if unit == "tokens":
            return None if self.samples is None else self.samples * self.grain(unit)
        length: int | None = getattr(self, unit)
        return length

    def total(self, unit: Unit) -> int:
        """The length of the run in ``unit``.

        Raises:
            ValueError: An unknown unit, or the length is not known in this unit.
        """
        length = self.length(unit)
        if length is None:
            raise ValueError(
                f"a schedule asks for the run's length in unit {unit!r}, which is not known here. Give the schedule a length "
                "of its own (`total=...`, or an int for `every=...` or `over=...`), or bound the run "
                "(`max_epochs` gives its length in epochs, and in samples and tokens if that of an epoch is known, `max_steps` "
                "in steps, `BatchLRScheduler(max_samples=...)` in samples and tokens)"
            )
        return length

    def grain(self, unit: Unit) -> int:
        """The step of the clock in ``unit``: the tokens of one example for ``"tokens"``, else 1.

        Raises:
            ValueError: ``unit`` is ``"tokens"`` and ``tokens_per_sample`` is not known.
        """
        if unit != "tokens":
            return 1
        if self.tokens_per_sample is None:
            raise ValueError(
                "a schedule counts in tokens, but the number of tokens of an example is not known. Give the DataModule an "
                "attribute `tokens_per_sample` (the text data sets have it), or give `plan` this argument; or write "
                "`unit='samples'`"
            )
        return self.tokens_per_sample

    def ends_before(self, progress: Progress) -> bool:
        """Whether a run of this length is over at ``progress``."""
        ends = ((self.epoch, progress.epoch), (self.step, progress.step), (self.samples, progress.samples))
        return any(end is not None and count >= end for end, count in ends)


VERY_LONG = Horizon(10**9, 10**12, 10**15)  # a run whose length does not matter


class Progress(NamedTuple):
    """The clock of a run: how far it has come. A schedule may depend on nothing else.

    Args:
        epoch: Completed epochs.
        step: Completed optimizer steps.
        samples: Examples consumed so far, over all processes. This is the number of gradients of single examples, called SFO
            complexity (stochastic first-order oracle) by Umeda & Iiduka 2025 (arXiv 2508.05297).
        horizon: The length of the run, for schedules over a fraction of it.

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
        """The reading of the clock in ``unit``.

        Raises:
            ValueError: An unknown unit, or ``"tokens"`` where ``tokens_per_sample`` is not known.
        """
        check_unit(unit)
        if unit == "tokens":
            return self.samples * self.horizon.grain(unit)
        reading: int = getattr(self, unit)
        return reading

    def advance(self, examples: int, steps: int = 1) -> Progress:
        """The clock after ``steps`` more optimizer steps, which take ``examples`` examples together."""
        return Progress(self.epoch, self.step + steps, self.samples + examples, self.horizon)

    def next_epoch(self) -> Progress:
        """The clock at the start of the next epoch."""
        return Progress(self.epoch + 1, self.step, self.samples, self.horizon)

    def since(self, count: int, unit: Unit, until: int | None = None) -> Progress:
        """The clock of a schedule that starts when this clock reads ``count`` in ``unit``.

        Only the reading and the horizon in ``unit`` are shifted. Samples and tokens are one clock: a start inside an example
        is moved to the end of this example.

        Args:
            count: The reading at the start.
            unit: Its unit.
            until: The reading at which the schedule ends; by default the end of the run.
        """
        horizon = self.horizon
        if unit == "tokens":
            grain = horizon.grain(unit)
            unit, count, until = "samples", -(-count // grain), None if until is None else -(-until // grain)
        length: int | None = getattr(horizon, unit) if until is None else until
        if length is not None:
            horizon = replace(horizon, **{unit: length - count})
        return self._replace(**{unit: self.count(unit) - count}, horizon=horizon)


def crosses(before: Progress, after: Progress, every: int, unit: Unit) -> bool:
    """Whether the clock passes or reaches a multiple of ``every`` on its way from ``before`` to ``after``.

    Args:
        before: The clock before, for example, a step.
        after: The clock after it.
        every: Distance of the multiples, in ``unit``.
        unit: The unit.

    Example:
        >>> crosses(Progress(samples=96), Progress(samples=128), every=100, unit="samples")
        True
    """
    return after.count(unit) // every > before.count(unit) // every
