"""The graph of a loop from graphs of single layers, beside the graph of the whole loop."""

import onnx_ir as ir
import pytest
from conftest import random_model

from melt_export import trace
from melt_export.formats import weight_formats
from melt_export.trace import graph_modules, model_shape, trace_graph
from melt_runtime.bundle.contract import graph_specs


def edges(graph: ir.Graph) -> list[tuple[object, ...]]:
    """What each node does with which weights, inputs and nodes, by place; names within the graph do not count."""
    known: dict[ir.Value, object] = {value: value.name for value in (*graph.inputs, *graph.initializers.values())}
    found = []
    for place, node in enumerate(graph):
        known |= {value: (place, output) for output, value in enumerate(node.outputs)}
        reads = [value and known[value] for value in node.inputs]
        told = {name: str(attribute.value) for name, attribute in node.attributes.items()}
        results = [value.name if value.is_graph_output() else "" for value in node.outputs]
        found.append((node.domain, node.op_type, reads, told, results))
    return found


@pytest.mark.parametrize(
    ("changes", "layers", "kinds"),
    [
        ({"exit_gate": True}, {"model.layers.1.*": "int8"}, 2),
        ({"gate_kind": "none", "norm_placement": "pre", "total_ut_steps": 1, "num_hidden_layers": 1}, {}, 1),
    ],
)
def test_layers_of_one_kind_are_traced_once(changes, layers, kinds, monkeypatch):
    model = random_model(**changes)
    modules = graph_modules(model.config, weight_formats(model, "int4", layers), "float32")
    spec = graph_specs(model_shape(model.config), "float32")["loop"]
    real, traced = trace._trace, []
    monkeypatch.setattr(trace, "_trace", lambda *args: traced.append(args) or real(*args))
    joined = trace_graph("loop", modules["loop"], spec).graph
    assert len(traced) == kinds
    whole = real("loop", modules["loop"], spec).graph
    trace._drop_unused_outputs(whole)
    assert edges(joined) == edges(whole)
    for values, tensors in ((joined.inputs, spec.inputs), (joined.outputs, spec.outputs)):
        assert [value.name for value in values] == [tensor.name for tensor in tensors]
    assert set(joined.initializers) == set(whole.initializers)
    names = [value.name for node in joined for value in node.outputs if value.name]
    assert len(set(names)) == len(names)
