"""Runs in optimum's own environment: FOLDER and prompts as JSON in; greedy tokens, one by one and as a batch, out."""

import json
import os
import sys

import torch

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the next import
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

folder, prompts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = ORTModelForCausalLM.from_pretrained(folder)


def greedy(rows: list[list[int]]) -> list[list[int]]:
    """New tokens after each row; shorter rows are padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "eos_token_id": None}
    return model.generate(ids, attention_mask=mask, do_sample=False, **length)[:, longest:].tolist()


error = ""
try:
    model.generate(torch.tensor([prompts[0]]), loops=2)
except ValueError as problem:
    error = str(problem)
print(
    json.dumps(
        {
            "alone": [greedy([prompt])[0] for prompt in prompts],
            "batch": greedy(prompts),
            "text": AutoTokenizer.from_pretrained(folder).decode(prompts[0]),
            "loops": model.config.melt["loops"],
            "error": error,
            "ours": sorted(name for name in sys.modules if "melt" in name),
        }
    )
)
