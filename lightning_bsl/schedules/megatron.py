"""Schedules of the batch size in the words of Megatron-LM: ``--step-batch-size-schedule "0:768 250B:1536 500B:3072"``."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Literal

from lightning_bsl.schedules.joins import Milestones
from lightning_bsl.schedules.plan import Plan

_SUFFIXES = {"T": 10**12, "B": 10**9, "M": 10**6, "K": 10**3}


def from_megatron(schedule: str, unit: Literal["tokens", "samples"] = "tokens") -> Milestones:
    """Read a schedule of Megatron-LM.

    It is a list of ``THRESHOLD:BATCH_SIZE`` with spaces or commas between, and K, M, B or T for thousands to trillions. The
    batch size counts sequences. Megatron-LM reads thresholds in tokens if it knows the sequence length, else in samples. It
    rounds a threshold inside a sequence down to whole sequences; here the change comes with the next whole sequence.

    Args:
        schedule: The argument of ``--step-batch-size-schedule``.
        unit: What the thresholds count.

    Raises:
        ValueError: An entry that is no pair of whole numbers, a first threshold that is not 0, or two equal thresholds; an
            unknown ``unit``.

    Example:
        >>> batch_size = from_megatron("0:768 250B:1536 500B:3072")
        >>> batch_size.values, batch_size.at
        ((768, 1536, 3072), (250000000000, 500000000000))
    """
    _check_unit(unit)
    if not isinstance(schedule, str):
        raise ValueError(f"`schedule={schedule!r}` is no schedule of Megatron-LM: write a string, such as '0:768 250B:1536'")
    entries = sorted(_entry(entry) for entry in schedule.replace(",", " ").split())
    thresholds = [threshold for threshold, _ in entries]
    if not entries or thresholds[0] != 0:
        raise ValueError(f"{schedule!r} must begin with threshold 0, such as '0:768 250B:1536'")
    if len(set(thresholds)) < len(thresholds):
        raise ValueError(f"{schedule!r} has a threshold twice; write each once")
    return Milestones([size for _, size in entries], at=thresholds[1:], unit=unit)


def to_megatron(plan: Plan, unit: Literal["tokens", "samples"] = "samples") -> str:
    """Write the batch sizes of a plan as a schedule of Megatron-LM.

    The thresholds are the samples or tokens before the first step with the new batch size. Megatron-LM drops the short last
    batch of an epoch, which a plan keeps.

    Args:
        plan: The plan.
        unit: What the thresholds count.

    Returns:
        The argument of ``--step-batch-size-schedule``.

    Raises:
        ValueError: ``unit="tokens"`` and the tokens of an example are not known; a plan whose batch sizes count tokens; an
            unknown ``unit``.

    Example:
        >>> from lightning_bsl.schedules import Exponential, JointSchedule, plan
        >>> to_megatron(plan(JointSchedule(Exponential(8, factor=2)), 1000, epochs=3))
        '0:8 1K:16 2K:32'
    """
    _check_unit(unit)
    if any(stretch.sizes is not None for stretches in plan.stretches for stretch in stretches):
        raise ValueError(
            "the batch sizes of this plan count tokens, but those of Megatron-LM count sequences; plan in examples"
        )
    entries: list[tuple[int, int]] = []
    samples, grain = 0, plan.horizon.grain(unit)
    for stage in plan.stages:
        if not entries or entries[-1][1] != stage.batch_size:
            entries.append((samples * grain, stage.batch_size))
        samples += stage.samples
    return " ".join(f"{_short(threshold)}:{size}" for threshold, size in entries)


def _check_unit(unit: str) -> None:
    if unit not in ("tokens", "samples"):
        raise ValueError(f"unknown unit {unit!r}; the thresholds of Megatron-LM count 'tokens' or 'samples'")


def _entry(entry: str) -> tuple[int, int]:
    threshold, colon, size = entry.partition(":")
    numbers = _number(threshold), _number(size)
    if not colon or None in numbers or numbers[1] == 0:
        raise ValueError(f"{entry!r} is no THRESHOLD:BATCH_SIZE in whole numbers; write for example '250B:1536'")
    return numbers  # type: ignore[return-value]


def _number(text: str) -> int | None:
    """A number with or without a suffix; ``None`` for anything else."""
    factor = _SUFFIXES.get(text[-1:].upper(), 1)
    try:
        number = Decimal(text[:-1] if factor > 1 else text) * factor
    except InvalidOperation:
        return None
    return int(number) if number.is_finite() and number >= 0 and number == int(number) else None


def _short(number: int) -> str:
    for suffix, factor in _SUFFIXES.items():
        if number and number % factor == 0:
            return f"{number // factor}{suffix}"
    return str(number)
