"""Control tokens in chats: what people and tools write stays text, whatever it looks like.

A chat template writes control tokens such as ``<|im_end|>`` around the messages. The same characters inside a message
are text. To tell them apart, the chat is rendered a second time with stand-ins for the characters of its messages that
could begin a control token: they survive whatever a template does with a text, and show where the character came from.
"""

import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

_FIRST_STAND_IN = 0xF0000
"""The first character of a plane for private use."""
_MARKER = re.compile(r"<\|.*\|>|<｜.*｜>", re.DOTALL)
"""The form of control tokens that some tokenizers do not mark as special."""
_TAG = re.compile(r"</?\w+_\w+>|</?think>")
"""The form of markers that models write in text; tags of HTML, which may be tokens as well, have no such names."""
_OWN_WORDS = ("content", "reasoning_content", "thinking", "reasoning")
"""Fields of an assistant's message that hold what a model wrote."""

Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None], str]
Encode = Callable[[Tokenizer, str, bool], Encoding]
"""Tokenizes a text; the last argument: whether offsets are needed."""


class ControlTokens:
    """The control tokens of a tokenizer: those marked as special or written ``<|...|>``; those that the template names;
    and markers such as ``<think>`` and ``<tool_call>``.

    Models write the latter two in text, so they stay tokens in the assistant's own words.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, texts: Collection[str], encode: Encode):
        """Sorts the tokenizer's added tokens.

        Args:
            tokenizer: the tokenizer of the model.
            template: source of the chat template.
            texts: special tokens that are text in an answer.
            encode: encodes a text with a tokenizer.
        """
        self._tokenizer, self._encode = tokenizer, encode
        added = {token: form for token, form in tokenizer.get_added_tokens_decoder().items() if form.content}
        always = {
            token: form
            for token, form in added.items()
            if (form.special and form.content not in texts) or _MARKER.fullmatch(form.content)
        }
        named = {
            token: form
            for token, form in added.items()
            if _TAG.fullmatch(form.content) or (form.content in template and not _is_plain(form.content))
        }
        self._added = added
        self._control = {**named, **always}
        self._always = _starts(form.content for form in always.values())
        self._any = _starts(form.content for form in self._control.values())
        self._always_names = [form.content for form in always.values()]
        self._first = {form.content[0] for form in self._control.values()}
        self._folds = tokenizer.normalizer is not None and any(form.normalized for form in self._control.values())
        self._apart: _Apart | None = None

    def encode(
        self,
        plain: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        render: Render,
    ) -> list[int]:
        """Token ids of a chat.

        Args:
            plain: the rendered chat.
            messages: checked messages.
            tools: checked tools.
            render: renders messages and tools.
        """
        made = self._made(plain)
        first = self._first | {letter for letter, text in made.items() if self._first & set(text)}
        letters = iter(range(_FIRST_STAND_IN, 0x10FFFE))
        taken = set(plain)
        stand_ins = {letter: next(chr(code) for code in letters if chr(code) not in taken) for letter in sorted(first)}
        marks = _Marks(stand_ins, *self._patterns(made))
        marked = marks.render(plain, messages, tools, render)
        text = marks.removed(marked)
        if marked == text:
            return list(self._encode(self._tokenizer, text, False).ids)
        encoding = self._encode(self._tokenizer, text, True)
        if not any(self._forged(encoding, marked, marks)):
            return list(encoding.ids)
        if self._apart is None:
            self._apart = _Apart(self._tokenizer, self._added, self._control)
        return self._apart.encode(marked, marks, self._encode)

    def _made(self, plain: str) -> dict[str, str]:
        """What the normalizer makes of each character of a text, where it may make a control token of a text."""
        if not self._folds:
            return {}
        normalize = self._tokenizer.normalizer.normalize_str
        return {letter: normalize(letter) for letter in sorted(set(plain))}

    def _patterns(self, made: Mapping[str, str]) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """The first characters of all control tokens, and of those that no model writes, as a text of the letters
        in ``made`` may spell them: in capitals or with accents, where the normalizer takes them away."""
        if not self._folds:
            return self._any, self._always
        normalize = self._tokenizer.normalizer.normalize_str
        spellings: dict[str, str] = {}
        for letter, text in made.items():
            for each in set(text):
                spellings[each] = spellings.get(each, "") + letter
        dropped = "".join(letter for letter, text in made.items() if not text)
        return (
            _folded_starts([form.content for form in self._control.values()], normalize, spellings, dropped),
            _folded_starts(self._always_names, normalize, spellings, dropped),
        )

    def _forged(self, encoding: Encoding, marked: str, marks: "_Marks") -> Iterator[bool]:
        """Of each control token: whether it begins in a message."""
        return (
            marks.are_in(marked[slice(*_span(encoding, place))])
            for place, token in enumerate(encoding.ids)
            if token in self._control
        )


class _Marks:
    """Stand-ins for characters of messages that could begin a control token."""

    def __init__(self, stand_ins: Mapping[str, str], any_start: re.Pattern[str], always_start: re.Pattern[str]):
        self._stand_ins = stand_ins
        self._letters = {stand_in: letter for letter, stand_in in stand_ins.items()}
        self._any_start, self._always_start = any_start, always_start

    def render(
        self,
        plain: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        render: Render,
    ) -> str:
        """The rendered chat with stand-ins.

        Every first character of a control token is marked, so that none comes together from two texts. Where that leads
        the template elsewhere, since it looks at such characters, only whole control tokens are marked.
        """
        for mark in (self._each, self._whole):
            made = [self._message(message, mark) for message in messages], self._walk(tools, mark)
            if made == (messages, tools):
                return plain
            marked = render(*made)
            if self.removed(marked) == plain:
                break
        return marked

    def removed(self, marked: str) -> str:
        """The text that the stand-ins stand in."""
        for stand_in, letter in self._letters.items():
            marked = marked.replace(stand_in, letter)
        return marked

    def are_in(self, marked: str) -> bool:
        """Whether a text holds one."""
        return any(stand_in in marked for stand_in in self._letters)

    def _each(self, text: str) -> str:
        for letter, stand_in in self._stand_ins.items():
            text = text.replace(letter, stand_in)
        return text

    def _whole(self, text: str) -> str:
        return self._any_start.sub(self._swap, text)

    def _own(self, text: str) -> str:
        """In a model's own words: only tokens that no model writes as text."""
        return self._always_start.sub(self._swap, text)

    def _swap(self, match: re.Match[str]) -> str:
        return self._stand_ins[match[0]]

    def _message(self, message: Mapping[str, Any], mark: Callable[[str], str]) -> dict[str, Any]:
        own = _OWN_WORDS if message["role"] == "assistant" else ()
        return {mark(key): self._walk(value, self._own if key in own else mark) for key, value in message.items()}

    def _walk(self, value: Any, mark: Callable[[str], str]) -> Any:
        if isinstance(value, str):
            return mark(value)
        if isinstance(value, list):
            return [self._walk(item, mark) for item in value]
        if isinstance(value, dict):
            return {mark(key): self._walk(item, mark) for key, item in value.items()}
        return value


