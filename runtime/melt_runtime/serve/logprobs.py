"""Logarithms of probabilities to OpenAI's objects: every token with its own text and bytes. Knows nothing of HTTP."""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any

from melt_runtime.request.logprobs import TokenLogprob
from melt_runtime.text.codec import TextCodec


class LogprobWriter:
    """Writes the logprobs of one answer, whose tokens it reads in their order.

    The bytes of all tokens together are the text, but for special tokens, which have those of their names. A token that
    is part of a character is named by its bytes (``bytes:\\xe4\\xb8``, as OpenAI does). Of several tokens at one place
    with the same text the first is named by it, the others by their ids (``token_id:65``, as vLLM does).
    """

    def __init__(self, codec: TextCodec, context: Sequence[int]):
        """Starts an answer.

        Args:
            codec: the model's tokenizer.
            context: tokens whose text the answer continues.
        """
        self._codec, self._decoder = codec, codec.stream(context)
        self._characters = self._shown = 0  # of the tokens' text, and of the answer's
        self._waiting: list[tuple[str, float, dict[str, float], int]] = []

    def chat(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The object of a chat."""
        content = []
        for one in tokens:
            entries = {token: self._entry(token, name, value) for token, name, value in self._names(one)}
            tops = [entries[token] for token, _ in one.top]
            content.append({**entries[one.token_id], "top_logprobs": tops})
            self._decoder.push(one.token_id)
        return {"content": content, "refusal": None}

    def completion(self, tokens: Sequence[TokenLogprob], text: str, is_last: bool) -> dict[str, Any]:
        """The object of a plain completion.

        A token whose place in the text is not there yet waits: a stop string may end the text before it.

        Args:
            tokens: the next ones.
            text: the next of the answer.
            is_last: whether no more text comes.
        """
        self._shown += len(text)
        for one in tokens:
            names = {token: name for token, name, _ in self._names(one)}
            top = {names[token]: value for token, value in one.top}
            self._waiting.append((names[one.token_id], one.logprob, top, self._read(one.token_id)))
        count = sum(is_last or offset <= self._shown for *_, offset in self._waiting)
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        return {
            "tokens": [name for name, *_ in ready],
            "token_logprobs": [logprob for _, logprob, *_ in ready],
            "top_logprobs": [top for *_, top, _ in ready],
            "text_offset": [min(offset, self._shown) for *_, offset in ready],
        }

    def _read(self, token: int) -> int:
        """Reads a token, and returns the place in the text of its first character, which may have begun before it."""
        text = self._decoder.push(token)
        added, offset = self._decoder.added, self._characters
        if added and added[0] & 0xC0 != 0x80:  # bytes held back before belong to no character, and show before it
            offset += len(text) - len(getincrementaldecoder("utf-8")("replace").decode(added))
        self._characters += len(text)
        return offset

    def _names(self, one: TokenLogprob) -> list[tuple[int, str, float]]:
        """(token, name, value) of the chosen token and of those that could have come in its place."""
        values = {one.token_id: one.logprob} | dict(one.top)
        names: dict[str, int] = {}
        for token in values:
            name = self._name(token)
            names[f"token_id:{token}" if name in names else name] = token
        return [(token, name, values[token]) for name, token in names.items()]

    def _name(self, token: int) -> str:
        added = self._bytes(token)
        try:
            text = added.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in added)
        return text or self._codec.tokenizer.id_to_token(token) or f"token_id:{token}"

    def _bytes(self, token: int) -> bytes:
        special = self._codec.special_name(token)
        return self._decoder.peek(token) if special is None else special.encode()

    def _entry(self, token: int, name: str, value: float) -> dict[str, Any]:
        return {"token": name, "logprob": value, "bytes": list(self._bytes(token))}
