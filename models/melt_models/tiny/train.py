"""Trains melt-tiny from a seed, chunk by chunk, with a curriculum over loops.

    python -m melt_models.tiny.train --out models/melt-tiny

Each stage allows one loop and one hop more. The target of loop t is the answer after min(t, hops) steps, so every
depth learns to answer. Depth and chunk size vary from step to step: the cache then holds final states of any depth.
"""

import argparse
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from melt_models.configuration import MeltConfig
from melt_models.modeling import KVCache, MeltCausalLM
from melt_models.tiny.data import IGNORED, Batch, Encoder
from melt_models.tiny.evaluate import exact_match, format_table
from melt_models.tiny.tokenizer import build_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides the code.

    Attributes:
        stage_steps: steps of stage 1, 2, ... ; stage k runs up to k loops on up to k hops.
        chunks: chunk sizes drawn from, tokens; the largest holds a whole context.
        decay: fraction of all steps over which the learning rate falls to zero at the end.
    """

    seed: int = 0
    stage_steps: tuple[int, ...] = (1000, 700, 700, 3600)
    batch: int = 64
    questions: int = 8
    chunks: tuple[int, ...] = (16, 64, 256)
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 100
    decay: float = 0.4
    gradient_clip: float = 1.0

    @property
    def steps(self) -> int:
        """Steps in all."""
        return sum(self.stage_steps)

    def rate(self, step: int) -> float:
        """Learning rate at ``step``: warm-up, constant, linear decay."""
        left = (self.steps - step) / (self.decay * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, left)

    def stage(self, step: int) -> int:
        """Loops and hops allowed at ``step``."""
        for number, length in enumerate(self.stage_steps, start=1):
            if step < length:
                return number
            step -= length
        return len(self.stage_steps)


def tiny_config(vocab_size: int, pad_token_id: int, eos_token_id: int) -> MeltConfig:
    """melt-tiny's shape."""
    return MeltConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=4096,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        total_ut_steps=4,
        chunk_size=64,
        gate_bias_init=-2.0,
    )


def loss_per_loop(model: MeltCausalLM, batch: Batch, loops: int, chunk_size: int) -> Tensor:
    """Cross entropy at the answers after each loop, [loops]."""
    states, _ = model.model(batch.input_ids, loops, chunk_size, KVCache(model.config))
    rows, places = (batch.targets[0] != IGNORED).nonzero(as_tuple=True)
    return torch.stack(
        [
            F.cross_entropy(model.lm_head(state[rows, places]), batch.targets[loop_idx, rows, places])
            for loop_idx, state in enumerate(states)
        ]
    )


def train(recipe: Recipe, out: Path) -> MeltCausalLM:
    """Trains, saving to ``out`` after every stage and at the end."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = build_tokenizer(recipe.seed)
    encoder = Encoder(tokenizer)
    model = MeltCausalLM(tiny_config(len(tokenizer), encoder.pad_id, tokenizer.eos_token_id))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    tokens, started = 0, time.perf_counter()
    progress = tqdm(range(recipe.steps), unit="step", mininterval=10)
    for step in progress:
        stage = recipe.stage(step)
        # Half of the steps at full depth, the others at a shallower one.
        loops = stage if rng.random() < 0.5 else rng.randint(1, stage)
        batch = encoder.batch(training_problems(rng, recipe.batch, recipe.questions, stage), loops)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        losses = loss_per_loop(model, batch, loops, rng.choice(recipe.chunks))
        optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimizer.step()
        tokens += batch.input_ids.numel()
        if step % 10 == 0:
            rate = tokens / (time.perf_counter() - started)
            progress.set_postfix_str(f"stage {stage} loss {losses.mean():.3f} {rate:.0f} tokens/s")
        if (step + 1) % 500 == 0 or step + 1 == recipe.steps:
            model.eval()
            table = exact_match(model, encoder, problems=64)
            tqdm.write(f"step {step + 1}, stage {stage}\n{format_table(table)}")
            model.train().save_pretrained(out)
            tokenizer.save_pretrained(out)
    return model


def main(argv: list[str] | None = None) -> int:
    """Trains with the default recipe."""
    parser = argparse.ArgumentParser(prog="python -m melt_models.tiny.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="default: %(default)s")
    args = parser.parse_args(argv)
    train(Recipe(seed=args.seed), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
