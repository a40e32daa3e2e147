"""The dry run: what a schedule does to a data set, before it happens."""

from __future__ import annotations

import bisect
import csv
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lightning_bsl.schedules.functions import Exponential, Schedule
from lightning_bsl.schedules.joint import JointSchedule
from lightning_bsl.schedules.progress import Horizon, Progress


@dataclass(frozen=True)
class Stage:
    """A stretch with constant batch size and learning rate.

    A rate that changes at every optimizer step does not end a stage; it goes from ``lr`` to ``last_lr``.

    Args:
        stage: Index, from 0.
        first_epoch: Where the stage begins, in epochs.
        epochs: Its length in epochs.
        steps: Its length in optimizer steps.
        samples: Its length in examples; a short last batch of an epoch counts what it holds.
        batch_size: Of one optimizer step: its examples, or what a `Measure` counts of them.
        lr: Learning rate of its first step, ``None`` if left to the module.
        last_lr: Learning rate of its last step.
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
        """This stage and the one that follows it as one, with this one's index, start and batch size."""
        return replace(
            self,
            epochs=self.epochs + after.epochs,
            steps=self.steps + after.steps,
            samples=self.samples + after.samples,
            last_lr=after.last_lr,
        )


@dataclass(frozen=True)
class Run:
    """Steps of one epoch with the same batch size, and the same learning rate unless ``every_step``.

    Args:
        start: The clock before the first step.
        steps: Optimizer steps.
        examples: Examples of all of them; fewer than ``steps * batch_size`` where the last is the epoch's short one.
        batch_size: Of one optimizer step: its examples, or what a `Measure` counts of them.
        every_step: Whether the learning rate changes at every step.
        sizes: The examples of each step, where the batch size is no number of examples.
    """

    start: Progress
    steps: int
    examples: int
    batch_size: int
    every_step: bool
    sizes: tuple[int, ...] | None = None

    def kinds(self) -> Iterator[tuple[int, int]]:
        """The examples of a step, and how many steps have as many, one after another; none with no examples."""
        rest = self.examples - (self.steps - 1) * self.batch_size
        same = ((self.batch_size, self.steps - 1), (rest, 1)) if self.sizes is None else ((size, 1) for size in self.sizes)
        return ((size, number) for size, number in same if size and number)

    def examples_of(self, steps: int) -> int:
        """Examples of the first ``steps`` steps."""
        if self.sizes is not None:
            return sum(self.sizes[:steps])
        return min(steps * self.batch_size, self.examples)

    def over(self, examples: int) -> Run:
        """The first steps, over ``examples`` examples."""
        steps = self.steps_over(examples)
        return replace(self, steps=steps, examples=examples, sizes=None if self.sizes is None else self.sizes[:steps])

    def steps_over(self, examples: int) -> int:
        """The first steps that it takes to get over ``examples`` examples."""
        if self.sizes is None:
            return -(-examples // self.batch_size)
        ends = list(itertools.accumulate(self.sizes))
        return bisect.bisect_left(ends, examples) + 1 if examples > 0 else 0


@dataclass(frozen=True)
class Plan:
    """The stages of a run.

    Args:
        stages: One after another.
        num_examples: Examples of one epoch.
        horizon: The run's length in each unit.
        schedule: What was planned.
        runs: Of each stage its runs of equal steps, epoch by epoch.
    """

    stages: tuple[Stage, ...]
    num_examples: int
    horizon: Horizon
    schedule: JointSchedule = field(repr=False)
    runs: tuple[tuple[Run, ...], ...] = field(repr=False, compare=False)

    @property
    def epochs(self) -> float:
        """Epochs in all."""
        return round(self.stages[-1].first_epoch + self.stages[-1].epochs, 5)

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return sum(stage.steps for stage in self.stages)

    @property
    def samples(self) -> int:
        """Examples in all."""
        return sum(stage.samples for stage in self.stages)

    def runs_of_epochs(self) -> Iterator[tuple[Run, int]]:
        """All runs, each with the examples of its epoch that lie before it."""
        epoch, behind = -1, 0
        for run in itertools.chain.from_iterable(self.runs):
            if run.start.epoch != epoch:
                epoch, behind = run.start.epoch, 0
            yield run, behind
            behind += run.examples

    def to_csv(self, path: str | Path) -> None:
        """Write one row per stage."""
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Stage)])
            writer.writeheader()
            writer.writerows(asdict(stage) for stage in self.stages)


