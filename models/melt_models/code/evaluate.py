"""How well a model knows held-out source code, by loops: perplexity and bits per byte.

    python -m melt_models.code.evaluate models/melt-code --data build/melt-code-training/data/held_out

Every depth reads the rows on its own, in the model's chunks, so that the cache holds states of that depth. Bits per
byte do not depend on the tokenizer. ``--waves`` reads the last tokens of every row as waves instead, lag by lag.
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
from melt_models.training.forward import TrainingCache, forward_chunk, joined
from melt_models.training.wave import forward_wave

WAVE_TOKENS = 64
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


@dataclass(frozen=True)
class WaveMeasure:
    """Of waves of one lag whose drafts all hold, over the last tokens of every row; lag 0 is chunks.

    Attributes:
        loss: cross entropy after the last loop, nats a token.
        agreement: share of tokens whose first choice is that of plain decoding, one token after another.
        held: share of tokens whose first choice after ``lag`` loops is the last loop's: drafts that hold. None for
            chunks, which draft nothing.
    """

    loss: float
    agreement: float
    held: float | None

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


@torch.no_grad()
def measure_waves(
    model: MeltCausalLM, rows: torch.Tensor, loops: int, chunk_size: int, tokens: int = WAVE_TOKENS
) -> dict[int, WaveMeasure]:
    """Reads the last tokens of rows [n, L] as waves of every lag, the rest in chunks.

    Args:
        tokens: of each row that are read so and scored, below L.

    Returns:
        By lag: 0 for chunks, then 1 to ``loops - 1``, which is plain decoding; of a LoopLM and of the gate kind
        ``mean``, which have no waves, 0 and ``loops - 1``.
    """
    targets = rows[:, -tokens:].flatten()
    has_waves = model.config.gate_kind not in ("none", "mean")
    choices: dict[int, list[torch.Tensor]] = {}
    losses: dict[int, float] = {}
    for lag in range(loops) if has_waves else (0, loops - 1):
        by_loop = []
        for part in rows.split(_ROWS_AT_ONCE):
            cache, known, read = TrainingCache(), part[:, : -tokens - 1], part[:, -tokens - 1 : -1]
            _read_chunks(model, known, loops, chunk_size, cache)
            if 0 < lag < loops - 1:
                states = forward_wave(model.model, read, loops, lag, cache).states
            else:
                states = _read_chunks(model, read, loops, 1 if lag else chunk_size, cache)
            by_loop.append(model.lm_head(torch.stack([states[lag - 1], states[-1]])).flatten(1, 2))
        early, last = torch.cat(by_loop, dim=1)
        choices[lag] = [early.argmax(-1), last.argmax(-1)]
        losses[lag] = F.cross_entropy(last, targets).item()
    plain = choices[loops - 1][1]
    return {
        lag: WaveMeasure(
            losses[lag],
            (last == plain).float().mean().item(),
            (early == last).float().mean().item() if lag else None,
        )
        for lag, (early, last) in choices.items()
    }


def _read_chunks(
    model: MeltCausalLM, ids: torch.Tensor, loops: int, chunk_size: int, cache: TrainingCache
) -> list[torch.Tensor]:
    """The states after every loop; none of no tokens."""
    chunks = [chunk for chunk in ids.split(chunk_size, dim=1) if chunk.numel()]
    passes = [forward_chunk(model.model, chunk, loops, cache) for chunk in chunks]
    return joined(passes).states if passes else []


def bytes_of_tokens(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Bytes of each token, [V] int64: byte-level BPE writes each as one character; special tokens have none."""
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([0 if token in special else len(name) for token, name in enumerate(names)])


def read_rows(data: Path, rows: int) -> torch.Tensor:
    """Token ids [rows, L] of token data, evenly spread.

    Raises:
        TrainingError: no token data, or fewer rows.
    """
    try:
        found = load_from_disk(str(data))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{data} is not token data ({error}): write them with melt_models.code.write_data"
        ) from error
    if not 1 <= rows <= len(found):
        raise TrainingError(f"--rows must be in [1, {len(found)}], the rows of {data}, got {rows}")
    return torch.tensor([found[place * len(found) // rows]["input_ids"] for place in range(rows)])


def measure(
    model: MeltCausalLM, tokenizer: PreTrainedTokenizerFast, rows: torch.Tensor, depths: range, chunk_size: int
) -> dict[int, Measure]:
    """Every depth of a model over rows [n, L]."""
    sizes, result = bytes_of_tokens(tokenizer), {}
    with Progress("evaluating", len(depths), "depth") as progress:
        for loops in depths:
            result[loops] = measure_depth(model, rows, sizes, loops, chunk_size)
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
    parser.add_argument(
        "--waves",
        nargs="?",
        type=int,
        const=WAVE_TOKENS,
        metavar="TOKENS",
        help="read so many tokens at the end of every row as waves, lag by lag (default: %(const)s)",
    )
    args = parser.parse_args(argv)
    try:
        for name in ("most_loops", "chunk_size", "waves"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise TrainingError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        model = load_checkpoint(args.checkpoint).float().eval()
        rows, chunk_size = read_rows(args.data, args.rows), args.chunk_size or model.config.chunk_size
        if args.waves is not None:
            print(wave_table(model, rows, args.most_loops, chunk_size, args.waves))
        else:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(args.checkpoint)
            print(depth_table(measure(model, tokenizer, rows, range(1, args.most_loops + 1), chunk_size)))
    except (CheckpointError, TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def depth_table(found: dict[int, Measure]) -> str:
    """In Markdown."""
    lines = ["| loops | perplexity | bits per byte | first choice right |", "|---|---|---|---|"]
    lines += [f"| {n} | {one.perplexity:.2f} | {one.bits_per_byte:.3f} | {one.right:.1%} |" for n, one in found.items()]
    return "\n".join(lines)


def wave_table(model: MeltCausalLM, rows: torch.Tensor, loops: int, chunk_size: int, tokens: int) -> str:
    """In Markdown.

    Raises:
        TrainingError: one loop, or rows that are too short.
    """
    if loops < 2 or rows.shape[1] <= tokens:
        raise TrainingError(
            f"--waves {tokens} must be given at least 2 loops and rows of more tokens, got {loops} and {rows.shape[1]}"
        )
    lines = ["| lag | perplexity | choices as in plain decoding | drafts that hold |", "|---|---|---|---|"]
    for lag, one in measure_waves(model, rows, loops, chunk_size, tokens).items():
        held = "" if one.held is None else f"{one.held:.1%}"
        lines.append(f"| {lag or 'in chunks'} | {one.perplexity:.2f} | {one.agreement:.1%} | {held} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
