"""Writes a checkpoint of a published shape with random weights, tensor by tensor, to try exports at full size.

    python benchmarks/make_checkpoint.py melt-1.6b build/melt-1.6b
    python export.py build/melt-1.6b --out build/melt-1.6b-int4 --precision int4

Ouro's shapes are written as its published files are: bfloat16 shards, ``model_type: ouro``, all special token ids 0.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from melt_export.source import random_source, tensor_shapes
from melt_models.configuration import MeltConfig
from melt_models.families import PUBLISHED_OURO_IDS
from melt_models.shapes import SHAPES, shape_config

SHARD_TENSORS = 64


def main() -> int:
    """Writes bfloat16 shards, their index, configuration and a tokenizer of numbered words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help=f"one of {', '.join(SHAPES)}; NAME:4 takes 4 layers")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_checkpoint(shape_config(args.shape), args.out, args.seed, as_ouro=args.shape.startswith("ouro"))
    return 0


def write_checkpoint(config: MeltConfig, out: Path, seed: int = 0, as_ouro: bool = False) -> None:
    """Makes the folder ``out``; ``as_ouro`` writes ``config.json`` in the form of Ouro's published ones."""
    source = random_source(config, seed)
    out.mkdir(parents=True)
    if as_ouro:
        text = json.dumps(published_ouro_config(config), indent=2)
        (out / "config.json").write_text(text + "\n", encoding="utf-8")
    else:
        config.save_pretrained(out)
    (out / "tokenizer.json").write_text(source.tokenizer, encoding="utf-8")
    names = [name for name in tensor_shapes(config) if name != "lm_head.weight" or not config.tie_word_embeddings]
    places = {}
    for start in tqdm(range(0, len(names), SHARD_TENSORS), unit="shard", disable=None):
        shard = f"model-{start // SHARD_TENSORS + 1:05d}.safetensors"
        tensors = {name: source.read(name).to(torch.bfloat16) for name in names[start : start + SHARD_TENSORS]}
        save_file(tensors, out / shard, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, shard)
    index = {"metadata": {}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def published_ouro_config(config: MeltConfig) -> dict[str, Any]:
    """``config.json`` of a LoopLM in the form of Ouro's published ones."""
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
        *("tie_word_embeddings", "total_ut_steps", "early_exit_threshold", "initializer_range"),
    )
    layers = {"layer_types": ["full_attention"] * config.num_hidden_layers, "use_sliding_window": False}
    fixed = {"model_type": "ouro", "architectures": ["OuroForCausalLM"], "rope_scaling": None, "sliding_window": None}
    return {**fixed, **PUBLISHED_OURO_IDS, **layers, **{name: getattr(config, name) for name in same}}


if __name__ == "__main__":
    sys.exit(main())
