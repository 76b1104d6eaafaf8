"""Draws a run's log: its loss terms by step, with the end of phase 1 marked."""

from pathlib import Path

from melt_models.training.errors import TrainingError
from melt_models.training.saving import read_log

PLOT_NAME = "log.png"
_TERMS = ("cross_entropy", "distillation", "attention")


def plot_log(out: Path) -> Path:
    """Writes ``OUT/log.png``.

    Raises:
        TrainingError: no log, or matplotlib is not installed.
    """
    records = read_log(out)
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise TrainingError("--plot needs matplotlib: pip install 'melt-onnx[plot]'") from error
    terms = [name for name in _TERMS if any(name in record for record in records)]
    figure, axes = plt.subplots(len(terms), 1, figsize=(8, 2.4 * len(terms)), sharex=True, squeeze=False)
    for axis, name in zip(axes[:, 0], terms, strict=True):
        points = [(record["step"], record[name]) for record in records if name in record]
        axis.plot(*zip(*points, strict=True), linewidth=0.8)
        axis.set_ylabel(name.replace("_", " "))
        axis.set_yscale("log")
        boundary = sum(record["phase"] == "transition" for record in records)
        if 0 < boundary < len(records):
            axis.axvline(boundary + 0.5, color="grey", linestyle="--", linewidth=0.8)
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(out / PLOT_NAME, dpi=120)
    plt.close(figure)
    return out / PLOT_NAME
