"""DataModules whose batch size may change while training runs."""

from lightning_bsl.data.datamodule import BatchSizeDataModule
from lightning_bsl.data.sampler import GlobalBatchSampler
from lightning_bsl.data.stream_loader import StreamDataModule

__all__ = ["BatchSizeDataModule", "GlobalBatchSampler", "StreamDataModule"]
