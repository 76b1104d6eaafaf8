"""Trains melt-tiny's teacher from a seed: a LoopLM, with the loss at every loop, by a curriculum.

    python -m melt_models.tiny.teacher --out build/melt-tiny-training/teacher

Each stage asks for more: longer contexts, more wordings, one loop and one hop more; from the seventh on for answers in
sentences and step by step as well. The target of loop t is the answer after min(t, hops) steps, at every depth; the
last stages take up to six loops, so that what has been found stays found. Stages 9 and 10 begin again at two hops, with
sentences above all: without them the model found the names at the end of sentences about trains and rooms after one hop
only. Two crutches make the first loop's lookup appear within minutes and are then taken away: questions of 0 hops ("who
is zero levels above Ana?") teach the model to find the start of a question, and the recall loss to know, at the end of
a fact, whom it is about.

Every stage has a random state and optimizers of its own and ends in a checkpoint: stopped and started again, training
goes on after the last finished stage, to the same result. The checkpoint of the last stage is the teacher.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from melt_files import staged
from melt_models.checkpoint import load_checkpoint
from melt_models.configuration import MeltConfig
from melt_models.errors import CheckpointError
from melt_models.fresh import new_looplm
from melt_models.modeling import KVCache, MeltCausalLM
from melt_models.progress import Progress
from melt_models.tiny.data import IGNORED, Batch, Encoder
from melt_models.tiny.evaluate import exact_match, format_table
from melt_models.tiny.task import FACTS, MIXED, NAMES, make_problem
from melt_models.tiny.tokenizer import build_tokenizer
from melt_models.training.errors import TrainingError

RECORD = "stage.json"


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum; it ends when enough answers are right, or after ``most_steps``.

    Attributes:
        loops: fewest and most loops of a step, evenly drawn.
        hops: fewest and most hops of a question.
        facts: fewest and most facts of a context.
        wordings: how many of a domain's wordings are used.
        goal: moving average of right answers, at the last loop and in training, that ends the stage.
        most_steps: steps at most.
        recall: weight of the loss that asks, at the end of each fact, whom the fact is about.
        falling: learning rates fall to zero over ``most_steps``.
        kinds: kinds of answers, evenly drawn.
        questions: of a context.
    """

    loops: tuple[int, int]
    hops: tuple[int, int]
    facts: tuple[int, int]
    wordings: int
    goal: float
    most_steps: int
    recall: float = 0.0
    falling: bool = False
    kinds: tuple[str, ...] = NAMES
    questions: int = 8


NEVER = 2.0
SPOKEN = ("name", *3 * ("sentence",))
"""Kinds of answers to draw from: sentences above all."""
STAGES = (
    Stage((1, 1), (0, 1), (2, 4), 1, 0.62, 600, recall=1.0),
    Stage((1, 1), (1, 1), (2, 4), 1, 0.94, 2500, recall=1.0),
    Stage((1, 1), (0, 1), (3, 8), 2, 0.96, 2000, recall=1.0),
    Stage((1, 1), (0, 1), FACTS, 2, 0.96, 1500, recall=1.0),
    Stage((2, 2), (0, 2), FACTS, 2, 0.95, 1500),
    Stage((3, 3), (0, 3), FACTS, 2, 0.94, 1500),
    Stage((4, 4), (1, 4), FACTS, 2, 0.95, 1500, kinds=MIXED, questions=6),
    Stage((4, 6), (1, 4), FACTS, 2, NEVER, 1200, falling=True, kinds=MIXED, questions=6),
    Stage((2, 2), (1, 2), FACTS, 2, 0.97, 600, kinds=SPOKEN),
    Stage((3, 3), (1, 3), FACTS, 2, 0.97, 600, kinds=SPOKEN),
    Stage((4, 6), (1, 4), FACTS, 2, NEVER, 500, falling=True, kinds=MIXED, questions=6),
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides the stages and the code.

    Attributes:
        matrix_rate: learning rate of Muon for the layers' matrices.
        other_rate: learning rate of AdamW for embeddings and norms.
        warmup: steps at the start of a stage over which the rates rise.
    """

    seed: int = 0
    batch: int = 16
    matrix_rate: float = 0.01
    other_rate: float = 2e-3
    warmup: int = 50
    gradient_clip: float = 1.0


def teacher_config(vocab_size: int, pad_token_id: int, eos_token_id: int) -> MeltConfig:
    """melt-tiny's shape, as a LoopLM."""
    return MeltConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        total_ut_steps=4,
        chunk_size=64,
        gate_kind="none",
        gate_bias_init=-2.0,
    )


def losses_of(model: MeltCausalLM, batch: Batch, loops: int, recall: float) -> tuple[Tensor, float]:
    """Mean loss over the loops at the answers, and the fraction of names right after the last loop.

    With ``recall``, the loss of naming a fact's subject at its end, after the first loop, is added with that weight.
    """
    states = model.model.forward_chunk(batch.input_ids, loops, KVCache(model.config))
    rows, places = (batch.targets[0] != IGNORED).nonzero(as_tuple=True)
    loss = torch.zeros(())
    for loop_idx, state in enumerate(states):
        targets = batch.targets[loop_idx, rows, places]
        logits = model.lm_head(state[rows, places])
        loss = loss + F.cross_entropy(logits, targets) / loops
    if recall:
        ends, at = (batch.subjects != IGNORED).nonzero(as_tuple=True)
        subjects = model.lm_head(states[0][ends, at])
        loss = loss + recall * F.cross_entropy(subjects, batch.subjects[ends, at])
    right = (logits.argmax(-1) == targets)[batch.is_name[rows, places]].float().mean().item()
    return loss, right


