"""The loop over loops and layers. Every model runs this one, and training too; caches are the callers' own affair.

Letters: B batch, C chunk, D hidden size, T loops.
"""

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor, nn

from melt_layers.layers import Layer


class RunLayer(Protocol):
    """Runs one layer at one loop, over what the caller keeps of earlier chunks, and keeps what the caller needs."""

    def __call__(
        self, layer: Layer, x: Tensor, latent: Tensor | None, loop_idx: int, layer_idx: int
    ) -> tuple[Tensor, Tensor]:
        """The new ``x`` and the layer's new latent state, both [B, C, D]."""


def run_loops(
    hidden: Tensor, layers: Iterable[Layer], norm: nn.Module, loops: int, run_layer: RunLayer
) -> list[Tensor]:
    """Runs one chunk through all loops in parallel.

    Args:
        hidden: embeddings, [B, C, D].
        layers: of the stack, the same at every loop.
        norm: closes every loop.
        loops: depth T.

    Returns:
        The normed value after every loop, T tensors [B, C, D].
    """
    latents: dict[int, Tensor] = {}  # of each layer, ``h`` of the loop before
    states = []
    for loop_idx in range(loops):
        for layer_idx, layer in enumerate(layers):
            hidden, latents[layer_idx] = run_layer(layer, hidden, latents.get(layer_idx), loop_idx, layer_idx)
        hidden = norm(hidden)
        states.append(hidden)
    return states
