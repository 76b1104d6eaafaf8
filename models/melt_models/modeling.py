"""MELT and LoopLM in PyTorch, read top-down: norm, RoPE, gate, attention, MLP, layer, stack, causal LM.

The equations are those of MELT (arXiv 2605.07721) over Ouro's layer (arXiv 2510.25741). This is the reference: it
favours legibility over speed and knows nothing of ONNX. Letters: B batch, L tokens, C chunk, P past tokens, D hidden
size, H query heads, Hk key/value heads, dh head size, T loops, N layers.

Where the paper is silent: the gate reads the *normed* layer input ``a``, and ``h_0 = 0``; with ``z = 0`` a MELT layer
is then exactly a LoopLM layer.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput

from melt_models.configuration import MeltConfig

GATE_INIT_STD = 1e-3
"""Standard deviation of new ``W_z`` and ``U_z``: small, so that ``b_z`` alone decides the start (our choice)."""


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes ``x`` [..., D] and keeps its type."""
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


def rope_tables(config: MeltConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each [len(positions), dh / 2] float32."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=positions.device) / config.head_dim
    angles = positions[:, None].double() * config.rope_theta**-exponent
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates ``x`` [B, heads, C, dh], first half against second half (not interleaved)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class GateLinear(nn.Linear):
    """A gate's projection; a class of its own because it starts differently from other weights."""


class Gate(nn.Module):
    """Updates the latent state once a loop: ``h_t = z_t h_{t-1} + (1 - z_t) a_t``; the kinds differ in ``z``."""

    def __init__(self, config: MeltConfig):
        super().__init__()
        self.kind = config.gate_kind
        self.ema = config.gate_ema
        if self.kind in ("elementwise", "scalar"):
            width = config.hidden_size if self.kind == "elementwise" else 1
            self.w_z = GateLinear(config.hidden_size, width)
            self.u_z = GateLinear(config.hidden_size, width, bias=False)

    def forward(self, a: Tensor, latent: Tensor | None, loop_idx: int | Tensor) -> Tensor:
        """The source of keys and values at this loop.

        Args:
            a: normed layer input, [B, C, D].
            latent: ``h_{t-1}``, [B, C, D]; None before the first loop, where it counts as zero.
            loop_idx: ``t - 1``, counted from zero.

        Returns:
            ``h_t`` [B, C, D].
        """
        if self.kind in ("none", "last"):
            return a
        if latent is None:
            latent = torch.zeros_like(a)
        if self.kind == "mean":
            return latent + (a - latent) / (loop_idx + 1)
        z = self.ema if self.kind == "ema" else torch.sigmoid(self.w_z(a) + self.u_z(latent))
        return a + z * (latent - a)


class Attention(nn.Module):
    """Grouped-query attention whose queries come from ``a`` and whose keys and values come from ``h``."""

    def __init__(self, config: MeltConfig):
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """[B, C, heads * dh] -> [B, heads, C, dh]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, a: Tensor, h: Tensor, past: "KeyValue | None", frame: "Frame") -> tuple[Tensor, "KeyValue"]:
        """Attends over past and chunk.

        Returns:
            The output [B, C, D], and keys and values of past and chunk, each [B, Hk, P + C, dh].
        """
        key, value = self.keys_values(h, frame)
        if past is not None:
            key, value = torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)
        return self.attend(a, (key, value), frame), (key, value)

    def keys_values(self, h: Tensor, frame: "Frame") -> "KeyValue":
        """The chunk's rows out of their source ``h`` [B, C, D], each [B, Hk, C, dh]."""
        return apply_rope(self.heads(self.k_proj(h)), frame.cos, frame.sin), self.heads(self.v_proj(h))

    def attend(self, a: Tensor, present: "KeyValue", frame: "Frame") -> Tensor:
        """The output [B, C, D] of queries from ``a`` over rows of past and chunk."""
        query = apply_rope(self.heads(self.q_proj(a)), frame.cos, frame.sin)
        grouped = query.shape[1] != present[0].shape[1]  # said only where it is so: it rules out CUDA's fast kernels
        out = F.scaled_dot_product_attention(query, *present, attn_mask=frame.mask, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: MeltConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, D] -> [B, C, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One layer; the gate stands between the input norm and keys and values.

    The norms whose names end in ``_2`` are those that close the sandwich; with norms before only, they do nothing.
    """

    def __init__(self, config: MeltConfig):
        super().__init__()
        self.gate = Gate(config)
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        norm = (config.hidden_size, config.rms_norm_eps)
        closing = RMSNorm if config.norm_placement == "sandwich" else nn.Identity
        self.input_layernorm, self.input_layernorm_2 = RMSNorm(*norm), closing(*norm)
        self.post_attention_layernorm, self.post_attention_layernorm_2 = RMSNorm(*norm), closing(*norm)

    def forward(
        self, x: Tensor, latent: Tensor | None, past: "KeyValue | None", frame: "Frame", loop_idx: int
    ) -> tuple[Tensor, Tensor, "KeyValue"]:
        """One layer of one loop: ``x``, the new latent state, keys and values of past and chunk."""
        a = self.input_layernorm(x)
        h = self.gate(a, latent, loop_idx)
        attended, present = self.self_attn(a, h, past, frame)
        return self.after_attention(x + self.input_layernorm_2(attended)), h, present

    def after_attention(self, x: Tensor) -> Tensor:
        """The MLP's residual branch, [B, C, D]."""
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))


KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [B, Hk, tokens, dh]."""


@dataclass
class Frame:
    """What every layer of a chunk shares: rotary tables [C, dh / 2] and the causal mask [C, P + C] (True: seen)."""

    cos: Tensor
    sin: Tensor
    mask: Tensor

    @classmethod
    def of(cls, config: MeltConfig, past_length: int, chunk: int, device: torch.device) -> "Frame":
        """The frame of ``chunk`` tokens that follow ``past_length`` others."""
        positions = torch.arange(past_length, past_length + chunk, device=device)
        seen = torch.arange(past_length + chunk, device=device)
        return cls(*rope_tables(config, positions), mask=seen[None, :] <= positions[:, None])


class KVCache:
    """Final keys and values of the tokens already processed.

    MELT has one slot for all loops; a LoopLM has one slot a loop. Functional: a chunk's rows are concatenated when
    they are final, so that gradients flow through; the runtime rewrites a preallocated buffer instead.
    """

    def __init__(self, config: MeltConfig):
        self.per_loop = config.cache_kind == "per_loop"
        self.slots: dict[tuple[int, int], KeyValue] = {}
        self.length = 0

    def past(self, loop_idx: int, layer_idx: int) -> KeyValue | None:
        """What layer ``layer_idx`` sees of earlier chunks at loop ``loop_idx``."""
        return self.slots.get((loop_idx if self.per_loop else 0, layer_idx))

    def store(self, loop_idx: int, layer_idx: int, present: KeyValue) -> None:
        """Keeps the rows of past and chunk."""
        self.slots[(loop_idx if self.per_loop else 0, layer_idx)] = present


@dataclass
class MeltOutput(ModelOutput):
    """Result of a forward pass.

    Attributes:
        loss: mean cross entropy of the next token over labels that are not -100, last loop, scalar.
        logits: last loop, [B, L, V].
        loop_hidden_states: normed value after every loop, T tensors [B, L, D].
        exit_logits: exit gate before the sigmoid, [B, L, T]; None where the model has no exit gate.
        past_key_values: the cache after these tokens.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    loop_hidden_states: tuple[Tensor, ...] | None = None
    exit_logits: Tensor | None = None
    past_key_values: KVCache | None = None


