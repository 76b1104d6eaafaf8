"""Measures bundles, and draws what was measured."""

__all__: list[str] = []
