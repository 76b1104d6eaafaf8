"""Configuration of looped language models: MELT, and the LoopLM (Ouro) that it starts from.

Key names are those of Ouro's published ``config.json`` where it has them. Knows nothing of weights or training.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from melt_layers import GATES
from melt_models.configuration_form import CHUNK, FIELDS, check_configuration
from melt_models.configuration_form import GATE_KINDS as GATE_KINDS


@strict
class MeltConfig(PreTrainedConfig):
    """Shape and options of a MELT or LoopLM checkpoint.

    Letters: N = ``num_hidden_layers``, T = ``total_ut_steps``, D = ``hidden_size``, H = ``num_attention_heads``,
    Hk = ``num_key_value_heads``, dh = ``head_dim``, C = ``chunk_size``, V = ``vocab_size``.

    Args:
        total_ut_steps: loops T that the model was trained for.
        chunk_size: tokens C that training and prefill process in parallel; the caller may choose another.
            None: 500, or as many as there are positions.
        gate_kind: how the latent state is updated; ``none`` makes the model a LoopLM.
        gate_bias_init: initial value of ``b_z``. The paper does not fix it: a negative value starts a converted
            LoopLM near ``z = 0``.
        gate_ema: the fixed ``z`` of gate kind ``ema``.
        early_exit_threshold: cumulated exit probability at which a token may leave the loop; below 1 it says that the
            exit gate was trained.
        norm_placement: where a layer has norms, ``sandwich`` or ``pre``.
        exit_gate: whether the model has an exit gate; a model without loops has none.

    Raises:
        ValueError: a value outside its rule, or a key that is not part of the configuration.
    """

    model_type = "melt"

    vocab_size: int = 49152
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 65536
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: RopeParameters | dict | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    total_ut_steps: int = 4
    early_exit_threshold: float = 1.0
    chunk_size: int | None = None
    gate_kind: str = "elementwise"
    gate_bias_init: float = -4.0
    gate_ema: float = 0.2
    norm_placement: str = "sandwich"
    exit_gate: bool = True

    default_theta = 1e6

    def __post_init__(self, **kwargs):
        """Fills the derived fields and refuses unknown keys."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)
        if self.chunk_size is None:
            self.chunk_size = min(CHUNK, self.max_position_embeddings)
        unknown = sorted(key for key in kwargs if key not in _TRANSFORMERS_KEYS and not key.startswith("_"))
        if unknown:
            raise ValueError(f"unknown configuration keys {unknown}: remove them or correct their spelling")
        super().__post_init__(**kwargs)
        self._check_rules()

    def _check_rules(self) -> None:
        """Reports all broken rules at once."""
        faults: list[str] = []
        check_configuration({name: getattr(self, name) for name in FIELDS}, type(self).__name__, faults)
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""
        return float((self.rope_parameters or {}).get("rope_theta", self.default_theta))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The end-of-text tokens; ``eos_token_id`` may name none, one or several."""
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    @property
    def has_latent(self) -> bool:
        """Whether the gate carries a latent state from loop to loop."""
        return GATES[self.gate_kind].has_latent

    @property
    def cache_kind(self) -> str:
        """``shared``: one KV cache for all loops (MELT); ``per_loop``: one for each (LoopLM)."""
        return "per_loop" if self.gate_kind == "none" else "shared"


_TRANSFORMERS_KEYS = frozenset(
    {
        "architectures",
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "rope_scaling",
        "rope_theta",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
