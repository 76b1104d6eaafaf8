"""Every tolerance of the tests, in one place; torch against ONNX Runtime has the exporter's own.

A difference counts beside the magnitude of what is compared, since processors sum in different orders. What no
processor changes, statistics of draws and figures that a paper rounds, stands here too, by name.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from melt_export.tolerances import PARITY, Tolerance
from melt_models import MeltCausalLM
from melt_models.modeling import KVCache

LAST_PLACE = Tolerance(1e-6, 0.0)
"""One product in float32: eight units of its last place."""
GOLDEN_LOGITS = Tolerance(2e-4, 1e-4)
"""Logits of melt-tiny, of which 1.4e-5 was met on any processor: closer than random weights, whose loops amplify."""
TORCH = Tolerance(1e-4, 1e-6)
"""One computation in torch, written in two ways: a few units of float32's last place, more where a sum is long."""
CALIBRATED = Tolerance(0.1, 1e-6)
"""Scales of KV caches, from products whose rounding is the processor's own: two steps of the clippings tried."""
CUDA_TYPES = Tolerance(8e-2, 1e-3)
"""Logits of bfloat16, or of integers with float16 activations, on CUDA beside float32 on a CPU."""
CAPTURED = Tolerance(1e-2, 1e-3)
"""Float16 logits of a captured CUDA graph, which attends over the whole capacity, beside a plain run's."""
HALF = Tolerance(0.1, 1e-3)
"""A loss in mixed precision beside float32: eight bits of mantissa, over every layer and loop."""
FINITE_DIFFERENCE = Tolerance(0.01, 1e-6)
"""A slope from two float32 losses beside the gradient."""
SHARPENED = Tolerance(1e-5, 1e-7)
"""Probabilities in float32 beside their closed form."""

DRAWS = 0.03
"""Of a frequency over 4,000 draws: four standard deviations of the widest."""
PUBLISHED = 3e-3
"""Relative, of a figure that a paper or a model card gives with three digits."""
PLANNED_MEMORY = 0.03
"""Relative, of a process beside its plan."""
LOSSY_PERPLEXITY = {"int8": 1.05, "int4": 1.25}
"""SmolLM2's perplexity with rounded KV cache or weights over float32's; docs/quantization.md has 1.03 and 1.17."""


def assert_close(actual: Any, expected: Any, tolerance: Tolerance = PARITY["float32"]) -> None:
    """Compares two tensors, arrays or numbers; a failure says by how much they differ and what that changes."""
    found, wanted = _array(actual), _array(expected)
    assert found.shape == wanted.shape
    # Written so that NaN fails too.
    assert np.abs(found - wanted).max() <= tolerance.allowed(wanted), describe(found, wanted, tolerance)


def assert_far(actual: Any, expected: Any, tolerance: Tolerance = PARITY["float32"]) -> None:
    """Two tensors differ by far more than rounding: ten times what is allowed of equal ones."""
    found, wanted = _array(actual), _array(expected)
    assert np.abs(found - wanted).max() > 10 * tolerance.allowed(wanted), describe(found, wanted, tolerance)


def describe(found: NDArray[Any], wanted: NDArray[Any], tolerance: Tolerance) -> str:
    """Largest and mean difference, what is allowed, the magnitude, and whether a first choice changed."""
    difference, choice = np.abs(found - wanted), ""
    if found.ndim:
        choice = f", argmax {'changed' if (found.argmax(-1) != wanted.argmax(-1)).any() else 'equal'}"
    return (
        f"largest difference {difference.max():.3g}, mean {difference.mean():.3g}, allowed "
        f"{tolerance.allowed(wanted):.3g} of magnitude {np.abs(wanted).max():.3g}{choice}"
    )


def assert_choices(logits: torch.Tensor, tokens: list[int], tolerance: Tolerance = PARITY["float32"]) -> None:
    """Each token is the first choice of its logits [tokens, V], or both are within twice the tolerance."""
    assert len(logits) == len(tokens)
    for place, (row, token) in enumerate(zip(logits.detach(), tokens, strict=True)):
        gap, limit = float(row.max() - row[token]), 2 * tolerance.allowed(row.numpy())
        best = int(row.argmax())
        assert gap <= limit, f"token {place} is {token}, torch has {best}, {gap:.3g} higher (allowed {limit:.3g})"


@torch.no_grad()
def assert_greedy(
    model: MeltCausalLM,
    prompt: list[int],
    tokens: list[int],
    loops: int | None = None,
    chunk_size: int | None = None,
    tolerance: Tolerance = PARITY["float32"],
) -> None:
    """Each token is torch's first choice after those before it, or torch has both within twice the tolerance."""
    cache = KVCache(model.config)
    logits = [model(torch.tensor([prompt]), None, cache, loops, chunk_size).logits[0, -1]]
    logits += [model(torch.tensor([[token]]), None, cache, loops, 1).logits[0, -1] for token in tokens[:-1]]
    assert_choices(torch.stack(logits), tokens, tolerance)


def _array(values: Any) -> NDArray[Any]:
    values = values.detach().double().numpy() if isinstance(values, torch.Tensor) else values
    return np.asarray(values, dtype=np.float64)
