"""A loop over many layers from graphs of one layer: layers of one kind are traced once, whatever their number."""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx_ir as ir
from torch import nn

from melt_export.graphs import LoopGraph
from melt_layers import Layer
from melt_runtime.bundle.contract import GraphSpec, TensorSpec

_FIRST_NORM = "layers.0.input_layernorm.weight"
_LAST_NORM = "norm.weight"


def trace_layers(module: LoopGraph, spec: GraphSpec, trace: Callable[[nn.Module, GraphSpec], ir.Model]) -> ir.Model:
    """The graph of one loop.

    Args:
        module: all its layers.
        spec: the contract's inputs and outputs.
        trace: traces a loop of one layer.
    """
    one_layer = GraphSpec(*(tuple(t for t in ts if _layer_of(t) in (None, 0)) for ts in (spec.inputs, spec.outputs)))
    traced: dict[str, ir.Model] = {}
    models = []
    for layer_idx, layer in enumerate(module.layers):
        if (kind := _kind(layer)) not in traced:
            traced[kind] = trace(_alone(module, layer_idx), one_layer)
        models.append(traced[kind])
    return ir.Model(
        _joined([model.graph for model in models], spec),
        ir_version=models[0].ir_version,
        producer_name=models[0].producer_name,
        producer_version=models[0].producer_version,
    )


def _layer_of(tensor: TensorSpec) -> int | None:
    """The layer whose state a tensor is, of ``past_key.3`` the fourth."""
    _, dot, layer_idx = tensor.name.rpartition(".")
    return int(layer_idx) if dot else None


def _alone(module: LoopGraph, layer_idx: int) -> LoopGraph:
    """The loop over one of its layers; weights are shared."""
    one = copy.copy(module)
    one._modules = {**module._modules, "layers": nn.ModuleList([module.layers[layer_idx]])}
    return one


def _kind(layer: Layer) -> str:
    """All that a layer's graph depends on: what its parts are told, and types and shapes of their tensors."""
    return re.sub(r"\blayers\.\d+\.", "layers.", "\n".join(_described(layer)))  # its weights' names have its number


def _described(layer: Layer) -> Iterator[str]:
    for name, part in layer.named_modules():
        told: dict[str, Any] = {key: value for key, value in vars(part).items() if not key.startswith("_")}
        yield f"{name} {type(part).__qualname__} {told}"
        for key, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            yield f"{key} {tensor.dtype} {tuple(tensor.shape)}"


def _joined(layers: Sequence[ir.Graph], spec: GraphSpec) -> ir.Graph:
    """One graph of the layers' graphs: each begins with the normed value and the residual of the one before."""
    # By name: the joined graph's inputs and weights, and all that its nodes compute.
    inputs: dict[str, ir.Value] = {}
    weights: dict[str, ir.Value] = {}
    results: dict[str, ir.Value] = {}
    nodes: list[ir.Node] = []
    normed = hidden = None
    for layer_idx, graph in enumerate(layers):
        is_last = layer_idx + 1 == len(layers)
        known: dict[ir.Value | None, Any] = {None: None}
        for value in graph.inputs:
            name = _of_layer(value, layer_idx)
            known[value] = hidden if hidden and name == "hidden" else inputs.setdefault(name, _like(value, name))
        for value in graph.initializers.values():
            name = _of_layer(value, layer_idx)
            if name == _LAST_NORM and not is_last:
                name = f"layers.{layer_idx + 1}.input_layernorm.weight"
            known[value] = weights.setdefault(name, _like(value, name))
        for node in graph:
            weight_names = {value.name for value in node.inputs if value is not None and value.is_initializer()}
            if normed and _FIRST_NORM in weight_names:
                known[node.outputs[0]] = normed
                continue
            for value in node.outputs:
                is_result = value.is_graph_output() and (is_last or str(value.name).endswith(".0"))
                name = _of_layer(value, layer_idx) if is_result else f"layers.{layer_idx}.{value.name}"
                known[value] = results[name] = _like(value, name)
            nodes.append(_copied(node, known, f"layers.{layer_idx}.{node.name}"))
            if _LAST_NORM in weight_names:
                normed, hidden = nodes[-1].outputs[0], nodes[-1].outputs[3]
                if not is_last:
                    break  # what follows reads the last layer's output
    return ir.Graph(
        [inputs[tensor.name] for tensor in spec.inputs],
        [results[tensor.name] for tensor in spec.outputs],
        nodes=nodes,
        initializers=list(weights.values()),
        opset_imports=layers[0].opset_imports,
        name=layers[0].name,
    )


def _of_layer(value: ir.Value, layer_idx: int) -> str:
    """The name of a weight or a state of the only layer, as a model of several has it."""
    name = str(value.name)
    if name.startswith("layers.0."):
        return f"layers.{layer_idx}.{name.removeprefix('layers.0.')}"
    return f"{name.removesuffix('.0')}.{layer_idx}" if name.endswith(".0") else name


def _like(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)


def _copied(node: ir.Node, known: dict[ir.Value | None, Any], name: str) -> ir.Node:
    return ir.Node(
        node.domain,
        node.op_type,
        [known[value] for value in node.inputs],
        list(node.attributes.values()),
        outputs=[known[value] for value in node.outputs],
        name=name,
    )
