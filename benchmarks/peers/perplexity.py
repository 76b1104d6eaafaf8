"""Perplexity of a text under llama.cpp's reading of a GGUF file; run with the Python of ``build/peers/venv``.

python benchmarks/peers/perplexity.py MODEL.gguf TEXT.txt
"""

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama

THREADS = 2


def main(gguf: str, text: str) -> None:
    """Prints token ids and perplexity as JSON; every token but the first counts."""
    content = Path(text).read_bytes()
    room = len(content) // 2
    model = Llama(gguf, n_ctx=room, n_batch=512, logits_all=True, n_threads=THREADS, verbose=False)
    ids = model.tokenize(content, add_bos=False, special=False)
    model.eval(ids)
    logits = np.asarray(model.scores[: len(ids) - 1], dtype=np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    chosen = shifted[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(shifted).sum(axis=1))
    print(json.dumps({"ids": ids, "perplexity": float(np.exp(-chosen.mean()))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
