"""The three graphs of a bundle as torch modules, in the form that ONNX Runtime runs best.

The equations are those of ``melt_layers``; here they stand once more with ONNX Runtime's operators (fused
norms and residuals, attention over an in-place cache, quantized matrices) in place of torch's. These modules are
traced, never run: the operators return zeros in torch. Inputs and outputs: ``melt_runtime.bundle.contract``.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from melt_export.stored import Read
from melt_layers import UNGATED, Layer, RMSNorm, rope_tables
from melt_models.modeling import MeltCausalLM

_OPERATORS = "com.microsoft::"


class EmbedGraph(nn.Module):
    """Token ids to embeddings and zeroed latent states."""

    prefix: ClassVar = "model."
    """What stands before this graph's tensor names in the checkpoint."""

    def __init__(self, model: MeltCausalLM):
        super().__init__()
        self.embed_tokens = model.model.embed_tokens
        self.layer_count = model.config.num_hidden_layers
        self.has_latent = model.config.has_latent

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """[B, C] -> hidden [B, C, D], latent [N, B, C, D]."""
        hidden = self.embed_tokens(ids)
        if not self.has_latent:
            return (hidden,)
        # Zeros of the right shape without any shape computation, which would run on the host.
        zeros = (hidden - hidden).unsqueeze(0)  # [1, B, C, D]
        return hidden, torch.cat([zeros] * self.layer_count)


class HeadGraph(nn.Module):
    """The normed value to logits."""

    prefix: ClassVar = ""

    def __init__(self, model: MeltCausalLM):
        super().__init__()
        self.lm_head = model.lm_head

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, D] -> [B, C, V] float32."""
        return self.lm_head(hidden).float()


class LoopGraph(nn.Module):
    """One loop over all layers.

    Per layer, with a gate of quantized matrices: six matrix products (queries with ``W_z``, ``U_z``, keys with values,
    output, the MLP's two), attention, four norms of which two add the residual too, five element-wise steps of the gate
    and two of the MLP. Without a gate four products.
    """

    prefix: ClassVar = "model."

    def __init__(self, model: MeltCausalLM):
        super().__init__()
        config = model.config
        self.config = config
        self.layers = model.model.layers
        self.norm = model.model.norm
        self.early_exit_gate = model.model.early_exit_gate
        half, dtype = config.head_dim // 2, self.norm.weight.dtype
        self.register_buffer("cos", torch.empty(config.max_position_embeddings, half, dtype=dtype))
        self.register_buffer("sin", torch.empty(config.max_position_embeddings, half, dtype=dtype))

    def pack(self, _: Read) -> dict[str, Tensor]:
        """The rotary tables, [positions, dh / 2]."""
        tables = rope_tables(self.config, torch.arange(self.config.max_position_embeddings))
        return {name: table.to(self.cos.dtype) for name, table in zip(("cos", "sin"), tables, strict=True)}

    def forward(
        self,
        hidden: Tensor,
        latents: list[Tensor],
        past_keys: list[Tensor],
        past_values: list[Tensor],
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        loop_idx: Tensor | None,
    ) -> tuple[Tensor | list[Tensor], ...]:
        """One loop; ``latents`` is empty where the gate has no latent state.

        Returns:
            ``hidden_out``, ``latent_out`` and ``present_key`` and ``present_value`` of every layer, and with an exit
            gate ``exit_logit``.
        """
        latents_out, keys, values = [], [], []
        lengths = (seqlens_k, total_sequence_length)
        a = self._norm(self.layers[0].input_layernorm, hidden)
        for layer_idx, layer in enumerate(self.layers):
            query, *others = layer.of_input(a)
            if layer.gate.kind in UNGATED:
                source = others
            else:
                h = layer.gate.update(a, latents[layer_idx] if latents else None, loop_idx, *(others or [None]))
                if latents:
                    latents_out.append(h)
                source = layer.of_state(h)
            past = (past_keys[layer_idx], past_values[layer_idx])
            attended, key, value = self._attention((query, *source), past, lengths)
            keys.append(key)
            values.append(value)
            attended = self._norm(layer.input_layernorm_2, layer.self_attn.o_proj(attended))
            m, hidden = self._add_norm(layer.post_attention_layernorm, hidden, attended)
            fed = self._norm(layer.post_attention_layernorm_2, self._mlp(layer, m))
            last = layer_idx + 1 == len(self.layers)
            following = self.norm if last else self.layers[layer_idx + 1].input_layernorm
            a, hidden = self._add_norm(following, hidden, fed)
        outputs = (a, latents_out, keys, values)
        return outputs if self.early_exit_gate is None else (*outputs, self.early_exit_gate(a))

    def _norm(self, norm: RMSNorm | nn.Identity, x: Tensor) -> Tensor:
        if isinstance(norm, nn.Identity):
            return x
        attributes = {"axis": -1, "epsilon": norm.eps, "stash_type": 1}
        return torch.onnx.ops.symbolic(
            "SimplifiedLayerNormalization", (x, norm.weight), attributes, dtype=x.dtype, shape=x.shape, version=1
        )

    def _add_norm(self, norm: RMSNorm, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """``norm(x + y)`` and ``x + y``; the operator's two outputs between are statistics that nobody reads."""
        outputs = torch.onnx.ops.symbolic_multi_out(
            _OPERATORS + "SkipSimplifiedLayerNormalization",
            (y, x, norm.weight),
            {"epsilon": norm.eps},
            dtypes=(x.dtype, torch.float32, torch.float32, x.dtype),
            shapes=(x.shape, x.shape[:-1], x.shape[:-1], x.shape),
            version=1,
        )
        return outputs[0], outputs[3]

    def _mlp(self, layer: Layer, m: Tensor) -> Tensor:
        gate, up = layer.of_middle(m)
        silu = torch.onnx.ops.symbolic(
            _OPERATORS + "QuickGelu", (gate,), {"alpha": 1.0}, dtype=gate.dtype, shape=gate.shape, version=1
        )
        return layer.mlp.down_proj(silu * up)

    def _attention(
        self, rows: tuple[Tensor, ...], past: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention of queries, keys and values, which rewrites its rows of the cache where past and present are one
        buffer."""
        attributes = {
            "num_heads": self.config.num_attention_heads,
            "kv_num_heads": self.config.num_key_value_heads,
            "do_rotary": 1,
        }
        attended, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
            _OPERATORS + "GroupQueryAttention",
            (*rows, *past, *lengths, self.cos, self.sin),
            attributes,
            dtypes=(rows[0].dtype, past[0].dtype, past[1].dtype),
            shapes=(rows[0].shape, past[0].shape, past[1].shape),
            version=1,
        )
        return attended, present_key, present_value
