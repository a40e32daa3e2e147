"""A Hydra application of your own that borrows a scheduler.

Run it with `python main.py +scheduler=increasing_both schedule_defaults.lr=0.02`.
"""

import hydra
import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class Model(LightningModule):
    """A linear model whose output should be 1."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.net = torch.nn.Linear(size, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch of inputs ``[batch, size]``."""
        loss: Tensor = (self.net(batch[0]) - 1).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The scheduler sets its learning rate."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


@hydra.main(version_base=None, config_path=".", config_name="config")
def main(cfg: DictConfig) -> None:
    """Train."""
    scheduler = instantiate(cfg.scheduler)
    loader = DataLoader(TensorDataset(torch.randn(600, cfg.size)), batch_size=32, shuffle=True)
    trainer = Trainer(max_epochs=cfg.epochs, callbacks=[scheduler], accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Model(cfg.size), loader)
    print("batch sizes:", [stage.batch_size for stage in scheduler.plan.stages], "first rate:", scheduler.plan.stages[0].lr)


if __name__ == "__main__":
    main()
