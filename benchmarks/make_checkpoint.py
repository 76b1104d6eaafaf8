"""Writes a checkpoint of a published shape with random weights, tensor by tensor, to try exports at full size.

python benchmarks/make_checkpoint.py melt-1.6b build/melt-1.6b
python export.py build/melt-1.6b --out build/melt-1.6b-int4 --precision int4
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from melt_export.source import random_source, tensor_shapes
from melt_models.shapes import SHAPES, shape_config

SHARD_TENSORS = 64


def main() -> int:
    """Writes bfloat16 shards, their index, configuration and a tokenizer of numbered words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help=f"one of {', '.join(SHAPES)}; NAME:4 takes 4 layers")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = shape_config(args.shape)
    source = random_source(config, args.seed)
    args.out.mkdir(parents=True)
    config.save_pretrained(args.out)
    (args.out / "tokenizer.json").write_text(source.tokenizer, encoding="utf-8")
    names = [name for name in tensor_shapes(config) if name != "lm_head.weight" or not config.tie_word_embeddings]
    places = {}
    for start in tqdm(range(0, len(names), SHARD_TENSORS), unit="shard", disable=None):
        shard = f"model-{start // SHARD_TENSORS + 1:05d}.safetensors"
        tensors = {name: source.read(name).to(torch.bfloat16) for name in names[start : start + SHARD_TENSORS]}
        save_file(tensors, args.out / shard, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, shard)
    index = {"metadata": {}, "weight_map": places}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
