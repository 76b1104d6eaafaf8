"""8-bit products on this processor: which instructions it has for them, and whether they are exact.

x86 processors without VNNI add pairs of products of unsigned and signed bytes in 16 bits, where they overflow: up to
12 % of a product, silently. ONNX Runtime has exact kernels for them, which it takes on request; on a processor with
VNNI the same request halves the speed. So the products themselves are asked, with the largest values that there are.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melt_runtime.device.ort import ort
from melt_runtime.device.processor import cpuinfo

EXACT_PRODUCTS = ("session.x64quantprecision", "1")
"""The session's entry that asks for exact kernels."""

_PROBE = Path(__file__).with_name("integers.onnx")
"""``codes`` [rows, 64] uint8, less 128, times ``extreme_weights``: ``sums`` [rows, 16] float32."""
_ROWS, _WIDTH, _OUTPUTS = 16, 64, 16
_INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "amx_int8": "AMX",
    "asimddp": "NEON dot product",
    "i8mm": "NEON int8 matrices",
}


@cache
def overflows() -> bool:
    """Whether 8-bit products are wrong here unless ``EXACT_PRODUCTS`` is asked for."""
    return not _is_exact(ort.SessionOptions())


def instructions() -> tuple[str, ...]:
    """What the processor has for products, as far as Linux says."""
    flags = {flag for line in cpuinfo("flags", "Features") for flag in line.split()}
    return tuple(name for flag, name in _INSTRUCTIONS.items() if flag in flags)


def extreme_codes(rows: int = _ROWS, width: int = _WIDTH) -> NDArray[np.uint8]:
    """The smallest and largest activations that there are, [rows, width]: in turn, in runs, alone."""
    return np.where(_turns(rows, width), 255, 0).astype(np.uint8)


def extreme_weights(width: int = _WIDTH, outputs: int = _OUTPUTS) -> NDArray[np.int8]:
    """The smallest and largest weights that there are, [width, outputs]: in turn, in runs, alone."""
    return np.where(_turns(outputs, width).T, 127, -127).astype(np.int8)


def _turns(count: int, width: int) -> NDArray[np.bool_]:
    """[count, width]: lines of runs of 1, 2, 4 to 128, then the reverse of each, and again."""
    line, place = np.arange(count)[:, None], np.arange(width)
    turns: NDArray[np.bool_] = ((place >> line % 8) + line // 8) % 2 == 0
    return turns


def _is_exact(options: ort.SessionOptions) -> bool:
    options.log_severity_level = 3
    session: Any = ort.InferenceSession(_PROBE, options, providers=["CPUExecutionProvider"])
    codes = extreme_codes()
    exact = (codes.astype(np.int64) - 128) @ extreme_weights().astype(np.int64)
    pieces = [codes, *codes[:, None]]  # many rows and single ones may be other kernels
    sums = [session.run(None, {"codes": piece})[0] for piece in pieces]
    return all(np.array_equal(one, exact) for one in (sums[0], np.concatenate(sums[1:])))
