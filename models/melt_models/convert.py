"""Makes a MELT checkpoint with fresh gates out of a LoopLM checkpoint: where the two-phase training starts.

The LoopLM's weights are copied file by file; only the gates are made, in the type of the other weights. With the gates'
initial bias a converted model starts near ``z = 0``, where a MELT layer is a LoopLM layer.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from melt_files import require_absent, staged
from melt_models.checkpoint import INDEX_NAME, WEIGHTS_NAME, Checkpoint, empty_model
from melt_models.configuration import MeltConfig
from melt_models.configuration_form import GateKind
from melt_models.errors import CheckpointError
from melt_models.modeling import MeltCausalLM

GATES_NAME = "model-gates.safetensors"
_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_RENAMED = {WEIGHTS_NAME: "model-looplm.safetensors"}
"""transformers reads a file of the first name alone, whatever an index beside it names."""
_WEIGHTS = ("*.safetensors", INDEX_NAME, "config.json")


def looplm_to_melt(checkpoint: Checkpoint, out: Path, gate_kind: GateKind = "elementwise", seed: int = 0) -> MeltConfig:
    """Writes a MELT checkpoint.

    Args:
        checkpoint: a LoopLM.
        out: folder to make; it must not exist.
        gate_kind: how the latent state will be updated.
        seed: of the gates' small random weights.

    Returns:
        The configuration of the new checkpoint.

    Raises:
        CheckpointError: the checkpoint is not a LoopLM, or ``out`` exists.
    """
    if checkpoint.config.gate_kind != "none":
        raise CheckpointError(
            f"{checkpoint.folder} is a MELT checkpoint already (gate_kind {checkpoint.config.gate_kind}): "
            "only a LoopLM gets new gates"
        )
    if checkpoint.config.total_ut_steps == 1:
        raise CheckpointError(
            f"{checkpoint.folder} has no loops (total_ut_steps 1): a gate has nothing to update; give a LoopLM"
        )
    require_absent(out, CheckpointError)
    config = as_melt(checkpoint.config, gate_kind=gate_kind)
    with staged(out) as folder:
        config.save_pretrained(folder)
        _copy_texts(checkpoint.folder, folder)
        places = {name: _RENAMED.get(entry.file.name, entry.file.name) for name, entry in checkpoint.tensors.items()}
        for name in sorted({entry.file.name for entry in checkpoint.tensors.values()}):
            shutil.copyfile(checkpoint.folder / name, folder / _RENAMED.get(name, name))
        dtype = next(iter(checkpoint.tensors.values())).dtype
        gates = new_gates(config, getattr(torch, _TYPES[dtype]), seed)
        if gates:
            save_file(gates, folder / GATES_NAME, metadata={"format": "pt"})
        places |= dict.fromkeys(gates, GATES_NAME)
        index = {"metadata": {}, "weight_map": places}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return config


def new_gates(config: MeltConfig, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Initial weights of every gate by name; empty for kinds that have none.

    Raises:
        ValueError: a tensor of the gate that ``_init_weights`` leaves as it was found.
    """
    model = empty_model(config)
    gates: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer_idx, layer in enumerate(model.model.layers):
            gate = layer.gate.to_empty(device="cpu")
            own = {f"model.layers.{layer_idx}.gate.{name}": tensor for name, tensor in gate.state_dict().items()}
            for tensor in own.values():
                tensor.fill_(torch.nan)
            gate.apply(model._init_weights)
            if left := [name for name, tensor in own.items() if tensor.isnan().any()]:
                raise ValueError(f"{', '.join(left)} got no initial value from MeltPreTrainedModel._init_weights")
            gates |= {name: tensor.to(dtype) for name, tensor in own.items()}
            layer.gate.to("meta")
    return gates


def as_melt(config: MeltConfig, **changes: object) -> MeltConfig:
    """A LoopLM's configuration as MELT's, with ``changes``; what names its former class is left out."""
    own = {name: value for name, value in config.to_diff_dict().items() if name not in ("architectures", "model_type")}
    return MeltConfig(**{**own, "architectures": [MeltCausalLM.__name__], **changes})


def _copy_texts(source: Path, target: Path) -> None:
    """Copies everything but weights and configuration: tokenizer, chat template, evaluation, licence, card."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in _WEIGHTS):
            shutil.copyfile(path, target / path.name)
