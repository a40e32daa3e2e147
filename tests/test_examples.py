"""Each example runs as its reader would run it, and prints what it promises."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from harness.commands import run_python
from lightning_bsl.data import GlobalBatchSampler

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.filterwarnings("ignore:the batch has labels of -100")
def test_padded_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "padded_language_model.py"), run_name="__main__")
    whole, without, with_terms = map(float, re.findall(r" (\d\.\d+)$", capsys.readouterr().out, flags=re.M))
    assert with_terms == pytest.approx(whole, rel=1e-5)
    assert without != pytest.approx(whole, rel=1e-3)


def weights_of(example: str) -> torch.Tensor:
    """Runs an example that returns its weights."""
    namespace = runpy.run_path(str(EXAMPLES / f"{example}.py"))
    return torch.cat([weight.flatten() for weight in namespace["main"]()])


def by_hand() -> torch.Tensor:
    """The weights after the same batches and rates, written out."""
    example = runpy.run_path(str(EXAMPLES / "plain_pytorch.py"))
    x, y = example["make_data"]().tensors
    model = example["make_model"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for epoch in range(6):
        order = torch.tensor(GlobalBatchSampler(1000, 1, seed=0).permutation(epoch))
        optimizer.param_groups[0]["lr"] = 0.02 * 1.3 ** (epoch // 2)
        for indices in order.split(16 * 2 ** (epoch // 2)):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x[indices]), y[indices]).backward()
            optimizer.step()
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def test_plain_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    assert torch.equal(weights_of("plain_pytorch"), by_hand())
    assert "stage 2: 32 steps with batch size 64 and learning rate 0.0338" in capsys.readouterr().out


def test_fabric() -> None:
    assert torch.equal(weights_of("fabric"), by_hand())


@pytest.mark.slow
def test_fabric_in_two_processes(tmp_path: Path) -> None:
    printed = run_python(EXAMPLES / "fabric.py", 2, folder=tmp_path)
    total = re.findall(r"sum of the weights: (\S+)", printed)
    assert float(total[-1]) == pytest.approx(by_hand().double().sum().item(), rel=1e-5)


def test_every_example_has_a_test() -> None:
    assert all(f"test_{path.stem}" in globals() for path in EXAMPLES.glob("*.py"))
    assert {path.name for path in EXAMPLES.iterdir() if path.is_dir()} - {"__pycache__"} == {"hydra_app"}  # test_commands.py
