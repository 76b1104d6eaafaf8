"""One style for every picture of this project. Matplotlib alone; every other package may import it."""

from melt_plots.picture import picture, require_picture_path

__all__ = ["picture", "require_picture_path"]
