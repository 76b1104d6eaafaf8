"""The modules of the traced graphs that own weights: each says which operator it is and what stands in the bundle.

They are traced with empty weights, in address space only. Where the bundle's tensors are not the checkpoint's own,
``pack`` makes them, one module at a time, so that an export never holds a model; ``unpack`` gives them back as the
bundle rounded them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from melt_export.formats import WeightFormat
from melt_export.quantize import (
    Rounding,
    dequantize_blocks,
    dequantize_columns,
    quantize_blocks,
    quantize_columns,
    smooth_columns,
)

Read = Callable[[str], Tensor]
"""Gives a tensor by its name: of a module, such as ``weight``, or of a checkpoint."""

_OPERATORS = "com.microsoft::"
# Activations are rounded to 8 bits a block, so that products are integer: two to three times faster than any other.
_ACCURACY_LEVEL = 4
_LARGEST_CODE = 127
_SMALLEST_PEAK = 1e-30  # a row of zeros is divided by it


@dataclass(frozen=True)
class Matrix:
    """Linear layers of the checkpoint that read the same rows, as one: their outputs beside each other.

    Attributes:
        names: of the layers, in order; of a tied head, of the embedding.
        outputs: of each.
        inputs: columns of their weights.
        form: how they are stored.
        bias: name of what is added to the outputs of all of them; None: nothing.
    """

    names: tuple[str, ...]
    outputs: tuple[int, ...]
    inputs: int
    form: WeightFormat
    bias: str | None = None

    @property
    def key(self) -> str:
        """The name under which its tensors stand in the bundle's weights."""
        return "+".join(self.names)

    def reader(self, read: Read) -> Read:
        """Reads ``weight`` [N, K] and ``bias`` [N] out of a checkpoint."""

        def read_part(name: str) -> Tensor:
            if name == "bias":
                assert self.bias is not None
                return read(self.bias)
            weights = [read(f"{layer}.{name}") for layer in self.names]
            return weights[0] if len(weights) == 1 else torch.cat(weights)

        return read_part

    def rows(self, name: str) -> slice:
        """Where the outputs of one of its layers are."""
        place = self.names.index(name)
        first = sum(self.outputs[:place])
        return slice(first, first + self.outputs[place])


class FloatLinear(nn.Module):
    """``x W^T + b`` with W as the checkpoint has it, [N, K]: a tied embedding is the same bytes."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype):
        super().__init__()
        self.matrix = matrix
        outputs = sum(matrix.outputs)
        self.weight = nn.Parameter(torch.empty(outputs, matrix.inputs, dtype=dtype), requires_grad=False)
        self.bias = None if matrix.bias is None else nn.Parameter(torch.empty(outputs, dtype=dtype), False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        shape = (*x.shape[:-1], self.weight.shape[0])
        y = torch.onnx.ops.symbolic(
            _OPERATORS + "FusedMatMul", (x, self.weight), {"transB": 1}, dtype=x.dtype, shape=shape, version=1
        )
        return y if self.bias is None else y + self.bias

    def unpack(self, read: Read, rows: slice) -> Tensor:
        """Some of its outputs' weights, float32."""
        return read("weight")[rows].float()


