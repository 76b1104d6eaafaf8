"""Exports MELT and LoopLM checkpoints to ONNX bundles, one loop at a time."""

from melt_export.bundle import ExportError, export_bundle
from melt_export.verify import ParityError

__all__ = ["ExportError", "ParityError", "export_bundle"]
