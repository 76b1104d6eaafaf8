"""A picture: opened with its panels, drawn in one style, written at the end.

Dark text on a light ground of its own, so that it reads on a light page and on a dark one, in colours that the
colour-blind can tell apart (M. Okabe, K. Ito, 2008).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
_STYLE = {
    "figure.facecolor": "#FCFCFC",
    "axes.facecolor": "#FCFCFC",
    "savefig.facecolor": "#FCFCFC",
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "text.color": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "font.size": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}

_MATPLOTLIB = "pictures need matplotlib: pip install 'melt-onnx[plot]'"


def require_picture_path(path: Path) -> None:
    """Refuses what ``picture`` could not write, before the work that it would show.

    Raises:
        ValueError: matplotlib is not installed, or cannot write files of that ending; or the folder does not exist.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
        from matplotlib.figure import Figure  # noqa: F401
    except ImportError as error:
        raise ValueError(_MATPLOTLIB) from error
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise ValueError(f"a picture's file must end in one of .{', .'.join(kinds)}, got {path.name!r}")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of {path} does not exist: make it first")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")


@contextmanager
def picture(
    path: Path, title: str, rows: int = 1, columns: int = 1, width: float = 8, height: float = 4, **axes: Any
) -> Iterator[tuple[Any, Any]]:
    """A new picture, written to ``path`` when the block ends well.

    Args:
        path: file to write, of any kind that matplotlib knows by its ending.
        title: what the whole picture shows.
        rows: of panels.
        columns: of panels.
        width: inches.
        height: inches.
        **axes: as matplotlib's ``Figure.subplots`` takes them, e.g. ``sharey=True``.

    Yields:
        The figure, for a legend, and its panels, [rows, columns].

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from cycler import cycler
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(_MATPLOTLIB) from error
    with rc_context({**_STYLE, "axes.prop_cycle": cycler(color=_COLOURS)}):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left")
        yield figure, figure.subplots(rows, columns, squeeze=False, **axes)
        figure.savefig(path, dpi=130)
