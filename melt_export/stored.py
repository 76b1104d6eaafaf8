"""The modules of the traced graphs that own weights: each says which operator it is and what stands in the bundle.

They are traced with empty weights, in address space only. Where the bundle's tensors are not the checkpoint's own,
``pack`` makes them, one module at a time, so that an export never holds a model; ``unpack`` gives them back as the
bundle rounded them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from melt_export.formats import WeightFormat
from melt_export.quantize import Rounding, dequantize_blocks, quantize_blocks

Read = Callable[[str], Tensor]
"""Gives one of a module's tensors by its name inside the module, such as ``weight``."""

_OPERATORS = "com.microsoft::"
# Activations are rounded to 8 bits a block, so that products are integer: two to three times faster than any other.
_ACCURACY_LEVEL = 4


class FloatLinear(nn.Module):
    """``x W^T + b`` with W as the checkpoint has it, [N, K]: a tied embedding is the same bytes."""

    def __init__(self, outputs: int, inputs: int, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        shape = (*x.shape[:-1], self.weight.shape[0])
        y = torch.onnx.ops.symbolic(
            _OPERATORS + "FusedMatMul", (x, self.weight), {"transB": 1}, dtype=x.dtype, shape=shape, version=1
        )
        return y if self.bias is None else y + self.bias


class BlockLinear(nn.Module):
    """``x W^T + b`` with W rounded in blocks."""

    def __init__(
        self, outputs: int, inputs: int, bias: bool, form: WeightFormat, rounding: Rounding, dtype: torch.dtype
    ):
        super().__init__()
        self.form, self.rounding = form, rounding
        self.outputs, self.inputs = outputs, inputs
        blocks = inputs // form.block
        self.register_buffer("packed", torch.empty(outputs, blocks, form.block * form.bits // 8, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(outputs, blocks, dtype=dtype))
        self.register_buffer("zeros", _empty_zeros(outputs, blocks, form))
        self.register_buffer("bias", torch.empty(outputs, dtype=dtype) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        attributes = {
            "K": self.inputs,
            "N": self.outputs,
            "bits": self.form.bits,
            "block_size": self.form.block,
            "accuracy_level": _ACCURACY_LEVEL,
        }
        operands = (x, self.packed, self.scales, self.zeros, None, self.bias)
        return torch.onnx.ops.symbolic(
            _OPERATORS + "MatMulNBits",
            operands,
            attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.outputs),
            version=1,
        )

    def pack(self, read: Read) -> dict[str, Tensor]:
        """Rounds the weight."""
        tensors = quantize_blocks(read("weight"), self.form.bits, self.form.block, self.rounding, self.scales.dtype)
        return tensors if self.bias is None else tensors | {"bias": read("bias").to(self.bias.dtype)}


class FloatEmbedding(nn.Module):
    """Rows of a float matrix."""

    def __init__(self, tokens: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, width, dtype=dtype), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, C] -> [B, C, D]."""
        return nn.functional.embedding(ids, self.weight)


class BlockEmbedding(nn.Module):
    """Rows of a matrix rounded in blocks; a tied head's ``BlockLinear`` has the same bytes."""

    def __init__(self, tokens: int, width: int, form: WeightFormat, rounding: Rounding, dtype: torch.dtype):
        super().__init__()
        self.form, self.rounding, self.width = form, rounding, width
        self.register_buffer("packed", torch.empty(tokens, width * form.bits // 8, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(tokens, width // form.block, dtype=dtype))
        self.register_buffer("zeros", _empty_zeros(tokens, width // form.block, form))

    def forward(self, ids: Tensor) -> Tensor:
        """[B, C] -> [B, C, D]."""
        attributes = {
            "bits": self.form.bits,
            "block_size": self.form.block,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        return torch.onnx.ops.symbolic(
            _OPERATORS + "GatherBlockQuantized",
            (self.packed, ids, self.scales, self.zeros),
            attributes,
            dtype=self.scales.dtype,
            shape=(*ids.shape, self.width),
            version=1,
        )

    def pack(self, read: Read) -> dict[str, Tensor]:
        """Rounds the matrix."""
        tensors = quantize_blocks(read("weight"), self.form.bits, self.form.block, self.rounding, self.scales.dtype)
        return tensors | {"packed": tensors["packed"].flatten(1)}


def _empty_zeros(outputs: int, blocks: int, form: WeightFormat) -> Tensor | None:
    """Room for the zero points, two a byte; 8 bits have none."""
    return torch.empty(outputs, (blocks + 1) // 2, dtype=torch.uint8) if form.bits == 4 else None


def unpack(read: Read, form: WeightFormat) -> Tensor:
    """The float32 weight [N, K] of a packed module, as the bundle rounded it."""
    if not form.bits:
        return read("weight").float()
    scales = read("scales").float()
    zeros = read("zeros") if form.bits == 4 else None
    return dequantize_blocks(read("packed").view(*scales.shape, -1), scales, zeros)


def store_modules(model: nn.Module, formats: dict[str, WeightFormat], dtype: torch.dtype, rounding: Rounding) -> None:
    """Replaces every linear layer and the embedding of ``model`` by the module of its format, in place."""
    for name, form in formats.items():
        module = model.get_submodule(name)
        outputs, inputs = tuple(module.weight.shape)
        if isinstance(module, nn.Embedding):
            made: nn.Module = (
                BlockEmbedding(outputs, inputs, form, rounding, dtype)
                if form.bits
                else FloatEmbedding(outputs, inputs, dtype)
            )
        else:
            bias = module.bias is not None
            made = (
                BlockLinear(outputs, inputs, bias, form, rounding, dtype)
                if form.bits
                else FloatLinear(outputs, inputs, bias, dtype)
            )
        model.set_submodule(name, made)
