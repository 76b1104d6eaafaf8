"""What a configuration may say: types, ranges, values against each other. Knows no file and no framework.

The bounds lie far above every published model; a size beyond them is a damaged file, and would only fill the memory.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from melt_models.forms import STRICT, fitting

GateKind = Literal["none", "elementwise", "scalar", "ema", "mean", "last"]
GATE_KINDS: tuple[str, ...] = get_args(GateKind)
"""``none`` is LoopLM (a KV cache per loop); the others keep one gated KV cache (arXiv 2605.07721, Table 3).
What each of them has is said in ``melt_layers.GATES``."""

NormPlacement = Literal["sandwich", "pre"]
"""``sandwich``: before and after attention and MLP (Ouro); ``pre``: before them only (Llama)."""

CHUNK = 500
"""Tokens that training and prefill process in parallel (the paper's), where the model's positions allow it."""

_Size = Annotated[int, Field(ge=1, le=1 << 20)]
_Count = Annotated[int, Field(ge=1, le=1 << 10)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 20)]
TokenIds = Annotated[
    Annotated[list[TokenId], Field(min_length=1)] | None,
    BeforeValidator(lambda value: value if value is None or isinstance(value, list) else [value]),
]
"""One token id, several, or none."""


@with_config({**STRICT, "extra": "forbid"})
class _Rope(TypedDict, total=False):
    rope_type: Literal["default"]
    type: Literal["default"]  # its name in older files
    rope_theta: Annotated[float, Field(ge=1, le=1e15)]
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)]


@with_config(STRICT)
class _Form(TypedDict, total=False):
    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Count
    num_attention_heads: _Count
    num_key_value_heads: _Count | None
    head_dim: _Count | None
    hidden_act: Literal["silu"]
    max_position_embeddings: _Size
    initializer_range: Annotated[float, Field(ge=0, le=1e3)]
    rms_norm_eps: Annotated[float, Field(gt=0, le=1)]
    rope_parameters: _Rope | None
    tie_word_embeddings: bool
    bos_token_id: TokenId | None
    eos_token_id: TokenIds
    pad_token_id: TokenId | None
    total_ut_steps: _Count
    early_exit_threshold: Annotated[float, Field(ge=0, le=1)]
    chunk_size: _Size | None
    gate_kind: GateKind
    gate_bias_init: Annotated[float, Field(ge=-1e6, le=1e6)]
    gate_ema: Annotated[float, Field(ge=0, le=1)]
    norm_placement: NormPlacement
    exit_gate: bool


_FORM = TypeAdapter(_Form)
FIELDS = tuple(_Form.__annotations__)
"""Every field of a configuration."""


def check_configuration(values: Mapping[str, Any], where: str, faults: list[str]) -> None:
    """Adds every broken rule to ``faults``.

    Args:
        values: fields by name; what is absent has its default, and is not checked.
        where: the file's name in messages.
        faults: is added to.
    """
    good = {name: value for name, value in fitting(_FORM, values, where, faults).items() if value is not None}
    faults += [f"{where}: {fault}" for fault in _contradictions(good)]


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """What fields say against each other; looks only at those that are there."""
    faults = []
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    kv_heads, head_dim = values.get("num_key_value_heads"), values.get("head_dim")
    if heads and kv_heads and heads % kv_heads:
        faults.append(f"num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {kv_heads}")
    if heads and hidden and head_dim is None and hidden % heads:
        faults.append(
            f"hidden_size must be a multiple of num_attention_heads, got {hidden} and {heads}: or give head_dim"
        )
    if head_dim and head_dim % 2:
        faults.append(f"head_dim must be even for rotary embeddings, got {head_dim}")
    positions, chunk = values.get("max_position_embeddings"), values.get("chunk_size")
    if positions and chunk and chunk > positions:
        faults.append(f"chunk_size must be at most max_position_embeddings ({positions}), got {chunk}")
    vocab = values.get("vocab_size")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        faults += outside(name, values.get(name), vocab)
    return faults


def outside(name: str, ids: int | list[int] | None, vocab: int | None) -> list[str]:
    """A fault where one of a field's token ids is not in the vocabulary."""
    given = ids if isinstance(ids, list) else [] if ids is None else [ids]
    wrong = [] if vocab is None else [token for token in given if token >= vocab]
    return [f"{name} must be below vocab_size ({vocab}), got {', '.join(map(str, wrong))}"] if wrong else []
