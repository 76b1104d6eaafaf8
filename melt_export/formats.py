"""Which precision each weight matrix gets: one for the bundle, others for layers named by patterns."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from melt_export.choices import BLOCKS as BLOCKS
from melt_runtime.bundle.contract import ACTIVATIONS, INTEGERS, PRECISIONS, activation_dtype
from melt_runtime.errors import MeltError


class FormatError(MeltError):
    """A precision that does not fit the model, or a layer pattern that matches nothing."""


@dataclass(frozen=True)
class WeightFormat:
    """How one matrix is stored.

    Attributes:
        precision: one of ``PRECISIONS``; floats are stored in the bundle's activation type.
        block: weights along the input axis that share a scale; 0 for floats, and for integers by column.
    """

    precision: str
    block: int = 0

    @property
    def bits(self) -> int:
        """Bits of a quantized weight; 0 for floats."""
        return {"int8": 8, "int4": 4}.get(self.precision, 0)

    @property
    def by_column(self) -> bool:
        """Whether all weights of an output share one scale, and products are integer for any number of rows."""
        return self.bits == 8 and self.block == 0


def weight_formats(
    model: nn.Module,
    precision: str,
    layers: Mapping[str, str],
    block: int = BLOCKS[0],
    activations: str | None = None,
) -> dict[str, WeightFormat]:
    """Decides the format of every linear layer and of the embedding.

    Args:
        model: a ``MeltCausalLM``; its weights are not looked at.
        precision: of the bundle.
        layers: precision by pattern of module name (``*.gate.*``, ``model.layers.0.*``, ``lm_head``); of several that
            match, the last counts.
        block: most weights that share a scale, one of ``BLOCKS``.
        activations: type of activations, which float weights have too; default: as the precision asks.

    Returns:
        Formats by module name. A tied head has its embedding's.

    Raises:
        ValueError: an unknown precision, activation type or block.
        FormatError: a pattern that matches nothing, a float type other than the bundle's, or a row length that no
            block divides.
    """
    if block not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(map(str, BLOCKS))}, got {block}")
    dtype = activation_dtype(precision) if activations is None else activations
    if dtype not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {dtype!r}")
    if precision in ACTIVATIONS and precision != dtype:
        raise ValueError(
            f"activations must be {precision}, as the weights are, got {dtype!r}: only integers take another"
        )
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }
    chosen = dict.fromkeys(shapes, precision)
    faults = []
    for pattern, wanted in layers.items():
        if wanted not in PRECISIONS:
            raise ValueError(f"precision of {pattern!r} must be one of {', '.join(PRECISIONS)}, got {wanted!r}")
        matches = [name for name in shapes if fnmatchcase(name, pattern)]
        if not matches:
            faults.append(f"pattern {pattern!r} matches no layer; the last of them are {', '.join([*shapes][-12:])}")
        if wanted not in (*INTEGERS, dtype):
            faults.append(f"pattern {pattern!r} asks for {wanted} in a bundle of {dtype} activations")
        chosen.update(dict.fromkeys(matches, wanted))
    # A single row (the exit gate, a scalar gate) decides much and costs nothing.
    chosen |= {name: dtype for name, (rows, _) in shapes.items() if rows == 1}
    if model.config.tie_word_embeddings:
        chosen["lm_head"] = chosen["model.embed_tokens"]
    formats = {}
    for name, kind in chosen.items():
        width = shapes[name][1]
        fitting = next((size for size in BLOCKS if size <= block and width % size == 0), None)
        if kind not in INTEGERS:
            formats[name] = WeightFormat(kind)
        elif fitting is None:
            faults.append(f"{name} has rows of {width}, which no block of {BLOCKS} divides: keep it at {dtype}")
        else:
            formats[name] = WeightFormat(kind, fitting)
    if faults:
        raise FormatError("the precision does not fit the model:\n  " + "\n  ".join(faults))
    return formats


def prompt_formats(formats: Mapping[str, WeightFormat]) -> dict[str, WeightFormat]:
    """The formats of a copy for passes of several rows: integers by column, all else as it is."""
    return {
        name: WeightFormat("int8") if form.bits and name.startswith("model.layers.") else form
        for name, form in formats.items()
    }
