"""Answers to OpenAI's objects, whole or in chunks. Knows nothing of HTTP."""

import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from melt_runtime.reply import Part
from melt_runtime.request.logprobs import TokenLogprob
from melt_runtime.request.result import GenerationResult
from melt_runtime.serve.calls import Call
from melt_runtime.serve.logprobs import LogprobWriter
from melt_runtime.serve.tools import CallReader
from melt_runtime.text.codec import TextCodec


def usage_of(results: Sequence[GenerationResult], prompts: int) -> dict[str, Any]:
    """Tokens of a request's answers; ``loops_per_token`` and ``depth_histogram`` are ours.

    Args:
        results: of every choice, those of one prompt next to each other.
        prompts: how many different ones there are; each counts once, as its cached tokens do.
    """
    each = max(1, len(results) // prompts)
    prompt = sum(result.prompt_tokens for result in results[::each])
    completion = sum(len(result.token_ids) for result in results)
    depths: Counter[int] = Counter()
    for result in results:
        depths.update(result.depth_histogram)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(result.cached_tokens for result in results[::each])},
        "loops_per_token": sum(loops * count for loops, count in depths.items()) / completion if completion else 0.0,
        "depth_histogram": {str(loops): count for loops, count in sorted(depths.items())},
    }


@dataclass
class Writer:
    """Writes the objects of one request.

    Attributes:
        codec: decodes single tokens.
        model: the name that it is asked for by.
        is_chat: whether it is a chat's, or a plain completion's.
        with_logprobs: whether these were asked for.
        with_tools: whether calls are read out of answers.
        max_calls: maximum number of calls of an answer; None: no limit.
        with_usage: whether a stream ends with the usage, so that its other chunks have an empty one.
        contexts: of each choice, tokens whose text the answer continues; empty: of none.
    """

    codec: TextCodec
    model: str
    is_chat: bool
    with_logprobs: bool
    with_tools: bool
    max_calls: int | None = None
    with_usage: bool = False
    contexts: Sequence[Sequence[int]] = ()
    _id: str = field(default_factory=lambda: uuid.uuid4().hex)
    _created: int = field(default_factory=lambda: int(time.time()))
    _logprob_writers: dict[int, LogprobWriter] = field(default_factory=dict)
    _readers: dict[int, CallReader] = field(default_factory=dict)

    def whole(self, results: Sequence[GenerationResult], prompts: int) -> dict[str, Any]:
        """The object of all choices."""
        choices = []
        for index, result in enumerate(results):
            said: dict[str, Any] = {"text": result.text}
            reason: str = result.finish_reason
            if self.is_chat:
                message, reason = self._message(result)
                said = {"message": message}
            logprobs = self._logprobs(index, result.logprobs or (), result.text, is_last=True)
            choices.append({"index": index, **said, "logprobs": logprobs, "finish_reason": reason})
        return {**self._head(""), "choices": choices, "usage": usage_of(results, prompts)}

    def first(self, index: int) -> dict[str, Any]:
        """The chunk with which a chat's choice begins."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def part(self, index: int, part: Part) -> dict[str, Any]:
        """What came of a choice; ``loops`` of each new token is ours."""
        text = self._reader(index).push(part.text) if self.with_tools else part.text
        said: dict[str, Any] = {"delta": {"content": text}} if self.is_chat else {"text": text}
        return self._chunk(
            index, said, logprobs=self._logprobs(index, part.logprobs, part.text), loops=list(part.loops)
        )

    def last(self, index: int, result: GenerationResult) -> list[dict[str, Any]]:
        """The chunks with which a choice ends."""
        if not self.is_chat:
            logprobs = self._logprobs(index, (), "", is_last=True)
            waited = logprobs if logprobs and logprobs["tokens"] else None
            return [self._chunk(index, {"text": ""}, result.finish_reason, logprobs=waited)]
        if not self.with_tools:
            return [self._chunk(index, {"delta": {}}, result.finish_reason)]
        rest, calls = self._reader(index).finish()
        delta: dict[str, Any] = {"content": rest} if rest else {}
        if calls:
            forms = [call.form for call in calls[: self.max_calls]]
            delta["tool_calls"] = [{"index": place, **form} for place, form in enumerate(forms)]
        reason = "tool_calls" if calls else result.finish_reason
        return [*([self._chunk(index, {"delta": delta})] if delta else []), self._chunk(index, {"delta": {}}, reason)]

    def _reader(self, index: int) -> CallReader:
        return self._readers.setdefault(index, CallReader())

    def _message(self, result: GenerationResult) -> tuple[dict[str, Any], str]:
        """A chat's answer, and why it ended."""
        text = result.text
        calls: list[Call] = []
        if self.with_tools:
            reader = CallReader()
            text = reader.push(result.text)
            rest, calls = reader.finish()
            text += rest
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [call.form for call in calls[: self.max_calls]]}
        return message, "tool_calls" if calls else result.finish_reason

    def usage(self, results: Sequence[GenerationResult], prompts: int) -> dict[str, Any]:
        """The chunk after the last one, where usage was asked for."""
        return {**self._head(".chunk"), "choices": [], "usage": usage_of(results, prompts)}

    def _head(self, suffix: str) -> dict[str, Any]:
        kind, prefix = ("chat.completion" + suffix, "chatcmpl-") if self.is_chat else ("text_completion", "cmpl-")
        return {"id": prefix + self._id, "object": kind, "created": self._created, "model": self.model}

    def _chunk(self, index: int, said: dict[str, Any], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, **said, "finish_reason": finish_reason, **more}
        return {**self._head(".chunk"), "choices": [choice], **({"usage": None} if self.with_usage else {})}

    def _logprobs(
        self, index: int, tokens: Sequence[TokenLogprob], text: str, is_last: bool = False
    ) -> dict[str, Any] | None:
        """Of the next tokens of a choice, and the text that came with them."""
        if not self.with_logprobs:
            return None
        if index not in self._logprob_writers:
            context = self.contexts[index] if self.contexts else ()
            self._logprob_writers[index] = LogprobWriter(self.codec, context)
        writer = self._logprob_writers[index]
        return writer.chat(tokens) if self.is_chat else writer.completion(tokens, text, is_last)
