"""L0: stop strings across pieces, streaming without half characters, the chat template."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from melt_runtime.errors import BundleError, TokenError
from melt_runtime.text import StopMatcher, TextCodec


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


def test_special_tokens_are_not_text(codec):
    decoder = codec.stream()
    ids = [codec.tokenizer.token_to_id("<|end|>"), *codec.encode("hi"), codec.tokenizer.token_to_id("<|end|>")]
    assert "".join(decoder.push(token) for token in ids) == "hi"


def test_empty_prompts_are_refused(codec):
    with pytest.raises(TokenError, match="empty"):
        codec.encode("")
    with pytest.raises(TokenError, match=r"messages\[0\]: the content is empty"):
        codec.render([{"role": "user", "content": "  "}])
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
