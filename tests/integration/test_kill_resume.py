"""Killing a training process does not change what it trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kill_resume
import pytest
import torch
from kill_resume import Line, differences, read_state


@pytest.mark.parametrize(
    "options",
    [
        "--kills 2 --seed 2 --exact --epochs 3",
        pytest.param("--kills 1 --seed 2 --exact --epochs 2 --source torchdata", marks=pytest.mark.slow),
        pytest.param("--kills 20 --seed 2 --exact", marks=pytest.mark.slow),
        pytest.param("--kills 20 --seed 3 --exact --cap 7", marks=pytest.mark.slow),
        pytest.param("--kills 20 --seed 2", marks=pytest.mark.slow),
        pytest.param("--kills 20 --seed 4 --weighted", marks=pytest.mark.slow),
        pytest.param("--kills 20 --seed 3 --cap 7", marks=pytest.mark.slow),
        pytest.param("--kills 30 --seed 7 --epochs 6 --source litdata", marks=pytest.mark.slow),
        pytest.param("--kills 30 --seed 7 --epochs 6 --source torchdata", marks=pytest.mark.slow),
        pytest.param("--kills 30 --seed 7 --epochs 6 --source datasets", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_killed_and_resumed_equals_never_killed(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "--source" in options:
        pytest.importorskip(options.split()[-1])
    assert kill_resume.run(options.split()) == 0
    summary = capsys.readouterr().out.splitlines()[-1]
    assert summary.endswith(": equal")
    resumes = re.search(r"(\d+) resumes", summary)
    assert resumes and int(resumes[1]) > 0, summary


def test_checker_sees_a_journal_that_differs() -> None:
    right = [Line("step 0 batch 0", "loss 0x1.8p+0"), Line("step 1 batch 1", "loss 0x1.4p+0")]
    assert differences(right, [*right, right[0]]) == []  # a step done again
    wrong = Line("step 1 batch 1", "loss 0x1.4000000000001p+0")
    assert differences(right, [*right, wrong]) == [f"step 1 batch 1: {wrong.said} instead of loss 0x1.4p+0"]
    assert differences(right, right[:1]) == ["step 1 batch 1: missing"]
    assert differences(right[:1], right) == ["step 1 batch 1: loss 0x1.4p+0 instead of nothing"]


@pytest.mark.parametrize("change", ["weight", "lr", "rng", "epochs"])
def test_checker_sees_a_state_that_differs(change: str, tmp_path: Path) -> None:
    def save(name: str, weight: float = 0.5, lr: float = 0.1, rng: int = 3, epochs: int = 2) -> Path:
        state: dict[str, Any] = {
            "epoch": 2,
            "global_step": 9,
            "state_dict": {"weight": torch.tensor([0.25, weight])},
            "optimizer_states": [{"param_groups": [{"lr": lr}]}],
            "loops": {"fit_loop": {"epoch_progress": {"total": {"ready": epochs}}}},
            "callbacks": {"BatchLRScheduler": {"rng": [{"torch": torch.tensor([rng])}]}, "ModelCheckpoint": {"dirpath": name}},
        }
        torch.save(state, tmp_path / name)
        return tmp_path / name

    values: dict[str, Any] = {"weight": 0.5 + 2**-24, "lr": 0.1 + 2**-56, "rng": 4, "epochs": 3}
    right = read_state(save("right"))
    assert differences(right, read_state(save("same"))) == []
    (found,) = differences(right, read_state(save("wrong", **{change: values[change]})))
    assert change in found
