"""Runs in optimum's own environment: a folder of models, prompts of each as JSON; greedy tokens, one by one and as a
batch, out."""

import json
import os
import sys
from pathlib import Path

import torch

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the next import
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

folder, prompts, new_tokens = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])


def greedy(model: ORTModelForCausalLM, rows: list[list[int]]) -> list[list[int]]:
    """New tokens after each row; shorter rows are padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "eos_token_id": None}
    return model.generate(ids, attention_mask=mask, do_sample=False, **length)[:, longest:].tolist()


def generated(name: str, rows: list[list[int]]) -> dict[str, object]:
    model = ORTModelForCausalLM.from_pretrained(folder / name)
    error = ""
    try:
        model.generate(torch.tensor([rows[0]]), loops=2)
    except ValueError as problem:
        error = str(problem)
    return {
        "alone": [greedy(model, [row])[0] for row in rows],
        "batch": greedy(model, rows),
        "text": AutoTokenizer.from_pretrained(folder / name).decode(rows[0]),
        "loops": model.config.melt["loops"],
        "error": error,
    }


made = {name: generated(name, rows) for name, rows in prompts.items()}
print(json.dumps({**made, "ours": sorted(name for name in sys.modules if "melt" in name)}))
