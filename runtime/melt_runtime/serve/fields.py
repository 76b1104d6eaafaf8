"""What all forms of requests have in common: null is absent, values that ask for nothing pass, others must be known.

The tables name fields of OpenAI, vLLM, llama.cpp and the tools around them that this server does not have.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

SCHEMA_FIELD = "response_format.json_schema.schema"
_EMPTY: tuple[object, ...] = ("", [], {})
_NULL = {"type": "null"}
_MAX_REFUSED = 8
"""Unknown fields of one object that are told to pydantic, and so to the client: each costs microseconds."""


class Form(BaseModel):
    """A JSON object of a request.

    A field whose value is null is absent. An unknown field passes where its value is false or empty.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    changes_nothing: ClassVar[frozenset[str]] = frozenset()
    """Unknown fields that change no answer: they pass with any value."""
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    """Values with which a field asks for nothing; an unknown field passes with these only, false and empty included."""
    empty_is_absent: ClassVar[bool] = False
    """Whether optional fields that are known may be empty, too."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known, kept, refused = cls._known(), {}, 0
        for name, value in values.items():
            if cls._asks_for_nothing(name, value):
                continue
            if name not in known:
                refused += 1
                if refused > _MAX_REFUSED:
                    continue  # the object is refused anyway
            kept[name] = value
        return kept

    @classmethod
    def _asks_for_nothing(cls, name: str, value: object) -> bool:
        if value is None or (name in cls.neutral and _is_one_of(value, cls.neutral[name])):
            return True
        known = cls._known()
        if name in known:
            return cls.empty_is_absent and not known[name] and value in _EMPTY
        return name in cls.changes_nothing or (name not in cls.neutral and (value is False or value in _EMPTY))

    @classmethod
    @cache  # a body may hold thousands of forms
    def _known(cls) -> Mapping[str, bool]:
        """The names of the fields, and whether each is required."""
        return {field.alias or key: field.is_required() for key, field in cls.model_fields.items()}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The form's JSON schema: optional fields may be null, and fields that are not in it may pass."""
        reference = handler(core)
        schema = handler.resolve_ref_schema(reference)
        schema.pop("additionalProperties", None)
        for name, field in schema.get("properties", {}).items():
            if name not in schema.get("required", ()) and _NULL not in field.get("anyOf", ()):
                outside = {key: field.pop(key) for key in ("title", "default", "description") if key in field}
                schema["properties"][name] = {"anyOf": [*(field.pop("anyOf", None) or [field]), _NULL], **outside}
        return reference


def _is_one_of(value: object, values: tuple[object, ...]) -> bool:
    """Whether one of them is equal; in JSON ``true`` is not 1."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


CHANGES_NOTHING = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "verbosity"),  # OpenAI
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
        *("request_id", "priority"),  # vLLM
        "rid",  # SGLang
        *("keep_alive", "session_id", "chat_id"),  # Ollama, Open WebUI
        *("cache_prompt", "id_slot", "slot_id", "n_keep", "n_discard", "n_cache_reuse"),  # llama.cpp
        # Settings of samplers that are off, or refused where they are on.
        *("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_range", "dry_sequence_breakers"),
        *("dynatemp_exponent", "dynatemp_low", "dynatemp_high", "smoothing_curve", "xtc_threshold", "adaptive_decay"),
        *("mirostat_tau", "mirostat_eta"),
    }
)
"""Of a request for an answer."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "seed": (-1,),
    "top_k": (-1,),
    # OpenAI
    "modalities": (["text"],),
    "function_call": ("none", "auto"),
    "reasoning_effort": ("none",),
    "thinking": ({"type": "disabled"},),  # Anthropic's, taken by others
    # vLLM and SGLang
    "min_tokens": (0,),
    "length_penalty": (1,),
    "detokenize": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_reasoning": (True,),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    # llama.cpp: thoughts stay where the model writes them
    "reasoning_format": ("none", "auto"),
    "parse_tool_calls": (True,),
    "n_indent": (0,),
    "t_max_predict_ms": (0, -1),
    # llama.cpp, KoboldCpp and text-generation-webui: samplers that are off
    "n_predict": (-1,),
    "n_probs": (0,),
    "min_keep": (0,),
    "typical_p": (1,),
    "typ_p": (1,),
    "tfs_z": (1,),
    "tfs": (1,),
    "top_a": (0,),
    "top_n_sigma": (-1,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "dynatemp_range": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "smoothing_factor": (0,),
    "adaptive_target": (-1,),
    "repeat_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "num_beams": (1,),
    "min_length": (0,),
}
"""Of a request for an answer."""

MESSAGE_CHANGES_NOTHING = frozenset(
    {
        *("id", "index", "status", "metadata", "timestamp", "finish_reason"),
        *("annotations", "citations", "parsed", "cache_control", "prompt_cache_breakpoint"),
        *("reasoning_details", "reasoning_opaque", "thinking_blocks", "signature", "encrypted_content"),
        *("provider_specific_fields", "extra_content", "providerOptions"),
    }
)
"""Of a message or a part of it: what servers, clients and the ``openai`` package put there beside what is read."""
