"""MELT as a causal language model over the transformers that optimum exports: a fixed number of loops, one KV cache.

Every call is one chunk: its tokens run all loops together and see the tokens of earlier calls at their final state.
Letters: B batch, C tokens of this call, P tokens of earlier calls, D hidden size, T loops, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from melt_layers import Frame, KeyValue, Layer, RMSNorm, run_loops


class MeltConfig(PretrainedConfig):
    """``config.json`` of a MELT checkpoint as it stands; ``melt_models.MeltConfig`` describes its keys.

    Raises:
        ValueError: keys that the model needs are missing or hold what they cannot, all in one message; or the model
            keeps a KV cache for each of several loops.
    """

    model_type = "melt"

    def __init__(self, **values: Any):
        super().__init__(**values)
        if not values:  # transformers compares with an empty configuration when it saves one
            return
        faults = [
            f"{name} must be {rule}, got {getattr(self, name, None)!r}"
            for names, rule, holds in _RULES
            for name in names
            if not holds(getattr(self, name, None))
        ]
        plain = PretrainedConfig()
        unknown = [name for name in values if name not in _FIELDS and not hasattr(plain, name) and name != "rope_theta"]
        faults += [f"{name} is unknown, got {values[name]!r}: it may change what is computed" for name in unknown]
        faults += [
            f"{name} must be {wanted!r}, got {values[name]!r}: not implemented"
            for name, wanted in {"hidden_act": "silu", "rope_scaling": None}.items()
            if values.get(name, wanted) != wanted
        ]
        if faults:
            raise ValueError(f"config.json of a MELT checkpoint: {'; '.join(faults)}: save it with melt_models")
        self.require_plain(self.total_ut_steps)

    def require_plain(self, loops: int) -> None:
        """Refuses what cannot be a plain decoder.

        Raises:
            ValueError: ``loops`` is not a whole number from 1, or the model is a LoopLM and it is above 1.
        """
        if not isinstance(loops, int) or isinstance(loops, bool) or loops < 1:
            raise ValueError(f"loops must be a whole number of at least 1, got {loops!r}")
        if self.gate_kind == "none" and loops > 1:
            raise ValueError(
                f"a plain decoder has one KV cache a layer, and a LoopLM with {loops} loops needs one for each loop: "
                "train it to MELT first (docs/training.md), or export it with 1 loop"
            )

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""
        return float(self.rope_parameters["rope_theta"])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


_PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
_FIELDS = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "total_ut_steps", "chunk_size"),
        *("rms_norm_eps", "rope_parameters", "rope_scaling", "hidden_act", "initializer_range", "norm_placement"),
        *("gate_kind", "gate_bias_init", "gate_ema", "early_exit_threshold", "exit_gate", "tie_word_embeddings"),
        *("attn_implementation", "experts_implementation"),  # which transformers 5 writes
    }
)
_RULES: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (
        (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "max_position_embeddings", "total_ut_steps"),
        ),
        "a whole number of at least 1",
        _is_count,
    ),
    (("rms_norm_eps", "gate_ema"), "a number above 0", _is_positive),
    (
        ("rope_parameters",),
        "an object with a rope_theta above 0, and no rope_type but 'default'",
        lambda value: (
            isinstance(value, dict)
            and _is_positive(value.get("rope_theta"))
            and all(value.get(name) in (None, wanted) for name, wanted in _PLAIN_ROPE.items())
            and not value.keys() - {"rope_theta", *_PLAIN_ROPE}
        ),
    ),
    (("gate_kind", "norm_placement"), "a string", lambda value: isinstance(value, str)),
)
"""What the model needs of its configuration."""


class MeltBackbone(nn.Module):
    """Embedding, the looped layer stack, the norm that closes every loop."""

    def __init__(self, config: MeltConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MeltForCausalLM(PreTrainedModel, GenerationMixin):
    """MELT with ``config.total_ut_steps`` loops; to any caller a decoder with one key and one value a layer."""

    config_class = MeltConfig
    base_model_prefix = "model"
    _tied_weights_keys = ["lm_head.weight"]  # noqa: RUF012 (transformers' own form)
    _keys_to_ignore_on_load_unexpected = [r"early_exit_gate\."]  # noqa: RUF012

    def __init__(self, config: MeltConfig):
        super().__init__(config)
        self.model = MeltBackbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, name_or_path: Any, *args: Any, config: Any = None, **options: Any) -> "MeltForCausalLM":
        """As transformers 5 loads it: a stored head that is not the embedding counts, whatever the configuration says.

        Raises:
            ValueError: tensors are missing, or are none of the model's.
        """
        with_report = options.pop("output_loading_info", False)
        if not isinstance(config, MeltConfig):
            config = MeltConfig.from_pretrained(name_or_path if config is None else config, **options)
        is_tied, config.tie_word_embeddings = config.tie_word_embeddings, False
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # the warning that a tied head is not stored; other tensors are told below
        try:
            model, report = super().from_pretrained(
                name_or_path, *args, config=config, output_loading_info=True, **options
            )
        finally:
            logging.set_verbosity(level)
        head, embedding = model.lm_head, model.model.embed_tokens
        missing = set(report["missing_keys"]) - ({"lm_head.weight"} if is_tied else set())
        faults = [
            *(f"missing {name}" for name in missing),
            *(f"unexpected {name}" for name in report["unexpected_keys"]),
        ]
        if faults:
            raise ValueError(f"{name_or_path} cannot be loaded: {', '.join(sorted(faults))}")
        if is_tied and ("lm_head.weight" in report["missing_keys"] or torch.equal(head.weight, embedding.weight)):
            head.weight, config.tie_word_embeddings = embedding.weight, True
        model.config.tie_word_embeddings = config.tie_word_embeddings
        return (model, report) if with_report else model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Runs one chunk.

        Args:
            input_ids: [B, C] int64.
            attention_mask: 0 where a token is padding, [B, P + C]; default: none is.
            position_ids: [B, C] int64; default: P, P + 1, ...
            past_key_values: final keys and values of earlier calls.
            use_cache: whether to return the cache.

        Returns:
            Logits of the last loop [B, C, V], and the cache of P + C tokens.
        """
        past = past_key_values.to_legacy_cache() if past_key_values is not None else ()
        past_length = past[0][0].shape[2] if past else 0
        frame = self.frame(input_ids, attention_mask, position_ids, past_length)
        presents: dict[int, KeyValue] = {}  # of each layer, after the latest loop

        def run_layer(
            layer: Layer, x: Tensor, latent: Tensor | None, loop_idx: int, layer_idx: int
        ) -> tuple[Tensor, Tensor]:
            before = past[layer_idx] if past else None
            x, latent, presents[layer_idx] = layer(x, latent, before, frame, loop_idx)
            return x, latent

        hidden = self.model.embed_tokens(input_ids)
        hidden = run_loops(hidden, self.model.layers, self.model.norm, self.config.total_ut_steps, run_layer)[-1]
        cache = DynamicCache.from_legacy_cache(tuple(presents.values())) if use_cache is not False else None
        return CausalLMOutputWithPast(logits=self.lm_head(hidden), past_key_values=cache)

    def frame(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past_length: int
    ) -> Frame:
        """The frame of these tokens, each sequence with padding of its own: its tensors begin with axes [B, 1]."""
        places = torch.arange(past_length, past_length + input_ids.shape[1], device=input_ids.device)
        if position_ids is None:
            position_ids = places.expand(input_ids.shape)
        keys = torch.arange(past_length + input_ids.shape[1], device=input_ids.device)
        mask = (keys[None, :] <= places[:, None])[None, None]
        if attention_mask is not None:
            # A padding token sees itself, so that no row is empty: nobody sees it.
            itself = (keys[None, :] == places[:, None])[None, None]
            mask = mask & (attention_mask[:, None, None, :] != 0) | itself
        return Frame.at(self.config, position_ids[:, None], mask)
