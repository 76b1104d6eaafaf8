"""L0: stop strings, streaming without half characters, long texts, the chat template."""

import json
from itertools import chain, pairwise
from types import SimpleNamespace

import pytest
from conftest import MELT_TINY
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from melt_runtime.errors import BundleError, CapacityError, TokenError
from melt_runtime.request.answer import AnswerText
from melt_runtime.request.generation_config import GenerationConfig
from melt_runtime.request.prompts import Desk
from melt_runtime.request.settings import settle
from melt_runtime.text.codec import TextCodec
from melt_runtime.text.stops import StopMatcher


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    """A byte-level tokenizer without merges: one token a byte, so that characters are split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258,
        special_tokens=["<|user|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
        "{% else %}{{ raise_exception('no role ' ~ m.role) }}{% endif %}{% endfor %}<|end|>"
    )
    return TextCodec(tokenizer, template)


def feed(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher, shown = StopMatcher(stops), ""
    for piece in pieces:
        shown += matcher.push(piece)
        if matcher.found is not None:
            return shown, matcher.found
    return shown + matcher.flush(), None


def test_stop_string_across_pieces_is_never_shown():
    assert feed(["STOP"], ["one S", "TO", "P two"]) == ("one ", "STOP")


def test_what_only_looked_like_a_stop_is_shown():
    assert feed(["STOP"], ["one ST", "ART"]) == ("one START", None)
    assert feed(["STOP"], ["one STO"]) == ("one STO", None)


def test_the_earliest_stop_wins():
    assert feed(["cd", "b"], ["abcd"]) == ("a", "b")


@given(
    text=st.text("ab.", max_size=30),
    stops=st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_pieces_do_not_matter(text, stops, cuts):
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    shown, found = feed(stops, pieces)
    assert not any(stop in shown for stop in stops)
    if found is None:
        assert shown == text
    else:
        assert text.startswith(shown + found)


@given(st.text(min_size=1, max_size=20).filter(lambda text: "\ufffd" not in text))
def test_streaming_never_shows_half_a_character(codec, text):
    ids = codec.encode(text)
    decoder = codec.stream()
    pieces = [decoder.push(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text


def byte_fallback() -> Tokenizer:
    """As Llama's: words with a mark in front, and a token for each byte of what no word covers."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁café", "é", "\ufffd", "世"]
    model = models.BPE({word: place for place, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def word_pieces() -> Tokenizer:
    words = ["[UNK]", "[SEP]", "a", "##b", "don", "'", "##t", ".", "!", "é", "##é", "\ufffd"]
    tokenizer = Tokenizer(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[SEP]"])
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def marked() -> Tokenizer:
    words = ["<unk>", "▁", "▁▁", "▁a", "b", "世", "\ufffd"]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def bytes_alone() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(sorted(BYTES))}, []))
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


BYTES = pre_tokenizers.ByteLevel.alphabet()
TOKENIZERS = {
    "bytes": bytes_alone(),
    "byte fallback": byte_fallback(),
    "word pieces": word_pieces(),
    "marked words": marked(),
    "melt-tiny": Tokenizer.from_file(str(MELT_TINY / "tokenizer.json")),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_a_stream_shows_what_decoding_at_once_shows(name, data):
    """Any tokens, in any order, some of which the tokenizer has not: pieces and flush together, and their bytes."""
    tokenizer = TOKENIZERS[name]
    if name == "byte fallback":  # of stray bytes: below
        places = st.one_of(st.integers(258, tokenizer.get_vocab_size() + 2).map(lambda token: [token]), CHARACTERS)
        ids = [*chain.from_iterable(data.draw(st.lists(places, max_size=12)))]
    else:
        ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 2), max_size=30))
    decoder, added = TextCodec(tokenizer, None).stream(), b""
    pieces = []
    for token in ids:
        peeked = decoder.peek(token)
        pieces.append(decoder.push(token))
        assert decoder.added == peeked
        added += peeked
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(pieces) + decoder.flush() == expected
    assert decoder.flush() == ""
    assert expected.startswith(added.decode("utf-8", "replace").rstrip("\ufffd"))
    decoder = TextCodec(tokenizer, None).stream(ids)  # a context is not shown
    pieces = [decoder.push(token) for token in ids]
    both = tokenizer.decode([*ids, *ids], skip_special_tokens=True)
    if "\ufffd" not in both:
        assert both == expected + "".join(pieces) + decoder.flush()


CHARACTERS = st.characters(codec="utf-8").map(lambda letter: [2 + byte for byte in letter.encode()])
"""The byte tokens of a character, as ``byte_fallback`` numbers them."""


