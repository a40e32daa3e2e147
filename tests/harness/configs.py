"""The configurations under ``conf/``."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from harness.files import ROOT

CONF = ROOT / "conf"
CHOICES = sorted(
    (str(file.parent.relative_to(CONF)), file.stem)
    for file in CONF.rglob("*.yaml")
    if file.parent != CONF and not file.stem.startswith("_")  # what choices have in common
)


def choices(group: str) -> list[str]:
    """The choices of a group."""
    return [choice for of, choice in CHOICES if of == group]


# how many sequences there are is known when the text is read; a language model has the vocabulary of some text
NEEDED = dict.fromkeys(
    ("eli5", "text", "pydoc", "surge_law"),
    ("data.samples_per_epoch=5000",),
) | dict.fromkeys(("distilgpt2", "gpt_tiny"), ("data=pydoc", "data.samples_per_epoch=5000"))
PLANNED = [choice for choice in choices("scheduler") if "adaptive" not in choice]  # the others decide while they train


@cache
def _composed(name: str, overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides), return_hydra_config=True)


def compose_config(*overrides: str, name: str = "train") -> DictConfig:
    """A configuration of one's own, as a command composes it."""
    cfg = deepcopy(_composed(name, overrides))
    HydraConfig.instance().set_config(cfg)
    return cfg
