"""Post-training a LoopLM into MELT by the paper's two phases (arXiv 2605.07721), and the exit gate of either.

A name is imported when it is asked for: ``melt-train --help`` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from melt_models.training.errors import TrainingError

if TYPE_CHECKING:
    from melt_models.training.recipe import Exit, Joint, Phase, Recipe, read_recipe
    from melt_models.training.trainer import train

__all__ = ["Exit", "Joint", "Phase", "Recipe", "TrainingError", "read_recipe", "train"]

_HOMES = {**dict.fromkeys(("Exit", "Joint", "Phase", "Recipe", "read_recipe"), "recipe"), "train": "trainer"}


def __getattr__(name: str) -> Any:
    """Imports one of ``__all__``."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
