"""Where a recipe lies: one of this package by its name, any other by its path."""

from pathlib import Path

from melt_models.training.errors import TrainingError

RECIPES = Path(__file__).parent.parent / "recipes"
"""The ready ones: the paper's numbers, melt-tiny's."""


def recipe_path(text: str) -> Path:
    """The file of a recipe.

    Args:
        text: the name of a recipe of this package, such as ``ouro-1.4b``, or the path of a TOML file, ending so.

    Raises:
        TrainingError: neither; lists the names.
    """
    if text.endswith(".toml"):
        return Path(text)
    names = sorted(path.stem for path in RECIPES.glob("*.toml"))
    if text not in names:
        raise TrainingError(f"recipe must be a .toml file or one of {', '.join(names)}, got {text!r}")
    return RECIPES / f"{text}.toml"