class Beside(NamedTuple):
    """The loaders that are trained on beside the scheduled one, a batch of each in every step.

    Args:
        lengths: Batches of one pass over each.
        mode: What ends an epoch, as of Lightning's ``CombinedLoader``: ``"min_size"`` the shortest loader; ``"max_size"`` the
            longest, the others having no batch any more; ``"max_size_cycle"`` the longest, the others beginning again.
    """

    lengths: tuple[int, ...] = ()
    mode: str = "max_size_cycle"

    def steps(self, steps: int, limit_batches: float) -> int:
        """Steps of an epoch in which one pass over the scheduled loader has ``steps``.

        Args:
            steps: Of one pass.
            limit_batches: As Lightning's ``limit_train_batches``: an ``int`` number of steps, or a fraction of them.
        """
        lengths = (steps, *self.lengths)
        kept = (min(n, limit_batches) if isinstance(limit_batches, int) else int(n * limit_batches) for n in lengths)
        return min(kept) if self.mode == "min_size" else max(kept)


class Measure(NamedTuple):
    """What batch sizes count, where these are not examples: each example has its own number of it.

    Args:
        unit: Its name, such as tokens.
        total: From an epoch to how much of it a pass has.
        take: From an epoch, the examples of it that came before, and a batch size to the examples of the step: so many that
            they have as much or more, or all that are left. 0 where these are left out.
    """

    unit: str
    total: Callable[[int], float]
    take: Callable[[int, int, int], int]


# For an epoch whose batch size is asked once, at its start: a batch size to the epoch's optimizer steps and examples.
EpochLength = Callable[[int], tuple[int, int]]
_Cutter = Callable[[JointSchedule, Progress], list[Run]]


def runs(
    schedule: JointSchedule,
    start: Progress,
    num_examples: int,
    limit_batches: float = 1.0,
    drop_last: bool = False,
    beside: Beside = Beside(),  # noqa: B008 (immutable)
    measure: Measure | None = None,
) -> list[Run]:
    """One epoch of ``num_examples`` examples from ``start``, in runs of equal steps.

    Args:
        schedule: Batch size and learning rate.
        start: The clock at the start of the epoch.
        num_examples: Examples of one pass over the data.
        limit_batches: As Lightning's ``limit_train_batches``: an ``int`` number of steps, or a fraction of them.
        drop_last: Whether a pass ends before a step that would be short.
        beside: Loaders that are trained on in the same steps.
        measure: What batch sizes count, where these are not examples; not with other loaders. It answers for ``drop_last`` too.

    Raises:
        ValueError: A batch size above ``num_examples``, or an error of the schedule.
    """
    if measure is None:
        found = _one_pass(schedule, start, num_examples, drop_last, None)
    else:
        found = _one_measured_pass(schedule, start, num_examples, measure)
    total = sum(run.steps for run in found)
    kept = beside.steps(total, limit_batches)
    if kept < 1:
        raise ValueError(f"`limit_batches={limit_batches}` leaves no step of epoch {start.epoch}, which has {total}; raise it")
    while total < kept:  # a loader beside this one is longer
        last = found[-1]
        progress = last.start.advance(last.examples, last.steps)
        if beside.mode == "max_size":
            size = size_at(schedule, progress, num_examples, last.batch_size)
            found.append(Run(progress, 1, 0, size, every_step=False))
            total += 1
        else:
            again = _one_pass(schedule, progress, num_examples, drop_last, last.batch_size)
            found += again
            total += sum(run.steps for run in again)
    return _cut(found, kept)


