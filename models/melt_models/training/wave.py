"""The forward pass of training over tokens that are read as a wave, as the runtime decodes them, with gradients.

A token starts ``lag`` loops behind the one before it, in the same passes: at its loop t it sees the token j places
before it at loop ``t + j * lag``, or finished. So training meets the states of the cache that lie between those of a
chunk, where all are at one loop, and those of finished tokens.
"""

import torch
from torch import Tensor

from melt_layers import Frame
from melt_models.modeling import MeltBackbone
from melt_models.training.forward import ChunkPass, Pieces, TrainingCache, layer_pass


def forward_wave(
    backbone: MeltBackbone,
    input_ids: Tensor,
    loops: int,
    lag: int,
    cache: TrainingCache,
    pieces: Pieces | None = None,
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
    pieces = pieces or Pieces()
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
