"""Draws a run's log: its loss terms by step, with the ends of phases marked."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from melt_models.training.errors import TrainingError
from melt_models.training.saving import read_log
from melt_plots import picture

PLOT_NAME = "log.png"
_TERMS = {
    "cross_entropy": "cross entropy, nats",
    "distillation": "distillation, nats",
    "attention": "attention",
    "expected_cross_entropy": "expected cross entropy, nats",
    "entropy": "entropy of exits, nats",
    "exit": "exit gate, nats",
    "expected_loops": "expected loops",
}
_WIDE = 5
"""Ratio of the largest value to the smallest from which an axis is logarithmic."""
_SHOWN = 1e3
"""Ratio of the largest value to the smallest that a logarithmic axis shows."""


def plot_log(out: Path) -> Path:
    """Writes ``OUT/log.png``.

    Raises:
        TrainingError: no log, one without losses, or matplotlib is not installed.
    """
    records = read_log(out)
    terms = [name for name in _TERMS if any(name in record for record in records)]
    if not terms:
        raise TrainingError(f"the log of {out} has no losses to draw")
    phases = [record["phase"] for record in records]
    ends = [place for place in range(1, len(phases)) if phases[place] != phases[place - 1]]
    size = {"width": 8, "height": 0.8 + 2.2 * len(terms)}
    try:
        with picture(out / PLOT_NAME, f"Training, {len(records)} steps", len(terms), **size, sharex=True) as (_, axes):
            for axis, name in zip(axes[:, 0], terms, strict=True):
                points = [(record["step"], record[name]) for record in records if name in record]
                axis.plot(*zip(*points, strict=True), linewidth=1)
                axis.set_ylabel(_TERMS[name])
                choose_scale(axis, [value for _, value in points if value > 0])
                for end in ends:
                    axis.axvline(end + 0.5, color="#555555", linestyle="--", linewidth=1)
            top = axes[0, 0].get_xaxis_transform()
            for start, end in pairwise([0, *ends, len(phases)]) if ends else ():
                place = (start + end + 1) / 2
                axes[0, 0].text(place, 1.02, phases[start], transform=top, ha="center", fontsize=9)
            axes[-1, 0].set_xlabel("step")
            axes[-1, 0].locator_params("x", integer=True)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    return out / PLOT_NAME


def choose_scale(axis: Any, values: list[float]) -> None:
    """A logarithmic axis where values differ widely, with plain numbers beside its ticks.

    Values far below the largest are left out of view: at alpha 0 the student is its teacher, and the rest is rounding.
    """
    if not values or max(values) < _WIDE * min(values):
        return
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = max(min(values), max(values) / _SHOWN), max(values)
    axis.set_yscale("log")
    axis.set_ylim(low / 1.2, high * 1.2)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