def _one_pass(
    schedule: JointSchedule, progress: Progress, num_examples: int, drop_last: bool, previous: int | None
) -> list[Run]:
    found: list[Run] = []
    left = num_examples
    while left:
        batch_size = size_at(schedule, progress, num_examples, found[-1].batch_size if found else previous)
        until, every_step = schedule.lr_steps_to_change(progress, batch_size)
        most, steps, clock = min(until, -(-left // batch_size)), 0, progress
        while steps < most and (steps == 0 or size_at(schedule, clock, num_examples, batch_size) == batch_size):
            more = int(min(schedule.batch_steps_to_change(clock, batch_size), most - steps))
            steps, clock = steps + more, clock.advance(more * batch_size, more)
        examples = min(steps * batch_size, left)
        if drop_last and examples < steps * batch_size:
            return [*found, *_cut([Run(progress, steps, examples, batch_size, every_step)], steps - 1)]
        found.append(Run(progress, steps, examples, batch_size, every_step))
        progress, left = progress.advance(examples, steps), left - examples
    return found


def _one_measured_pass(schedule: JointSchedule, progress: Progress, num_examples: int, measure: Measure) -> list[Run]:
    found: list[Run] = []
    total, behind, previous = measure.total(progress.epoch), 0, None
    while behind < num_examples:
        batch_size = size_at(schedule, progress, total, previous, measure.unit)
        # a step has no more examples than tokens, so neither may change sooner than this says
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
            found.append(Run(progress, len(sizes), sum(sizes), batch_size, every_step, tuple(sizes)))
        if ended:
            break
        progress = clock
    return found


def _runs_of_one_size(schedule: JointSchedule, start: Progress, num_examples: int, length: EpochLength) -> list[Run]:
    """One epoch whose batch size is asked once, in runs of equal learning rate."""
    batch_size = schedule.batch_size_at(start)
    check_fits(batch_size, num_examples, start)
    found: list[Run] = []
    (left, examples), progress = length(batch_size), start
    if not left:
        raise ValueError(
            f"with batches of {batch_size} epoch {start.epoch} has no step; check `drop_last` and `limit_train_batches`"
        )
    while left:
        until, every_step = schedule.lr_steps_to_change(progress, batch_size)
        steps = int(min(until, left))
        taken = min(steps * batch_size, examples)
        found.append(Run(progress, steps, taken, batch_size, every_step))
        progress, left, examples = progress.advance(taken, steps), left - steps, examples - taken
    return found


def size_at(
    schedule: JointSchedule, progress: Progress, num_examples: float, previous: int | None, unit: str = "examples"
) -> int:
    """The batch size of a step inside an epoch of ``num_examples`` examples.

    Args:
        schedule: Batch size and learning rate.
        progress: The clock before the step.
        num_examples: Examples of the epoch, or how much it has of what batch sizes count.
        previous: The batch size of the step before it in the epoch. Where a run ends inside an epoch, nobody takes the steps
            beyond its end, and the schedule need not have a value for them: then they keep the size of the last.
        unit: What batch sizes count.

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
    """Raise ``ValueError`` if a batch holds more examples, or more of what batch sizes count, than an epoch."""
    if batch_size > num_examples:
        raise ValueError(
            f"the batch size is {batch_size} at epoch={progress.epoch}, step={progress.step}, but an epoch has only "
            f"{num_examples:.10g} {unit}; write smaller batch sizes, or give them a `maximum` of {num_examples:.10g} or less"
        )


def _cut(found: list[Run], steps: int) -> list[Run]:
    """The first ``steps`` steps."""
    kept = []
    for run in found:
        if steps <= 0:
            break
        if run.steps > steps:
            sizes = None if run.sizes is None else run.sizes[:steps]
            run = replace(run, steps=steps, examples=run.examples_of(steps), sizes=sizes)
        kept.append(run)
        steps -= run.steps
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
    """What ``schedule`` does to ``num_examples`` examples an epoch, until the first horizon given is reached.

    The optimizer step is the grain: a horizon in samples ends with the step that reaches it.

    Args:
        schedule: Batch size and learning rate.
        num_examples: Examples of one epoch.
        epochs: Horizon in epochs.
        steps: Horizon in optimizer steps.
        samples: Horizon in examples.
        tokens_per_sample: Tokens of one example, for schedules that count in tokens.
        limit_batches: As Lightning's ``limit_train_batches``.
        drop_last: Whether an epoch ends before a step that would be short.
        beside: Loaders that are trained on in the same steps.
        epoch_length: Where the batch size can change only between epochs: the optimizer steps and the examples of an epoch,
            for a batch size. It then answers for ``limit_batches``, ``drop_last`` and ``beside`` too.
        measure: What batch sizes count, where these are not examples.

    Raises:
        ValueError: No horizon at all, a horizon below 1, a batch size below 1 or above ``num_examples``, a learning rate
            that is not above 0 and finite, or a schedule over a fraction of a run whose length is not known in its unit.

    Example:
        >>> growing = plan(JointSchedule(Exponential(128, factor=2, every=25)), 50_000, epochs=26)
        >>> [(stage.steps, stage.batch_size) for stage in growing.stages]
        [(9775, 128), (196, 256)]
    """
    given = {"epochs": epochs, "steps": steps, "samples": samples}
    if all(value is None for value in given.values()):
        raise ValueError("a plan needs a horizon: write `epochs`, `steps` or `samples`")
    for name, value in (*given.items(), ("num_examples", num_examples), ("tokens_per_sample", tokens_per_sample)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}={value}` must be 1 or more")
    if epoch_length is not None:
        cut: _Cutter = partial(_runs_of_one_size, num_examples=num_examples, length=epoch_length)
    else:
        options = {"limit_batches": limit_batches, "drop_last": drop_last, "beside": beside, "measure": measure}
        cut = partial(runs, num_examples=num_examples, **options)  # type: ignore[arg-type]
        # the int 1 is one step
        whole_epochs = isinstance(limit_batches, float) and limit_batches == 1.0 and not (drop_last or beside.lengths)
        if epochs is not None and steps is None and samples is None and whole_epochs:
            samples = epochs * num_examples
    horizon = Horizon(epochs, steps, samples, tokens_per_sample)
    # the length in the other units follows from the batch sizes alone, so it is known before the rates are asked
    lengths, _ = _walk(JointSchedule(schedule.batch_size), cut, horizon, horizon)
    full = Horizon(
        epochs if epochs is not None else math.ceil(round(sum(stage.epochs for stage in lengths), 6)),
        steps if steps is not None else sum(stage.steps for stage in lengths),
        samples if samples is not None else sum(stage.samples for stage in lengths),
        tokens_per_sample,
    )
    stages, found = _walk(schedule, cut, full, horizon)
    for message in filter(None, (schedule.warn_of(), _warn_of_maximum(schedule, stages))):
        warnings.warn(message, stacklevel=2)
    rounded = (replace(s, epochs=round(s.epochs, 6), first_epoch=round(s.first_epoch, 6)) for s in stages)
    return Plan(tuple(rounded), num_examples, full, schedule, tuple(map(tuple, found)))


def _walk(schedule: JointSchedule, cut: _Cutter, horizon: Horizon, end: Horizon) -> tuple[list[Stage], list[list[Run]]]:
    """The stages, and the runs of each."""
    stages: list[Stage] = []
    found: list[list[Run]] = []
    previous_varies = False
    for run, first_epoch, share in _until(schedule, cut, Progress(horizon=horizon), end):
        lr, last_lr, varies = _rates(schedule, run)
        stage = Stage(len(stages), first_epoch, share, run.steps, run.examples, run.batch_size, lr, last_lr)
        previous = stages[-1] if stages else None
        if previous and previous.batch_size == run.batch_size and varies == previous_varies and (varies or previous.lr == lr):
            stages[-1] = previous.join(stage)
            found[-1].append(run)
        else:
            stages.append(stage)
            found.append([run])
        previous_varies = varies
    return stages, found


def _until(schedule: JointSchedule, cut: _Cutter, progress: Progress, end: Horizon) -> Iterator[tuple[Run, float, float]]:
    """The runs of every epoch up to ``end``, each with its start and its length in epochs."""
    while not end.ends_before(progress):
        epoch = cut(schedule, progress)
        examples = sum(run.examples for run in epoch)
        behind = 0
        for run in epoch:
            steps = run.steps
            if end.step is not None:
                steps = min(steps, end.step - run.start.step)
            if end.samples is not None:
                steps = min(steps, run.steps_over(end.samples - run.start.samples))
            for kept in _cut([run], steps):
                yield kept, progress.epoch + behind / examples, kept.examples / examples
                behind += kept.examples
                progress = kept.start.advance(kept.examples, kept.steps)
            if steps < run.steps:
                return
        progress = progress.next_epoch()


def _rates(schedule: JointSchedule, run: Run) -> tuple[float | None, float | None, bool]:
    """The learning rate of the first and the last step of a run, and whether it changes in between."""
    last = run.steps - 1

    def rate(step: int) -> float | None:
        return schedule.lr_at(run.start.advance(run.examples_of(step), step), run.batch_size)

    if not run.every_step or isinstance(schedule.lr, Schedule):
        return rate(0), rate(last), run.every_step
    rates = [rate(step) for step in range(run.steps)]  # a plain function: nobody knows its shape, so every step is asked
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
                f"rate still grows, so the gradient noise grows with it (V_T of P1 no longer vanishes). Give the rate "
                f"`maximum={before.lr:.6g}`, or shorten the run"
            )
    return None
