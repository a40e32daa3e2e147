"""Schedules that several test modules train with."""

from __future__ import annotations

from lightning_bsl.schedules import Milestones

GROWING = Milestones([7, 12, 31], at=[4, 9], unit="step")
SHRINKING = Milestones([31, 13, 5], at=[70, 120], unit="samples")
