"""How large the columns of the rows get that each matrix reads: what the copy for prompts is smoothed by."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from melt_export.stored import ColumnLinear


@contextmanager
def observed_peaks(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While the block runs a model: largest magnitudes of the columns of what its linear layers read.

    Yields:
        Peaks [K] float32 by module name, of every run and loop together.
    """
    peaks: dict[str, Tensor] = {}

    def observe(name: str) -> torch.utils.hooks.RemovableHandle:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found = inputs[0].detach().float().abs().flatten(0, -2).amax(0)
            peaks[name] = torch.maximum(peaks.get(name, found), found)

        return model.get_submodule(name).register_forward_pre_hook(look)

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    hooks = [observe(name) for name in linears]
    try:
        yield peaks
    finally:
        for hook in hooks:
            hook.remove()


def give_peaks(graph: nn.Module, peaks: Mapping[str, Tensor]) -> None:
    """Tells the matrices of a graph that shall be smoothed, before they are packed."""
    for module in graph.modules():
        if isinstance(module, ColumnLinear) and module.smoothing is not None:
            module.peaks = peaks[module.matrix.names[0]]
