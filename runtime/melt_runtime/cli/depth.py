"""How deep an answer went, for people: colours by loops, and counts."""

import os
from collections.abc import Callable
from typing import TextIO

from melt_runtime.request.result import GenerationResult

COLOURS = (244, 33, 29, 136, 166, 160, 163)
"""By loops, of the 256 colours that terminals have: one loop, two, and so on; the last for all beyond. Each can be read
on black and on white."""
_RESET = "\x1b[0m"

Paint = Callable[[str, int], str]
"""Gives a text its colour by loops, or leaves it as it is."""


def colours(stream: TextIO) -> Paint:
    """Colours for a terminal; none for pipes and files, and where ``NO_COLOR`` (no-color.org) is set."""
    return _coloured if stream.isatty() and not os.environ.get("NO_COLOR") else _plain


def describe_depth(result: GenerationResult, paint: Paint) -> str:
    """How many tokens took how many loops, each in its colour, and the passes that they took together."""
    shares = ", ".join(
        paint(f"{count} token{'s' * (count > 1)} after {loops} loop{'s' * (loops > 1)}", loops)
        for loops, count in result.depth_histogram.items()
    )
    return f"depth: {shares}; {result.passes} passes after the prompt{_describe_drafts(result)}"


def _describe_drafts(result: GenerationResult) -> str:
    drafts = result.drafts
    if drafts is None:
        return ""
    corrected = ", ".join(f"{count} by loop {loop}" for loop, count in sorted(drafts.corrected.items()))
    return f"; {drafts.kept} of {drafts.made} drafts kept" + (f", corrected {corrected}" if corrected else "")


def _coloured(text: str, loops: int) -> str:
    return f"\x1b[38;5;{COLOURS[min(loops, len(COLOURS)) - 1]}m{text}{_RESET}"


def _plain(text: str, loops: int) -> str:
    return text
