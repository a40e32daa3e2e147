"""The commands, and what they share: from a composed Hydra configuration to the objects of a run."""
