"""Every subject of the benchmark runs, at a toy size, and ends with its ratios."""

from __future__ import annotations

import re
from typing import Any

import pytest

from harness.commands import run_script

BOUNDS = {
    "data": ["fashion_mnist/16/vs_torchvision", "fashion_mnist/16/vs_bare", "cifar/16/vs_torchvision"],
    "callback": ["FashionMNIST/8", "Digits/8", "Digits/8/loss_terms"],
    "switch": ["epoch_end", "inside_epoch"],
    "stream": ["0_workers/8", "2_workers/8"],
    "noise_scale": ["FashionMNIST/8/micro-batches", "Digits/8", "Digits/4"],
    "lengths": ["by_length_over_by_number"],
    "gradient_norm": ["fashion_mnist/over_bare", "fashion_mnist/torchvision_over_ours"],
    "train": ["fashion_mnist/over_the_papers_way"],
    "population": ["2/1", "2/1/over_one_by_one", "2/12", "2/12/over_one_by_one"],
}  # fmt: skip


def ratios(printed: str) -> dict[str, float]:
    """The lines of the bounds, which stand at the end."""
    lines = [re.fullmatch(r"(\S+): ratio ([\d.e+-]+), bound [\d.]+", line) for line in printed.splitlines()]
    found = [line for line in lines if line]
    assert lines[-len(found) :] == found
    return {line[1]: float(line[2]) for line in found}


@pytest.mark.parametrize("subject", BOUNDS)
def test_every_subject(subject: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_script("benchmark.py", subject, "--toy", "--rounds", 1, monkeypatch=monkeypatch) == 0
    found = ratios(capfd.readouterr().out)
    assert list(found) == [f"{subject}/{name}" for name in BOUNDS[subject]]
    assert all(ratio > 0 for ratio in found.values())


def test_there_are_no_other_subjects(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_script("benchmark.py", "--help", monkeypatch=monkeypatch) == 0
    listed = re.findall(r"^    (\w+) ", capfd.readouterr().out, flags=re.M)
    assert listed == list(BOUNDS)


@pytest.mark.parametrize(
    "arguments", [("--rounds", 3, "switch"), ("switch", "--rounds", 3), ("--rounds", 5, "switch", "--rounds", 3)]
)
def test_rounds_before_or_after_the_subject(arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []
    monkeypatch.setattr("argparse.Namespace.run", lambda _, given: rounds.append(given.rounds) or [], raising=False)
    monkeypatch.setattr("argparse.ArgumentParser.set_defaults", lambda *_, **__: None)
    assert run_script("benchmark.py", *arguments, monkeypatch=monkeypatch) == 0
    assert rounds == [3]


@pytest.mark.parametrize("arguments, message", [
    (("switch", "--rounds", 0), "0 must be 1 or more"),
    (("--rounds", "many", "switch"), "invalid"),
    (("nothing",), "invalid choice: 'nothing'"),
    ((), "SUBJECT"),
])  # fmt: skip
def test_refusals(arguments: Any, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_script("benchmark.py", *arguments, monkeypatch=monkeypatch) == 2
    assert message in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("subject", BOUNDS)
def test_every_subject_at_its_size(subject: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    small = {
        "train": ("--images", 2000, "--epochs", 2, "--width", 8),
        "population": ("--replicas", 20, "--width", 8, "--seconds", 1),
    }
    arguments = (subject, "--rounds", 1, *small.get(subject, ()))
    assert run_script("benchmark.py", *arguments, monkeypatch=monkeypatch) == 0
    assert ratios(capfd.readouterr().out)
