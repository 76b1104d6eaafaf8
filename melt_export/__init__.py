"""Exports MELT and LoopLM checkpoints to ONNX bundles, one loop at a time.

A name is imported when it is asked for: ``melt-export --help`` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from melt_export.bundle import ExportOptions, export_bundle
    from melt_export.formats import FormatError
    from melt_export.source import ExportError
    from melt_export.verify import ParityError

__all__ = ["ExportError", "ExportOptions", "FormatError", "ParityError", "export_bundle"]

_HOMES = {
    "ExportError": "source",
    "ExportOptions": "bundle",
    "FormatError": "formats",
    "ParityError": "verify",
    "export_bundle": "bundle",
}


def __getattr__(name: str) -> Any:
    """Imports one of ``__all__``."""
    if name in _HOMES:
        return getattr(import_module(f"melt_export.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