Optimizers = list[tuple[torch.optim.Optimizer, float]]
"""Optimizers with their full learning rates."""


class Trainer:
    """One run: the model goes from stage to stage."""

    def __init__(self, recipe: Recipe, out: Path, stages: tuple[Stage, ...] = STAGES):
        self.recipe, self.out, self.stages = recipe, out, stages
        self.tokenizer = build_tokenizer(recipe.seed)
        self.encoder = Encoder(self.tokenizer)
        torch.manual_seed(recipe.seed)
        self.model = new_looplm(teacher_config(len(self.tokenizer), self.encoder.pad_id, self.tokenizer.eos_token_id))

    def run(self) -> None:
        """Every stage that has not been finished yet.

        Raises:
            TrainingError: ``out`` holds stages of another recipe, or something else.
        """
        for index, stage in enumerate(self.stages):
            folder = self.out / f"stage-{index + 1}"
            settings = {"recipe": asdict(self.recipe), "stage": asdict(stage)}
            record = json.loads(json.dumps(settings))  # as it will be read back
            if folder.exists():
                if _read_record(folder) != record:
                    raise TrainingError(f"{folder} was made by another recipe: remove it or choose another --out")
                self.model = load_checkpoint(folder)
                print(f"stage {index + 1} was finished before: {folder}")
                continue
            measured = self.run_stage(index, stage)
            with staged(folder) as new:
                self.model.save_pretrained(new)
                self.tokenizer.save_pretrained(new)
                (new / RECORD).write_text(json.dumps({"settings": record, "measured": measured}, indent=2) + "\n")

    def run_stage(self, index: int, stage: Stage) -> dict[str, float]:
        """Steps until the goal is met; returns steps, tokens and minutes."""
        rng = random.Random(1000 * self.recipe.seed + index)
        optimizers = make_optimizers(self.model.train(), self.recipe)
        average, tokens, started = 0.0, 0, time.perf_counter()
        with Progress(f"stage {index + 1}", stage.most_steps, "step") as progress:
            for step in range(stage.most_steps):
                rate = min(1.0, (step + 1) / self.recipe.warmup)
                if stage.falling:
                    rate = min(rate, 1 - step / stage.most_steps)
                loss, right, count = self.step(stage, rng, optimizers, rate)
                average += (right - average) * 0.02
                tokens += count
                seconds = time.perf_counter() - started
                note = f"loss {loss:.3f}, right {average:.3f}, {tokens / seconds:.0f} tokens/s"
                progress.advance(note=note)
                if average >= stage.goal:
                    break
        table = format_table(exact_match(self.model.eval(), self.encoder, problems=64))
        print(f"stage {index + 1}: {step + 1} steps, {tokens} tokens, {seconds / 60:.1f} minutes\n{table}", flush=True)
        return {"steps": step + 1, "tokens": tokens, "minutes": round(seconds / 60, 1)}

    def step(self, stage: Stage, rng: random.Random, optimizers: Optimizers, rate: float) -> tuple[float, float, int]:
        """One optimizer step; returns loss, fraction of right names, and tokens."""
        problems = [
            make_problem(rng, False, stage.questions, stage.hops, stage.facts, stage.wordings, stage.kinds)
            for _ in range(self.recipe.batch)
        ]
        loops = rng.randint(*stage.loops)
        batch = self.encoder.batch(problems, loops)
        loss, right = losses_of(self.model, batch, loops, stage.recall)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_clip)
        for optimizer, full_rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * full_rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item(), right, batch.input_ids.numel()


def make_optimizers(model: MeltCausalLM, recipe: Recipe) -> Optimizers:
    """Muon for the layers' matrices, AdamW for embeddings and norms."""
    matrices = [module.weight for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    chosen = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        (torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=0.0), recipe.matrix_rate),
        (torch.optim.AdamW(others, lr=recipe.other_rate, weight_decay=0.0, betas=(0.9, 0.98)), recipe.other_rate),
    ]


def _read_record(folder: Path) -> dict[str, Any]:
    """The settings of a finished stage.

    Raises:
        TrainingError: the folder is not one.
    """
    path = folder / RECORD
    try:
        settings = json.loads(path.read_bytes())["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} is no record of a stage ({error!r}): remove {folder}") from error
    return settings


def main(argv: list[str] | None = None) -> int:
    """Trains by the stages; returns the exit status: 0 done, 1 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m melt_models.tiny.teacher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint of every stage")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="default: %(default)s")
    parser.add_argument("--most-steps", type=int, help="steps a stage at most, for a trial run that trains nothing")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        if not 0 <= args.seed < 1 << 63:
            raise TrainingError(f"--seed must be in [0, 2**63), got {args.seed}")
        stages: tuple[Stage, ...] = STAGES
        if args.most_steps is not None:
            if args.most_steps < 1:
                raise TrainingError(f"--most-steps must be at least 1, got {args.most_steps}")
            stages = tuple(replace(stage, most_steps=min(stage.most_steps, args.most_steps)) for stage in STAGES)
        Trainer(Recipe(seed=args.seed), args.out, stages).run()
    except (TrainingError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on after the last finished stage", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
