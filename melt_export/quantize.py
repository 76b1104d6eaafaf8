"""Rounds weight matrices to 4 or 8 bits in blocks, or to 8 bits by column, and back. Knows tensors, not models.

Layout of ``com.microsoft.MatMulNBits``: ``packed [N, blocks, block * bits / 8]`` uint8, ``scales [N, blocks]`` float.
At 4 bits a zero point for each block, ``zeros [N, ceil(blocks / 2)]`` uint8; two values a byte, the first in the low
nibble. At 8 bits the zero point is 128 everywhere. A weight is ``(code - zero) * scale``.

Layout of ``com.microsoft.MatMulIntegerToFloat``: ``codes [K, N]`` int8, ``scales [N]`` float32, no zero point: all
weights of a column, which are those of an output, share a scale.
"""

import torch
from torch import Tensor

from melt_export.choices import ROUNDINGS as ROUNDINGS
from melt_export.choices import Rounding as Rounding

_SLICE = 1 << 19  # elements rounded at a time: the search stays in the processor's cache, and memory is bounded
_SHRINK = torch.linspace(1.0, 1.45, 8).tolist()  # the span of a block's weights, over what its codes span


def quantize_blocks(
    weight: Tensor, bits: int, block: int, rounding: Rounding = "search", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Rounds a matrix.

    Args:
        weight: [N, K], any float type; ``block`` divides K.
        bits: 4 or 8.
        block: weights that share a scale.
        rounding: ``nearest`` takes scale and zero point from the smallest and largest weight; ``search`` tries narrower
            spans that clip them, and refits the scale by least squares. 8 bits gain nothing and are not searched.
        dtype: of the scales.

    Returns:
        ``packed``, ``scales``, and at 4 bits ``zeros``.
    """
    rows, width = weight.shape
    blocks = weight.reshape(-1, block)
    codes = torch.empty(blocks.shape, dtype=torch.uint8)
    scales, zeros = torch.empty(len(blocks), 1), torch.empty(len(blocks), 1, dtype=torch.uint8)
    step = max(1, _SLICE // block)
    for start in range(0, len(blocks), step):
        here = slice(start, start + step)
        piece = blocks[here].float()
        if bits == 8:
            codes[here], scales[here], zeros[here] = _round_evenly(piece)
        else:
            codes[here], scales[here], zeros[here] = _round_span(piece, _SHRINK if rounding == "search" else [1.0])
    codes, scales = codes.view(rows, width // block, block), scales.view(rows, width // block)
    if bits == 8:
        return {"packed": codes, "scales": scales.to(dtype)}
    zeros = torch.nn.functional.pad(zeros.view(rows, width // block), (0, width // block % 2))
    return {"packed": _pair(codes), "scales": scales.to(dtype), "zeros": _pair(zeros)}


def dequantize_blocks(packed: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The float32 matrix [N, K] that ``quantize_blocks`` stands for; ``zeros`` is None at 8 bits."""
    rows, blocks, width = packed.shape
    restored = torch.empty(rows, blocks * width * (1 if zeros is None else 2))
    step = max(1, _SLICE // restored.shape[1])
    for start in range(0, rows, step):
        here = slice(start, start + step)
        codes, points = packed[here], torch.tensor(128)
        if zeros is not None:
            codes, points = _split(codes), _split(zeros[here])[:, :blocks, None]
        restored[here] = ((codes.float() - points) * scales[here, :, None]).flatten(1)
    return restored


def quantize_columns(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a matrix [N, K] to codes [K, N] from -127 to 127 and scales [N]; an output of zeros has scale 0."""
    rows, width = weight.shape
    codes, scales = torch.empty(width, rows, dtype=torch.int8), torch.empty(rows)
    step = max(1, _SLICE // width)
    for start in range(0, rows, step):
        here = slice(start, start + step)
        piece = weight[here].float()
        peak = piece.abs().amax(1, keepdim=True)
        codes[:, here] = (piece * torch.where(peak == 0, 0.0, 127 / peak)).round_().to(torch.int8).T
        scales[here] = peak[:, 0] / 127
    return codes, scales


def smooth_columns(weight: Tensor, peaks: Tensor) -> Tensor:
    """What to multiply the rows of a product by, and to divide the weights by, so that both are rounded with less loss.

    Channels that are large in every row spoil a rounding with one scale a row. Half of their range moves to the weights
    (SmoothQuant, arXiv 2211.10438, equation 4 with alpha 0.5).

    Args:
        weight: [N, K], any float type.
        peaks: largest magnitude of each column of the rows, [K].

    Returns:
        Factors [K] float32.
    """
    spans = [_at_least_little(values.float()) for values in (weight.abs().amax(0), peaks)]
    return (spans[0] / spans[1]).sqrt()


def _at_least_little(values: Tensor) -> Tensor:
    """Positive values, none less than a ten-thousandth of the largest."""
    return values.clamp_min(max(1e-4 * float(values.max()), 1e-20))


def dequantize_columns(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 matrix [N, K] that ``quantize_columns`` stands for."""
    return codes.T.float() * scales[:, None]


def _round_evenly(blocks: Tensor) -> tuple[Tensor, Tensor, int]:
    """8 bits, zero at 128: codes, scales and the zero point; the signed largest magnitude goes to 0."""
    peak = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    inverse = torch.where(peak == 0, 0.0, -128 / peak)
    codes = (blocks * inverse).round_().clamp_(-128, 127)
    return (codes + 128).to(torch.uint8), -peak / 128, 128


def _round_span(blocks: Tensor, shrink: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """4 bits: codes [blocks, block], scales and zero points [blocks, 1]; zero is always a code."""
    low, high = blocks.amin(1, keepdim=True).clamp_max(0), blocks.amax(1, keepdim=True).clamp_min(0)
    widest = torch.where(high == low, 0.0, 15 / (high - low))
    codes = torch.empty_like(blocks)

    def round_to(inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Leaves the codes less their zero point in ``codes``; returns zero point, q.w and |q|^2."""
        zero = (7.5 - (low + high) / 2 * inverse).round().clamp(0, 15)  # clips both ends alike
        torch.mul(blocks, inverse, out=codes).round_().add_(zero).clamp_(0, 15).sub_(zero)
        product, square = (torch.einsum("bk,bk->b", codes, other)[:, None] for other in (blocks, codes))
        return zero, product, square.clamp_min(1e-20)

    best, inverse = torch.full_like(low, -1.0), widest
    for factor in shrink:
        _, product, square = round_to(widest * factor)
        # With the scale of least squares, q.w / |q|^2, the squared error is |w|^2 - (q.w)^2 / |q|^2.
        gain = product**2 / square
        inverse = torch.where(gain > best, widest * factor, inverse)
        best = torch.maximum(best, gain)
    zero, product, square = round_to(inverse)
    return (codes + zero).to(torch.uint8), product / square, zero.to(torch.uint8)


def _pair(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, along the last axis."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _split(packed: Tensor) -> Tensor:
    """The reverse of ``_pair``."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
