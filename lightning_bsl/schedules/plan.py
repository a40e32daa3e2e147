"""The plan of a run: its batch sizes, learning rates and steps, known before the run."""

from __future__ import annotations

import bisect
import csv
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lightning_bsl.schedules.checks import check_whole
from lightning_bsl.schedules.files import written_whole
from lightning_bsl.schedules.functions import Exponential, Schedule
from lightning_bsl.schedules.joint import JointSchedule
from lightning_bsl.schedules.progress import Horizon, Progress

ConstantsAt = Callable[[int], Mapping[str, float]]  # batch size -> the constants of the optimizer that follow it, by name


@dataclass(frozen=True)
class Stage:
    """A part of a run with constant batch size and learning rate.

    A learning rate that changes at every optimizer step does not end a stage. It goes from ``lr`` to ``last_lr``.

    Args:
        stage: Index, from 0.
        first_epoch: Start of the stage, in epochs.
        epochs: Length in epochs.
        steps: Length in optimizer steps.
        samples: Length in examples; a short last batch counts the examples that it holds.
        batch_size: Batch size of one optimizer step, in examples (or in tokens, where batch sizes count tokens).
        lr: Learning rate of the first step; ``None`` if the module sets it.
        last_lr: Learning rate of the last step.

    Example:
        >>> stage, *_ = plan(JointSchedule(8, 0.1), 100, epochs=2).stages
        >>> stage.steps, stage.samples, stage.batch_size, stage.lr
        (26, 200, 8, 0.1)
    """

    stage: int
    first_epoch: float
    epochs: float
    steps: int
    samples: int
    batch_size: int
    lr: float | None
    last_lr: float | None

    def join(self, after: Stage) -> Stage:
        """Join this stage and the next one. Index, start and batch size are those of this stage."""
        return replace(
            self,
            epochs=self.epochs + after.epochs,
            steps=self.steps + after.steps,
            samples=self.samples + after.samples,
            last_lr=after.last_lr,
        )


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps of one epoch with the same batch size, and the same learning rate unless ``every_step``.

    Args:
        start: The clock before the first step.
        steps: Number of optimizer steps.
        examples: Number of examples of all steps; fewer than ``steps * batch_size`` if the last step is short.
        batch_size: Batch size of one optimizer step, in examples or in the unit of a ``Measure``.
        every_step: Whether the learning rate changes at every step.
        sizes: The examples of each step, if the batch size does not count examples.
    """

    start: Progress
    steps: int
    examples: int
    batch_size: int
    every_step: bool
    sizes: tuple[int, ...] | None = None

    def kinds(self) -> Iterator[tuple[int, int]]:
        """Pairs of a number of examples and how many steps in a row have it. Steps without examples are left out."""
        rest = self.examples - (self.steps - 1) * self.batch_size
        pairs = ((self.batch_size, self.steps - 1), (rest, 1)) if self.sizes is None else ((size, 1) for size in self.sizes)
        return ((size, number) for size, number in pairs if size and number)

    def examples_of(self, steps: int) -> int:
        """Examples of the first ``steps`` steps."""
        if self.sizes is not None:
            return sum(self.sizes[:steps])
        return min(steps * self.batch_size, self.examples)

    def over(self, examples: int) -> Stretch:
        """The steps that take the first ``examples`` examples; the last step is cut to them."""
        steps, sizes = self.steps_over(examples), self.sizes
        if sizes is not None:
            sizes = (*sizes[: steps - 1], examples - sum(sizes[: steps - 1]))
        return replace(self, steps=steps, examples=examples, sizes=sizes)

    def steps_over(self, examples: int) -> int:
        """The number of steps that take the first ``examples`` examples."""
        if self.sizes is None:
            return -(-examples // self.batch_size)
        ends = list(itertools.accumulate(self.sizes))
        return bisect.bisect_left(ends, examples) + 1 if examples > 0 else 0


@dataclass(frozen=True)
class Plan:
    """The stages of a run, made by [`plan`][lightning_bsl.schedules.plan].

    Args:
        stages: The stages in their order.
        num_examples: Examples of one epoch.
        horizon: Length of the run in each unit.
        schedule: The schedule that was planned.
        stretches: For each stage its stretches of equal steps, epoch by epoch.

    Example:
        >>> growing = plan(JointSchedule(Exponential(8, factor=2, every=1)), 100, epochs=3)
        >>> growing.epochs, growing.steps, growing.samples
        (3.0, 24, 300)
    """

    stages: tuple[Stage, ...]
    num_examples: int
    horizon: Horizon
    schedule: JointSchedule = field(repr=False)
    stretches: tuple[tuple[Stretch, ...], ...] = field(repr=False, compare=False)

    @property
    def epochs(self) -> float:
        """Length of the run in epochs."""
        return round(self.stages[-1].first_epoch + self.stages[-1].epochs, 5)

    @property
    def steps(self) -> int:
        """Length of the run in optimizer steps."""
        return sum(stage.steps for stage in self.stages)

    @property
    def samples(self) -> int:
        """Length of the run in examples."""
        return sum(stage.samples for stage in self.stages)

    def stretches_of_epochs(self) -> Iterator[tuple[Stretch, int]]:
        """All stretches, each with the number of examples before it in its epoch."""
        epoch, behind = -1, 0
        for stretch in itertools.chain.from_iterable(self.stretches):
            if stretch.start.epoch != epoch:
                epoch, behind = stretch.start.epoch, 0
            yield stretch, behind
            behind += stretch.examples

    def to_csv(self, path: str | Path, constants_at: ConstantsAt | None = None) -> None:
        """Write a CSV file with one row per stage.

        Args:
            path: The file.
            constants_at: For further columns: returns the optimizer's constants for a batch size, by name.

        Raises:
            OSError: It cannot be written; what was there before is still there.
        """
        further = [constants_at(stage.batch_size) if constants_at else {} for stage in self.stages]
        with written_whole(Path(path)) as unfinished, open(unfinished, "w", newline="") as file:
            writer = csv.DictWriter(file, [*(field.name for field in fields(Stage)), *further[0]])
            writer.writeheader()
            writer.writerows({**asdict(stage), **constants} for stage, constants in zip(self.stages, further))


class Beside(NamedTuple):
    """The other training loaders of a ``CombinedLoader``. Every step takes one batch of each.

    Args:
        lengths: Number of batches of each loader.
        mode: What ends an epoch, as in Lightning's ``CombinedLoader``: ``"min_size"`` the shortest loader; ``"max_size"`` the
            longest, and a shorter one then gives no more batches; ``"max_size_cycle"`` the longest, and a shorter one starts
            again.
    """

    lengths: tuple[int, ...] = ()
    mode: str = "max_size_cycle"

    def steps(self, steps: int, limit_batches: float) -> int:
        """The number of steps of an epoch.

        Args:
            steps: Steps of one pass over the scheduled loader.
            limit_batches: As Lightning's ``limit_train_batches``: an ``int`` number of steps, or a fraction of them.
        """
        lengths = (steps, *self.lengths)
        kept = (min(n, limit_batches) if isinstance(limit_batches, int) else int(n * limit_batches) for n in lengths)
        return min(kept) if self.mode == "min_size" else max(kept)


class Measure(NamedTuple):
    """The unit of batch sizes that do not count examples, such as tokens. Each example has its own number of units.

    Args:
        unit: Name of the unit.
        total: ``total(epoch)`` returns the units of one pass over the data.
        take: ``take(epoch, behind, batch_size)`` returns the number of examples of the step after the first ``behind``
            examples. They have ``batch_size`` units or more, or they are all that are left; 0 if the rest is left out.
    """

    unit: str
    total: Callable[[int], float]
    take: Callable[[int, int, int], int]


# For loaders whose batch size changes only between epochs: batch size -> optimizer steps and examples of an epoch.
EpochLength = Callable[[int], tuple[int, int]]
_EpochStretches = Callable[[JointSchedule, Progress], list[Stretch]]


def stretches_of_epoch(
    schedule: JointSchedule,
    start: Progress,
    num_examples: int,
    limit_batches: float = 1.0,
    drop_last: bool = False,
    beside: Beside = Beside(),  # noqa: B008 (immutable)
    measure: Measure | None = None,
) -> list[Stretch]:
    """Divide one epoch into stretches of equal steps.

    Args:
        schedule: Batch size and learning rate.
        start: The clock at the start of the epoch.
        num_examples: Examples of one pass over the data.
        limit_batches: As Lightning's ``limit_train_batches``: an ``int`` number of steps, or a fraction of them.
        drop_last: Whether a short last step of a pass is left out.
        beside: The other training loaders.
        measure: The unit of batch sizes, if it is not examples. It must apply ``drop_last`` itself, and it does not work with
            other loaders.

    Raises:
        ValueError: A batch size above ``num_examples``, or an error of the schedule.
    """
    if measure is None:
        stretches = _one_pass(schedule, start, num_examples, drop_last, None)
    else:
        stretches = _one_measured_pass(schedule, start, num_examples, measure)
    total = sum(stretch.steps for stretch in stretches)
    kept = beside.steps(total, limit_batches)
    if kept < 1:
        raise ValueError(f"`limit_batches={limit_batches}` leaves no step of epoch {start.epoch}, which has {total}; raise it")
    while total < kept:  # another loader is longer
        last = stretches[-1]
        progress = last.start.advance(last.examples, last.steps)
        if beside.mode == "max_size":
            size = size_at(schedule, progress, num_examples, last.batch_size)
            stretches.append(Stretch(progress, 1, 0, size, every_step=False))
            total += 1
        else:
            next_pass = _one_pass(schedule, progress, num_examples, drop_last, last.batch_size)
            stretches += next_pass
            total += sum(stretch.steps for stretch in next_pass)
    return _first_steps(stretches, kept)


def _one_pass(
    schedule: JointSchedule, progress: Progress, num_examples: int, drop_last: bool, previous: int | None
) -> list[Stretch]:
    stretches: list[Stretch] = []
    left = num_examples
    while left:
        batch_size = size_at(schedule, progress, num_examples, stretches[-1].batch_size if stretches else previous)
        until, every_step = schedule.lr_steps_to_change(progress, batch_size)
        most, steps, clock = min(until, -(-left // batch_size)), 0, progress
        while steps < most and (steps == 0 or size_at(schedule, clock, num_examples, batch_size) == batch_size):
            more = int(min(schedule.batch_steps_to_change(clock, batch_size), most - steps))
            steps, clock = steps + more, clock.advance(more * batch_size, more)
        examples = min(steps * batch_size, left)
        if drop_last and examples < steps * batch_size:
            return [*stretches, *_first_steps([Stretch(progress, steps, examples, batch_size, every_step)], steps - 1)]
        stretches.append(Stretch(progress, steps, examples, batch_size, every_step))
        progress, left = progress.advance(examples, steps), left - examples
    return stretches


def _one_measured_pass(schedule: JointSchedule, progress: Progress, num_examples: int, measure: Measure) -> list[Stretch]:
    stretches: list[Stretch] = []
    total, behind, previous = measure.total(progress.epoch), 0, None
    while behind < num_examples:
        batch_size = size_at(schedule, progress, total, previous, measure.unit)
        # a step has at least as many tokens as examples, so the learning rate stays for this many steps or more
        until, every_step = schedule.lr_steps_to_change(progress, batch_size)
        sizes: list[int] = []
        clock, previous, ended = progress, batch_size, False
        while len(sizes) < until and behind < num_examples:
            if sizes and size_at(schedule, clock, total, batch_size, measure.unit) != batch_size:
                break
            size = measure.take(progress.epoch, behind, batch_size)
            if not size:
                ended = True
                break
            sizes.append(size)
            behind, clock = behind + size, clock.advance(size)
        if sizes:
            stretches.append(Stretch(progress, len(sizes), sum(sizes), batch_size, every_step, tuple(sizes)))
        if ended:
            break
        progress = clock
    return stretches


def _stretches_of_one_size(schedule: JointSchedule, start: Progress, num_examples: int, length: EpochLength) -> list[Stretch]:
    """Divide one epoch, whose batch size is that of its start, into stretches of equal learning rate."""
    batch_size = schedule.batch_size_at(start)
    check_fits(batch_size, num_examples, start)
    stretches: list[Stretch] = []
    (left, examples), progress = length(batch_size), start
    if not left:
        raise ValueError(
            f"epoch {start.epoch} has no step with a batch size of {batch_size}: write a smaller batch size or a higher "
            "`limit_train_batches`, or leave out `drop_last`"
        )
    while left:
        until, every_step = schedule.lr_steps_to_change(progress, batch_size)
        steps = int(min(until, left))
        taken = min(steps * batch_size, examples)
        stretches.append(Stretch(progress, steps, taken, batch_size, every_step))
        progress, left, examples = progress.advance(taken, steps), left - steps, examples - taken
    return stretches


def size_at(
    schedule: JointSchedule, progress: Progress, num_examples: float, previous: int | None, unit: str = "examples"
) -> int:
    """The batch size of a step inside an epoch of ``num_examples`` examples.

    Args:
        schedule: Batch size and learning rate.
        progress: The clock before the step.
        num_examples: Examples of the epoch, or its length in ``unit``.
        previous: The batch size of the step before it in the epoch. A run may end inside an epoch. The steps after its end
            are never taken, so the schedule need not have a value for them: they keep the batch size of the step before.
        unit: The unit of batch sizes.

    Raises:
        ValueError: A batch size above ``num_examples``, or an error of the schedule.
    """
    try:
        batch_size = schedule.batch_size_at(progress)
        check_fits(batch_size, num_examples, progress, unit)
    except ValueError:
        if previous is None or not progress.horizon.ends_before(progress):
            raise
        return previous
    return batch_size


def check_fits(batch_size: int, num_examples: float, progress: Progress, unit: str = "examples") -> None:
    """Raise ``ValueError`` if the batch size is above the length of an epoch."""
    if batch_size > num_examples:
        raise ValueError(
            f"the batch size is {batch_size} at epoch={progress.epoch}, step={progress.step}, but an epoch has only "
            f"{num_examples:.10g} {unit}; write smaller batch sizes, or give them a `maximum` of {num_examples:.10g} or less"
        )


def _first_steps(stretches: list[Stretch], steps: int) -> list[Stretch]:
    """The first ``steps`` steps."""
    kept = []
    for stretch in stretches:
        if steps <= 0:
            break
        if stretch.steps > steps:
            sizes = None if stretch.sizes is None else stretch.sizes[:steps]
            stretch = replace(stretch, steps=steps, examples=stretch.examples_of(steps), sizes=sizes)
        kept.append(stretch)
        steps -= stretch.steps
    return kept


def plan(
    schedule: JointSchedule,
    num_examples: int,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    samples: int | None = None,
    tokens_per_sample: int | None = None,
    limit_batches: float = 1.0,
    drop_last: bool = False,
    beside: Beside = Beside(),  # noqa: B008 (immutable)
    epoch_length: EpochLength | None = None,
    measure: Measure | None = None,
) -> Plan:
    """Plan a run: its batch sizes, learning rates and steps, stage by stage.

    The run ends with the optimizer step that reaches the first of the given horizons. A horizon in examples cuts this step, so
    that the run takes exactly so many; not with ``beside`` or ``epoch_length``.

    Args:
        schedule: Batch size and learning rate.
        num_examples: Examples of one epoch.
        epochs: Horizon in epochs.
        steps: Horizon in optimizer steps.
        samples: Horizon in examples.
        tokens_per_sample: Tokens of one example, for schedules that count in tokens.
        limit_batches: As Lightning's ``limit_train_batches``: an ``int`` number of steps, or a fraction of them.
        drop_last: Whether a short last step of an epoch is left out.
        beside: The other training loaders.
        epoch_length: For loaders whose batch size changes only between epochs: maps a batch size to the optimizer steps and
            the examples of an epoch. ``limit_batches``, ``drop_last`` and ``beside`` are then not used.
        measure: The unit of batch sizes, if it is not examples.

    Returns:
        The plan.

    Raises:
        ValueError: No horizon, a horizon below 1, a batch size below 1 or above ``num_examples``, a learning rate that is not
            above 0 and finite, or a schedule over a fraction of a run whose length is not known in the schedule's unit.

    Warns:
        UserWarning: The learning rate grows too fast for the batch size.

    Example:
        >>> growing = plan(JointSchedule(Exponential(128, factor=2, every=25)), 50_000, epochs=26)
        >>> [(stage.steps, stage.batch_size) for stage in growing.stages]
        [(9775, 128), (196, 256)]
    """
    horizons = {"epochs": epochs, "steps": steps, "samples": samples}
    if all(value is None for value in horizons.values()):
        raise ValueError("a plan needs a horizon: write `epochs`, `steps` or `samples`")
    for name, value in (*horizons.items(), ("num_examples", num_examples), ("tokens_per_sample", tokens_per_sample)):
        check_whole(name, value, or_none=True)
    bounded = samples is not None and (epochs is not None or steps is not None)
    if epoch_length is not None:
        divide: _EpochStretches = partial(_stretches_of_one_size, num_examples=num_examples, length=epoch_length)
    else:
        options = {"limit_batches": limit_batches, "drop_last": drop_last, "beside": beside, "measure": measure}
        divide = partial(stretches_of_epoch, num_examples=num_examples, **options)  # type: ignore[arg-type]
        # the float 1.0 is the whole epoch, but the int 1 is one step
        whole_epochs = isinstance(limit_batches, float) and limit_batches == 1.0 and not (drop_last or beside.lengths)
        if steps is None and whole_epochs:
            samples = min(bound for bound in (samples, epochs and epochs * num_examples) if bound is not None)
            epochs, bounded = -(-samples // num_examples), False  # both bounds end the run at the same step
    end = Horizon(epochs, steps, samples, tokens_per_sample)
    # it is not known before whether the examples end the run or another bound; schedules cannot count in fractions of that one
    known = Horizon(None, None, samples, tokens_per_sample) if bounded else end
    cuts = epoch_length is None and not beside.lengths
    # the lengths in the other units follow from the batch sizes alone; the learning rates may need them
    lengths, _ = _walk(replace(schedule, lr=None), divide, known, end, cuts)
    taken = sum(stage.samples for stage in lengths)
    if bounded and samples is not None and taken < samples:  # another bound
        end = known = replace(end, samples=None)
        lengths, _ = _walk(replace(schedule, lr=None), divide, known, end, cuts)
        taken = sum(stage.samples for stage in lengths)
    full = Horizon(
        known.epoch if known.epoch is not None else math.ceil(round(sum(stage.epochs for stage in lengths), 6)),
        known.step if known.step is not None else sum(stage.steps for stage in lengths),
        known.samples if known.samples is not None else taken,
        tokens_per_sample,
    )
    stages, stretches = _walk(schedule, divide, full, end, cuts)
    for message in filter(None, (schedule.warn_of(), _warn_of_maximum(schedule, stages), _warn_of_zero(stages))):
        warnings.warn(message, stacklevel=2)
    rounded = (replace(s, epochs=round(s.epochs, 6), first_epoch=round(s.first_epoch, 6)) for s in stages)
    return Plan(tuple(rounded), num_examples, full, schedule, tuple(map(tuple, stretches)))


def _walk(
    schedule: JointSchedule, divide: _EpochStretches, horizon: Horizon, end: Horizon, cuts: bool
) -> tuple[list[Stage], list[list[Stretch]]]:
    """The stages, and the stretches of each."""
    stages: list[Stage] = []
    stretches: list[list[Stretch]] = []
    previous_varies = False
    for stretch, first_epoch, epochs in _until(schedule, divide, Progress(horizon=horizon), end, cuts):
        lr, last_lr, varies = _rates(schedule, stretch)
        size = stretch.batch_size
        stage = Stage(len(stages), first_epoch, epochs, stretch.steps, stretch.examples, size, lr, last_lr)
        previous = stages[-1] if stages else None
        if previous and previous.batch_size == size and varies == previous_varies and (varies or previous.lr == lr):
            stages[-1] = previous.join(stage)
            stretches[-1].append(stretch)
        else:
            stages.append(stage)
            stretches.append([stretch])
        previous_varies = varies
    return stages, stretches


def _until(
    schedule: JointSchedule, divide: _EpochStretches, progress: Progress, end: Horizon, cuts: bool
) -> Iterator[tuple[Stretch, float, float]]:
    """The stretches of every epoch up to ``end``, each with its start and its length in epochs.

    The last step is cut to the end in examples if ``cuts``.
    """
    while not end.ends_before(progress):
        epoch = divide(schedule, progress)
        examples = sum(stretch.examples for stretch in epoch)
        behind = 0
        for stretch in epoch:
            steps = stretch.steps
            if end.step is not None:
                steps = min(steps, end.step - stretch.start.step)
            if end.samples is not None:
                steps = min(steps, stretch.steps_over(end.samples - stretch.start.samples))
            for kept in _first_steps([stretch], steps):
                if cuts and end.samples is not None and kept.start.samples + kept.examples > end.samples:
                    kept = kept.over(end.samples - kept.start.samples)
                yield kept, progress.epoch + behind / examples, kept.examples / examples
                behind += kept.examples
                progress = kept.start.advance(kept.examples, kept.steps)
            if steps < stretch.steps:
                return
        progress = progress.next_epoch()


def _rates(schedule: JointSchedule, stretch: Stretch) -> tuple[float | None, float | None, bool]:
    """The learning rate of the first and the last step of a stretch, and whether it changes between them."""
    last = stretch.steps - 1

    def rate(step: int) -> float | None:
        return schedule.lr_at(stretch.start.advance(stretch.examples_of(step), step), stretch.batch_size)

    if not stretch.every_step or isinstance(schedule.lr, Schedule):
        return rate(0), rate(last), stretch.every_step
    rates = [rate(step) for step in range(stretch.steps)]  # a plain function may have any shape: evaluate it at every step
    return rates[0], rates[-1], len(set(rates)) > 1


def _warn_of_maximum(schedule: JointSchedule, stages: list[Stage]) -> str | None:
    batch, lr = schedule.batch_size, schedule.lr
    if not (isinstance(batch, Schedule) and batch.maximum and isinstance(lr, Exponential) and lr.factor > 1):
        return None
    for before, after in itertools.pairwise(stages):
        if before.batch_size == after.batch_size == math.ceil(batch.maximum) and (
            before.lr is None or after.lr is None or not math.isclose(after.lr, before.lr, rel_tol=1e-5)
        ):
            return (
                f"from epoch {after.first_epoch:g} on the batch size is at its maximum {after.batch_size} while the learning "
                "rate still grows, so the gradient noise grows too (V_T of Umeda & Iiduka 2025, arXiv 2409.08770, no longer "
                f"vanishes). Give the learning rate `maximum={before.lr:.6g}`, or shorten the run"
            )
    return None


def _warn_of_zero(stages: list[Stage]) -> str | None:
    for where, stage in (("first", stages[0]), ("last", stages[-1])) if stages else ():
        if stage.lr == stage.last_lr == 0 and stage.steps > 1:
            return (
                f"the {where} {stage.steps} steps have a learning rate of 0, so they train nothing: the schedule of the "
                "learning rate changes between epochs only. Write `unit='step'` or `unit='samples'` for it, or a value above 0"
            )
    return None
