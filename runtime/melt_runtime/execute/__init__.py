"""Passes of the loop graph over a cache, and which sequence owns which of its rows. Knows no text."""

__all__: list[str] = []
