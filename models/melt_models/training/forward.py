"""The forward pass of training: one chunk after another, with gradients through the cache.

Beside what the model's own pass computes it can mix keys and values with those of a LoopLM (phase 1), it returns the
attention outputs (phase 2), and it can recompute layers in the backward pass. With ``alpha`` 0 it equals the LoopLM
with the same weights, with ``alpha`` 1 or None MELT, number for number. Rows of the cache are kept chunk by chunk and
joined where they are attended to, so that recomputation holds each row once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from melt_layers import Frame, KeyValue, Layer, run_loops
from melt_models.modeling import MeltBackbone

_SHAPES = 256
"""Of a compiled function at most: chunk sizes, the last chunk's, with gradients and without."""

Rows = list[KeyValue]
"""Rows of one layer, a pair for each chunk, each [B, Hk, C, dh]."""


@dataclass
class TrainingCache:
    """Rows of the earlier chunks.

    Attributes:
        final: of each layer, the rows after the last loop (MELT).
        per_loop: of each loop and layer, the LoopLM's rows; filled for a LoopLM, and while phase 1 mixes.
        length: tokens.
        left: the loop, counted from 1, after which each token of the sequences leaves, [B, L] int64; None: the last.
            Its rows stay as that one left them for the chunks after its own; a LoopLM's caches of later loops get
            copies, as Ouro's do.
    """

    final: dict[int, Rows] = field(default_factory=dict)
    per_loop: dict[tuple[int, int], Rows] = field(default_factory=dict)
    length: int = 0
    left: Tensor | None = None


@dataclass(frozen=True)
class ChunkPass:
    """What one chunk gives.

    Attributes:
        states: the normed value after every loop, T tensors [B, C, D].
        attended: what attention adds to the residual stream, after the norm that closes it, in the order of (loop,
            layer), T * N tensors [B, C, D].
    """

    states: list[Tensor]
    attended: list[Tensor]


def joined(passes: list[ChunkPass]) -> ChunkPass:
    """Consecutive chunks as one."""
    if len(passes) == 1:
        return passes[0]
    states, attended = zip(*((one.states, one.attended) for one in passes), strict=True)
    return ChunkPass(
        [torch.cat(parts, dim=1) for parts in zip(*states, strict=True)],
        [torch.cat(parts, dim=1) for parts in zip(*attended, strict=True)],
    )


def forward_chunk(
    backbone: MeltBackbone,
    input_ids: Tensor,
    loops: int,
    cache: TrainingCache,
    alpha: float | None = None,
    recompute: bool = False,
    pieces: "Pieces | None" = None,
) -> ChunkPass:
    """Runs one chunk through all loops and adds its rows to ``cache``.

    Args:
        backbone: a LoopLM (gate kind ``none``) or MELT.
        input_ids: [B, C] int64.
        alpha: weight of MELT's keys and values against the LoopLM's at every layer and loop (phase 1: interpolated
            transition); None: the model's own alone.
        recompute: keep only each layer's inputs for the backward pass and compute the layer again there.
        pieces: what of a layer needs no earlier rows; default: as they stand here.
    """
    pieces = pieces or Pieces()
    frame = Frame.of(backbone.config, cache.length, input_ids.shape[1], input_ids.device)
    is_looplm = backbone.config.cache_kind == "per_loop"
    attended = []
    left = None if cache.left is None else cache.left[:, cache.length : cache.length + input_ids.shape[1]]
    stayed: dict[int, KeyValue] = {}  # of each layer, the rows so far of tokens that leave at loops of their own

    def run_layer(
        layer: Layer, x: Tensor, latent: Tensor | None, loop_idx: int, layer_idx: int
    ) -> tuple[Tensor, Tensor]:
        own = cache.per_loop.setdefault((loop_idx, layer_idx), [])
        past = own if is_looplm else cache.final.setdefault(layer_idx, [])
        # The lists grow below; a recomputation in the backward pass must see them as they are now.
        x, latent, output, rows, looplm_rows = layer_pass(
            *(layer, x, latent, list(past), list(own), frame, loop_idx, alpha, pieces), recompute=recompute
        )
        attended.append(output)
        if left is not None:
            goes_on = (left > loop_idx)[:, None, :, None]
            before = stayed.get(layer_idx, rows)
            rows = (torch.where(goes_on, rows[0], before[0]), torch.where(goes_on, rows[1], before[1]))
            stayed[layer_idx] = rows
        if is_looplm or loop_idx == loops - 1:
            past.append(rows)
        if looplm_rows is not None and not is_looplm:
            own.append(looplm_rows)
        return x, latent

    states = run_loops(backbone.embed_tokens(input_ids), backbone.layers, backbone.norm, loops, run_layer)
    cache.length += input_ids.shape[1]
    return ChunkPass(states, attended)


def layer_pass(
    layer: Layer,
    x: Tensor,
    latent: Tensor | None,
    past: Rows,
    looplm_past: Rows,
    frame: Frame,
    loop_idx: int,
    alpha: float | None,
    pieces: "Pieces",
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor, KeyValue, KeyValue | None]:
    """One layer: ``x``, the latent state, the attention output, the chunk's rows, and the LoopLM's while mixing.

    Args:
        recompute: keep only what goes in for the backward pass, and compute the layer again there.
    """

    def run(x: Tensor, latent: Tensor | None) -> tuple[Tensor, Tensor, Tensor, KeyValue, KeyValue | None]:
        a, h, rows = pieces.enter(layer, x, latent, frame, loop_idx)
        present, looplm_rows = _join(past, rows), None
        if alpha is not None:
            looplm_rows = layer.self_attn.keys_values(a, frame)
            looplm = _join(looplm_past, looplm_rows)
            present = (
                alpha * present[0] + (1 - alpha) * looplm[0],
                alpha * present[1] + (1 - alpha) * looplm[1],
            )
        after, output = pieces.close(layer, x, layer.self_attn.attend(a, present, frame))
        return after, h, output, rows, looplm_rows

    if recompute and torch.is_grad_enabled():
        return checkpoint(run, x, latent, use_reentrant=False)
    return run(x, latent)


def _enter(
    layer: Layer, x: Tensor, latent: Tensor | None, frame: Frame, loop_idx: int
) -> tuple[Tensor, Tensor, KeyValue]:
    """What comes before attention: the normed input, the latent state, the chunk's rows."""
    a = layer.input_layernorm(x)
    h = layer.gate(a, latent, loop_idx)
    return a, h, layer.self_attn.keys_values(h, frame)


def _close(layer: Layer, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    """What comes after it: the layer's result, and what attention adds to the residual stream."""
    output = layer.input_layernorm_2(attended)
    return layer.after_attention(x + output), output


@dataclass(frozen=True)
class Pieces:
    """The parts of a layer whose shapes depend on the chunk alone, so that a compiled one serves every chunk."""

    enter: Callable[..., tuple[Tensor, Tensor, KeyValue]] = _enter
    close: Callable[..., tuple[Tensor, Tensor]] = _close

    @classmethod
    def compiled(cls) -> "Pieces":
        """Fused by torch's compiler, at their first call."""
        return cls(compiled(_enter), compiled(_close))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that torch's compiler makes anew for every shape that it meets."""
    torch._dynamo.config.recompile_limit = _SHAPES
    return torch.compile(function, dynamic=False)


def _join(past: Rows, new: KeyValue) -> KeyValue:
    if not past:
        return new
    keys, values = zip(*past, new, strict=True)
    return torch.cat(keys, dim=2), torch.cat(values, dim=2)
