"""How deep an answer went, for people: colours by loops, and counts."""

from melt_runtime.request.result import GenerationResult

# From pale to strong, of the 256 colours that terminals have: one loop, two, and so on; the last for all beyond.
_COLOURS = (250, 117, 78, 220, 208, 203, 199)
_RESET = "\x1b[0m"


def coloured(piece: str, loops: int) -> str:
    """A piece of text in the colour of its depth."""
    return f"{_start(loops)}{piece}{_RESET}"


def describe_depth(result: GenerationResult) -> str:
    """How many tokens took how many loops, each in its colour, and the passes that they took together."""
    shares = ", ".join(
        f"{_start(loops)}{count} token{'s' * (count > 1)} after {loops} loop{'s' * (loops > 1)}{_RESET}"
        for loops, count in result.depth_histogram.items()
    )
    return f"depth: {shares}; {result.passes} passes after the prompt{_describe_drafts(result)}"


def _describe_drafts(result: GenerationResult) -> str:
    drafts = result.drafts
    if drafts is None:
        return ""
    corrected = ", ".join(f"{count} by loop {loop}" for loop, count in sorted(drafts.corrected.items()))
    return f"; {drafts.kept} of {drafts.made} drafts kept" + (f", corrected {corrected}" if corrected else "")


def _start(loops: int) -> str:
    return f"\x1b[38;5;{_COLOURS[min(loops, len(_COLOURS)) - 1]}m"
