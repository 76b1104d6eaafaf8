"""L1: what is exported has the names, shapes and types of the contract, and the operators we mean."""

import json
from collections import Counter
from typing import get_args

import onnx
import pytest
from conftest import SMALL, random_model

from melt_export.formats import weight_formats
from melt_export.trace import graph_modules, model_shape, trace_graph
from melt_layers import GATES
from melt_models import GATE_KINDS, MeltConfig
from melt_runtime.bundle import contract
from melt_runtime.bundle.contract import KV_CACHES, METADATA_KEY, graph_metadata, graph_specs
from melt_runtime.bundle.manifest import check_files, read_manifest
from melt_runtime.device.ort import ort

TYPES = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}
TYPES |= {"int8": onnx.TensorProto.INT8, "uint8": onnx.TensorProto.UINT8}
TYPES |= {"int64": onnx.TensorProto.INT64, "int32": onnx.TensorProto.INT32}


def signature(values) -> list[tuple]:
    return [
        (v.name, v.type.tensor_type.elem_type, tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim))
        for v in values
    ]


def test_every_list_of_gate_kinds_names_the_same():
    """The runtime and the models know nothing of each other, so the names stand once for each of them."""
    assert set(GATES) == set(GATE_KINDS) == set(get_args(contract.GateKind))
    for kind in GATES:
        config = MeltConfig(**SMALL, gate_kind=kind)
        assert (config.has_latent, model_shape(config).has_latent) == (GATES[kind].has_latent,) * 2


@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        *(("float32", kind) for kind in ("elementwise", "mean", "last", "none")),
        ("float16", "elementwise"),
        ("float16", "none"),
        ("int8", "elementwise"),
        ("int4", "elementwise"),
        ("int4", "none"),
    ],
)
def test_graphs_follow_the_contract(random_bundle, kind, precision):
    bundle = random_bundle(precision=precision, gate_kind=kind)
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    kv_caches = ("float",) if precision == "float16" else KV_CACHES
    assert manifest.kv_caches == kv_caches
    assert manifest.graphs == graph_specs(manifest.model, manifest.activations, kv_caches, precision == "int8")
    for name in manifest.graphs:
        model = onnx.load(bundle / f"{name}.onnx", load_external_data=False)
        said = {entry.key: json.loads(entry.value) for entry in model.metadata_props if entry.key == METADATA_KEY}
        assert said == {METADATA_KEY: graph_metadata(manifest.model, precision, manifest.activations)}
        graph = model.graph
        for values, specs in (
            (graph.input, manifest.graphs[name].inputs),
            (graph.output, manifest.graphs[name].outputs),
        ):
            assert sorted(signature(values)) == sorted((t.name, TYPES[t.dtype], t.shape) for t in specs)


MOVING = {"Cast", "Reshape", "Transpose", "Identity", "Expand", "Concat", "Slice", "DequantizeLinear", "QuantizeLinear"}
MOVING |= {"MemcpyFromHost", "MemcpyToHost", "ReorderInput", "ReorderOutput"}
LAYERS = 3
PER_LAYER = {
    "SimplifiedLayerNormalization": 2,
    "SkipSimplifiedLayerNormalization": 2,
    "GroupQueryAttention": 1,
    "QuickGelu": 1,
    "Sigmoid": 1,
    "Sub": 1,
    "Mul": 2,  # z (h - a); the MLP's product
    "Add": 2,  # W_z a + U_z h; a + z (h - a)
    "Split": 3,  # queries and W_z; keys and values; the MLP's gate and up
    "Constant": 3,
}
"""Of a gated layer, whatever its precision, without its nine matrices, which are six products."""


@pytest.mark.parametrize("graph", ["loop", "loop_int8", "loop_int4"])
@pytest.mark.parametrize(
    ("precision", "matrices"),
    [
        ("float32", {"FusedMatMul": 6 * LAYERS + 1, "Add": LAYERS + 1}),  # b_z and the exit gate's bias are added
        ("int8", {"MatMulNBits": 6 * LAYERS, "FusedMatMul": 1, "Add": 1}),  # the exit gate stays float
        ("int4", {"MatMulNBits": 6 * LAYERS, "FusedMatMul": 1, "Add": 1}),
    ],
)
def test_nothing_decomposes(random_bundle, precision, matrices, graph):
    """Norms, residuals and attention are single operators, and no shape is computed."""
    nodes = onnx.load(random_bundle(precision) / f"{graph}.onnx", load_external_data=False).graph.node
    expected = Counter({name: LAYERS * count for name, count in PER_LAYER.items()}) + Counter(matrices)
    expected["SimplifiedLayerNormalization"] += 1  # the first layer has no residual to add
    assert Counter(node.op_type for node in nodes) == expected


@pytest.mark.parametrize(
    ("gate_kind", "layers", "products"),
    [
        ("elementwise", {}, 6),  # queries and W_z, U_z, keys and values, output, gate and up, down
        ("elementwise", {"*.w_z": "int8"}, 7),  # two formats are two products
        ("ema", {}, 5),
        ("last", {}, 4),  # keys and values read what the queries read
        ("none", {}, 4),
    ],
)
def test_matrices_that_read_the_same_rows_are_one_product(gate_kind, layers, products):
    """Each product is the start and the end of a parallel section."""
    config = random_model(gate_kind=gate_kind).config
    formats = weight_formats(random_model(gate_kind=gate_kind), "int4", layers)
    spec = graph_specs(model_shape(config), "float32")["loop"]
    graph = trace_graph("loop", graph_modules(config, formats, "float32")["loop"], spec).graph
    assert sum(node.op_type == "MatMulNBits" for node in graph) == products * LAYERS


def test_onnx_runtime_leaves_the_graph_as_it_is(random_bundle, tmp_path):
    """No operator is added at load that converts, copies or rearranges: what was exported is what runs."""
    exported = onnx.load(random_bundle("int4") / "loop.onnx", load_external_data=False).graph.node
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(random_bundle("int4") / "loop.onnx", options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    added = {node.op_type for node in optimized} - {node.op_type for node in exported}
    assert not added & MOVING
    for name in ("MatMulNBits", "GroupQueryAttention"):
        assert [node.op_type for node in optimized].count(name) == [node.op_type for node in exported].count(name)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_matrices_multiply_integers(random_bundle, precision):
    """Accuracy level 4 is two to three times as fast as any other."""
    for name in ("loop", "head"):
        for node in onnx.load(random_bundle(precision) / f"{name}.onnx", load_external_data=False).graph.node:
            if node.op_type == "MatMulNBits":
                attributes = {a.name: a.i for a in node.attribute}
                assert (attributes["accuracy_level"], attributes["bits"]) == (4, int(precision[3:]))
                assert attributes["block_size"] in (32, 64)  # K is 64 or 96 here


def test_one_file_of_weights_holds_each_tensor_once(random_bundle):
    bundle = random_bundle("int4", tie_word_embeddings=True)
    assert [path.name for path in bundle.glob("*.data")] == ["weights.data"]
    manifest = read_manifest(bundle)
    assert manifest.weight_bytes == (bundle / "weights.data").stat().st_size
    places: dict[str, set] = {}
    for name in manifest.graphs:
        path = bundle / f"{name}.onnx"
        assert path.stat().st_size < 200_000
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"] == "weights.data"
            places.setdefault(name, set()).add((int(place["offset"]), int(place["length"])))
    assert places["embed"] == places["head"]  # tied: packed, scales, zeros
    assert places["loop"] < places["loop_int8"]
    assert sum(length for _, length in set().union(*places.values())) <= manifest.weight_bytes
