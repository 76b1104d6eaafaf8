"""Small tokenizers of every family: byte-level BPE, byte fallback, Metaspace, unigram, word pieces."""

from collections.abc import Callable
from functools import partial

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

WORDS = [
    "tool",
    "call",
    "name",
    "weather",
    "zoo",
    "a",
    "b",
    "ab",
    "12",
    "1",
    '{"',
    '":',
    '"',
    "}",
    "<",
    ">",
    "_",
    "T",
]
MARKERS = ("<tool_call>", "</tool_call>")


def _merged(words: list[str], letters: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of letters, and of words letter by letter."""
    vocab = {letter: place for place, letter in enumerate(letters)}
    merges = []
    for word in words:
        for size in range(2, len(word) + 1):
            if word[:size] not in vocab:
                vocab[word[:size]] = len(vocab)
                merges.append((word[: size - 1], word[size - 1]))
    return vocab, merges


def _with_tokens(tokenizer: Tokenizer, is_special: bool) -> Tokenizer:
    tokenizer.add_special_tokens(["<|end|>"])
    markers = [AddedToken(marker, special=is_special, normalized=False) for marker in MARKERS]
    (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(markers)
    return tokenizer


def byte_level(is_special: bool, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """As GPT-2's and Qwen's."""
    vocab, merges = _merged([*WORDS, *(f"Ġ{word}" for word in WORDS)], sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return _with_tokens(tokenizer, is_special)


def byte_fallback(is_special: bool, is_normalized: bool) -> Tokenizer:
    """As Llama-2's: spaces by a normalizer, or by Metaspace."""
    letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted({*"".join(WORDS)}), "▁"]
    vocab, merges = _merged([*WORDS, *(f"▁{word}" for word in WORDS)], letters)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if is_normalized:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return _with_tokens(tokenizer, is_special)


def unigram(is_special: bool) -> Tokenizer:
    """As T5's: no bytes, so that most characters have no token."""
    words = dict.fromkeys(["▁", *WORDS, *(f"▁{word}" for word in WORDS), *sorted({*"".join(WORDS)})], -2.0)
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *words.items()], unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _with_tokens(tokenizer, is_special)


def word_pieces(is_special: bool) -> Tokenizer:
    """As BERT's."""
    words = dict.fromkeys(["[UNK]", *WORDS, *(f"##{word}" for word in WORDS)])
    vocab = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _with_tokens(tokenizer, is_special)


KINDS: dict[str, Callable[[bool], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level, NFKC": partial(byte_level, normalizer=normalizers.NFKC()),
    "byte-level, lowercase": partial(byte_level, normalizer=normalizers.Lowercase()),
    "byte-level, replaced": partial(byte_level, normalizer=normalizers.Replace("a", "b")),
    "byte fallback, normalizer": partial(byte_fallback, is_normalized=True),
    "byte fallback, Metaspace": partial(byte_fallback, is_normalized=False),
    "unigram": unigram,
    "word pieces": word_pieces,
}