@pytest.mark.parametrize("name", ["bytes", "byte fallback"])
@pytest.mark.parametrize(
    ("given", "pieces"),
    [
        ("aé", ["a", "", "é"]),
        ("世🙂", ["", "", "世", "", "", "", "🙂"]),
        (b"\xe4\xb8\x96\xff", ["", "", "世", "\ufffd"]),  # a stray byte takes nothing else with it
        (b"\xff\xff\x80a", ["\ufffd", "\ufffd", "\ufffd", "a"]),
        (b"\xe4\xb8", ["", ""]),
    ],
)
def test_a_character_is_shown_with_its_last_byte(name, given, pieces):
    tokenizer = TOKENIZERS[name]
    letters = dict(zip(range(256), byte_letters(), strict=True))
    content = given if isinstance(given, bytes) else given.encode()
    ids = [tokenizer.token_to_id(letters[byte] if name == "bytes" else f"<0x{byte:02X}>") for byte in content]
    special = tokenizer.token_to_id("<|end|>" if name == "bytes" else "<s>")
    decoder = TextCodec(tokenizer, None).stream()
    shown = [decoder.push(token) + decoder.push(special) for token in ids]  # special tokens part no character
    assert shown == pieces
    assert decoder.flush() == ("\ufffd" * (2 if name == "byte fallback" else 1) if pieces[-1] == "" else "")


@pytest.mark.parametrize(
    ("name", "prompt", "answer", "alone", "following"),
    [
        ("byte fallback", ["b"], ["▁a", "<0xC3>", "<0xA9>", "▁café"], "aé café", " aé café"),
        ("byte fallback", ["<s>", "b", "<s>"], ["▁a"], "a", " a"),
        ("byte fallback", ["<s>"], ["▁a"], "a", "a"),  # nothing stands before it
        ("byte fallback", ["<0xE4>", "<0xB8>"], ["<0x96>", "▁a"], "\ufffd a", "世 a"),
        # Half a character of the prompt that the answer does not complete is the prompt's.
        ("byte fallback", ["<0xE4>", "<0xB8>"], ["▁a"], "a", " a"),
        ("byte fallback", ["<0xE4>", "<0xB8>"], [], "", ""),
        ("byte fallback", ["<0xE4>"], ["<0xB8>", "▁a"], "\ufffd a", "\ufffd a"),
        ("byte fallback", ["<0xE4>"], ["<0xB8>"], "\ufffd", "\ufffd"),
        ("byte fallback", ["<0xEF>", "<0xBF>"], ["<0xBD>"], "\ufffd", "\ufffd"),
        ("bytes", ["ä", "¸"], ["ĸ", "a"], "\ufffda", "世a"),
        ("bytes", ["ä", "¸"], ["a"], "a", "a"),
        ("bytes", ["ä", "¸"], ["ä", "¸", "ĸ"], "世", "世"),
        ("bytes", ["ä", "¸"], [], "", ""),
        ("bytes", ["ä"], ["¸", "a"], "\ufffda", "\ufffda"),
        ("bytes", ["ä"], ["¸"], "\ufffd", "\ufffd"),
        ("marked words", ["b"], ["▁a", "b"], "ab", " ab"),
        ("word pieces", ["don"], ["##t", "a"], "##t a", "t a"),
        ("melt-tiny", ["Ġ"], ["ĠAna", "."], "Ana.", " Ana."),
    ],
)
def test_an_answer_that_continues_a_text_keeps_its_first_space(name, prompt, answer, alone, following):
    tokenizer = TOKENIZERS[name]
    ids, codec = [tokenizer.token_to_id(word) for word in answer], TextCodec(tokenizer, None)
    for context, expected in (([], alone), ([tokenizer.token_to_id(word) for word in prompt], following)):
        decoder = codec.stream(context)
        assert "".join(map(decoder.push, ids)) + decoder.flush() == expected