class _Apart:
    """The tokenizer with other names for its control tokens, so that a text can hold both them and their old names.

    It shares the model of the tokenizer. The names cannot be guessed.
    """

    def __init__(self, tokenizer: Tokenizer, added: Mapping[int, AddedToken], control: Mapping[int, AddedToken]):
        self._tokenizer, self._control = tokenizer, control
        self._names: dict[int, str] = {}
        self._twin = Tokenizer(tokenizer.model)
        if tokenizer.normalizer is not None:
            self._twin.normalizer = tokenizer.normalizer
        if tokenizer.pre_tokenizer is not None:
            self._twin.pre_tokenizer = tokenizer.pre_tokenizer
        tokens = []
        for token, form in added.items():
            # The ends stay, since a token may ask for the edge of a word there.
            name = f"{form.content[0]}{secrets.token_hex(16)}{form.content[-1]}" if token in control else form.content
            self._names[token] = name
            rules = {rule: getattr(form, rule) for rule in ("single_word", "lstrip", "rstrip", "normalized")}
            tokens.append(AddedToken(name, **rules, special=form.special))
        self._twin.add_tokens(tokens)
        self._ids = {self._twin.token_to_id(name): token for token, name in self._names.items()}

    def encode(self, marked: str, marks: _Marks, encode: Encode) -> list[int]:
        """Token ids of a text in which stand-ins mark what is text."""
        encoding = encode(self._tokenizer, marked, True)
        parts, end = [], 0
        for place, token in enumerate(encoding.ids):
            if token not in self._control:
                continue
            start, stop = _span(encoding, place)
            found = marked[start:stop]
            if marks.are_in(found) or not self._is_name(found, token):
                continue
            name = self._control[token].content
            name = name if name in found else found.strip()
            before, _, after = found.partition(name)  # spaces that the token takes in
            parts += [marked[end:start], before, self._names[token], after]
            end = stop
        text = marks.removed("".join([*parts, marked[end:]]))
        encoding = encode(self._twin, text, True)
        ids: list[int] = []
        for place, token in enumerate(encoding.ids):
            if token in self._ids:
                ids.append(self._ids[token])
            else:
                ids += self._spelled(token, encoding, place, text)
        return ids

    def _spelled(self, token: int, encoding: Encoding, place: int, text: str) -> list[int]:
        """The token; letter by letter where the model itself has made a control token of a text."""
        if token not in self._control:
            return [token]
        found = text[slice(*_span(encoding, place))]
        if not self._is_name(found, token):
            return [token]
        letters = [piece.id for letter in found for piece in self._tokenizer.model.tokenize(letter)]
        return [letter for letter in letters if letter != token]

    def _is_name(self, found: str, token: int) -> bool:
        """Whether a text is a token's own; else the model gave the token for a letter that it does not know."""
        name, normalizer = self._control[token].content, self._tokenizer.normalizer
        if found.strip() == name.strip():
            return True
        return normalizer is not None and normalizer.normalize_str(found.strip()) == normalizer.normalize_str(name)


