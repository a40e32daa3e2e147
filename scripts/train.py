"""Train a model while its batch size and learning rate grow: `python scripts/train.py data=cifar100 model=resnet18`."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from lightning_bsl.training import train


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Train as configured; returns what a sweeper may optimise."""
    return train(cfg)


if __name__ == "__main__":
    main()
