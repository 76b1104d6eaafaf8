"""Sizes and memory: planned before anything is allocated, then the buffers. Knows no ONNX Runtime session."""

__all__: list[str] = []
