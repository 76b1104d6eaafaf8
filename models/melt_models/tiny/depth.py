"""Adaptive depth in torch: tokens leave the loop by the exit gate as a runtime lets them; what melt-tiny does then.

A MELT token's keys and values stay as its last loop left them; of a LoopLM the caches of the loops that a token did not
take get those of its last one (as Ouro does, arXiv 2510.25741).
"""

import random
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from melt_layers import Frame, KeyValue, Layer, run_loops
from melt_models.exits import exit_loops
from melt_models.modeling import KVCache, MeltCausalLM
from melt_models.progress import Progress
from melt_models.tiny.data import ANSWER_TOKENS, Encoder
from melt_models.tiny.task import MAX_HOPS, Problem, make_problem

Prompt = Literal["apart", "whole", "leaving"]
"""How a prompt is read; its last token is the one that gives the answer's first."""
PROMPTS: dict[Prompt, str] = {
    "apart": "in chunks at full depth, the last token by itself, which leaves as generated ones do",
    "leaving": "in chunks, which leave when each token of them would",
    "whole": "in chunks at full depth",
}
_AT_ONCE = 64


@dataclass(frozen=True)
class Measure:
    """What adaptive depth costs and saves; every value is a mean over questions of a number of hops.

    Attributes:
        exact: questions answered exactly, in [0, 1], by hops.
        on_name: loops that gave the name that the answer ends with, by hops.
        on_rest: loops that gave each other token of the answer, by hops.
        on_prompt: loops of a token of the prompt's before its last one, by hops.
    """

    exact: dict[int, float]
    on_name: dict[int, float]
    on_rest: dict[int, float]
    on_prompt: dict[int, float]


def run_chunk(
    model: MeltCausalLM, input_ids: Tensor, loops: int, cache: KVCache, threshold: float | None
) -> tuple[Tensor, Tensor]:
    """Runs one chunk, which leaves when each token of it would; extends ``cache``.

    Args:
        input_ids: [B, C] int64; each sequence leaves on its own.
        loops: most loops.
        threshold: of the exit gate; None: every loop is taken.

    Returns:
        Normed values after each sequence's last loop, [B, C, D], and how many loops it took, [B] int64.
    """
    rows, tokens = input_ids.shape
    frame = Frame.of(model.config, cache.length, tokens, input_ids.device)
    made: dict[int, list[KeyValue]] = defaultdict(list)  # of each layer, the chunk's rows after every loop

    def run_layer(
        layer: Layer, x: Tensor, latent: Tensor | None, loop_idx: int, layer_idx: int
    ) -> tuple[Tensor, Tensor]:
        x, latent, (key, value) = layer(x, latent, cache.past(loop_idx, layer_idx), frame, loop_idx)
        made[layer_idx].append((key[:, :, -tokens:], value[:, :, -tokens:]))
        return x, latent

    backbone = model.model
    states = run_loops(backbone.embed_tokens(input_ids), backbone.layers, backbone.norm, loops, run_layer)
    taken = torch.full((rows,), loops)
    if threshold is not None:
        gate = backbone.early_exit_gate
        assert gate is not None, "asked for by who has one"
        said = torch.cat([gate(state) for state in states], dim=-1)
        taken = exit_loops(said, threshold).amax(dim=1)
    every = torch.arange(rows)
    for layer_idx, pairs in made.items():
        for loop_idx in range(loops if cache.per_loop else 1):
            last = (taken - 1).clamp(max=loop_idx) if cache.per_loop else taken - 1
            left = [torch.stack(side)[last, every] for side in zip(*pairs, strict=True)]
            past = cache.past(loop_idx, layer_idx)
            key, value = left if past is None else map(torch.cat, zip(past, left, strict=True), (2, 2))
            cache.store(loop_idx, layer_idx, (key, value))
    cache.length += tokens
    return torch.stack(states)[taken - 1, every], taken


