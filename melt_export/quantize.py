"""Rounds weight matrices to 4 or 8 bits in blocks, and back. Knows tensors, not models.

Layout of ``com.microsoft.MatMulNBits``: ``packed [N, blocks, block * bits / 8]`` uint8, low nibble first, offset by
``2 ** (bits - 1)``; ``scales [N, blocks]`` float32; symmetric, so there are no zero points.
"""

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["search", "nearest"]
ROUNDINGS: tuple[Rounding, ...] = ("search", "nearest")

_SLICE = 1 << 19  # elements rounded at a time: the search stays in the processor's cache, and memory is bounded
_SHRINK = torch.linspace(1.0, 1.5, 8).tolist()  # the largest magnitude, over what the scale represents


def quantize_blocks(weight: Tensor, bits: int, block: int, rounding: Rounding = "search") -> tuple[Tensor, Tensor]:
    """Rounds a matrix.

    Args:
        weight: [N, K], any float type; ``block`` divides K.
        bits: 4 or 8.
        block: weights that share a scale.
        rounding: ``nearest`` takes the scale from the largest magnitude; ``search`` tries smaller ones that clip it and
            refits the scale by least squares. 4 bits gain about 6 % of the rounding error, 8 bits nothing.

    Returns:
        ``packed`` [N, K / block, block * bits / 8] uint8 and ``scales`` [N, K / block] float32.
    """
    rows, width = weight.shape
    blocks = weight.reshape(-1, block)
    codes = torch.empty(blocks.shape, dtype=torch.uint8)
    scales = torch.empty(len(blocks), 1)
    step = max(1, _SLICE // block)
    half = 2 ** (bits - 1)
    for start in range(0, len(blocks), step):
        piece = blocks[start : start + step].float()
        signed, scale = _round_blocks(piece, half, _SHRINK if rounding == "search" and bits == 4 else [1.0])
        codes[start : start + step] = (signed + half).to(torch.uint8)
        scales[start : start + step] = scale
    codes = codes.view(rows, width // block, block)
    packed = codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed, scales.view(rows, width // block)


def dequantize_blocks(packed: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The float32 matrix [N, K] that ``packed`` and ``scales`` stand for."""
    if bits == 4:
        packed = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return ((packed.float() - 2 ** (bits - 1)) * scales[..., None]).flatten(1)


def _round_blocks(blocks: Tensor, half: int, shrink: list[float]) -> tuple[Tensor, Tensor]:
    """Signed codes [blocks, block] and scales [blocks, 1]; the signed largest magnitude goes to ``-half``."""
    peak = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    inverse = torch.where(peak == 0, 0.0, -half / peak)
    codes = torch.empty_like(blocks)
    if len(shrink) > 1:
        best, chosen = torch.full_like(peak, -1.0), inverse
        for factor in shrink:
            torch.mul(blocks, inverse * factor, out=codes).round_().clamp_(-half, half - 1)
            # With the least-squares scale the squared error is |w|^2 - (q.w)^2 / |q|^2.
            gain = torch.einsum("bk,bk->b", codes, blocks) ** 2 / torch.einsum("bk,bk->b", codes, codes).clamp_min(1e-20)
            better = gain[:, None] > best
            best, chosen = torch.where(better, gain[:, None], best), torch.where(better, inverse * factor, chosen)
        inverse = chosen
    torch.mul(blocks, inverse, out=codes).round_().clamp_(-half, half - 1)
    squares = torch.einsum("bk,bk->b", codes, codes)[:, None]
    fitted = torch.einsum("bk,bk->b", codes, blocks)[:, None] / squares.clamp_min(1e-20)
    return codes, fitted
