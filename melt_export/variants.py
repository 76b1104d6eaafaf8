"""Loop graphs made from the traced one by changing attributes: quantized KV caches, and exact arithmetic.

They share the traced graph's weights; nothing is traced again.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from melt_export.weights import WeightFile
from melt_runtime.bundle.contract import GraphSpec, KVCacheKind, loop_graph
from melt_runtime.memory.plan import Array

_INPUTS_BEFORE_SCALES = 12  # of GroupQueryAttention
_BITS = {"int8": 8, "int4": 4}

CODES = {"int8": (-128, 127), "int4": (-8, 7)}
"""Smallest and largest code of a quantized KV cache: a value is its code times its scale."""


def scale_keys(kv_cache: KVCacheKind, layer_idx: int) -> tuple[str, str]:
    """Keys in the weight file of the scales of one layer's keys and values, each [Hk, dh] float32."""
    return f"{kv_cache}_key_scale.{layer_idx}", f"{kv_cache}_value_scale.{layer_idx}"


def cache_scales(folder: Path, kv_cache: KVCacheKind) -> list[tuple[Array, Array]]:
    """The scales of every layer's keys and values in a bundle's loop, each [Hk, dh]; a float cache has none."""
    if kv_cache == "float":
        return []
    graph = ir.load(folder / f"{loop_graph(kv_cache)}.onnx").graph
    return [
        (
            node.inputs[_INPUTS_BEFORE_SCALES].const_value.numpy(),
            node.inputs[_INPUTS_BEFORE_SCALES + 1].const_value.numpy(),
        )
        for node in graph
        if node.op_type == "GroupQueryAttention"
    ]


def cache_codes(rows: Array, kv_cache: KVCacheKind) -> Array:
    """The codes of a quantized KV cache's rows, [..., dh] int32; at 4 bits two stand in a byte, the first one low."""
    if kv_cache == "int8":
        return rows.astype(np.int32)
    pairs = np.stack((rows & 15, rows >> 4), axis=-1)
    return pairs.reshape(*rows.shape[:-1], -1).astype(np.int32) + CODES["int4"][0]


def write_quantized_loop(path: Path, out: Path, kv_cache: KVCacheKind, spec: GraphSpec, weights: WeightFile) -> None:
    """Writes a loop over a quantized KV cache.

    Args:
        path: the loop over the float one.
        out: the file to write.
        kv_cache: ``int8`` or ``int4``.
        spec: the contract's inputs and outputs of this loop.
        weights: holds the scales under ``scale_keys``.
    """
    model = ir.load(path)
    keys = {}
    for layer_idx, node in enumerate(_nodes(model, "GroupQueryAttention")):
        node.resize_inputs(_INPUTS_BEFORE_SCALES + 2)
        for place, key in enumerate(scale_keys(kv_cache, layer_idx), start=_INPUTS_BEFORE_SCALES):
            shape = ir.Shape(weights.entries[key].shape)
            scale = ir.Value(name=key, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
            model.graph.initializers.add(scale)
            node.replace_input_with(place, scale)
            keys[key] = key
        node.attributes["k_quant_type"] = ir.AttrString("k_quant_type", "PER_CHANNEL")
        node.attributes["v_quant_type"] = ir.AttrString("v_quant_type", "PER_CHANNEL")
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", _BITS[kv_cache])
    for values, tensors in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        by_name = {tensor.name: tensor for tensor in tensors}
        for value in values:
            tensor = by_name[str(value.name)]
            value.shape = ir.Shape(tensor.shape)
            value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(tensor.dtype)))
    weights.attach(model.graph, keys)
    ir.save(model, out)


def write_exact(path: Path, out: Path) -> None:
    """Writes a graph whose quantized matrices multiply unrounded activations, to compare it with torch closely."""
    model = ir.load(path)
    for node in _nodes(model, "MatMulNBits"):
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    for node in _nodes(model, "MatMulIntegerToFloat"):
        rows, codes, _, scales, _ = node.inputs
        (unrounded, *_) = rows.producer().inputs
        weight = ir.node("DequantizeLinear", (codes, scales), {"axis": 1})
        product = ir.node("MatMul", (unrounded, *weight.outputs))
        model.graph.insert_before(node, (weight, product))
        ir.convenience.replace_all_uses_with(node.outputs[0], product.outputs[0])
        model.graph.remove((node, rows.producer()), safe=True)
    ir.save(model, out)


def _nodes(model: ir.Model, operator: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == operator]