class BlockLinear(nn.Module):
    """``x W^T + b`` with W rounded in blocks."""

    def __init__(self, matrix: Matrix, rounding: Rounding, dtype: torch.dtype):
        super().__init__()
        self.matrix, self.rounding = matrix, rounding
        form, outputs = matrix.form, sum(matrix.outputs)
        blocks = matrix.inputs // form.block
        self.register_buffer("packed", torch.empty(outputs, blocks, form.block * form.bits // 8, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(outputs, blocks, dtype=dtype))
        self.register_buffer("zeros", _empty_zeros(outputs, blocks, form))
        self.register_buffer("bias", None if matrix.bias is None else torch.empty(outputs, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        form, outputs = self.matrix.form, sum(self.matrix.outputs)
        attributes = {
            "K": self.matrix.inputs,
            "N": outputs,
            "bits": form.bits,
            "block_size": form.block,
            "accuracy_level": _ACCURACY_LEVEL,
        }
        operands = (x, self.packed, self.scales, self.zeros, None, self.bias)
        return torch.onnx.ops.symbolic(
            _OPERATORS + "MatMulNBits", operands, attributes, dtype=x.dtype, shape=(*x.shape[:-1], outputs), version=1
        )

    def pack(self, read: Read) -> dict[str, Tensor]:
        """Rounds the weight."""
        form = self.matrix.form
        tensors = quantize_blocks(read("weight"), form.bits, form.block, self.rounding, self.scales.dtype)
        return tensors if self.bias is None else tensors | {"bias": read("bias").to(self.bias.dtype)}

    def unpack(self, read: Read, rows: slice) -> Tensor:
        """Some of its outputs' weights, as the bundle rounded them, float32."""
        return _unpack_blocks(read, self.matrix.form, rows)


class ColumnLinear(nn.Module):
    """``x W^T + b`` of 8-bit integers: W with a scale for each output, x with one for each row.

    The operator takes unsigned activations and signed weights: the pair that has a kernel for AMX on x86.

    Attributes:
        peaks: largest magnitude of each column of x, [K], of a matrix that is smoothed; None: not known, as they are.
    """

    def __init__(self, matrix: Matrix, smoothed: bool):
        super().__init__()
        self.matrix = matrix
        self.peaks: Tensor | None = None
        outputs = sum(matrix.outputs)
        self.register_buffer("smoothing", torch.empty(matrix.inputs) if smoothed else None)
        self.register_buffer("codes", torch.empty(matrix.inputs, outputs, dtype=torch.int8))
        self.register_buffer("column_scales", torch.empty(outputs))
        self.register_buffer("row_scale", torch.empty(()))
        self.register_buffer("row_zero", torch.empty((), dtype=torch.uint8))
        self.register_buffer("bias", None if matrix.bias is None else torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        x = x if self.smoothing is None else x * self.smoothing
        peak = x.abs().amax(-1, keepdim=True) + _SMALLEST_PEAK
        rounding = (self.row_scale, self.row_zero)
        rows = torch.onnx.ops.symbolic(
            "QuantizeLinear", (x / peak, *rounding), dtype=torch.uint8, shape=x.shape, version=21
        )
        y = torch.onnx.ops.symbolic(
            _OPERATORS + "MatMulIntegerToFloat",
            (rows, self.codes, self.row_scale, self.column_scales, self.row_zero),
            dtype=x.dtype,
            shape=(*x.shape[:-1], sum(self.matrix.outputs)),
            version=1,
        )
        return y * peak if self.bias is None else y * peak + self.bias

    def pack(self, read: Read) -> dict[str, Tensor]:
        """Rounds the weight."""
        weight, tensors = read("weight"), {}
        if self.smoothing is not None:
            known = self.peaks is not None
            tensors["smoothing"] = smooth_columns(weight, self.peaks) if known else torch.ones(weight.shape[1])
            weight = weight / tensors["smoothing"]
        codes, scales = quantize_columns(weight)
        tensors |= {
            "codes": codes,
            "column_scales": scales,
            "row_scale": torch.tensor(1 / _LARGEST_CODE),
            "row_zero": torch.tensor(128, dtype=torch.uint8),
        }
        return tensors if self.bias is None else tensors | {"bias": read("bias").float()}

    def unpack(self, read: Read, rows: slice) -> Tensor:
        """Some of its outputs' weights, as the bundle rounded them, float32."""
        weight = dequantize_columns(read("codes")[:, rows], read("column_scales")[rows])
        return weight if self.smoothing is None else weight * read("smoothing")


Linear = FloatLinear | BlockLinear | ColumnLinear


class Products(nn.Module):
    """Linear layers that read the same rows: one matrix for each format among them, whose result is split."""

    def __init__(self, made: list[tuple[Linear, list[int]]]):
        """Takes matrices, each with the places of its layers in the result."""
        super().__init__()
        self.made = nn.ModuleList(module for module, _ in made)
        self.places = [places for _, places in made]

    def forward(self, x: Tensor) -> list[Tensor]:
        """[..., K] -> [..., N] of each layer."""
        results: dict[int, Tensor] = {}
        for module, places in zip(self.made, self.places, strict=True):
            results |= zip(places, _split(module(x), module.matrix.outputs), strict=True)
        return [results[place] for place in range(len(results))]


class FloatEmbedding(nn.Module):
    """Rows of a float matrix."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype):
        super().__init__()
        self.matrix = matrix
        self.weight = nn.Parameter(torch.empty(*matrix.outputs, matrix.inputs, dtype=dtype), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, C] -> [B, C, D]."""
        return nn.functional.embedding(ids, self.weight)

    def unpack(self, read: Read, rows: slice) -> Tensor:
        """Some of its rows, float32."""
        return read("weight")[rows].float()


class BlockEmbedding(nn.Module):
    """Rows of a matrix rounded in blocks; a tied head's ``BlockLinear`` has the same bytes."""

    def __init__(self, matrix: Matrix, rounding: Rounding, dtype: torch.dtype):
        super().__init__()
        self.matrix, self.rounding = matrix, rounding
        form, (tokens,), width = matrix.form, matrix.outputs, matrix.inputs
        self.register_buffer("packed", torch.empty(tokens, width * form.bits // 8, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(tokens, width // form.block, dtype=dtype))
        self.register_buffer("zeros", _empty_zeros(tokens, width // form.block, form))

    def forward(self, ids: Tensor) -> Tensor:
        """[B, C] -> [B, C, D]."""
        attributes = {
            "bits": self.matrix.form.bits,
            "block_size": self.matrix.form.block,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        return torch.onnx.ops.symbolic(
            _OPERATORS + "GatherBlockQuantized",
            (self.packed, ids, self.scales, self.zeros),
            attributes,
            dtype=self.scales.dtype,
            shape=(*ids.shape, self.matrix.inputs),
            version=1,
        )

    def pack(self, read: Read) -> dict[str, Tensor]:
        """Rounds the matrix."""
        form = self.matrix.form
        tensors = quantize_blocks(read("weight"), form.bits, form.block, self.rounding, self.scales.dtype)
        return tensors | {"packed": tensors["packed"].flatten(1)}

    def unpack(self, read: Read, rows: slice) -> Tensor:
        """Some of its rows, as the bundle rounded them, float32."""
        return _unpack_blocks(read, self.matrix.form, rows)


def stored(module: nn.Module) -> Matrix | None:
    """What a module of the traced graphs holds of the checkpoint; None where that is its own tensors alone."""
    return getattr(module, "matrix", None)


def _empty_zeros(outputs: int, blocks: int, form: WeightFormat) -> Tensor | None:
    """Room for the zero points, two a byte; 8 bits have none."""
    return torch.empty(outputs, (blocks + 1) // 2, dtype=torch.uint8) if form.bits == 4 else None


def _unpack_blocks(read: Read, form: WeightFormat, rows: slice) -> Tensor:
    scales = read("scales")[rows].float()
    zeros = read("zeros")[rows] if form.bits == 4 else None
    return dequantize_blocks(read("packed")[rows].view(*scales.shape, -1), scales, zeros)


def _split(y: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Pieces of the last axis."""
    if len(sizes) == 1:
        return (y,)
    lengths = torch.onnx.ops.symbolic(
        "Constant", (), {"value_ints": list(sizes)}, dtype=torch.int64, shape=(len(sizes),), version=13
    )
    return tuple(
        torch.onnx.ops.symbolic_multi_out(
            "Split",
            (y, lengths),
            {"axis": -1},
            dtypes=(y.dtype,) * len(sizes),
            shapes=[(*y.shape[:-1], size) for size in sizes],
            version=18,
        )
    )
