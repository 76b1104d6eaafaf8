"""The losses of all phases, chunk by chunk, so that only whole sequences in one chunk or wave have all their logits."""

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from melt_models.modeling import MeltCausalLM
from melt_models.training.exit_gate import continue_targets, expected_loops, gate_loss, joint_terms
from melt_models.training.forward import ChunkPass, Pieces, TrainingCache, compiled, forward_chunk, joined
from melt_models.training.recipe import Exit, Joint, Phase
from melt_models.training.wave import settle_wave

IGNORED = -100
_TOKENS_AT_ONCE = 512
"""Of a batch, whose logits are compared together; a larger chunk's are by themselves."""


@dataclass(frozen=True)
class TokenBatch:
    """Sequences padded on the right.

    Attributes:
        input_ids: [B, L] int64.
        targets: the token that should follow each position, ``IGNORED`` where none counts, [B, L] int64.
        real: which positions are not padding, [B, L] bool.
    """

    input_ids: Tensor
    targets: Tensor
    real: Tensor

    def to(self, device: torch.device) -> "TokenBatch":
        """The batch on another device."""
        return TokenBatch(self.input_ids.to(device), self.targets.to(device), self.real.to(device))


@dataclass(frozen=True)
class Step:
    """What a step's loss is made of.

    Attributes:
        phase: whose terms are weighed.
        loops: depth.
        chunk_size: tokens in parallel; 0: whole sequences.
        alpha: MELT's share of keys and values; None outside phase 1.
        leaving: seed of where supervised tokens leave the loop; None: none does before the last.
        lag: of the wave as which the sequences are read, after their share ``in_chunks``; None: all are read in chunks.
        in_chunks: share of the sequences before the wave.
    """

    phase: Phase | Joint | Exit
    loops: int
    chunk_size: int
    alpha: float | None
    leaving: int | None = None
    lag: int | None = None
    in_chunks: float = 0.0