@torch.no_grad()
def answer(
    model: MeltCausalLM,
    prompts: Tensor,
    tokens: int,
    loops: int,
    chunk_size: int,
    threshold: float | None,
    prompt: Prompt = "apart",
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy answers to ``prompts`` [B, L] of one length.

    Returns:
        Tokens [B, tokens], the loops that gave each, [B, tokens] int64, and the mean loops of the prompt's other
        tokens, [B] float32.
    """
    cache, body = KVCache(model.config), prompts[:, :-1] if prompt == "apart" else prompts
    total = torch.zeros(len(prompts))
    for ids in body.split(chunk_size, dim=1):
        state, taken = run_chunk(model, ids, loops, cache, threshold if prompt == "leaving" else None)
        total += taken * ids.shape[1]
    total -= taken * (prompt != "apart")
    if prompt == "apart":
        state, taken = run_chunk(model, prompts[:, -1:], loops, cache, threshold)
    chosen, depths = [model.lm_head(state[:, -1]).argmax(-1)], [taken]
    while len(chosen) < tokens:
        state, taken = run_chunk(model, chosen[-1][:, None], loops, cache, threshold)
        chosen.append(model.lm_head(state[:, -1]).argmax(-1))
        depths.append(taken)
    return torch.stack(chosen, dim=1), torch.stack(depths, dim=1), total / (prompts.shape[1] - 1)


def measure_depth(
    model: MeltCausalLM,
    encoder: Encoder,
    threshold: float | None,
    prompt: Prompt = "apart",
    problems: int = 256,
    loops: int = 4,
    chunk_size: int | None = None,
    seed: int = 1,
    kind: str = "name",
) -> Measure:
    """Answers held-out questions, one a context, 1 to 4 hops evenly drawn; the same seed asks the same ones.

    Args:
        threshold: of the exit gate; None: always ``loops``.
        chunk_size: of the prompt; default the model's own.
        kind: of answers.
    """
    rng = random.Random(seed)
    groups: dict[tuple[int, int], list[tuple[list[int], list[int], int]]] = defaultdict(list)
    for _ in range(problems):
        ids, wanted, hops = _encode(encoder, make_problem(rng, held_out=True, questions=1, kinds=(kind,)))
        groups[len(ids), len(wanted)].append((ids, wanted, hops))
    sums = torch.zeros(MAX_HOPS + 1, 4)
    asked = torch.zeros(MAX_HOPS + 1)
    with Progress(f"{kind}, threshold {threshold}, prompt {prompt}", problems, "problem") as progress:
        for (_, tokens), group in groups.items():
            for start in range(0, len(group), _AT_ONCE):
                columns = zip(*group[start : start + _AT_ONCE], strict=True)
                prompts, answers, steps = (torch.tensor(column) for column in columns)
                chunk = chunk_size or model.config.chunk_size
                got, taken, read = answer(model, prompts, tokens, loops, chunk, threshold, prompt)
                exact, name = (got == answers).all(dim=1).float(), taken[:, -ANSWER_TOKENS].float()
                rest = (taken.sum(1) - name) / (tokens - 1)
                found = torch.stack((exact, name, rest, read), dim=1)
                sums.index_add_(0, steps, found)
                asked += torch.bincount(steps, minlength=MAX_HOPS + 1)
                progress.advance(len(steps))
    means = (sums / asked[:, None])[1:]
    return Measure(*({hop + 1: value for hop, value in enumerate(column)} for column in means.T.tolist()))


def _encode(encoder: Encoder, problem: Problem) -> tuple[list[int], list[int], int]:
    """A prompt's tokens, those of its answer, and its hops."""
    text = encoder.tokenizer.apply_chat_template(problem.messages(), tokenize=False)
    ids = encoder.tokenizer(text)["input_ids"]
    begin = encoder.answer_begin(ids)
    return ids[:begin], ids[begin:], problem.questions[0].hops


def format_measures(measures: dict[str, Measure]) -> str:
    """A Markdown table, a line for each measure.

    Exact match in percent by hops; loops on the answer's name by hops, on its other tokens, and on the prompt's tokens
    before the last.
    """
    hops = range(1, MAX_HOPS + 1)
    words = [f"{hop} hop{'s' * (hop > 1)}" for hop in hops]
    head = ["threshold", *words, "all", *(f"loops, {word}" for word in words), "other tokens", "prompt"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in measures.items():
        cells = [f"{100 * value:.1f}" for value in (*row.exact.values(), _mean(row.exact))]
        cells += [f"{value:.2f}" for value in (*row.on_name.values(), _mean(row.on_rest), _mean(row.on_prompt))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: dict[int, float]) -> float:
    return sum(values.values()) / len(values)
