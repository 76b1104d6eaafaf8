"""The torch model that a bundle is compared with, in float32, in bounded memory.

A small model is loaded whole; of a large one each part is read when it computes and dropped after, so that at most one
layer is in memory.
"""

from collections.abc import Callable

from torch import Tensor, nn

from melt_export.formats import WeightFormat
from melt_export.stored import unpack
from melt_export.weights import WeightFile
from melt_models.checkpoint import empty_model
from melt_models.configuration import MeltConfig
from melt_models.modeling import MeltCausalLM

WHOLE_BYTES = 1 << 30
"""Models up to this size in float32 are loaded whole."""


def reference_model(config: MeltConfig, read: Callable[[str], Tensor]) -> MeltCausalLM:
    """A model in float32 whose tensors come from ``read``, by their names in a checkpoint."""
    model = empty_model(config)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    parts = [("model.embed_tokens", model.model.embed_tokens), ("model.norm", model.model.norm)]
    parts += [(f"model.layers.{layer_idx}", layer) for layer_idx, layer in enumerate(model.model.layers)]
    parts += [("model.early_exit_gate", model.model.early_exit_gate), ("lm_head", model.lm_head)]
    for name, part in parts:
        if size <= WHOLE_BYTES:
            _load(name, part, read)
        else:
            part.register_forward_pre_hook(lambda module, _, name=name: _load(name, module, read))
            part.register_forward_hook(lambda module, *_: _unload(module))
    return model


def bundle_reader(weights: WeightFile, formats: dict[str, WeightFormat], tied: bool) -> Callable[[str], Tensor]:
    """Reads tensors by their names in the checkpoint, as the bundle rounded them, in float32."""

    def read(name: str) -> Tensor:
        module, tensor = name.rsplit(".", 1)
        origin = "model.embed_tokens" if tied and module == "lm_head" else module
        if tensor == "weight" and module in formats:
            return unpack(lambda part: weights.read(f"{origin}.{part}"), formats[module])
        return weights.read(f"{origin}.{tensor}").float()

    return read


def _load(name: str, module: nn.Module, read: Callable[[str], Tensor]) -> None:
    tensors = {key: read(f"{name}.{key}").float() for key in module.state_dict()}
    module.load_state_dict(tensors, assign=True)


def _unload(module: nn.Module) -> None:
    module.to("meta")
