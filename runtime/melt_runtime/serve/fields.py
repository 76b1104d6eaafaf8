"""What all forms of requests have in common: null is absent, values that ask for nothing pass, others must be known.

The tables name fields of OpenAI, vLLM, llama.cpp and the tools around them that this server does not have.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

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
        *("cache_prompt", "id_slot", "slot_id"),  # llama.cpp
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
    # vLLM and SGLang
    "min_tokens": (0,),
    "length_penalty": (1,),
    "detokenize": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    # llama.cpp, KoboldCpp and text-generation-webui: samplers that are off
    "n_predict": (-1,),
    "n_probs": (0,),
    "n_keep": (0,),
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
    "repeat_penalty": (1,),
}
"""Of a request for an answer."""

MESSAGE_CHANGES_NOTHING = frozenset(
    {
        *("id", "annotations", "parsed", "cache_control"),
        *("reasoning_details", "thinking_blocks", "provider_specific_fields", "extra_content"),
    }
)
"""Of a message: what servers, the ``openai`` package and LiteLLM put into one beside what a chat template reads."""
