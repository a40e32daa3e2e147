"""What belongs to the user's process stays as it was."""

from __future__ import annotations

import warnings
from pathlib import Path

from harness.configs import compose_config
from lightning_bsl.app.train import train


def test_a_run_leaves_no_warning_filter(tmp_path: Path) -> None:
    filters = [*warnings.filters]
    overrides = ("trainer.max_epochs=1", "trainer.enable_progress_bar=false", "data.samples_per_epoch=160")
    train(compose_config(*overrides, f"hydra.runtime.output_dir={tmp_path}"))
    assert warnings.filters == filters
