"""Folders and files that appear whole or not at all. The standard library alone; every other package may import it."""

from melt_files.listing import matching
from melt_files.partial import Partial, partial_folder, partials, remove_dead
from melt_files.staging import replace_file, replace_text, require_absent, staged

__all__ = [
    "Partial",
    "matching",
    "partial_folder",
    "partials",
    "remove_dead",
    "replace_file",
    "replace_text",
    "require_absent",
    "staged",
]
