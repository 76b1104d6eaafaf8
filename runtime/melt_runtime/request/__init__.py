"""One answer: its settings, its sampler, its text, its costs. Pure: knows no ONNX Runtime."""

__all__: list[str] = []
