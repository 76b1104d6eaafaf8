"""Exports MELT and LoopLM checkpoints to ONNX bundles, one loop at a time."""

from melt_export.bundle import ExportOptions, export_bundle
from melt_export.formats import FormatError
from melt_export.source import ExportError
from melt_export.verify import ParityError

__all__ = ["ExportError", "ExportOptions", "FormatError", "ParityError", "export_bundle"]
