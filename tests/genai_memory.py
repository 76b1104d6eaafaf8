"""Runs alone: what one token over a full cache adds to the address space that holds FOLDER's decoder and its cache."""

import json
import sys
from pathlib import Path

import numpy as np
from address_space import mapped_bytes

from melt_runtime.device.ort import ort

CAPACITY = 16384

folder = Path(sys.argv[1])
options = ort.SessionOptions()
options.intra_op_num_threads = 1  # every other thread reserves address space of its own
session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
binding = session.io_binding()
cache = 0
for tensor in session.get_inputs():
    if tensor.name.startswith("past_key_values"):
        _, heads, _, width = tensor.shape
        values = np.full((1, heads, CAPACITY, width), 0.01, dtype=np.float32)
        cache += values.nbytes
        buffer = ort.OrtValue.ortvalue_from_numpy(values)
        binding.bind_ortvalue_input(tensor.name, buffer)
        binding.bind_ortvalue_output(tensor.name.replace("past_key_values", "present"), buffer)
binding.bind_cpu_input("input_ids", np.array([[5]], dtype=np.int64))
binding.bind_cpu_input("attention_mask", np.ones((1, CAPACITY), dtype=np.int64))
binding.bind_output("logits", "cpu")
before = mapped_bytes("VmSize")
session.run_with_iobinding(binding)
print(json.dumps({"cache": cache, "growth": mapped_bytes("VmPeak") - before}))
