"""Remakes ``tests/goldens/melt-tiny.json`` from torch: ``python tests/make_goldens.py``. Never run by the tests.

Run it only when the shipped model changes, and say why in the commit.
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

from melt_models import load_checkpoint

ROOT = Path(__file__).parent.parent
OUT = Path(__file__).parent / "goldens" / "melt-tiny.json"
NEW_TOKENS = 200
QUESTION = (
    "Ana reports to Ben. Cleo reports to Ana. Ben works for Dan. Eva reports to Cleo. Dan reports to Finn. "
    "Gina works for Hugo. Hugo reports to Ana. Iris reports to Gina. Who is three levels above Cleo?"
)


def main() -> None:
    """Logits of the last prompt token and greedy tokens, at every trained depth."""
    folder = ROOT / "models" / "melt-tiny"
    model, tokenizer = load_checkpoint(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=True
    )["input_ids"]
    ids = torch.tensor([prompt])
    depths = {}
    for loops in range(1, model.config.total_ut_steps + 1):
        with torch.no_grad():
            logits = model(ids, loops=loops).logits[0, -1]
        tokens = model.generate_greedy(ids, NEW_TOKENS, loops=loops)[0]
        depths[str(loops)] = {"logits": [round(value, 6) for value in logits.tolist()], "tokens": tokens.tolist()}
    golden = {
        "made_by": f"python tests/make_goldens.py, torch {torch.__version__}, transformers {transformers.__version__}",
        "question": QUESTION,
        "prompt": prompt,
        "chunk": model.config.chunk_size,
        "loops": depths,
    }
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
