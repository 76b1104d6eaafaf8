"""What rounding costs: a bundle beside the float32 checkpoint, over a text and over the model's own evaluation.

Looping compounds rounding error, so the error of the hidden state is given after every loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from melt_export.probe import Passage, Probe
from melt_models.evaluation import Example
from melt_models.modeling import KVCache, MeltCausalLM
from melt_runtime import MeltModel
from melt_runtime.loop import LoopRunner
from melt_runtime.state import Array

_ANSWER_ROOM = 8  # tokens beyond the expected answer: enough to be wrong


@dataclass(frozen=True)
class Trace:
    """What a probe gave.

    Attributes:
        hidden: after every loop, T arrays [tokens, D] float32.
        logits: before each token that counts, [scored, V] float32.
    """

    hidden: list[Array]
    logits: torch.Tensor


@torch.no_grad()
def trace_reference(model: MeltCausalLM, probe: Probe) -> Trace:
    """Runs a probe through torch, with the chunk and the depth that the model was trained with."""
    config = model.config
    hidden, logits = [], []
    for passage in probe.passages:
        cache = KVCache(config)
        states, _ = model.model(torch.tensor([passage.ids]), config.total_ut_steps, config.chunk_size, cache)
        hidden.append([state[0].numpy() for state in states])
        logits.append(model.lm_head(states[-1][0, passage.start - 1 : -1]))
    return Trace([np.concatenate(loop) for loop in zip(*hidden, strict=True)], torch.cat(logits))


def trace_bundle(runner: LoopRunner, probe: Probe, loops: int) -> Trace:
    """Runs a probe through a bundle, in chunks of the state's size."""
    state, width = runner.state, runner.state.plan.shape.hidden_size
    hidden: list[list[Array]] = [[] for _ in range(loops)]
    logits = []
    for passage in probe.passages:
        state.reset()
        pieces: list[list[Array]] = [[] for _ in range(loops)]

        def keep(loop_idx: int, passage: Passage = passage, pieces: list[list[Array]] = pieces) -> None:
            tokens = min(state.plan.chunk, len(passage.ids) - int(state.lengths[0]))
            pieces[loop_idx].append(state.hidden.read().reshape(-1)[: tokens * width].reshape(tokens, width))

        runner.prefill(passage.ids, loops, observe=keep)
        for whole, piece in zip(hidden, pieces, strict=True):
            whole.append(np.concatenate(piece))
        (scored,) = runner.sessions.head.run(None, {"hidden": hidden[-1][-1][None, passage.start - 1 : -1]})
        logits.append(torch.from_numpy(scored[0]))
    return Trace([np.concatenate(loop).astype(np.float32) for loop in hidden], torch.cat(logits))


def compare(reference: Trace, actual: Trace, probe: Probe) -> dict[str, Any]:
    """Figures of one run beside the reference.

    Returns:
        ``perplexity`` of the tokens that count; ``kl`` to the reference, mean over them, in nats; ``greedy_agreement``,
        the fraction of them with the same first choice; ``hidden_error_by_loop``, the norm of the difference over the
        norm of the reference, over all tokens.
    """
    wanted, given = F.log_softmax(reference.logits, dim=-1), F.log_softmax(actual.logits, dim=-1)
    pairs = zip(reference.hidden, actual.hidden, strict=True)
    errors = [float(np.linalg.norm(a - r) / np.linalg.norm(r)) for r, a in pairs]
    return {
        "perplexity": perplexity(actual, probe),
        "kl": max(0.0, float((wanted.exp() * (wanted - given)).sum(-1).mean())),
        "greedy_agreement": float((wanted.argmax(-1) == given.argmax(-1)).float().mean()),
        "hidden_error_by_loop": {str(number): error for number, error in enumerate(errors, start=1)},
    }


def perplexity(trace: Trace, probe: Probe) -> float:
    """Perplexity of the tokens that count."""
    targets = [token for passage in probe.passages for token in passage.ids[passage.start :]]
    return float(F.cross_entropy(trace.logits.float(), torch.tensor(targets)).exp())


def exact_match(model: MeltModel, examples: Sequence[Example], loops: int) -> dict[str, dict[str, float]]:
    """Fraction of examples answered exactly, greedily: ``{loops: {group: fraction}}`` for depths 1 to ``loops``."""
    groups = sorted({example.group for example in examples})
    table = {}
    for depth in range(1, loops + 1):
        right = dict.fromkeys(groups, 0)
        for example in examples:
            room = len(model.codec.encode(example.answer)) + _ANSWER_ROOM
            result = model.generate(example.chat, loops=depth, max_new_tokens=room, temperature=0.0)
            right[example.group] += result.text.strip() == example.answer
        asked = {group: sum(example.group == group for example in examples) for group in groups}
        table[str(depth)] = {group: right[group] / asked[group] for group in groups}
    return table
