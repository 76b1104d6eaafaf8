"""What rounding costs: a bundle beside the float32 checkpoint, over a text and over the model's own evaluation.

Unlike parity this runs the graphs as they ship, activations rounded too: the bundle's own loop for all tokens, then the
one for prompts for all tokens; answers run each where it belongs. Whether loops add up the error of rounding or
wash it out differs from model to model, so the error of the hidden state is given after every loop.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from melt_export.limits import loss_limit
from melt_export.probe import Probe
from melt_export.progress import bar
from melt_export.record import open_runner
from melt_export.waves import measure_waves
from melt_models.evaluation import Example
from melt_models.modeling import KVCache, MeltCausalLM
from melt_runtime import Manifest, MeltModel
from melt_runtime.bundle.contract import KVCacheKind
from melt_runtime.bundle.measured import CacheQuality, PromptQuality, Quality, WaveQuality
from melt_runtime.execute.executor import Executor
from melt_runtime.loading.load_cache import LoadCache
from melt_runtime.memory.plan import Array
from melt_runtime.runner import LoopRunner

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
    for passage in bar(probe.passages, "passage", "torch"):
        cache = KVCache(config)
        states, _ = model.model(torch.tensor([passage.ids]), config.total_ut_steps, config.chunk_size, cache)
        hidden.append([state[0].numpy() for state in states])
        logits.append(model.lm_head(states[-1][0, passage.start - 1 : -1]))
    return Trace([np.concatenate(loop) for loop in zip(*hidden, strict=True)], torch.cat(logits))


def trace_bundle(runner: LoopRunner, probe: Probe, loops: int) -> Trace:
    """Runs a probe through a bundle, in chunks of the state's size."""
    hidden: list[list[Array]] = [[] for _ in range(loops)]
    logits = []
    for passage in bar(probe.passages, "passage", "ONNX Runtime"):
        runner.reset()
        pieces: list[list[Array]] = [[] for _ in range(loops)]

        def keep(loop_idx: int, pieces: list[list[Array]] = pieces) -> None:
            pieces[loop_idx].append(runner.flight.hidden)

        runner.prefill(passage.ids, loops, observe=keep)
        for whole, piece in zip(hidden, pieces, strict=True):
            whole.append(np.concatenate(piece))
        (scored,) = runner.sessions.head.run(None, {"hidden": hidden[-1][-1][None, passage.start - 1 : -1]})
        logits.append(torch.from_numpy(scored[0]))
    return Trace([np.concatenate(loop).astype(np.float32) for loop in hidden], torch.cat(logits))


def compare(reference: Trace, actual: Trace, probe: Probe) -> CacheQuality:
    """Figures of one run beside the reference, without exact answers and limit."""
    wanted, given = F.log_softmax(reference.logits, dim=-1), F.log_softmax(actual.logits, dim=-1)
    pairs = zip(reference.hidden, actual.hidden, strict=True)
    errors = [float(np.linalg.norm(a - r) / np.linalg.norm(r)) for r, a in pairs]
    return CacheQuality(
        perplexity=perplexity(actual, probe),
        kl=max(0.0, float((wanted.exp() * (wanted - given)).sum(-1).mean())),
        greedy_agreement=float((wanted.argmax(-1) == given.argmax(-1)).float().mean()),
        hidden_error_by_loop={str(number): error for number, error in enumerate(errors, start=1)},
        exact_match={},
        limit=None,
    )


def compare_prompts(folder: Path, manifest: Manifest, reference: Trace, probe: Probe) -> PromptQuality:
    """The loop for passes of several rows, over a float KV cache, beside float32 and beside the bundle's own."""
    longest, loops = max(len(passage.ids) for passage in probe.passages), manifest.model.trained_loops
    own, copy = (
        trace_bundle(open_runner(folder, manifest, longest, prompts=prompts), probe, loops) for prompts in (False, True)
    )
    limit = loss_limit(manifest.precision, "float") if probe.says_loss else None
    loss = compare(reference, copy, probe)
    beside = compare(own, copy, probe)
    return PromptQuality(replace(loss, limit=limit), beside.kl, beside.greedy_agreement, beside.hidden_error_by_loop)


def perplexity(trace: Trace, probe: Probe) -> float:
    """Perplexity of the tokens that count."""
    targets = [token for passage in probe.passages for token in passage.ids[passage.start :]]
    return float(F.cross_entropy(trace.logits.float(), torch.tensor(targets)).exp())


def exact_match(model: MeltModel, examples: Sequence[Example], loops: int) -> dict[str, dict[str, float]]:
    """Fraction of examples answered exactly, greedily: ``{loops: {group: fraction}}`` for depths 1 to ``loops``."""
    groups = sorted({example.group for example in examples})
    asked = {group: sum(example.group == group for example in examples) for group in groups}
    right = {depth: dict.fromkeys(groups, 0) for depth in range(1, loops + 1)}
    for example in bar(examples, "example", "answers"):
        room = len(model.codec.encode(example.answer)) + _ANSWER_ROOM
        for depth, found in right.items():
            result = model.generate(example.chat, loops=depth, max_new_tokens=room, temperature=0.0)
            found[example.group] += result.text.strip() == example.answer
    return {str(depth): {group: found[group] / asked[group] for group in groups} for depth, found in right.items()}


def measure_quality(
    folder: Path, manifest: Manifest, examples: Sequence[Example], reference: Trace, probe: Probe
) -> Quality:
    """Runs a probe, and the model's own evaluation where it has one, over every kind of KV cache of a bundle.

    Waves only over a float one.
    """
    loops = manifest.model.trained_loops
    longest = max(len(passage.ids) for passage in probe.passages)
    by_cache: dict[KVCacheKind, CacheQuality] = {}
    waves: dict[str, WaveQuality] = {}
    for kind in manifest.kv_caches:
        runner = open_runner(folder, manifest, longest, kind)
        found = compare(reference, trace_bundle(runner, probe, loops), probe)
        if kind == "float":
            waves = measure_waves(Executor(runner.sessions, runner.state), probe, loops)
        limit = loss_limit(manifest.precision, kind) if probe.says_loss else None
        answers = {}
        if examples:
            model = MeltModel.load(folder, device="cpu", kv_cache=kind, cache=LoadCache(min_bytes=sys.maxsize))
            answers = exact_match(model, examples, loops)
        by_cache[kind] = replace(found, exact_match=answers, limit=limit)
    return Quality(
        text=probe.name,
        tokens=probe.scored,
        loops=loops,
        chunk=manifest.model.trained_chunk,
        examples=len(examples),
        perplexity_of_float32=perplexity(reference, probe),
        kv_cache=by_cache,
        waves=waves,
    )
