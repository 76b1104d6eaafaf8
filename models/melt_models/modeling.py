"""MELT and LoopLM in PyTorch over the layer of ``melt_layers``: cache, looped stack, causal LM.

This is the reference: it favours legibility over speed and knows nothing of ONNX. Letters: B batch, L tokens, C chunk,
P past tokens, D hidden size, Hk key/value heads, dh head size, T loops, N layers, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init

from melt_layers import Frame, GateLinear, KeyValue, Layer, RMSNorm, run_loops
from melt_models.configuration import MeltConfig

GATE_INIT_STD = 1e-3
"""Standard deviation of new ``W_z`` and ``U_z``: small, so that ``b_z`` alone decides the start (our choice)."""


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


@dataclass(frozen=True)
class MeltOutput:
    """Result of a forward pass. No ``ModelOutput`` of transformers, whose releases rename its fields.

    Attributes:
        logits: last loop, [B, L, V].
        loop_hidden_states: normed value after every loop, T tensors [B, L, D].
        cache: of these tokens and all before them; ``past_key_values`` is the same.
        exit_logits: exit gate before the sigmoid, [B, L, T]; None where the model has no exit gate.
        loss: mean cross entropy of the next token over labels that are not -100, last loop, scalar; None without
            labels.
    """

    logits: Tensor
    loop_hidden_states: tuple[Tensor, ...]
    cache: KVCache
    exit_logits: Tensor | None = None
    loss: Tensor | None = None

    @property
    def past_key_values(self) -> KVCache:
        """The cache, by the name that transformers gave it before 5.24."""
        return self.cache


class MeltPreTrainedModel(PreTrainedModel):
    """Weight initialization and names that transformers asks for."""

    config: MeltConfig
    config_class = MeltConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules: ClassVar = ["Layer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Gives a module its initial weights.

        Raises:
            ValueError: it has a parameter that no rule here covers: its memory would stay as it was found.
        """
        covered: tuple[str, ...] = ("weight", "bias") if isinstance(module, nn.Linear) else ()
        covered = ("weight",) if isinstance(module, (RMSNorm, nn.Embedding)) else covered
        for name, parameter in module.named_parameters(recurse=False):
            if name not in covered and not getattr(parameter, "_is_hf_initialized", False):
                raise ValueError(
                    f"{type(module).__name__}.{name} has no initial value: give it one in "
                    "MeltPreTrainedModel._init_weights"
                )
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
        frame = Frame.of(self.config, cache.length, input_ids.shape[1], input_ids.device)

        def run_layer(
            layer: Layer, x: Tensor, latent: Tensor | None, loop_idx: int, layer_idx: int
        ) -> tuple[Tensor, Tensor]:
            x, latent, present = layer(x, latent, cache.past(loop_idx, layer_idx), frame, loop_idx)
            if cache.per_loop or loop_idx == loops - 1:
                cache.store(loop_idx, layer_idx, present)
            return x, latent

        states = run_loops(self.embed_tokens(input_ids), self.layers, self.norm, loops, run_layer)
        cache.length += input_ids.shape[1]
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
            TypeError: ``past_key_values`` is a cache of another kind.
        """
        loops = self.config.total_ut_steps if loops is None else loops
        chunk_size = self.config.chunk_size if chunk_size is None else chunk_size
        for name, value in (("loops", loops), ("chunk_size", chunk_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not isinstance(past_key_values, KVCache | None):
            raise TypeError(f"past_key_values must be a KVCache or None, got {type(past_key_values).__name__}")
        cache = KVCache(self.config) if past_key_values is None else past_key_values
        states, exit_logits = self.model(input_ids, loops, chunk_size, cache)
        logits = self.lm_head(states[-1])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return MeltOutput(logits, states, cache, exit_logits, loss)

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
            out = self(tokens[-1], past_key_values=out.cache, loops=loops, chunk_size=1)
            tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
        return torch.cat(tokens, dim=1)


AutoConfig.register(MeltConfig.model_type, MeltConfig, exist_ok=True)
AutoModelForCausalLM.register(MeltConfig, MeltCausalLM, exist_ok=True)
