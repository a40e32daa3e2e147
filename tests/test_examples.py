"""Each example runs as its reader would run it, and prints what it promises."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.filterwarnings("ignore:the batch has labels of -100")
def test_padded_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "padded_language_model.py"), run_name="__main__")
    whole, without, with_terms = map(float, re.findall(r" (\d\.\d+)$", capsys.readouterr().out, flags=re.M))
    assert with_terms == pytest.approx(whole, rel=1e-5)
    assert without != pytest.approx(whole, rel=1e-3)


def test_every_example_has_a_test() -> None:
    assert all(f"test_{path.stem}" in globals() for path in EXAMPLES.glob("*.py"))
