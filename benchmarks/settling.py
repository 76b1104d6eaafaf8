"""How near the rounds of training's waves come to the wave itself, on text.

    python benchmarks/settling.py models/melt-code --data build/melt-code-training/data/held_out

A round reads all tokens at once and finds their neighbours as the round before left them; the first one is a chunk.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from melt_models import load_checkpoint
from melt_models.code.evaluate import read_rows
from melt_models.errors import CheckpointError
from melt_models.training import TrainingError
from melt_models.training.forward import TrainingCache
from melt_models.training.wave import forward_wave, settle_wave

MOST = 8


@torch.no_grad()
def main() -> int:
    """Prints a table: a row for each number of rounds, and the exact wave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="token data")
    parser.add_argument("--rows", type=int, default=16, help="of the data, evenly spread (default: %(default)s)")
    parser.add_argument("--lag", type=int, default=3, help="default: %(default)s, of four loops plain decoding")
    args = parser.parse_args()
    try:
        model, rows = load_checkpoint(args.checkpoint).float().eval(), read_rows(args.data, args.rows)
    except (CheckpointError, TrainingError) as error:
        raise SystemExit(f"error: {error}") from error
    loops = model.config.total_ut_steps
    if model.config.gate_kind in ("none", "mean") or not 1 <= args.lag <= loops:
        raise SystemExit(f"error: {args.checkpoint} must be MELT of another gate kind than mean, --lag in [1, {loops}]")
    ids, targets = rows[:, :-1], rows[:, 1:].flatten()
    exact = forward_wave(model.model, ids, loops, args.lag, TrainingCache()).states[-1]
    settled = [
        settle_wave(model.model, ids, loops, args.lag, TrainingCache(), rounds=rounds).states[-1]
        for rounds in range(MOST + 1)
    ]
    choices = model.lm_head(exact).argmax(-1)
    print("| rounds | perplexity | first choices as of the wave | distance of the last state |\n|---|---|---|---|")
    for name, state in [*enumerate(settled), ("the wave itself", exact)]:
        logits = model.lm_head(state)
        perplexity = math.exp(F.cross_entropy(logits.flatten(0, 1), targets).item())
        equal = (logits.argmax(-1) == choices).float().mean().item()
        distance = ((state - exact).norm() / exact.norm()).item()
        print(f"| {name} | {perplexity:.2f} | {equal:.1%} | {distance:.1%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
