"""Networks, and the LightningModules that train them."""

from lightning_bsl.models.classifier import Classifier
from lightning_bsl.models.cnn import cnn5
from lightning_bsl.models.gpt import distilgpt2
from lightning_bsl.models.language_model import CausalLM
from lightning_bsl.models.problems import LogisticRegression, NoisyQuadratic
from lightning_bsl.models.resnet import resnet18, wide_resnet28_10

__all__ = [
    "CausalLM",
    "Classifier",
    "LogisticRegression",
    "NoisyQuadratic",
    "cnn5",
    "distilgpt2",
    "resnet18",
    "wide_resnet28_10",
]