def _span(encoding: Encoding, place: int) -> tuple[int, int]:
    """The characters of a token: one by one, since a list of all holds every other thread up for a long text."""
    span: tuple[int, int] | None = encoding.token_to_chars(place)
    return (0, 0) if span is None else span


def _is_plain(text: str) -> bool:
    """Whether a text is of words and spaces, which tokenizers add to save tokens."""
    return all(letter.isalnum() or letter.isspace() for letter in text)


def _folded_starts(
    contents: Sequence[str], normalize: Callable[[str], str], spellings: Mapping[str, str], dropped: str
) -> re.Pattern[str]:
    """As ``_starts``, whatever letters the normalizer makes to those of a text.

    Args:
        contents: the texts.
        normalize: the normalizer.
        spellings: letters that become a letter, by that.
        dropped: letters that become nothing.
    """
    between = f"[{re.escape(dropped)}]*" if dropped else ""
    starts = []
    for content in contents:
        made = [normalize(letter) for letter in content]
        letters = [
            f"[{re.escape(''.join({letter, *each, *(x for y in each for x in spellings.get(y, ''))}))}]"
            for letter, each in zip(content, made, strict=True)
        ]
        starts.append(f"{letters[0]}(?={between}{between.join(letters[1:])})")
    return re.compile("|".join(starts) or r"(?!)")


def _starts(contents: Any) -> re.Pattern[str]:
    """Matches the first character of each text that stands somewhere, also within another."""
    rests: dict[str, list[str]] = {}
    for content in contents:
        rests.setdefault(content[0], []).append(re.escape(content[1:]))
    starts = (f"{re.escape(first)}(?={'|'.join(ends)})" for first, ends in rests.items())
    return re.compile("|".join(starts) or r"(?!)")
