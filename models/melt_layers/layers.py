"""The layer of MELT and LoopLM in plain PyTorch, read top-down: norm, RoPE, gate, attention, MLP, layer.

The equations are those of MELT (arXiv 2605.07721) over Ouro's layer (arXiv 2510.25741). This is the reference: it
favours legibility over speed and knows nothing of ONNX, nor of transformers, so that models for any version of that
library can be built of it. Letters: B batch, C chunk, P past tokens, D hidden size, H query heads, Hk key/value heads,
dh head size.

Where the paper is silent: the gate reads the *normed* layer input ``a``, and ``h_0 = 0``; with ``z = 0`` a MELT layer
is then exactly a LoopLM layer.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerConfig(Protocol):
    """What a layer asks of a configuration; the names are those of ``config.json``."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    norm_placement: str
    gate_kind: str
    gate_ema: float

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes ``x`` [..., D] and keeps its type."""
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


def rope_tables(config: LayerConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles of ``positions`` [..., C], each [..., C, dh / 2] float32."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=positions.device) / config.head_dim
    angles = positions[..., None].double() * config.rope_theta**-exponent
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates ``x`` [B, heads, C, dh], first half against second half (not interleaved)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@dataclass(frozen=True)
class GateKind:
    """What a kind of gate has.

    Attributes:
        has_latent: a latent state that it updates; without one the state is the layer's input, and keys and values
            read what the queries read.
        is_learned: weights, by which ``z`` is computed from the layer's input and the latent state.
    """

    has_latent: bool
    is_learned: bool


GATES = {
    "none": GateKind(has_latent=False, is_learned=False),
    "elementwise": GateKind(has_latent=True, is_learned=True),
    "scalar": GateKind(has_latent=True, is_learned=True),
    "ema": GateKind(has_latent=True, is_learned=False),
    "mean": GateKind(has_latent=True, is_learned=False),
    "last": GateKind(has_latent=False, is_learned=False),
}
"""Every kind of gate. ``configuration_form`` names them as a type, and the bundle's contract for the runtime, which
imports no model; a test compares the three."""
LEARNED_GATES = tuple(name for name, kind in GATES.items() if kind.is_learned)
UNGATED = tuple(name for name, kind in GATES.items() if not kind.has_latent)


class GateLinear(nn.Linear):
    """A gate's projection; a class of its own because it starts differently from other weights."""


class Gate(nn.Module):
    """Updates the latent state once a loop: ``h_t = z_t h_{t-1} + (1 - z_t) a_t``; the kinds differ in ``z``."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        if config.gate_kind not in GATES:
            raise ValueError(f"gate_kind must be one of {', '.join(GATES)}, got {config.gate_kind!r}")
        self.kind = config.gate_kind
        self.ema = config.gate_ema
        if self.kind in LEARNED_GATES:
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
        return self.update(a, latent, loop_idx, self.w_z(a) if self.kind in LEARNED_GATES else None)

    def update(self, a: Tensor, latent: Tensor | None, loop_idx: int | Tensor, read: Tensor | None) -> Tensor:
        """As ``forward``, with the learned gates' ``W_z a`` in ``read`` [B, C, D or 1], computed elsewhere."""
        if self.kind in UNGATED:
            return a
        if latent is None:
            latent = torch.zeros_like(a)
        if self.kind == "mean":
            return latent + (a - latent) / (loop_idx + 1)
        z = self.ema if read is None else torch.sigmoid(read + self.u_z(latent))
        return a + z * (latent - a)


class Attention(nn.Module):
    """Grouped-query attention whose queries come from ``a`` and whose keys and values come from ``h``."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.group = config.num_attention_heads // config.num_key_value_heads
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
        # The queries of a group stand in one head as further rows: no key is repeated, and every kernel can run it.
        rows = query.unflatten(1, (-1, self.group)).flatten(2, 3)
        out = F.scaled_dot_product_attention(rows, *present, attn_mask=frame.mask)
        out = out.unflatten(2, (self.group, -1)).flatten(1, 2)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LayerConfig):
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

    def __init__(self, config: LayerConfig):
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
    """What every layer of a chunk shares: rotary tables [C, dh / 2] and the mask [H / Hk * C, P + C] (True: seen).

    The mask stands once for each query of a group, as the layers lay them out. Where the sequences of a batch differ,
    by padding, the three have axes [B, 1] before these.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor

    @classmethod
    def of(cls, config: LayerConfig, past_length: int, chunk: int, device: torch.device) -> "Frame":
        """The frame of ``chunk`` tokens that follow ``past_length`` others."""
        positions = torch.arange(past_length, past_length + chunk, device=device)
        keys = torch.arange(past_length + chunk, device=device)
        return cls.at(config, positions, keys[None, :] <= positions[:, None])

    @classmethod
    def at(cls, config: LayerConfig, positions: Tensor, seen: Tensor) -> "Frame":
        """The frame of tokens at ``positions`` [C] int64 that see what is True in ``seen`` [C, P + C]."""
        group = config.num_attention_heads // config.num_key_value_heads
        return cls(*rope_tables(config, positions), mask=torch.cat([seen] * group, dim=-2))
