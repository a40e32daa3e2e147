"""Folders of runs, as training leaves them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import yaml

PER_EPOCH = 100  # samples
FIRST_EPOCH = """batch_size,epoch,lr,samples,step,train/loss,val/accuracy,val/loss
8.0,0,0.1,80.0,9,1.5,,
8.0,0,0.1,100.0,12,,0.5,1.25
8.0,0,0.1,100.0,12,1.4,,
"""
SECOND_EPOCH = """16.0,1,0.125,200.0,19,,0.75,0.5
16.0,1,0.125,200.0,19,0.7,,
"""


def write_metrics(path: Path, text: str = FIRST_EPOCH + SECOND_EPOCH) -> Path:
    """A ``metrics.csv`` of two epochs, as Lightning's CSVLogger writes it."""
    path.write_text(text)
    return path


def write_run(
    folder: Path,
    overrides: Sequence[str] = (),
    norms: Sequence[float] = (4, 3, 2, 1),
    batch_sizes: Sequence[int] = (10, 10, 10, 10),
    epochs: int | None = None,
    columns: Sequence[str] = ("epoch", "step", "samples", "seconds", "batch_size", "lr", "full_gradient_norm", "val/loss"),
    ours: bool = True,
) -> Path:
    """A run of as many epochs as there are norms, out of ``epochs``."""
    folder.mkdir(parents=True)
    given = dict(override.split("=") for override in overrides)
    if ours:
        (folder / ".hydra").mkdir()
        config = {
            "seed": int(given.get("seed", 0)),
            "ckpt_path": given.get("ckpt_path"),
            "output_dir": "${hydra:runtime.output_dir}",
            "trainer": {"max_epochs": epochs or len(norms)},
            "optimizer": {"lr": float(given.get("optimizer.lr", 0.1))},
        }
        choices = {"scheduler": given.get("scheduler", "increasing_both"), "data": "digits"}
        hydra = {"hydra": {"runtime": {"choices": choices, "cwd": str(folder)}, "job": {"name": "train"}}}
        for name, content in (("config", config), ("overrides", list(overrides)), ("hydra", hydra)):
            (folder / ".hydra" / f"{name}.yaml").write_text(yaml.safe_dump(content))
        with open(folder / "plan.csv", "w") as file:
            file.write("stage,first_epoch,epochs,steps,samples,batch_size,lr\n")
            file.write(f"0,0,{epochs or len(norms)},1,{PER_EPOCH * (epochs or len(norms))},10,0.1\n")
    step = -1
    with open(folder / "metrics.csv", "w") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for epoch, (norm, size) in enumerate(zip(norms, batch_sizes)):
            step += PER_EPOCH // size
            clock = {"epoch": epoch, "step": step, "samples": PER_EPOCH * (epoch + 1), "seconds": 0.5 * (epoch + 1)}
            writer.writerow({**clock, "batch_size": size, "lr": 0.1, "full_gradient_norm": norm, "val/loss": norm / 2})
    return folder


def sweep(root: Path) -> Path:
    """Two groups of three seeds; (i) needs 4, 5, 6 epochs to a norm of 1, (iii) needs 2, 2, 3."""
    for number, (scheduler, ends, sizes) in enumerate((
        ("constant_decaying", (4, 5, 6), (10,) * 6), ("increasing_both", (2, 2, 3), (10, 10, 20, 20, 50, 50))
    )):  # fmt: skip
        for seed, end in enumerate(ends):
            norms = [5.0 if epoch < end else 1.0 - 0.1 * seed for epoch in range(1, 7)]
            write_run(root / str(3 * number + seed), [f"scheduler={scheduler}", f"seed={seed}"], norms, sizes)
    return root