class MeltPreTrainedModel(PreTrainedModel):
    """Weight initialization and names that transformers asks for."""

    config: MeltConfig
    config_class = MeltConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules: ClassVar = ["Layer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            is_gate = isinstance(module, GateLinear)
            init.normal_(module.weight, mean=0.0, std=GATE_INIT_STD if is_gate else self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.constant_(module.bias, self.config.gate_bias_init if is_gate else 0.0)


class MeltBackbone(MeltPreTrainedModel):
    """Embedding, the looped layer stack, the norm that closes every loop, the exit gate."""

    def __init__(self, config: MeltConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1) if config.exit_gate else None
        self.post_init()

    def forward_chunk(self, input_ids: Tensor, loops: int, cache: KVCache) -> list[Tensor]:
        """Runs one chunk [B, C] through all loops in parallel and stores its final rows in ``cache``.

        Inside the chunk token i sees tokens j <= i at their loop-t state, and earlier chunks at their final state.

        Returns:
            The normed value after every loop, ``loops`` tensors [B, C, D].
        """
        chunk = input_ids.shape[1]
        frame = Frame.of(self.config, cache.length, chunk, input_ids.device)
        hidden = self.embed_tokens(input_ids)
        latents: list[Tensor | None] = [None] * len(self.layers)
        states = []
        for loop_idx in range(loops):
            for layer_idx, layer in enumerate(self.layers):
                past = cache.past(loop_idx, layer_idx)
                hidden, latents[layer_idx], present = layer(hidden, latents[layer_idx], past, frame, loop_idx)
                if cache.per_loop or loop_idx == loops - 1:
                    cache.store(loop_idx, layer_idx, present)
            hidden = self.norm(hidden)
            states.append(hidden)
        cache.length += chunk
        return states

    def forward(
        self, input_ids: Tensor, loops: int, chunk_size: int, cache: KVCache
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Processes ``input_ids`` [B, L] chunk after chunk.

        Returns:
            Normed values after every loop, T tensors [B, L, D], and exit logits [B, L, T], None without an exit gate.
        """
        chunks = [self.forward_chunk(ids, loops, cache) for ids in input_ids.split(chunk_size, dim=1)]
        states = tuple(torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True))
        if self.early_exit_gate is None:
            return states, None
        return states, torch.cat([self.early_exit_gate(state) for state in states], dim=-1)


class MeltCausalLM(MeltPreTrainedModel):
    """MELT, or LoopLM where ``config.gate_kind`` is ``none``, with its language-model head."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MeltConfig):
        super().__init__(config)
        self.model = MeltBackbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        past_key_values: KVCache | None = None,
        loops: int | None = None,
        chunk_size: int | None = None,
    ) -> MeltOutput:
        """Runs the model.

        Args:
            input_ids: tokens that follow those in ``past_key_values``, [B, L] int64.
            labels: targets aligned with ``input_ids`` and shifted here, [B, L] int64, -100 where not counted.
            past_key_values: cache of the earlier tokens; extended in place.
            loops: depth T of this call; default ``config.total_ut_steps``.
            chunk_size: tokens in parallel C; default ``config.chunk_size``. Another value gives other numbers.

        Raises:
            ValueError: ``loops`` or ``chunk_size`` below 1.
        """
        loops = self.config.total_ut_steps if loops is None else loops
        chunk_size = self.config.chunk_size if chunk_size is None else chunk_size
        for name, value in (("loops", loops), ("chunk_size", chunk_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        cache = KVCache(self.config) if past_key_values is None else past_key_values
        states, exit_logits = self.model(input_ids, loops, chunk_size, cache)
        logits = self.lm_head(states[-1])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return MeltOutput(loss, logits, states, exit_logits, cache)

    @torch.no_grad()
    def generate_greedy(
        self, input_ids: Tensor, new_tokens: int, loops: int | None = None, chunk_size: int | None = None
    ) -> Tensor:
        """Greedy continuation of ``input_ids`` [B, L], no stop rule: prefill in chunks, decode one by one.

        Returns:
            The new tokens, [B, new_tokens] int64.
        """
        out = self(input_ids, loops=loops, chunk_size=chunk_size)
        tokens = [out.logits[:, -1].argmax(-1, keepdim=True)]
        while len(tokens) < new_tokens:
            out = self(tokens[-1], past_key_values=out.past_key_values, loops=loops, chunk_size=1)
            tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
        return torch.cat(tokens, dim=1)
