"""Puts stored modules in the place of a model's own: matrices that read the same rows become one.

A matrix product costs the start and the end of a parallel section, whatever its size: of a token at hidden size 576 a
third. So queries and the gate's ``W_z``, both of the layer's input, are one product; keys and values, both of the gated
state; the MLP's gate and up. Without a gate queries, keys and values are one.
"""

from collections.abc import Sequence

import torch

from melt_export.formats import WeightFormat
from melt_export.quantize import Rounding
from melt_export.stored import (
    BlockEmbedding,
    BlockLinear,
    ColumnLinear,
    FloatEmbedding,
    FloatLinear,
    Linear,
    Matrix,
    Products,
)
from melt_layers import LEARNED_GATES, UNGATED, Layer
from melt_models.modeling import MeltCausalLM

_UNSMOOTHED = (".o_proj", ".down_proj")
"""Matrices whose rows have no channels that are large in every row; of ``down_proj`` single tokens are large, which
smoothing makes worse. All others read normed rows or latent states."""


class Store:
    """Makes the modules of one model."""

    def __init__(
        self, model: MeltCausalLM, formats: dict[str, WeightFormat], dtype: torch.dtype, rounding: Rounding
    ) -> None:
        self.model, self.formats, self.dtype, self.rounding = model, formats, dtype, rounding

    def fill(self) -> None:
        """Replaces every linear layer and the embedding of the model, in place."""
        model = self.model
        for idx, layer in enumerate(model.model.layers):
            self._fill_layer(layer, f"model.layers.{idx}")
        if model.model.early_exit_gate is not None:
            name = "model.early_exit_gate"
            model.set_submodule(name, self._linear([name], f"{name}.bias"))
        tied = model.config.tie_word_embeddings
        embedding = self._matrix(["model.embed_tokens"])
        model.set_submodule("lm_head", self._module(embedding) if tied else self._linear(["lm_head"]))
        rows = (
            BlockEmbedding(embedding, self.rounding, self.dtype)
            if embedding.form.bits
            else FloatEmbedding(embedding, self.dtype)
        )
        model.set_submodule("model.embed_tokens", rows)

    def _fill_layer(self, layer: Layer, name: str) -> None:
        """``of_input``, with a gate ``of_state``, and ``of_middle`` take the place of the merged layers."""
        gate, attention, mlp = layer.gate, layer.self_attn, layer.mlp
        query, key, value = (f"{name}.self_attn.{part}_proj" for part in "qkv")
        if gate.kind in UNGATED:
            layer.of_input = self._products(query, key, value)
        else:
            learned = [f"{name}.gate.w_z"] if gate.kind in LEARNED_GATES else []
            layer.of_input, layer.of_state = self._products(query, *learned), self._products(key, value)
        layer.of_middle = self._products(f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj")
        if gate.kind in LEARNED_GATES:
            # Both sum to z: the bias may be added to either, and the merged matrix has none.
            gate.set_submodule("u_z", self._linear([f"{name}.gate.u_z"], f"{name}.gate.w_z.bias"))
            del gate.w_z
        attention.set_submodule("o_proj", self._linear([f"{name}.self_attn.o_proj"]))
        mlp.set_submodule("down_proj", self._linear([f"{name}.mlp.down_proj"]))
        for owner, merged in ((attention, ("q_proj", "k_proj", "v_proj")), (mlp, ("gate_proj", "up_proj"))):
            for part in merged:
                delattr(owner, part)

    def _products(self, *names: str) -> Products:
        by_format: dict[WeightFormat, list[int]] = {}
        for place, name in enumerate(names):
            by_format.setdefault(self.formats[name], []).append(place)
        return Products([(self._linear([names[place] for place in places]), places) for places in by_format.values()])

    def _linear(self, names: Sequence[str], bias: str | None = None) -> Linear:
        return self._module(self._matrix(names, bias))

    def _matrix(self, names: Sequence[str], bias: str | None = None) -> Matrix:
        shapes = [tuple(self.model.get_submodule(name).weight.shape) for name in names]
        return Matrix(tuple(names), tuple(outputs for outputs, _ in shapes), shapes[0][1], self.formats[names[0]], bias)

    def _module(self, matrix: Matrix) -> Linear:
        if not matrix.form.bits:
            return FloatLinear(matrix, self.dtype)
        if matrix.form.by_column:
            return ColumnLinear(matrix, not matrix.names[0].endswith(_UNSMOOTHED))
        return BlockLinear(matrix, self.rounding, self.dtype)
