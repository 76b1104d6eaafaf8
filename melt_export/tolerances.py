"""Every tolerance of the exporter, and of the tests, in one place.

Processors sum in different orders and with different instructions (AVX2, AVX-512, AMX), so a difference counts beside
the magnitude of what is compared, and what is allowed is ten times what was met on any of them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Tolerance:
    """What two computations of one tensor may differ by: ``absolute + relative * max|expected|``.

    Attributes:
        relative: fraction of the largest magnitude of the expected tensor.
        absolute: for tensors that are next to nothing, such as a sum that cancels.
    """

    relative: float
    absolute: float

    def allowed(self, expected: NDArray[Any]) -> float:
        """The largest difference allowed of any element of ``expected``."""
        return self.absolute + self.relative * float(np.abs(expected).max())


PARITY = {
    "float32": Tolerance(5e-4, 3e-4),
    "float16": Tolerance(5e-2, 2e-2),
    "quantized": Tolerance(1e-3, 5e-4),
}
"""Torch against ONNX Runtime, by activation type, and for quantized matrices, whose products are summed by block.

Met with torch's kernels for AVX2 and AVX-512 against ONNX Runtime's on an AVX-512 machine with VNNI, after 4 loops and
32 decoded tokens: at float32 4.4e-5 of a key, and 3.7e-5 in exit logits next to zero, which are sums that cancel; at
float16 6e-3 of a value; over 30 layers of a language model at 4 bits 1.1e-4 of a key.
"""
INTEGER_PRODUCTS = Tolerance(0.05, 1e-3)
"""Rounded weights through kernels, or in graphs, that round activations differently."""
