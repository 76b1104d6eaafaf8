"""L2: the published shape (Ouro-1.4B with gates, MELT-1.6B) traces without its weights being there."""

import pytest
from tolerances import PUBLISHED

from melt_export.formats import weight_formats
from melt_export.trace import graph_modules, model_shape, trace_graph
from melt_models.checkpoint import empty_model
from melt_models.shapes import shape_config
from melt_runtime.bundle.contract import graph_specs


def test_published_shape_traces_without_weights():
    config = shape_config("melt-1.6b")
    model = empty_model(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    gates = sum(parameter.numel() for name, parameter in model.named_parameters() if ".gate." in name)
    assert parameters == pytest.approx(1.636e9, rel=PUBLISHED)  # arXiv 2605.07721
    assert gates == pytest.approx(0.2014e9, rel=PUBLISHED)
    config = shape_config("melt-1.6b:6")  # its layers are alike
    module = graph_modules(config, weight_formats(empty_model(config), "int4", {}), "float32")["loop"]
    spec = graph_specs(model_shape(config), "float32")["loop"]
    graph = trace_graph("loop", module, spec).graph
    assert [value.name for value in graph.inputs][:2] == ["hidden", "latent.0"]
    assert {value.name for value in graph.inputs} == {tensor.name for tensor in spec.inputs}
    assert {value.name for value in graph.outputs} == {tensor.name for tensor in spec.outputs}
    attentions = [node for node in graph if node.op_type == "GroupQueryAttention"]
    assert len(attentions) == config.num_hidden_layers == 6


@pytest.mark.parametrize(("name", "billions"), [("ouro-1.4b", 1.434), ("ouro-2.6b", 2.667), ("smollm2-135m", 0.1345)])
def test_published_shapes_have_their_parameters(name, billions):
    model = empty_model(shape_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(billions * 1e9, rel=PUBLISHED)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("melt-9b", "shape must be one of ouro-1.4b, ouro-2.6b, melt-1.6b, smollm2-135m, got 'melt-9b'"),
        ("melt-1.6b:0", r"layers of shape melt-1.6b must be in \[1, 24\], got '0'"),
        ("melt-1.6b:25", "got '25'"),
        ("melt-1.6b:x", "got 'x'"),
    ],
)
def test_unknown_shapes_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        shape_config(name)
