"""Networks, and the LightningModules that train them."""

from lightning_bsl.models.classifier import Classifier
from lightning_bsl.models.cnn import cnn5
from lightning_bsl.models.problems import LogisticRegression, NoisyQuadratic
from lightning_bsl.models.resnet import resnet18, wide_resnet28_10

__all__ = ["Classifier", "LogisticRegression", "NoisyQuadratic", "cnn5", "resnet18", "wide_resnet28_10"]