class Objective(nn.Module):
    """Student and frozen teacher, and the loss that both give; phases that train the exit gate need no teacher.

    The teacher runs over the whole sequence at once: a LoopLM's numbers do not depend on chunks.
    """

    def __init__(
        self,
        student: MeltCausalLM,
        teacher: MeltCausalLM | None,
        every_loop: bool = False,
        recompute: bool = False,
        compiles: bool = False,
    ):
        super().__init__()
        self._pieces = Pieces.compiled() if compiles else Pieces()
        self._cross_entropy = compiled(_cross_entropy) if compiles else _cross_entropy
        self._divergence = compiled(_divergence) if compiles else _divergence
        self.student = student
        self.every_loop, self.recompute = every_loop, recompute
        # In a list: no part of this module's parameters.
        self._teacher = [] if teacher is None else [teacher.requires_grad_(False)]

    @property
    def teacher(self) -> MeltCausalLM:
        """The frozen LoopLM."""
        return self._teacher[0]

    def forward(self, batch: TokenBatch, step: Step) -> dict[str, Tensor]:
        """The loss of one batch.

        Returns:
            Scalars: ``loss`` and its unweighted terms with a weight: ``cross_entropy``, ``distillation`` (nats),
            ``attention``; of the joint phase ``expected_cross_entropy`` and ``entropy`` (nats), of the exit gate's own
            ``exit``, its binary cross entropy (nats), and of both ``expected_loops``, the mean over tokens of how many
            the gate's probabilities make them take.
        """
        phase = step.phase
        terms = self._phase(batch, step, phase) if isinstance(phase, Phase) else self._gated(batch, step, phase)
        return {"loss": sum(weight * terms[name] for name, weight in phase.weights.items() if weight), **terms}

    def _phase(self, batch: TokenBatch, step: Step, phase: Phase) -> dict[str, Tensor]:
        """The means of every term of phases 1 and 2."""
        length = batch.input_ids.shape[1]
        chunk_size = step.chunk_size or length
        wanted = self._teach(batch, step.loops) if phase.needs_teacher else None
        sums: dict[str, Tensor] = {}
        cache = _new_cache(batch, step)
        known = length if step.lag is None else int(length * step.in_chunks)
        ends = sorted({*range(chunk_size, known, chunk_size), known, length} - {0})
        held: list[ChunkPass] = []  # small chunks share the terms' products, which read the head's weights
        begin = 0
        for start, end in pairwise([0, *ends]):
            backbone, ids = self.student.model, batch.input_ids[:, start:end]
            if start == known:
                held.append(settle_wave(backbone, ids, step.loops, step.lag, cache, self.recompute, self._pieces))
            else:
                args = (step.loops, cache, step.alpha, self.recompute, self._pieces)
                held.append(forward_chunk(backbone, ids, *args))
            if end < known and len(ids) * (end + chunk_size - begin) <= _TOKENS_AT_ONCE:
                continue
            for name, value in self._terms(joined(held), wanted, batch, slice(begin, end), phase).items():
                sums[name] = sums[name] + value if name in sums else value
            held, begin = [], end
        tokens, counted = batch.real.sum(), (batch.targets != IGNORED).sum().clamp(min=1)
        loops = step.loops if self.every_loop else 1
        outputs = step.loops * len(self.student.model.layers)
        counts = {"cross_entropy": counted, "distillation": counted * loops, "attention": tokens * outputs}
        return {name: value / counts[name] for name, value in sums.items()}

    def _gated(self, batch: TokenBatch, step: Step, phase: Joint | Exit) -> dict[str, Tensor]:
        """The means over supervised tokens of what the exit gate makes of their losses; ``exit`` over loops, too."""
        gate, cache = self.student.model.early_exit_gate, _new_cache(batch, step)
        assert gate is not None, "a model without one was refused"
        size = step.chunk_size or batch.input_ids.shape[1]
        parts: list[dict[str, Tensor]] = []
        for ids, targets in zip(batch.input_ids.split(size, dim=1), batch.targets.split(size, dim=1), strict=True):
            counted = targets != IGNORED
            with nullcontext() if phase.trains_model else torch.no_grad():
                got = forward_chunk(
                    self.student.model, ids, step.loops, cache, recompute=self.recompute, pieces=self._pieces
                )
                states = [state[counted] for state in got.states]
                entropies = torch.stack(
                    [self._run(self._cross_entropy, self.student, state, targets[counted], "none") for state in states]
                )
            said = torch.stack([gate(state)[:, 0].float() for state in states])
            if isinstance(phase, Joint):
                terms = joint_terms(entropies, said)
            else:
                wanted = continue_targets(entropies, phase.margin, phase.sharpness)
                terms = {"exit": gate_loss(said[:-1], wanted) / (step.loops - 1)}
            parts.append({**terms, "expected_loops": expected_loops(said)})
        tokens = (batch.targets != IGNORED).sum().clamp(min=1)
        return {name: torch.stack([terms[name] for terms in parts]).sum() / tokens for name in parts[0]}

    @torch.no_grad()
    def _teach(self, batch: TokenBatch, loops: int) -> ChunkPass:
        return forward_chunk(self.teacher.model, batch.input_ids, loops, TrainingCache(), pieces=self._pieces)

    def _terms(
        self, got: ChunkPass, wanted: ChunkPass | None, batch: TokenBatch, part: slice, phase: Phase
    ) -> dict[str, Tensor]:
        """Sums over one chunk of every term with a weight."""
        targets = batch.targets[:, part]
        counted = targets != IGNORED
        terms = {}
        if phase.cross_entropy:
            terms["cross_entropy"] = self._run(
                self._cross_entropy, self.student, got.states[-1][counted], targets[counted]
            )
        if wanted is not None and phase.distillation:
            pairs = list(zip(got.states, wanted.states, strict=True))
            divergences = [
                self._run(self._divergence, self.student, self.teacher, state[counted], goal[:, part][counted])
                for state, goal in (pairs if self.every_loop else pairs[-1:])
            ]
            terms["distillation"] = torch.stack(divergences).sum()
        if wanted is not None and phase.attention:
            real = batch.real[:, part, None]
            distances = [
                ((output.float() - goal[:, part].float()).square() * real).sum()
                for output, goal in zip(got.attended, wanted.attended, strict=True)
            ]
            terms["attention"] = torch.stack(distances).sum()
        return terms

    def _run(self, function, *arguments) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)


def _new_cache(batch: TokenBatch, step: Step) -> TrainingCache:
    if step.leaving is None:
        return TrainingCache()
    return TrainingCache(left=draw_leaving(batch.targets != IGNORED, step.loops, step.leaving))


def draw_leaving(supervised: Tensor, loops: int, seed: int) -> Tensor:
    """The loops after which tokens leave, from 1, [B, L] int64.

    A supervised token leaves after each loop with a probability that is drawn for its sequence, evenly from 0 to 1, so
    that nearly all of a sequence's leave at once, or nearly none. The others take every loop, as a prompt does.

    Args:
        supervised: [B, L] bool.
        loops: the most.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, length = supervised.shape
    chance = torch.rand(batch, 1, 1, generator=generator)
    stays = torch.rand(batch, length, loops - 1, generator=generator) >= chance
    left = 1 + stays.long().cumprod(dim=-1).sum(dim=-1).to(supervised.device)
    return torch.where(supervised, left, loops)


def _cross_entropy(student: MeltCausalLM, states: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    return F.cross_entropy(student.lm_head(states).float(), targets, reduction=reduction)


def _divergence(student: MeltCausalLM, teacher: MeltCausalLM, states: Tensor, goals: Tensor) -> Tensor:
    """KL(teacher || student), summed over tokens."""
    wanted = F.log_softmax(teacher.lm_head(goals).float(), dim=-1)
    got = F.log_softmax(student.lm_head(states).float(), dim=-1)
    return F.kl_div(got, wanted, reduction="sum", log_target=True)
