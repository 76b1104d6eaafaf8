"""How well a model knows held-out source code, by loops: perplexity and bits per byte.

    python -m melt_models.code.evaluate models/melt-code --data build/melt-code-training/data/held_out

Every depth reads the rows on its own, in the model's chunks, so that the cache holds states of that depth. Bits per
byte do not depend on the tokenizer.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import load_from_disk
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from melt_models.checkpoint import load_checkpoint
from melt_models.errors import CheckpointError
from melt_models.modeling import KVCache, MeltCausalLM
from melt_models.progress import Progress
from melt_models.training.errors import TrainingError

_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Measure:
    """Of one depth, over all tokens that have one before them in their row.

    Attributes:
        loss: cross entropy, nats a token.
        bits_per_byte: of the text; special tokens have no bytes.
        right: share of tokens that are the model's first choice.
    """

    loss: float
    bits_per_byte: float
    right: float

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.loss)


@torch.no_grad()
def measure_depth(
    model: MeltCausalLM, rows: torch.Tensor, token_bytes: torch.Tensor, loops: int, chunk_size: int
) -> Measure:
    """Reads rows at one depth.

    Args:
        rows: token ids [n, L].
        token_bytes: bytes of each token of the vocabulary, [V] int64.
        loops: depth T.
        chunk_size: tokens in parallel.
    """
    loss, right = 0.0, 0
    for part in rows.split(_ROWS_AT_ONCE):
        states, _ = model.model(part, loops, chunk_size, KVCache(model.config))
        logits, wanted = model.lm_head(states[-1][:, :-1]).flatten(0, 1), part[:, 1:].flatten()
        loss += F.cross_entropy(logits, wanted, reduction="sum").item()
        right += int((logits.argmax(-1) == wanted).sum())
    scored = rows[:, 1:]
    return Measure(loss / scored.numel(), loss / math.log(2) / int(token_bytes[scored].sum()), right / scored.numel())


def bytes_of_tokens(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Bytes of each token, [V] int64: byte-level BPE writes each as one character; special tokens have none."""
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([0 if token in special else len(name) for token, name in enumerate(names)])


def measure(folder: Path, data: Path, rows: int, depths: range, chunk_size: int | None = None) -> dict[int, Measure]:
    """Every depth of a checkpoint.

    Args:
        folder: the checkpoint, with its tokenizer.
        data: token data, as ``melt_models.code.write_data`` makes it.
        rows: how many of it, evenly spread.
        depths: numbers of loops.
        chunk_size: tokens in parallel; default: the model's own.

    Raises:
        CheckpointError: of the checkpoint.
        TrainingError: the data have fewer rows.
    """
    model = load_checkpoint(folder).float().eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    try:
        found = load_from_disk(str(data))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{data} is not token data ({error}): write them with melt_models.code.write_data"
        ) from error
    if not 1 <= rows <= len(found):
        raise TrainingError(f"--rows must be in [1, {len(found)}], the rows of {data}, got {rows}")
    chosen = torch.tensor([found[place * len(found) // rows]["input_ids"] for place in range(rows)])
    sizes, result = bytes_of_tokens(tokenizer), {}
    with Progress("evaluating", len(depths), "depth") as progress:
        for loops in depths:
            result[loops] = measure_depth(model, chosen, sizes, loops, chunk_size or model.config.chunk_size)
            progress.advance()
    return result


def main(argv: list[str] | None = None) -> int:
    """Prints a table; returns the exit status: 0 done, 1 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m melt_models.code.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="token data")
    parser.add_argument("--rows", type=int, default=200, help="of the data, evenly spread (default: %(default)s)")
    parser.add_argument("--most-loops", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--chunk-size", type=int, help="tokens in parallel (default: the model's own)")
    args = parser.parse_args(argv)
    try:
        for name in ("most_loops", "chunk_size"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise TrainingError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        depths = range(1, args.most_loops + 1)
        found = measure(args.checkpoint, args.data, args.rows, depths, args.chunk_size)
    except (CheckpointError, TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("| loops | perplexity | bits per byte | first choice right |\n|---|---|---|---|")
    for loops, one in found.items():
        print(f"| {loops} | {one.perplexity:.2f} | {one.bits_per_byte:.3f} | {one.right:.1%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
