"""The forward passes over tokens that are read as a wave, as the runtime decodes them, for training and measuring.

A token starts ``lag`` loops behind the one before it, in the same passes: at its loop t it sees the token j places
before it at loop ``t + j * lag``, or finished. So training meets the states of the cache that lie between those of a
chunk, where all are at one loop, and those of finished tokens.

``forward_wave`` takes the passes of the definition, about one for every token. ``settle_wave`` runs all tokens at once,
several times over: each round finds neighbours as the round before left them. A round makes at least one token more
exact, so that the wave is its fixed point; on text each takes about a third of the distance to it away.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from melt_layers import Frame, KeyValue, Layer, run_loops
from melt_models.modeling import MeltBackbone
from melt_models.training.forward import ChunkPass, Pieces, TrainingCache, layer_pass


def forward_wave(
    backbone: MeltBackbone,
    input_ids: Tensor,
    loops: int,
    lag: int,
    cache: TrainingCache,
) -> ChunkPass:
    """Runs tokens through all loops as one wave whose drafts all hold, and adds their rows to ``cache``.

    Args:
        backbone: MELT, of any gate kind but ``mean``, whose gate is told one loop for all rows.
        input_ids: [B, W] int64.
        loops: depth T.
        lag: loops of a token after which the next one starts, from 1 to ``loops``, where it is plain decoding.

    Returns:
        The same as for a chunk of these tokens. Nothing is computed again in the backward pass.
    """
    assert backbone.config.gate_kind not in ("none", "mean"), backbone.config.gate_kind
    pieces = Pieces()
    entering, count, layers = backbone.embed_tokens(input_ids), input_ids.shape[1], backbone.layers
    states: list[list[Tensor]] = [[] for _ in range(loops)]
    attended: list[list[Tensor]] = [[] for _ in range(loops * len(layers))]
    x = entering[:, :0]  # of the tokens under way, the first one deepest
    latents = [x] * len(layers)
    reached: list[int] = []  # loops that they have taken
    started = 0
    while started < count or reached:
        if started < count and (not reached or reached[-1] >= lag):
            new = entering[:, started : started + 1]
            x = torch.cat((x, new), dim=1)
            latents = [torch.cat((latent, torch.zeros_like(new)), dim=1) for latent in latents]
            reached.append(0)
            started += 1
        frame = Frame.of(backbone.config, cache.length, len(reached), input_ids.device)
        ends = reached[0] == loops - 1
        for layer_idx, layer in enumerate(layers):
            past = cache.final.setdefault(layer_idx, [])
            x, latents[layer_idx], output, rows, _ = layer_pass(
                layer, x, latents[layer_idx], past, [], frame, 0, None, pieces
            )
            for place, loop_idx in enumerate(reached):
                attended[loop_idx * len(layers) + layer_idx].append(output[:, place : place + 1])
            if ends:
                past.append((rows[0][:, :, :1], rows[1][:, :, :1]))
        x = backbone.norm(x)
        for place, loop_idx in enumerate(reached):
            states[loop_idx].append(x[:, place : place + 1])
        reached = [loop_idx + 1 for loop_idx in reached]
        if ends:
            x, latents, reached = x[:, 1:], [latent[:, 1:] for latent in latents], reached[1:]
            cache.length += 1
    return ChunkPass([torch.cat(parts, dim=1) for parts in states], [torch.cat(parts, dim=1) for parts in attended])


ROUNDS = 3
"""After the first, which reads one chunk. Over 511 tokens melt-code's perplexity is then within 2 % of the wave's."""
_LEARNING_ROUNDS = 2
"""The last ones, with gradients: of the loss, and through the rows that it read."""


def settle_wave(
    backbone: MeltBackbone,
    input_ids: Tensor,
    loops: int,
    lag: int,
    cache: TrainingCache,
    recompute: bool = False,
    pieces: Pieces | None = None,
    rounds: int = ROUNDS,
) -> ChunkPass:
    """What ``forward_wave`` gives, nearly, with gradients, in ``rounds + 1`` passes over all tokens at once.

    Args:
        backbone, input_ids, loops, lag: as of ``forward_wave``.
        recompute, pieces: as of ``forward_chunk``.
        rounds: after the first, which reads one chunk; W - 1 of them give the exact wave.

    Returns:
        The last round's.
    """
    assert backbone.config.gate_kind not in ("none", "mean"), backbone.config.gate_kind
    assert cache.left is None, "tokens of a wave leave after its last loop"
    pieces = pieces or Pieces()
    rows: dict[tuple[int, int], KeyValue] = {}
    as_chunk, as_wave = (_frames(backbone, input_ids, loops, at, cache.length) for at in (0, lag))
    for turn in range(rounds + 1):
        learns = turn > rounds - _LEARNING_ROUNDS
        with nullcontext() if learns else torch.no_grad():
            got, rows = _settle_once(
                *(backbone, input_ids, cache, as_wave if turn else as_chunk, rows, recompute, pieces)
            )
        if not learns:
            torch.clear_autocast_cache()  # in older torch, casts made without gradients would serve the later rounds
    for layer_idx in range(len(backbone.layers)):
        cache.final.setdefault(layer_idx, []).append(rows[loops - 1, layer_idx])
    cache.length += input_ids.shape[1]
    return got


def _frames(
    backbone: MeltBackbone, input_ids: Tensor, loops: int, lag: int, known: int
) -> list[tuple[list[int], Frame]]:
    """Of each loop, at which later loops its tokens find neighbours, and the frame over those rows, then their own."""
    device, count = input_ids.device, input_ids.shape[1]
    distance = torch.arange(count, device=device)[:, None] - torch.arange(count, device=device)
    positions = torch.arange(known, known + count, device=device)
    frames = []
    for loop_idx in range(loops):
        reached = (loop_idx + distance * lag).clamp(max=loops - 1)
        found = {at: (distance >= 0) & (reached == at) for at in range(loop_idx, loops)}
        ahead = [at for at in range(loop_idx + 1, loops) if found[at].any()]
        past = torch.ones(count, known, dtype=torch.bool, device=device)
        seen = torch.cat((past, *(found[at] for at in ahead), found[loop_idx]), dim=1)
        frames.append((ahead, Frame.at(backbone.config, positions, seen)))
    return frames


def _settle_once(
    backbone: MeltBackbone,
    input_ids: Tensor,
    cache: TrainingCache,
    frames: list[tuple[list[int], Frame]],
    before: dict[tuple[int, int], KeyValue],
    recompute: bool,
    pieces: Pieces,
) -> tuple[ChunkPass, dict[tuple[int, int], KeyValue]]:
    """One round: what it gives, and its rows by loop and layer, out of those of the round before."""
    attended: list[Tensor] = []
    rows: dict[tuple[int, int], KeyValue] = {}

    def run_layer(
        layer: Layer, x: Tensor, latent: Tensor | None, loop_idx: int, layer_idx: int
    ) -> tuple[Tensor, Tensor]:
        ahead, frame = frames[loop_idx]
        past = [*cache.final.get(layer_idx, []), *(before[at, layer_idx] for at in ahead)]
        x, latent, output, rows[loop_idx, layer_idx], _ = layer_pass(
            layer, x, latent, past, [], frame, loop_idx, None, pieces, recompute
        )
        attended.append(output)
        return x, latent

    states = run_loops(backbone.embed_tokens(input_ids), backbone.layers, backbone.norm, len(frames), run_layer)
    return ChunkPass(states, attended), rows
