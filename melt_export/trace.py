"""Traces the three graph modules with ``torch.onnx.export`` and names their inputs and outputs after the contract."""

import warnings
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from melt_export.graphs import EmbedGraph, HeadGraph, LoopGraph
from melt_models.modeling import MeltCausalLM
from melt_runtime.contract import GraphSpec, ModelShape, TensorSpec

OPSET = 21

# All different from each other and from 1, so that the tracer takes none for a constant.
_EXAMPLE_SIZES = {"B": 2, "C": 3, "S": 8}
_MODULES = {"embed": EmbedGraph, "loop": LoopGraph, "head": HeadGraph}


def model_shape(model: MeltCausalLM) -> ModelShape:
    """What the runtime must know of ``model``."""
    config = model.config
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
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
    )


def trace_graph(name: str, model: MeltCausalLM, spec: GraphSpec, folder: Path) -> None:
    """Writes ``{name}.onnx`` and its weights, ``{name}.onnx.data``; the first arguments are ``trace_program``'s."""
    trace_program(name, model, spec).save(folder / f"{name}.onnx", external_data=True)


def trace_program(name: str, model: MeltCausalLM, spec: GraphSpec) -> torch.onnx.ONNXProgram:
    """Traces one graph; the weights are not looked at.

    Args:
        name: ``embed``, ``loop`` or ``head``.
        model: in the precision that the graph shall have.
        spec: the contract's inputs and outputs of this graph.
    """
    symbols = {symbol: torch.export.Dim(symbol) for symbol in _EXAMPLE_SIZES}
    examples = {t.name: _example(t) for t in spec.inputs}
    dimensions = {t.name: {i: symbols[d] for i, d in enumerate(t.shape) if isinstance(d, str)} for t in spec.inputs}
    arguments = _arguments(name, spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notices of the tracer about its own future
        program = torch.onnx.export(
            _MODULES[name](model).eval(),
            _arrange(arguments, examples),
            dynamo=True,
            opset_version=OPSET,
            input_names=_flat(arguments),
            output_names=_flat(_results(name, spec)),
            dynamic_shapes=_arrange(arguments, dimensions),
            verbose=False,
        )
    assert program is not None
    _name_dimensions(program.model.graph, spec)
    return program


def _name_dimensions(graph: ir.Graph, spec: GraphSpec) -> None:
    """Gives inputs and outputs the contract's symbols; the tracer keeps ours for some and invents others."""
    for values, specs in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        tensors = {tensor.name: tensor for tensor in specs}
        for value in values:
            value.shape = ir.Shape(tensors[str(value.name)].shape)


def _example(tensor: TensorSpec) -> Tensor:
    shape = [_EXAMPLE_SIZES[size] if isinstance(size, str) else size for size in tensor.shape]
    return torch.zeros(shape, dtype=getattr(torch, tensor.dtype))


def _arguments(name: str, spec: GraphSpec) -> tuple:
    """The contract's input names in the form of the module's arguments: a list for one tensor per layer."""
    names = [tensor.name for tensor in spec.inputs]
    if name != "loop":
        return tuple(names)
    families = (_family(names, family) for family in ("latent", "past_key", "past_value"))
    loop_idx = "loop_idx" if "loop_idx" in names else None
    return ("hidden", *families, "seqlens_k", "total_sequence_length", loop_idx)


def _results(name: str, spec: GraphSpec) -> tuple:
    """The contract's output names in the form of what the module returns."""
    names = [tensor.name for tensor in spec.outputs]
    if name != "loop":
        return tuple(names)
    families = (_family(names, family) for family in ("latent_out", "present_key", "present_value"))
    return ("hidden_out", *families, "exit_logit")


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
