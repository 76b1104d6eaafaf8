"""The torch model that a bundle is compared with, in float32, in bounded memory.

A small model is loaded whole; of a large one each part is read when it computes and dropped after, all layers into the
same memory.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from melt_export.stored import Matrix, stored
from melt_export.weights import WeightFile, owners
from melt_models.checkpoint import empty_model
from melt_models.configuration import MeltConfig
from melt_models.modeling import MeltCausalLM

WHOLE_BYTES = 1 << 30
"""Models up to this size in float32 are loaded whole."""


def reference_model(config: MeltConfig, read: Callable[[str], Tensor]) -> MeltCausalLM:
    """A model in float32 whose tensors come from ``read``, by their names in a checkpoint."""
    model = empty_model(config)
    whole = fits_whole(model)
    room: dict[str, Tensor] = {}
    counter = tqdm(desc="torch", unit=" parts read", leave=False, disable=True if whole else None)
    parts: list[tuple[str, nn.Module, dict[str, Tensor] | None]] = [
        *((f"model.layers.{idx}", layer, None if whole else room) for idx, layer in enumerate(model.model.layers)),
        ("model.embed_tokens", model.model.embed_tokens, None),
        ("model.norm", model.model.norm, None),
        ("lm_head", model.lm_head, None),
    ]
    if config.exit_gate:
        parts.append(("model.early_exit_gate", model.model.early_exit_gate, None))
    for name, part, shared in parts:
        if whole:
            _load(part, name, read, shared)
        else:
            _stream(part, name, read, shared, counter)
    return model


def fits_whole(model: nn.Module) -> bool:
    """Whether a model's float32 weights are few enough to be held at once."""
    return 4 * sum(parameter.numel() for parameter in model.parameters()) <= WHOLE_BYTES


def bundle_reader(weights: WeightFile, graphs: Mapping[str, nn.Module]) -> Callable[[str], Tensor]:
    """Reads tensors by their names in the checkpoint, as the modules of a bundle's graphs rounded them, in float32."""
    owner: dict[str, tuple[Any, Matrix, str]] = {}
    biases: dict[str | None, str] = {}
    for graph in graphs.values():
        for place, module in owners(graph):
            matrix = stored(module)
            if matrix is None:
                continue
            owner |= {f"{name}.weight": (module, matrix, name) for name in matrix.names}
            owner[f"{graph.prefix}{place}.weight"] = (module, matrix, matrix.names[0])  # a tied head's own name
            biases[matrix.bias] = f"{matrix.key}.bias"

    def read(name: str) -> Tensor:
        if name in owner:
            module, matrix, layer = owner[name]
            return module.unpack(lambda part: weights.read(f"{matrix.key}.{part}"), matrix.rows(layer))
        return weights.read(biases.get(name, name)).float()

    return read


def _stream(
    module: nn.Module, name: str, read: Callable[[str], Tensor], room: dict[str, Tensor] | None, counter: tqdm
) -> None:
    """Loads a module's tensors whenever it runs, and forgets them after."""

    def load(module: nn.Module, _: object) -> None:
        _load(module, name, read, room)
        counter.update()

    def forget(module: nn.Module, *_: object) -> None:
        module.to("meta")

    module.register_forward_pre_hook(load)
    module.register_forward_hook(forget)


def _load(module: nn.Module, name: str, read: Callable[[str], Tensor], room: dict[str, Tensor] | None) -> None:
    """Fills a module; with ``room``, in memory that it shares with the modules like it, one after another."""
    tensors = {}
    for key in module.state_dict():
        tensor = read(f"{name}.{key}")
        if room is None:
            tensors[key] = tensor.float()
        else:
            tensors[key] = room.setdefault(key, torch.empty(tensor.shape)).copy_(tensor)
    module.load_state_dict(tensors, assign=True)
