"""Checkpoints as other people publish them, small: Ouro's and Llama's files, with random weights."""

import json
import shutil
from pathlib import Path

import torch
from conftest import MELT_TINY
from safetensors.torch import save_file
from torch import Tensor

OURO = {
    "architectures": ["OuroForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM"},
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "early_exit_threshold": 1.0,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "layer_types": ["full_attention"] * 3,
    "max_position_embeddings": 256,
    "max_window_layers": 3,
    "model_type": "ouro",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "total_ut_steps": 4,
    "transformers_version": "4.55.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 703,
}
"""``config.json`` in the form of Ouro's published ones, their wrong token ids included."""


def ouro_tensors(values: dict, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names of the published files, in bfloat16."""
    draw = torch.Generator().manual_seed(seed)
    d, f, v = values["hidden_size"], values["intermediate_size"], values["vocab_size"]
    q, k = values["num_attention_heads"] * values["head_dim"], values["num_key_value_heads"] * values["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    for n in range(values["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        for name, rows in (("q", q), ("k", k), ("v", k)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, d)
        shapes[f"{layer}self_attn.o_proj.weight"] = (d, q)
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (f, d)
        shapes[f"{layer}mlp.down_proj.weight"] = (d, f)
        for name in ("input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2"):
            shapes[f"{layer}{name}.weight"] = (d,)
    shapes |= {"model.early_exit_gate.weight": (1, d), "model.early_exit_gate.bias": (1,), "lm_head.weight": (v, d)}

    def fill(name: str, shape: tuple[int, ...]) -> Tensor:
        if "norm" in name:
            return torch.rand(shape, generator=draw) + 0.5
        return torch.randn(shape, generator=draw) * (0.5 if "exit" in name else 0.1)

    return {name: fill(name, shape).to(torch.bfloat16) for name, shape in shapes.items()}


def write_ouro(folder: Path, shards: int = 1, tensors: dict[str, Tensor] | None = None, **changes) -> Path:
    """Writes a checkpoint in the form of the published ones; ``changes`` are keys of its ``config.json``."""
    values = {**OURO, **changes}
    tensors = ouro_tensors({**OURO}) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        places = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = names[number::shards]
            save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(MELT_TINY / name, folder / name)
    return folder


def ouro_forward(tensors: dict[str, Tensor], values: dict, ids: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Ouro's equations on plain tensors, without any code of the models: whole sequence, causal, loop after loop.

    Returns:
        Logits [L, V] and exit gate lambda [L] after every loop, float32.
    """
    w = {name: tensor.float() for name, tensor in tensors.items()}
    heads, kv_heads, dh = values["num_attention_heads"], values["num_key_value_heads"], values["head_dim"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + values["rms_norm_eps"]).sqrt() * w[f"{name}.weight"]

    def rotate(x: Tensor) -> Tensor:  # [L, heads, dh]
        frequency = values["rope_theta"] ** -(torch.arange(dh // 2).double() / (dh // 2))
        angle = (torch.arange(len(x)).double()[:, None] * frequency)[:, None]
        turned = torch.view_as_complex(torch.stack((x[..., : dh // 2], x[..., dh // 2 :]), -1).double())
        turned = turned * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), -1).float()

    def attend(a: Tensor, layer: str) -> Tensor:
        q = rotate((a @ w[f"{layer}q_proj.weight"].T).unflatten(-1, (heads, dh)))
        k = rotate((a @ w[f"{layer}k_proj.weight"].T).unflatten(-1, (kv_heads, dh)))
        v = (a @ w[f"{layer}v_proj.weight"].T).unflatten(-1, (kv_heads, dh))
        out = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, group].T / dh**0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            out.append(scores.softmax(-1) @ v[:, group])
        return torch.cat(out, -1) @ w[f"{layer}o_proj.weight"].T

    x = w["model.embed_tokens.weight"][ids]
    logits, exits = [], []
    for _ in range(values["total_ut_steps"]):
        for n in range(values["num_hidden_layers"]):
            at = f"model.layers.{n}."
            attended = attend(norm(x, f"{at}input_layernorm"), f"{at}self_attn.")
            x = x + norm(attended, f"{at}input_layernorm_2")
            m = norm(x, f"{at}post_attention_layernorm")
            gate = m @ w[f"{at}mlp.gate_proj.weight"].T
            fed = (gate * gate.sigmoid() * (m @ w[f"{at}mlp.up_proj.weight"].T)) @ w[f"{at}mlp.down_proj.weight"].T
            x = x + norm(fed, f"{at}post_attention_layernorm_2")
        x = norm(x, "model.norm")
        logits.append(x @ w["lm_head.weight"].T)
        exits.append((x @ w["model.early_exit_gate.weight"].T + w["model.early_exit_gate.bias"]).sigmoid()[:, 0])
    return logits, exits
