"""An average of the weights that follows the batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import SGD

from harness.cases import GROWING
from harness.commands import run_python
from harness.data import own, regression
from harness.fits import fit
from harness.loops import whole_steps
from harness.modules import Recorder, Regression, equal, mlp
from harness.tiers import diagonal
from lightning_bsl import BatchEMA, BatchLRScheduler
from lightning_bsl.schedules import HalfLife, Progress

callbacks = pytest.importorskip("lightning.pytorch.callbacks")
pytestmark = pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="came with Lightning 2.6.0")

N = 61
DATA = regression(N)


def by_hand(every: int = 1, decay: float = 0.9) -> list[Tensor]:
    """The average of a plain loop."""
    model = Regression()
    optimizer = model.configure_optimizers()
    average: list[Tensor] = []
    number = 0
    for steps in whole_steps(GROWING, N, 3):
        for indices in steps:
            optimizer.zero_grad()
            model.loss(DATA[indices]).backward()
            optimizer.step()
            now = HalfLife(7)(decay, int(GROWING(Progress(step=number))))
            if number % every == 0:
                weights = [parameter.detach().clone() for parameter in model.net.parameters()]
                average = [now * a + (1 - now) * w for a, w in zip(average, weights)] if average else weights
            number += 1
    return average


@pytest.mark.parametrize("every, order", diagonal([1, 2], [1, -1]))
def test_equals_a_plain_loop(every: int, order: int) -> None:
    model = Regression()
    ours = [BatchLRScheduler(GROWING, 0.05), BatchEMA(7, 0.9, update_every_n_steps=every)]
    fit(model, own(DATA), *ours[::order])
    assert all(torch.equal(a, b) for a, b in zip(model.net.parameters(), by_hand(every)))


def test_micro_batches_are_one_update() -> None:
    model = Regression()
    fit(model, own(DATA), BatchLRScheduler(GROWING, 0.05, max_device_batch_size=5), BatchEMA(7, 0.9))
    for a, b in zip(model.net.parameters(), by_hand()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_at_a_constant_batch_it_is_lightnings() -> None:
    models = Regression(), Regression()
    for model, average in zip(models, (BatchEMA(16, 0.9), callbacks.EMAWeightAveraging(decay=0.9))):
        fit(model, own(DATA), BatchLRScheduler(16, 0.05), average)
    assert equal(*models)


@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (4, 7, 9))])
def test_resumes_bit_for_bit(step: int, tmp_path: Path) -> None:
    def parts() -> list[Callback]:
        return [BatchLRScheduler(GROWING, 0.05), BatchEMA(7, 0.9, update_starting_at_epoch=1)]

    whole, resumed = Regression(), Regression()
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(whole, own(DATA), *parts(), saver, enable_checkpointing=True)
    fit(resumed, own(DATA), *parts(), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert equal(whole.net, resumed.net)


def test_it_needs_a_scheduler() -> None:
    with pytest.raises(MisconfigurationException, match="there is none among the callbacks"):
        fit(Recorder(mlp(), lambda parameters: SGD(parameters, lr=0.1)), own(DATA), BatchEMA(7))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"base_batch_size": 0}, "write a finite number above 0"),
    ({"base_batch_size": 8, "decay": 1.0}, "`decay=1.0` must be 0 or more and below 1"),
    ({"base_batch_size": 8, "decay": float("nan")}, "must be 0 or more and below 1"),
])  # fmt: skip
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchEMA(**arguments)


@pytest.mark.slow
def test_an_older_lightning(tmp_path: Path) -> None:
    program = (
        "import lightning.pytorch.callbacks as callbacks\n"
        "del callbacks.EMAWeightAveraging\n"
        "from lightning_bsl import BatchEMA\n"
        "try:\n    BatchEMA(8)\nexcept Exception as error:\n    print(error)"
    )
    assert "install `lightning>=2.6`" in run_python("-c", program, folder=tmp_path)
