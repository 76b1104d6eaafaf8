"""Makes a checkpoint out of a GGUF file of llama.cpp, its weights unpacked to float32: ``python -m melt_models.gguf``.

transformers reads the file; the checkpoint is then like any other. Needs the packages ``gguf`` and ``accelerate``
(``pip install 'melt-onnx[gguf]'``) and memory for the whole model in float32.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from melt_files import require_absent, staged
from melt_models.checkpoint import WEIGHTS_NAME
from melt_models.errors import CheckpointError
from melt_models.families import FAMILIES
from melt_models.forms import shown
from melt_models.gguf_splitting import set_splitting, splitting_faults

_HEAD_SIZES = ("attention.key_length", "attention.value_length")
_IDLE = frozenset({"rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout"})
"""Keys that change no number, alone or because what they belong to is refused."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    **dict.fromkeys(("rope.scaling.factor", "rope.scale_linear"), (0, 1)),
    **dict.fromkeys(("rope.scaling.attn_factor", "logit_scale", "embedding_scale", "residual_scale"), (1,)),
    **dict.fromkeys(("expert_count", "expert_used_count", "attention.sliding_window", "pooling_type"), (0,)),
    "attention.causal": (True,),
}
"""Keys with the values that say what is computed anyway."""
_LAYER = ("attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_TOKENIZER = "tokenizer.ggml."


def gguf_to_checkpoint(file: Path, out: Path) -> None:
    """Writes configuration, weights, tokenizer and chat template of a GGUF file as a checkpoint folder.

    Args:
        file: a GGUF file of a family that is known here.
        out: folder to make; it must not exist.

    Raises:
        CheckpointError: no such file, not GGUF, another family, keys or tensors that may change what is computed and
            are not read, tensors that are missing, a splitting of text that is unknown, packages that are missing, or
            ``out`` exists.
    """
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(f"reading GGUF needs {' and '.join(missing)}: pip install 'melt-onnx[gguf]'")
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist: give a .gguf file")
    require_absent(out, CheckpointError)
    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(**place)
    except Exception as error:  # the reader has no error type of its own
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if config.model_type not in FAMILIES:
        raise CheckpointError(f"{file}: model_type must be one of {', '.join(FAMILIES)}, got {config.model_type!r}")
    faults, keys = _examine(file, config)
    if faults:
        raise CheckpointError(f"{file} cannot be unpacked:", faults)
    try:
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except Exception as error:  # a file that ends early, or a tokenizer that has no counterpart
        raise CheckpointError(f"{file} cannot be unpacked: {error}; fetch it again") from error
    set_splitting(tokenizer, keys.get("pre"))
    tied = config.tie_word_embeddings
    tensors = {
        name: t.contiguous() for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")
    }
    values = {name: value for name, value in config.to_diff_dict().items() if name != "quantization_config"}
    with staged(out) as folder:
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        tokenizer.save_pretrained(folder)


def _examine(file: Path, config: PreTrainedConfig) -> tuple[list[str], dict[str, Any]]:
    """What transformers passes over without a word, though it changes what is computed.

    Args:
        file: a GGUF file that transformers can read.
        config: its configuration as transformers reads it.

    Returns:
        What the file says or holds beyond the model, or lacks of it, a sentence each; and the keys of its tokenizer.
    """
    from gguf import GGUFReader  # an extra of its own

    reader, architecture, faults = GGUFReader(file), config.model_type, []
    tokenizer = {}
    for key, field in reader.fields.items():
        if key.startswith(_TOKENIZER) and len(field.data) == 1:  # no list
            tokenizer[key.removeprefix(_TOKENIZER)] = field.contents()
        name = key.removeprefix(f"{architecture}.")
        if name == key or GGUF_CONFIG_MAPPING[architecture].get(name) is not None or name in _IDLE:
            continue
        value = field.contents()
        neutral = (config.head_dim,) if name in _HEAD_SIZES else _NEUTRAL.get(name, ())
        if not any(value == each for each in neutral):
            faults.append(f"{key} must be {_rule(neutral)}, got {shown(value)}: it may change what the model computes")
    layers = (f"blk.{layer}.{name}" for layer in range(config.num_hidden_layers) for name in _LAYER)
    expected = dict.fromkeys(f"{name}.weight" for name in ("token_embd", "output_norm", *layers))
    known = {*expected, "output.weight"}
    found = {tensor.name: list(map(int, reversed(tensor.shape))) for tensor in reader.tensors}
    faults += [
        f"tensor {name} {shape} is none of the model's: rotary scaling, biases, experts and more layers than "
        f"{architecture}.block_count are not implemented"
        for name, shape in found.items()
        if name not in known
    ]
    # transformers would fill them with random numbers.
    faults += [
        f"tensor {name} is missing: fetch the file again, all its parts in one"
        for name in expected
        if name not in found
    ]
    return faults + splitting_faults(tokenizer), tokenizer


def _rule(neutral: Sequence[Any]) -> str:
    return " or ".join(map(shown, neutral)) or "absent"


def main(argv: list[str] | None = None) -> int:
    """Unpacks one file; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m melt_models.gguf", description=__doc__)
    parser.add_argument("file", type=Path, help="a .gguf file")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to make; it must not exist")
    args = parser.parse_args(argv)
    try:
        gguf_to_checkpoint(args.file, args.out)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: a checkpoint in float32")
    return 0


if __name__ == "__main__":
    sys.exit(main())
