"""Traces the three graph modules with ``torch.onnx.export`` and names their inputs and outputs after the contract.

Weights are not looked at: the modules are traced with empty ones.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from melt_export.formats import WeightFormat
from melt_export.graphs import EmbedGraph, HeadGraph, LoopGraph
from melt_export.merge import Store
from melt_export.quantize import Rounding
from melt_export.repeat import trace_layers
from melt_export.sampling import GreedyGraph, SampleGraph
from melt_models.checkpoint import empty_model
from melt_models.configuration import MeltConfig
from melt_runtime.bundle.contract import GraphSpec, ModelShape, TensorSpec

OPSET = 21

# All different from each other and from 1, so that the tracer takes none for a constant.
_EXAMPLE_SIZES = {"B": 2, "C": 3, "S": 8}
_LOOPS = ("loop", "prompts")
_MODULES = {"embed": EmbedGraph, "loop": LoopGraph, "head": HeadGraph}


def graph_modules(
    config: MeltConfig, formats: Mapping[str, WeightFormat], dtype: str, rounding: Rounding = "search"
) -> dict[str, nn.Module]:
    """The modules of ``embed``, ``loop`` and ``head``, with empty weights: address space that nothing ever touches.

    Args:
        config: the model.
        formats: of every linear layer and the embedding, by module name.
        dtype: activation type.
        rounding: of the quantized ones.
    """
    model = empty_model(config).to(getattr(torch, dtype))
    with torch.device("meta"):
        Store(model, formats, getattr(torch, dtype), rounding).fill()
        modules = {name: module(model) for name, module in _MODULES.items()}
    return {name: module.eval().to_empty(device="cpu") for name, module in modules.items()}


def sampling_modules(config: MeltConfig) -> dict[str, nn.Module]:
    """The modules of ``greedy`` and ``sample``, which own no weights."""
    return {"greedy": GreedyGraph(), "sample": SampleGraph(config.vocab_size)}


def model_shape(config: MeltConfig) -> ModelShape:
    """What the runtime must know of a model."""
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        trained_loops=config.total_ut_steps,
        trained_chunk=config.chunk_size,
        gate_kind=config.gate_kind,
        cache_kind=config.cache_kind,
        has_latent=config.has_latent,
        has_exit_gate=config.exit_gate,
    )


def trace_graph(name: str, module: nn.Module, spec: GraphSpec) -> ir.Model:
    """Traces one graph.

    Args:
        name: ``embed``, ``loop``, ``prompts``, ``head``, ``greedy`` or ``sample``.
        module: one of ``graph_modules`` or ``sampling_modules``.
        spec: the contract's inputs and outputs of this graph.
    """
    if name in _LOOPS:
        model = trace_layers(module, spec, lambda one_layer, its_spec: _trace(name, one_layer, its_spec))
    else:
        model = _trace(name, module, spec)
    _name_dimensions(model.graph, spec)
    _drop_unused_outputs(model.graph)
    ClearMetadataAndDocStringPass()(model)  # the tracer notes source lines, with paths of this machine
    return model


def _trace(name: str, module: nn.Module, spec: GraphSpec) -> ir.Model:
    used = {size for tensor in spec.inputs for size in tensor.shape if isinstance(size, str)}
    symbols = {symbol: torch.export.Dim(symbol) for symbol in used}
    examples = {t.name: _example(t) for t in spec.inputs}
    dimensions = {t.name: {i: symbols[d] for i, d in enumerate(t.shape) if isinstance(d, str)} for t in spec.inputs}
    arguments = _arguments(name, spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notices of the tracer about its own future
        program = torch.onnx.export(
            module,
            _arrange(arguments, examples),
            dynamo=True,
            opset_version=OPSET,
            input_names=_flat(arguments),
            output_names=_flat(_results(name, spec)),
            dynamic_shapes=_arrange(arguments, dimensions),
            optimize=False,  # the optimizer would merge tensors of equal content, and empty ones are equal
            verbose=False,
        )
    assert program is not None
    return program.model


def _name_dimensions(graph: ir.Graph, spec: GraphSpec) -> None:
    """Gives inputs and outputs the contract's symbols; the tracer keeps ours for some and invents others."""
    for values, specs in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        tensors = {tensor.name: tensor for tensor in specs}
        for value in values:
            value.shape = ir.Shape(tensors[str(value.name)].shape)


def _drop_unused_outputs(graph: ir.Graph) -> None:
    """Leaves out what a fused operator could give and nobody reads, so that it is not computed."""
    wanted = set(graph.outputs)
    for node in graph:
        for value in node.outputs[1:] if node.domain == "com.microsoft" else ():
            if not value.uses() and value not in wanted:
                value.name = ""


def _example(tensor: TensorSpec) -> Tensor:
    shape = [_EXAMPLE_SIZES[size] if isinstance(size, str) else size for size in tensor.shape]
    return torch.zeros(shape, dtype=getattr(torch, tensor.dtype))


def _arguments(name: str, spec: GraphSpec) -> tuple:
    """The contract's input names in the form of the module's arguments: a list for one tensor per layer."""
    names = [tensor.name for tensor in spec.inputs]
    if name not in _LOOPS:
        return tuple(names)
    families = (_family(names, family) for family in ("latent", "past_key", "past_value"))
    loop_idx = "loop_idx" if "loop_idx" in names else None
    return ("hidden", *families, "seqlens_k", "total_sequence_length", loop_idx)


def _results(name: str, spec: GraphSpec) -> tuple:
    """The contract's output names in the form of what the module returns."""
    names = [tensor.name for tensor in spec.outputs]
    if name not in _LOOPS:
        return tuple(names)
    families = (_family(names, family) for family in ("latent_out", "present_key", "present_value"))
    return ("hidden_out", *families, *(name for name in names if name == "exit_logit"))


def _family(names: list[str], family: str) -> list[str]:
    """The names of one tensor per layer, in the order of the layers."""
    return [name for name in names if name.startswith(f"{family}.")]


def _arrange(names: tuple, values: dict[str, Any]) -> tuple:
    """Values in the form of their names."""
    return tuple(
        [values[n] for n in name] if isinstance(name, list) else None if name is None else values[name]
        for name in names
    )


def _flat(names: tuple) -> list[str]:
    flat: list[str] = []
    for name in names:
        flat += name if isinstance(name, list) else [] if name is None else [name]
    return flat
