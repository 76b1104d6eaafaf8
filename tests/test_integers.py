"""8-bit products are exact on the machine that runs this, whatever its kernels: in the probe and in a bundle."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from melt_runtime.device import integers
from melt_runtime.device.integers import extreme_weights


def probe() -> onnx.ModelProto:
    """The graph that the runtime asks; ``python tests/test_integers.py`` writes it."""
    weights = extreme_weights()
    constants = {"weights": weights, "one": np.ones(1, np.float32), "zero": np.array([128], np.uint8)}
    node = helper.make_node(
        "MatMulIntegerToFloat", ["codes", "weights", "one", "one", "zero"], ["sums"], domain="com.microsoft"
    )
    graph = helper.make_graph(
        [node],
        "integers",
        [helper.make_tensor_value_info("codes", TensorProto.UINT8, ["rows", weights.shape[0]])],
        [helper.make_tensor_value_info("sums", TensorProto.FLOAT, ["rows", weights.shape[1]])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="melt-onnx")


def test_the_probe_is_the_graph_that_this_file_describes():
    assert onnx.load(integers._PROBE) == probe()


if __name__ == "__main__":
    onnx.save(probe(), integers._PROBE)
