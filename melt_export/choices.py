"""What an export may choose from, without torch, for the command line's help. The first of each is the default."""

from typing import Literal

BLOCKS = (128, 64, 32, 16)
"""Weights that share a scale: the largest of these, up to the wanted one, that divides the row. 128 streams 0.535 bytes
a weight at 4 bit where 32 streams 0.641, and on a CPU bytes are time; smaller ones cost less quality."""

Rounding = Literal["search", "nearest"]
ROUNDINGS: tuple[Rounding, ...] = ("search", "nearest")

PROMPTS = ("int8", "none")
"""Whether a bundle has a copy of the layers' weights for passes of several rows, at 8 bits by column."""
