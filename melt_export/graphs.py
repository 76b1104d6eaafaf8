"""The three graphs of a bundle as torch modules, in the form that ONNX Runtime runs best.

The equations are those of ``melt_models.modeling``; here they stand once more with ONNX Runtime's operators (fused
norm, attention over an in-place cache) in place of torch's. These modules are traced, never run: the operators return
zeros in torch. Inputs and outputs: ``melt_runtime.contract``.
"""

import torch
from torch import Tensor, nn

from melt_models.modeling import Layer, MeltCausalLM, RMSNorm, rope_tables


class EmbedGraph(nn.Module):
    """Token ids to embeddings and zeroed latent states."""

    def __init__(self, model: MeltCausalLM):
        super().__init__()
        self.embed_tokens = model.model.embed_tokens
        self.layers = model.config.num_hidden_layers
        self.has_latent = model.config.has_latent

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """[B, C] -> hidden [B, C, D], latent [N, B, C, D]."""
        hidden = self.embed_tokens(ids)
        if not self.has_latent:
            return (hidden,)
        # Zeros of the right shape without any shape computation, which would run on the host.
        zeros = (hidden - hidden).unsqueeze(0)  # [1, B, C, D]
        return hidden, torch.cat([zeros] * self.layers)


class HeadGraph(nn.Module):
    """The normed value to logits."""

    def __init__(self, model: MeltCausalLM):
        super().__init__()
        self.lm_head = model.lm_head

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, D] -> [B, C, V] float32."""
        return self.lm_head(hidden).float()


class LoopGraph(nn.Module):
    """One loop over all layers."""

    def __init__(self, model: MeltCausalLM):
        super().__init__()
        config = model.config
        self.config = config
        self.layers = model.model.layers
        self.norm = model.model.norm
        self.early_exit_gate = model.model.early_exit_gate
        cos, sin = rope_tables(config, torch.arange(config.max_position_embeddings))
        self.register_buffer("cos", cos.to(model.dtype), persistent=False)
        self.register_buffer("sin", sin.to(model.dtype), persistent=False)

    def forward(
        self,
        hidden: Tensor,
        latents: list[Tensor],
        past_keys: list[Tensor],
        past_values: list[Tensor],
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        loop_idx: Tensor | None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor]:
        """One loop; ``latents`` is empty where the gate has no latent state.

        Returns:
            ``hidden_out``, ``latent_out`` and ``present_key`` and ``present_value`` of every layer, ``exit_logit``.
        """
        latents_out, keys, values = [], [], []
        lengths = (seqlens_k, total_sequence_length)
        for layer_idx, layer in enumerate(self.layers):
            a = self._norm(layer.input_layernorm, hidden)
            h = layer.gate(a, latents[layer_idx] if latents else None, loop_idx)
            if latents:
                latents_out.append(h)
            past = (past_keys[layer_idx], past_values[layer_idx])
            attended, key, value = self._attention(layer, a, h, past, lengths)
            keys.append(key)
            values.append(value)
            hidden = hidden + self._norm(layer.input_layernorm_2, layer.self_attn.o_proj(attended))
            m = self._norm(layer.post_attention_layernorm, hidden)
            hidden = hidden + self._norm(layer.post_attention_layernorm_2, layer.mlp(m))
        hidden = self._norm(self.norm, hidden)
        return hidden, latents_out, keys, values, self.early_exit_gate(hidden)

    def _norm(self, norm: RMSNorm, x: Tensor) -> Tensor:
        attributes = {"axis": -1, "epsilon": norm.eps, "stash_type": 1}
        return torch.onnx.ops.symbolic(
            "SimplifiedLayerNormalization",
            (x, norm.weight),
            attributes,
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )

    def _attention(
        self, layer: Layer, a: Tensor, h: Tensor, past: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention that rewrites its rows of the cache where past and present are one buffer."""
        attention = layer.self_attn
        query, key, value = attention.q_proj(a), attention.k_proj(h), attention.v_proj(h)
        past_key, past_value = past
        attended, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (query, key, value, past_key, past_value, *lengths, self.cos, self.sin),
            {
                "num_heads": self.config.num_attention_heads,
                "kv_num_heads": self.config.num_key_value_heads,
                "do_rotary": 1,
            },
            dtypes=(a.dtype, a.dtype, a.dtype),
            shapes=(query.shape, past_key.shape, past_value.shape),
            version=1,
        )
        return attended, present_key, present_value
