"""L2: the published shape (Ouro-1.4B with gates, MELT-1.6B) traces without its weights being there."""

from collections import Counter

import pytest
import torch

from melt_export.trace import model_shape, trace_program
from melt_models import MeltCausalLM, MeltConfig
from melt_runtime.contract import graph_specs


def test_published_shape_traces_without_weights():
    with torch.device("meta"):
        model = MeltCausalLM(MeltConfig()).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    gates = sum(parameter.numel() for name, parameter in model.named_parameters() if ".gate." in name)
    assert parameters == pytest.approx(1.636e9, rel=1e-3)  # arXiv 2605.07721
    assert gates == pytest.approx(0.2014e9, rel=1e-3)
    model = model.to_empty(device="cpu")  # address space only: nothing is ever written to it
    spec = graph_specs(model_shape(model), "float32")["loop"]
    graph = trace_program("loop", model, spec).model.graph
    assert [value.name for value in graph.inputs][:2] == ["hidden", "latent.0"]
    assert {value.name for value in graph.inputs} == {tensor.name for tensor in spec.inputs}
    assert {value.name for value in graph.outputs} == {tensor.name for tensor in spec.outputs}
    assert Counter(node.op_type for node in graph)["GroupQueryAttention"] == 24
    assert len(list(graph)) == 25 * 24 + 3
