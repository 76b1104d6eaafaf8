"""Post-training a LoopLM into MELT by the paper's two phases (arXiv 2605.07721)."""

from melt_models.training.errors import TrainingError
from melt_models.training.recipe import Phase, Recipe, read_recipe
from melt_models.training.trainer import train

__all__ = ["Phase", "Recipe", "TrainingError", "read_recipe", "train"]
