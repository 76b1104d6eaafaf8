"""Published ``config.json`` files of other families, read as a ``MeltConfig``.

A family keeps its tensors' names, which are ours too; only the configuration is translated. What would change the
numbers and is not implemented is refused; what is corrected or passed over is said.
"""

from collections.abc import Callable, Mapping
from typing import Any

from melt_models.configuration import MeltConfig

Values = Mapping[str, Any]

_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "rms_norm_eps"),
)
"""Keys that every family must have, and that mean the same here."""
_OPTIONAL = (
    *("num_key_value_heads", "head_dim", "hidden_act", "initializer_range", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
_FIXED = {"attention_bias": False, "mlp_bias": False, "rope_interleaved": False, "pretraining_tp": 1}
"""Keys that may stand there with this value only."""
_CHECKED = ("rope_theta", "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "use_sliding_window")
_SILENT = frozenset(
    {
        *("model_type", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"),
        *("attention_dropout", "is_llama_config", "max_window_layers", "name_or_path", "transformers.js_config"),
        *("unk_token_id", "quantization_config"),
    }
)
"""Keys that change no number of a forward pass, or are looked at elsewhere."""

PUBLISHED_OURO_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
"""What Ouro's files say: all three are ``<|endoftext|>``."""
CORRECT_OURO_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
"""What Ouro was trained with: ``<|im_start|>``, ``<|im_end|>``, ``<|endoftext|>``."""


def read_ouro(values: Values) -> tuple[dict[str, Any], list[str]]:
    """Ouro (arXiv 2510.25741): a LoopLM, a KV cache for each loop.

    Args:
        values: the content of ``config.json``.

    Returns:
        Arguments of ``MeltConfig``, and what was corrected or passed over, a sentence each.

    Raises:
        ValueError: what is missing or not implemented, all faults at once.
    """
    ours, notes = _common(values, own=("total_ut_steps", "early_exit_threshold"), needed=("total_ut_steps",))
    ours |= {"total_ut_steps": values["total_ut_steps"], "norm_placement": "sandwich", "exit_gate": True}
    if "early_exit_threshold" in values:
        ours["early_exit_threshold"] = float(values["early_exit_threshold"])
    if {name: values.get(name) for name in PUBLISHED_OURO_IDS} == PUBLISHED_OURO_IDS:
        ours |= CORRECT_OURO_IDS
        notes.append(
            "the special token ids of Ouro's published files, all 0 (<|endoftext|>), are corrected: "
            "bos 1 (<|im_start|>), eos 2 (<|im_end|>), pad 0"
        )
    return ours, notes


def read_llama(values: Values) -> tuple[dict[str, Any], list[str]]:
    """Llama and what is built like it: no loops, norms before attention and MLP only; as ``read_ouro``."""
    ours, notes = _common(values, own=(), needed=())
    return ours | {"total_ut_steps": 1, "norm_placement": "pre", "exit_gate": False}, notes


FAMILIES: dict[str, Callable[[Values], tuple[dict[str, Any], list[str]]]] = {"ouro": read_ouro, "llama": read_llama}
"""Readers by ``model_type``."""


def _common(values: Values, own: tuple[str, ...], needed: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
    faults = [f"{name} is missing" for name in (*_SAME, *needed) if values.get(name) is None]
    faults += [
        f"{name} must be {value}, got {values[name]!r}: the models here have nothing else"
        for name, value in _FIXED.items()
        if values.get(name) not in (None, value)
    ]
    rope, rope_faults = _rope(values)
    faults += rope_faults + _windows(values)
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method")
        faults.append(f"the weights are quantized ({method}): give the unquantized checkpoint, the export rounds")
    if faults:
        raise ValueError("; ".join(faults))
    known = {*_SAME, *_OPTIONAL, *_FIXED, *_CHECKED, *_SILENT, *own}
    unknown = sorted(name for name in values if name not in known and not name.startswith("_"))
    notes = [f"keys of config.json that mean nothing here are passed over: {', '.join(unknown)}"] if unknown else []
    ours = {name: values[name] for name in (*_SAME, *_OPTIONAL) if values.get(name) is not None}
    return ours | {"gate_kind": "none", "rope_parameters": rope}, notes


def _rope(values: Values) -> tuple[dict[str, Any], list[str]]:
    """Rotary parameters: ``rope_theta`` and ``rope_scaling`` of older files, ``rope_parameters`` of newer ones."""
    stated = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    kind = stated.get("rope_type", stated.get("type", "default"))
    theta = stated.get("rope_theta", values.get("rope_theta"))
    faults = []
    if kind != "default":
        faults.append(f"rope_scaling must be none or 'default', got {kind!r}: this kind is not implemented")
    if stated.get("partial_rotary_factor", 1.0) != 1.0:
        faults.append(f"partial_rotary_factor must be 1, got {stated['partial_rotary_factor']}")
    if theta is None:
        faults.append("rope_theta is missing")
    return {"rope_type": "default", "rope_theta": theta}, faults


def _windows(values: Values) -> list[str]:
    """Layers that see only the latest tokens."""
    kinds = sorted({kind for kind in values.get("layer_types") or () if kind != "full_attention"})
    faults = [f"layer_types must all be 'full_attention', got {', '.join(kinds)} too: not implemented"] if kinds else []
    if values.get("sliding_window") is not None and values.get("use_sliding_window", True):
        faults.append(f"sliding_window must be none, got {values['sliding_window']}: not implemented")
    return faults


KNOWN_TYPES = (MeltConfig.model_type, *FAMILIES)
