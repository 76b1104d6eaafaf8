"""The layer of MELT and LoopLM, on torch alone: for models over any version of transformers."""

from melt_layers.layers import (
    GATES,
    LEARNED_GATES,
    MLP,
    UNGATED,
    Attention,
    Frame,
    Gate,
    GateKind,
    GateLinear,
    KeyValue,
    Layer,
    LayerConfig,
    RMSNorm,
    apply_rope,
    rope_tables,
)
from melt_layers.loops import RunLayer, run_loops

__all__ = [
    "Attention",
    "Frame",
    "GATES",
    "Gate",
    "GateKind",
    "GateLinear",
    "KeyValue",
    "LEARNED_GATES",
    "Layer",
    "LayerConfig",
    "MLP",
    "RMSNorm",
    "RunLayer",
    "UNGATED",
    "apply_rope",
    "rope_tables",
    "run_loops",
]
