"""What the tests of faults share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run that was never interrupted."""
    from children import SMALL, train_here

    return train_here(SMALL, tmp_path_factory.mktemp("whole"))
