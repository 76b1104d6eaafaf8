"""Folders and files that appear whole or not at all. The standard library alone; every other package may import it."""

from melt_files.staging import replace_text, require_absent, staged

__all__ = ["replace_text", "require_absent", "staged"]