def byte_letters() -> list[str]:
    """The letter by which a byte-level tokenizer writes each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def test_a_text_that_ends_in_half_a_character_is_shown(codec):
    ids = codec.encode("a 🙂")[:-1]
    decoder = codec.stream()
    assert "".join(decoder.push(token) for token in ids) == "a "
    assert decoder.flush() == "\ufffd"
    assert decoder.push(codec.encode("b")[0]) == "b"  # nothing of the last answer is left


def test_what_is_no_text_is_refused_by_name(codec):
    with pytest.raises(TokenError, match=r"the prompt must be text, got the half character U\+D83D at place 2"):
        codec.encode("ab\ud83d")


def test_truncation_and_padding_are_switched_off(tmp_path):
    tokenizer = Tokenizer.from_file(str(MELT_TINY / "tokenizer.json"))
    whole = tokenizer.encode("one two three four five", add_special_tokens=False).ids
    tokenizer.enable_truncation(max_length=3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("")
    assert TextCodec.read(tmp_path).encode("one two three four five") == whole


@pytest.mark.parametrize(
    "changes",
    [
        {"model": 5},
        {"model": {"type": "Unigram", "unk_id": 99, "vocab": [["a", 0.0]]}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # the library panics
    ],
)
def test_a_tokenizer_that_the_library_refuses_is_a_bundle_error(tmp_path, changes):
    content = json.loads((MELT_TINY / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | changes))
    (tmp_path / "chat_template.jinja").write_text("")
    with pytest.raises(BundleError, match=r"tokenizer.json cannot be read: ."):
        TextCodec.read(tmp_path)


def test_text_that_the_library_refuses_is_a_token_error():
    codec = TextCodec(Tokenizer(models.WordLevel({"a": 0}, unk_token="none")), None)
    with pytest.raises(TokenError, match="the tokenizer refuses the prompt: WordLevel error"):
        codec.encode("b")


def test_special_tokens_are_not_text(codec):
    decoder = codec.stream()
    ids = [codec.tokenizer.token_to_id("<|end|>"), *codec.encode("hi"), codec.tokenizer.token_to_id("<|end|>")]
    assert "".join(decoder.push(token) for token in ids) == "hi"


def test_empty_prompts_are_refused(codec):
    with pytest.raises(TokenError, match="empty"):
        codec.encode("")
    with pytest.raises(TokenError, match="empty"):
        TextCodec(codec.tokenizer, "{{ messages[0].content }}").encode_chat([{"role": "user", "content": ""}])
    with pytest.raises(TokenError, match="at least one message"):
        codec.render([])


def test_template_renders_and_refuses_by_its_own_words(codec):
    assert codec.render([{"role": "user", "content": "hi"}]) == "<|user|>hi<|end|>"
    with pytest.raises(TokenError, match="no role system"):
        codec.render([{"role": "system", "content": "hi"}])


def test_a_missing_template_names_the_way_out(codec):
    with pytest.raises(TokenError, match="raw=True"):
        TextCodec(codec.tokenizer, None).render([{"role": "user", "content": "hi"}])


def test_a_broken_template_is_a_bundle_error(codec):
    with pytest.raises(BundleError, match="not a template"):
        TextCodec(codec.tokenizer, "{% if %}")


@pytest.mark.parametrize("drops", [False, True])
def test_a_text_is_refused_by_its_length_before_it_is_tokenized(drops, monkeypatch):
    """For every tokenizer: by its longest token where each character has one, else by a generous bound."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if drops:
        tokenizer.normalizer = normalizers.Replace(" ", "")
    codec, most = TextCodec(tokenizer, "{{ messages[0].content }}"), 64 * 50 + 65536 if drops else 2 * 50
    desk = Desk(codec, GenerationConfig(), SimpleNamespace(capacity=50), "", None, None)
    codec.require_length("ab" * (most // 2), 50)
    monkeypatch.setattr("melt_runtime.text.codec._encode", None)
    text = "a" * (most + 1)
    for prompt, is_chat in ((text, False), ([{"role": "user", "content": text}], True)):
        with pytest.raises(CapacityError, match=f"{most + 1} characters .* the capacity is 50: at most {most} "):
            desk.encode(prompt, is_chat)


def test_long_texts_are_tokenized_as_short_ones_are(codec):
    """Where other threads go on meanwhile: in batches of one."""
    for tokenizer, text in (
        (codec.tokenizer, "aé 🙂<|end|>" * 3000),
        (TOKENIZERS["word pieces"], "a don't b. " * 3000),
    ):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        long = TextCodec(tokenizer, None)
        assert long.encode(text) == ids
        assert long.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)


def answer_of(codec: TextCodec, names: list[str], **settings) -> tuple[str, int]:
    """The text of an answer, and how many of its tokens were needed to end it."""
    answer = AnswerText(codec, settle(GenerationConfig(**settings), GenerationConfig(), 1, 100))
    text = ""
    left = [*names]
    while left and not answer.stopped:
        text += answer.push(codec.tokenizer.token_to_id(left.pop(0)))
    return text + answer.finish(), len(names) - len(left)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("<|end|>", ("abc", 4)),  # no part of the text, and matched all the same
        ("c<|end|>", ("ab", 4)),
        ("<|end|>a", ("abc", 5)),
        ("a<|end|>", ("abcab", 8)),  # it does not come
        ("ca", ("ab", 5)),  # a special token parts no text
        ("b<|end|><|user|>", ("abca", 8)),
    ],
)
def test_stop_strings_may_name_special_tokens(codec, stop, expected):
    names = ["a", "b", "c", "<|end|>", "a", "b", "<|end|>", "<|user|>"]
    text, count = answer_of(codec, names, stop=(stop,))
    assert (text, count) == expected


@pytest.mark.parametrize("name", ["bytes", "byte fallback"])
def test_a_stop_string_of_bytes_ends_the_answer_at_its_last_byte(name):
    letters = dict(zip(range(256), byte_letters(), strict=True))
    words = [letters[byte] if name == "bytes" else f"<0x{byte:02X}>" for byte in "é世é世é🙂".encode()]
    assert answer_of(TextCodec(TOKENIZERS[name], None), words * 20, stop=("世é世",)) == ("é", 10)
