"""``config.json`` of MELT and of other families, read as arguments of ``MeltConfig``.

A family keeps its tensors' names, which are ours too; only the configuration is translated. What would change the
numbers and is not implemented is refused, unknown keys too; what is corrected or passed over is said.
"""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter, with_config
from transformers import LlamaConfig
from typing_extensions import TypedDict

from melt_models.configuration_form import FIELDS
from melt_models.forms import STRICT, fitting, shown
from melt_models.keys import SILENT, check_keys

Values = Mapping[str, Any]
Reader = Callable[[Values, str, list[str]], tuple[dict[str, Any], list[str]]]
"""Takes the content of ``config.json``, its name in messages and a list to which faults are added; gives arguments of
``MeltConfig``, which are not yet checked, and what was corrected or passed over, a sentence each."""

_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "rms_norm_eps"),
)
"""Keys that mean the same here in every family; without a default of the family's they must be there."""
_OPTIONAL = (
    *("num_key_value_heads", "head_dim", "hidden_act", "initializer_range", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
_WRITTEN = frozenset(
    {
        *("architectures", "attn_implementation", "auto_map", "dtype", "experts_implementation", "model_type"),
        *("name_or_path", "num_labels", "output_attentions", "torch_dtype", "transformers_version", "use_cache"),
    }
)
"""Keys that transformers writes into every file; none of them changes a number here."""


@with_config(STRICT)
class _Checked(TypedDict, total=False):
    rope_theta: float | None
    rope_scaling: dict[str, Any] | None
    rope_parameters: dict[str, Any] | None
    layer_types: list[str] | None
    sliding_window: int | None
    use_sliding_window: bool | None
    quantization_config: dict[str, Any] | None


_CHECKED = TypeAdapter(_Checked)

_ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
_ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
"""Keys that ``rope_scaling`` and ``rope_parameters`` may have."""

PUBLISHED_OURO_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
"""What Ouro's files say: all three are ``<|endoftext|>``."""
CORRECT_OURO_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
"""What Ouro was trained with: ``<|im_start|>``, ``<|im_end|>``, ``<|endoftext|>``."""


def read_melt(values: Values, where: str, faults: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Our own files: every key must be known."""
    unknown = sorted({*values} - {*FIELDS, *_WRITTEN, "rope_theta", "rope_scaling"})
    if unknown := [name for name in unknown if name not in SILENT or not name.startswith("_")]:
        faults.append(f"{where}: unknown configuration keys {shown(unknown)}: remove them or correct their spelling")
    rope = _rope(fitting(_CHECKED, values, where, faults), where, faults)
    ours = {name: values[name] for name in FIELDS if name in values}
    return ours | {"rope_parameters": rope}, []


def read_ouro(values: Values, where: str, faults: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Ouro (arXiv 2510.25741): a LoopLM, a KV cache for each loop."""
    own = ("total_ut_steps", "early_exit_threshold")
    ours, notes = _common(values, where, faults, own=own, needed=(*_SAME, "total_ut_steps", "rope_theta"))
    ours |= {name: values[name] for name in own if values.get(name) is not None}
    ours |= {"norm_placement": "sandwich", "exit_gate": True}
    if {name: values.get(name) for name in PUBLISHED_OURO_IDS} == PUBLISHED_OURO_IDS:
        ours |= CORRECT_OURO_IDS
        notes.append(
            "the special token ids of Ouro's published files, all 0 (<|endoftext|>), are corrected: "
            "bos 1 (<|im_start|>), eos 2 (<|im_end|>), pad 0"
        )
    return ours, notes


def read_llama(values: Values, where: str, faults: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Llama and what is built like it: no loops, norms before attention and MLP only.

    An absent key has the default of transformers; a null where transformers takes none is a fault here too.
    """
    ours, notes = _common(values, where, faults, own=(), needed=())
    ours = {name: getattr(LlamaConfig, name) for name in (*_SAME, *_OPTIONAL)} | ours
    ours |= {name: None for name in (*_SAME, *_OPTIONAL) if name in values and values[name] is None}
    ours["rope_parameters"] = {"rope_theta": LlamaConfig.default_theta} | ours["rope_parameters"]
    if values.get("auto_map"):
        notes.append(f"auto_map names code of its own, {shown(values['auto_map'])}: it is not run, the model is Llama")
    return ours | {"total_ut_steps": 1, "norm_placement": "pre", "exit_gate": False}, notes


FAMILIES: dict[str, Reader] = {"ouro": read_ouro, "llama": read_llama}
"""Readers of other people's files by ``model_type``."""
READERS: dict[str, Reader] = {"melt": read_melt, **FAMILIES}
"""Readers of all ``KNOWN_TYPES``."""


def _common(
    values: Values, where: str, faults: list[str], own: tuple[str, ...], needed: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    checked = fitting(_CHECKED, values, where, faults)
    before = len(faults)
    rope = _rope(checked, where, faults)
    # What was wrongly said of positions is one fault; that it is not said at all would be a second, false one.
    is_said = "rope_theta" in rope or len(faults) > before or not _ROPE_KEYS.isdisjoint({*values} - {*checked})
    there = {*(name for name, value in values.items() if value is not None), *(("rope_theta",) if is_said else ())}
    faults += [f"{where}: {name} is missing" for name in needed if name not in there]
    _windows(checked, where, faults)
    if quantized := checked.get("quantization_config"):
        method = shown(quantized.get("quant_method"))
        faults.append(f"{where}: the weights are quantized ({method}): give the unquantized checkpoint")
    loops = values.get("total_ut_steps", 1) if "total_ut_steps" in own else 1
    notes = check_keys(values, {*_SAME, *_OPTIONAL, *_Checked.__annotations__, *own}, where, faults, loops)
    ours = {name: values[name] for name in (*_SAME, *_OPTIONAL) if values.get(name) is not None}
    if ours.get("pad_token_id") == -1:
        del ours["pad_token_id"]
        notes.append("pad_token_id -1 is read as none")
    return ours | {"gate_kind": "none", "rope_parameters": rope}, notes


def _rope(checked: Values, where: str, faults: list[str]) -> dict[str, Any]:
    """Rotary parameters: ``rope_theta`` and ``rope_scaling`` of older files, ``rope_parameters`` of newer ones.

    A file may have all three; none of them counts more than another, so what one says the others must not contradict.
    """
    thetas = [] if checked.get("rope_theta") is None else [checked["rope_theta"]]
    refused: list[Any] = []
    for name in ("rope_scaling", "rope_parameters"):
        stated = {key: value for key, value in (checked.get(name) or {}).items() if value is not None}
        kinds = [stated[key] for key in ("rope_type", "type") if stated.get(key, "default") != "default"]
        if kinds:  # whatever stands beside it belongs to that kind
            if kinds[0] not in refused:
                faults.append(
                    f"{where}: {name} must be none or 'default', got {shown(kinds[0])}: this kind is not implemented"
                )
            refused.append(kinds[0])
            continue
        if stated.get("partial_rotary_factor", 1.0) != 1.0:
            got = shown(stated["partial_rotary_factor"])
            faults.append(f"{where}: {name}.partial_rotary_factor must be 1, got {got}: not implemented")
        faults += [
            f"{where}: {name} must have no {shown(key)}, got {shown(stated[key])}: the kind 'default' has "
            f"{', '.join(_ROPE)}, and is the same for every layer"
            for key in sorted(stated.keys() - {*_ROPE})
        ]
        thetas += [stated["rope_theta"]] if "rope_theta" in stated else []
    if any(theta != thetas[0] for theta in thetas):
        faults.append(f"{where}: rope_theta must be the same wherever it stands, got {', '.join(map(shown, thetas))}")
    return {"rope_type": "default"} | ({"rope_theta": thetas[0]} if thetas else {})


def _windows(checked: Values, where: str, faults: list[str]) -> None:
    """Layers that see only the latest tokens."""
    kinds = sorted({kind for kind in checked.get("layer_types") or () if kind != "full_attention"})
    if kinds:
        others = ", ".join(map(shown, kinds))
        faults.append(f"{where}: layer_types must all be 'full_attention', got {others} too: not implemented")
    if checked.get("sliding_window") is not None and checked.get("use_sliding_window") is not False:
        faults.append(f"{where}: sliding_window must be none, got {checked['sliding_window']}: not implemented")
