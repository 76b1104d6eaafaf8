"""Published shapes by name, for benchmarks and full-size tests: configurations without weights."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from melt_models.configuration import MeltConfig

_OURO = {
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "max_position_embeddings": 65536,
    "total_ut_steps": 4,
    "tie_word_embeddings": False,
}
_SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "total_ut_steps": 1,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "ouro-1.4b": {**_OURO, "gate_kind": "none"},
    "ouro-2.6b": {**_OURO, "gate_kind": "none", "num_hidden_layers": 48},
    "melt-1.6b": {**_OURO, "gate_kind": "elementwise"},
    "smollm2-135m": {**_SMOLLM2, "gate_kind": "none", "norm_placement": "pre", "exit_gate": False},
}
"""Ouro: arXiv 2510.25741; MELT: arXiv 2605.07721; SmolLM2-135M: its ``config.json``."""


def shape_config(name: str) -> "MeltConfig":
    """The configuration of a published shape.

    Args:
        name: one of ``SHAPES``; ``melt-1.6b:4`` is the same with its first 4 layers only.

    Raises:
        ValueError: an unknown name, or a number of layers that the shape does not have.
    """
    from melt_models.configuration import MeltConfig  # here: the names of the shapes are known without transformers

    base, _, layers = name.partition(":")
    if base not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {base!r}")
    values = dict(SHAPES[base])
    if layers:
        most = values["num_hidden_layers"]
        if not layers.isdecimal() or not 1 <= int(layers) <= most:
            raise ValueError(f"layers of shape {base} must be in [1, {most}], got {layers!r}")
        values["num_hidden_layers"] = int(layers)
    return MeltConfig(**values)
