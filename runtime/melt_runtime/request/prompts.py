"""What a caller gives to be answered, to token ids and settings: checked as a whole before anything moves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from melt_runtime.arguments import instance, shown
from melt_runtime.errors import TokenError
from melt_runtime.memory.plan import StatePlan
from melt_runtime.request.generation_config import OF_GRAMMAR, GenerationChanges, GenerationConfig
from melt_runtime.request.grammar_compiler import GrammarCompiler
from melt_runtime.request.ids import check_ids
from melt_runtime.request.settings import GenerationSettings, settle
from melt_runtime.text.codec import Message, TextCodec
from melt_runtime.text.templates import ChatEnding

Prompt = str | Sequence[Message] | Sequence[int]
"""A user's message (or plain text with ``raw``), a whole chat, or token ids."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids.

    Attributes:
        ids: token ids of all that the model is to see.
        continues: whether the answer continues the prompt's text, so that its first token keeps its leading space; an
            answer in a chat is a text of its own.
    """

    ids: list[int]
    continues: bool


@dataclass(frozen=True)
class Desk:
    """What every request of a model is checked against.

    Attributes:
        codec: tokenizer and chat template.
        defaults: what the bundle says of generation.
        plan: sizes of the state that shall answer.
        identity: tells the model from every other.
        wave_obstacle: why it cannot decode in waves; None where it can.
        grammars: compiles those that answers shall follow.
    """

    codec: TextCodec
    defaults: GenerationConfig
    plan: StatePlan
    identity: str
    wave_obstacle: str | None
    grammars: GrammarCompiler

    def encode(self, prompt: Prompt | list[Message], is_chat: bool) -> list[int]:
        """Token ids of a whole chat, of text as it is, or of ids.

        Raises:
            CapacityError: more ids than the state holds.
            TokenError: an empty prompt, ids outside the vocabulary, or messages that the template refuses.
        """
        if is_chat:
            ids = self.codec.encode_chat(cast(Sequence[Message], prompt), max_tokens=self.plan.capacity)
        elif isinstance(prompt, str):
            self.codec.require_length(prompt, self.plan.capacity)
            ids = self.codec.encode(prompt)
        else:
            ids = cast(list[int], prompt)
        return check_ids(ids, self.plan.shape, self.plan.require_total)

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, ending: ChatEnding
    ) -> EncodedPrompt:
        """A chat as ``TextCodec.encode_chat`` encodes it, within the capacity; errors as for ``encode``."""
        ids = self.codec.encode_chat(messages, tools, ending, self.plan.capacity)
        return EncodedPrompt(ids, continues=ending == "continue")

    def read(self, prompt: Prompt | EncodedPrompt, raw: bool) -> EncodedPrompt:
        """A prompt that stands alone; errors as for ``encode``, and those of ``as_chat``."""
        if isinstance(prompt, EncodedPrompt):
            return prompt
        chat = as_chat(prompt, raw)
        return EncodedPrompt(self.encode(prompt if chat is None else chat, chat is not None), chat is None)

    def settle(
        self, said: GenerationConfig, prompt_tokens: int, defaults: GenerationConfig | None = None
    ) -> GenerationSettings:
        """The settings of an answer.

        Args:
            said: by the caller.
            prompt_tokens: number of tokens before the answer.
            defaults: for fields that the caller leaves out; the bundle has the others.

        Raises:
            CapacityError: prompt and ``max_new_tokens`` do not fit.
            QueueError: too many grammars are in use, or take long to compile.
            ValueError: a depth that the state cannot run, stop tokens outside the vocabulary, or a grammar that cannot
                be compiled.
        """
        shape, plan = self.plan.shape, self.plan
        room = plan.capacity - prompt_tokens + 1
        bundle = self.defaults if defaults is None else defaults.over(self.defaults)
        settings = settle(said, bundle, shape.trained_loops, room, shape.has_exit_gate)
        # The last new token is never run, so it takes no row.
        plan.require_total(prompt_tokens + max(settings.max_new_tokens, 1) - 1)
        plan.require_loops(settings.loops)
        if settings.lag is not None and self.wave_obstacle is not None:
            raise ValueError(f"decode must be 'plain' here, got 'wave': {self.wave_obstacle}")
        for name, tokens in (("stop_ids", said.stop_ids), ("logit_bias", said.logit_bias)):
            unknown = [token for token in tokens or () if token >= shape.vocab_size]
            if unknown:
                raise ValueError(f"{name} must be below the vocabulary's {shape.vocab_size}, got {unknown[:8]}")
        return self._with_grammar(settings, said)

    def _with_grammar(self, settings: GenerationSettings, said: GenerationConfig) -> GenerationSettings:
        """The settings with what keeps the answer to its grammar, after all other processors."""
        for kind in OF_GRAMMAR:
            if (source := getattr(said, kind)) is None:
                continue
            if missing := {*(self.defaults.stop_ids or ())} - {*settings.stop_ids}:
                raise ValueError(
                    f"stop_ids must have the bundle's with {kind}, since one of them ends the answer; missing: "
                    f"{sorted(missing)}"
                )
            processor = self.grammars.processor(kind, source)
            return replace(settings, logits_processors=(*settings.logits_processors, processor))
        return settings


def say(config: GenerationConfig | None, changes: GenerationChanges) -> GenerationConfig:
    """What a caller says: single fields over a whole config.

    Raises:
        ValueError: a field that is unknown or outside its rule.
    """
    config = GenerationConfig() if config is None else config
    return cast(GenerationConfig, instance("config", config, GenerationConfig, "a GenerationConfig")).with_changes(
        **changes
    )


def user_message(text: str) -> Message:
    """A user's message.

    Raises:
        TokenError: blank text.
    """
    if not text.strip():
        raise TokenError("the prompt is empty: give at least one character")
    return {"role": "user", "content": text}


def as_chat(prompt: Prompt, raw: bool) -> list[Message] | None:
    """The prompt as the messages of a chat of its own; None where it is raw text or ids.

    Raises:
        TokenError: nothing in it.
        ValueError: neither text, messages nor token ids.
    """
    if isinstance(prompt, str):
        return None if raw else [user_message(prompt)]
    if isinstance(prompt, np.ndarray):
        return None
    if isinstance(prompt, bytes | bytearray | memoryview) or not isinstance(prompt, Sequence):
        raise ValueError(f"prompt must be text, messages or token ids, got {shown(prompt)}")
    for first in prompt:  # its length may say another thing than what is in it
        return list(cast(Sequence[Message], prompt)) if isinstance(first, Mapping) else None
    raise TokenError("prompt must hold at least one message or token id")
