"""L1: what is exported has the names, shapes and types of the contract, and the operators we mean."""

from collections import Counter

import onnx
import pytest

from melt_runtime.contract import GRAPHS, graph_specs
from melt_runtime.manifest import check_files, read_manifest

TYPES = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}
TYPES |= {"int64": onnx.TensorProto.INT64, "int32": onnx.TensorProto.INT32}


def signature(values) -> list[tuple]:
    return [
        (v.name, v.type.tensor_type.elem_type, tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim))
        for v in values
    ]


@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        *(("float32", kind) for kind in ("elementwise", "mean", "last", "none")),
        ("float16", "elementwise"),
        ("float16", "none"),
    ],
)
def test_graphs_follow_the_contract(random_bundle, kind, precision):
    bundle = random_bundle(precision=precision, gate_kind=kind)
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    assert manifest.graphs == graph_specs(manifest.model, precision)
    for name in GRAPHS:
        graph = onnx.load(bundle / f"{name}.onnx", load_external_data=False).graph
        for values, specs in (
            (graph.input, manifest.graphs[name].inputs),
            (graph.output, manifest.graphs[name].outputs),
        ):
            assert sorted(signature(values)) == sorted((t.name, TYPES[t.dtype], t.shape) for t in specs)


def test_nothing_decomposes(random_bundle):
    """Nodes of one MELT layer: norms and attention are single operators, and no shape is computed."""
    graph = onnx.load(random_bundle() / "loop.onnx", load_external_data=False).graph
    layers = 3
    counts = Counter(node.op_type for node in graph.node)
    assert counts == {
        "SimplifiedLayerNormalization": 4 * layers + 1,
        "MatMul": 9 * layers + 1,  # W_z, U_z, q, k, v, o, gate, up, down; the exit gate
        "Add": 5 * layers + 1,  # b_z, W_z a + U_z h, a + z (h - a), two residuals; the exit gate's bias
        "Sub": layers,
        "Mul": 3 * layers,
        "Sigmoid": 2 * layers,
        "GroupQueryAttention": layers,
    }


def test_weights_stand_outside_the_graphs(random_bundle):
    bundle = random_bundle()
    for name in GRAPHS:
        assert (bundle / f"{name}.onnx").stat().st_size < 200_000
    assert read_manifest(bundle).weight_bytes == sum(path.stat().st_size for path in bundle.glob("*.data"))
