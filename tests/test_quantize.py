"""L0: rounding of matrices, against ONNX Runtime's own kernels; and which layers get which precision."""

import numpy as np
import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tolerances import LAST_PLACE, assert_close

from melt_export.formats import FormatError, WeightFormat, weight_formats
from melt_export.quantize import dequantize_blocks, quantize_blocks
from melt_runtime.device.ort import ort


def restore(weight, bits, block, rounding="search"):
    made = quantize_blocks(weight, bits, block, rounding)
    return dequantize_blocks(made["packed"], made["scales"], made.get("zeros"))


def gaussian(rows=64, width=512, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def relative(actual, expected) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_rounding_errors_of_gaussian_weights():
    """What the search is for: at block 128 symmetric rounding to nearest leaves 10.3 to 11 %."""
    weight = gaussian(512, 1024)
    errors = {rounding: relative(restore(weight, 4, 128, rounding), weight) for rounding in ("nearest", "search")}
    assert errors["search"] < 0.0965 < errors["nearest"] < 0.102
    assert relative(restore(weight, 8, 128), weight) < 0.007
    assert relative(restore(weight, 4, 32), weight) < relative(restore(weight, 4, 64), weight) < errors["search"]


@given(
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32, 64, 128]),
    blocks=st.integers(1, 5),
    rows=st.integers(1, 7),
    shift=st.floats(-3, 3),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_no_weight_moves_further_than_its_block_allows(bits, block, blocks, rows, shift, scale, seed):
    weight = (gaussian(rows, block * blocks, seed) + shift) * scale
    made = quantize_blocks(weight, bits, block)
    assert made["packed"].shape == (rows, blocks, block * bits // 8)
    assert made["scales"].shape == (rows, blocks)
    difference = (restore(weight, bits, block) - weight).view(rows, blocks, block).abs().amax(-1)
    spans = weight.view(rows, blocks, block)
    span = spans.amax(-1).clamp_min(0) - spans.amin(-1).clamp_max(0)
    # A step of 4 bits is a fifteenth of the span; searched spans are narrower by 1.45 at most, and clip what is beyond.
    assert (difference <= span * (0.25 if bits == 4 else 0.009)).all()


@given(st.integers(0, 500))
def test_searching_never_loses(seed):
    weight = gaussian(4, 256, seed) ** 3
    errors = [relative(restore(weight, 4, 64, rounding), weight) for rounding in ("search", "nearest")]
    assert errors[0] <= errors[1] * (1 + LAST_PLACE.relative)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 0.5, -2.0])
def test_constant_blocks_are_exact(bits, value):
    weight = torch.full((3, 64), value)
    assert_close(restore(weight, bits, 32), weight, LAST_PLACE)


def test_nothing_depends_on_how_many_rows_are_rounded_at_once():
    weight = gaussian(5000, 128).bfloat16()
    whole, part = quantize_blocks(weight, 4, 128), quantize_blocks(weight[4990:], 4, 128)
    for name, tensor in part.items():
        assert tensor.equal(whole[name][4990:])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("width", "block"), [(256, 128), (96, 32), (48, 16)])
def test_onnx_runtime_reads_what_we_write(bits, width, block):
    """The same tensors through MatMulNBits and GatherBlockQuantized; with an odd number of blocks too."""
    made = {name: tensor.numpy() for name, tensor in quantize_blocks(gaussian(40, width) + 0.3, bits, block).items()}
    expected = restore(gaussian(40, width) + 0.3, bits, block).numpy()
    zeros = "zeros" if bits == 4 else ""
    shared = {"domain": "com.microsoft", "bits": bits, "block_size": block}
    nodes = [
        helper.make_node(
            "MatMulNBits", ["x", "packed", "scales", zeros], ["y"], K=width, N=40, accuracy_level=1, **shared
        ),
        helper.make_node(
            "GatherBlockQuantized", ["flat", "ids", "scales", zeros], ["e"], gather_axis=0, quantize_axis=1, **shared
        ),
    ]
    made["flat"] = made["packed"].reshape(40, -1)
    graph = helper.make_graph(
        nodes,
        "both",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", width]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["B"]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "e")],
        [numpy_helper.from_array(values, name) for name, values in made.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((40, width), dtype=np.float32)
    ids = np.arange(40)[::-1].copy()
    product, rows = session.run(None, {"x": x, "ids": ids})
    assert_close(product, x @ expected.T)
    assert_close(rows, expected[ids], LAST_PLACE)


def test_formats_follow_the_last_pattern_that_matches():
    layers = {"*.gate.*": "int8", "model.layers.2.*": "float32", "lm_head": "int8"}
    formats = weight_formats(random_model(), "int4", layers)
    assert formats["model.layers.0.self_attn.q_proj"] == WeightFormat("int4", 64)
    assert formats["model.layers.0.mlp.down_proj"] == WeightFormat("int4", 32)
    assert formats["model.layers.0.gate.w_z"] == WeightFormat("int8", 64)
    assert formats["model.layers.2.gate.w_z"] == WeightFormat("float32")
    assert formats["lm_head"] == WeightFormat("int8", 64)
    assert formats["model.early_exit_gate"] == WeightFormat("float32")


def test_a_tied_head_has_its_embeddings_format():
    formats = weight_formats(random_model(tie_word_embeddings=True), "int4", {"model.embed_tokens": "int8"})
    assert formats["lm_head"] == formats["model.embed_tokens"] == WeightFormat("int8", 64)


def test_a_scalar_gate_is_one_row_and_stays_float():
    formats = weight_formats(random_model(gate_kind="scalar"), "int4", {})
    assert formats["model.layers.0.gate.w_z"] == WeightFormat("float32")


def test_bad_formats_are_all_named():
    with pytest.raises(FormatError) as raised:
        weight_formats(random_model(intermediate_size=40), "int4", {"*.nothing": "int8", "lm_head": "float16"})
    message = str(raised.value)
    assert "pattern '*.nothing' matches no layer; the last of them are" in message
    assert "lm_head" in message
    assert "pattern 'lm_head' asks for float16 in a bundle of float32 activations" in message
    assert "model.layers.0.mlp.down_proj has rows of 40, which no block of (128, 64, 32, 16) divides" in message
    with pytest.raises(
        ValueError, match="precision of 'lm_head' must be one of float32, float16, bfloat16, int8, int4, got 'int3'"
    ):
        weight_formats(random_model(), "int4", {"lm_head": "int3"})
