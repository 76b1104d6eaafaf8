"""How the tokenizer of a GGUF file splits text before it merges: by the name in ``tokenizer.ggml.pre``.

transformers knows some of these names, other ones it passes over and splits as GPT-2 does, without a word.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from melt_models.forms import shown

try:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as _KNOWN
except ImportError:  # older releases split all files as GPT-2 does
    _KNOWN = {}

_AS_GPT_2 = frozenset({"gpt-2", "mpt", "olmo", "phi-2"})
_DIGIT_BY_DIGIT = frozenset({"smollm", "starcoder", "refact", "command-r"})
_NEUTRAL = {"add_space_prefix": True, "remove_extra_whitespaces": False}
"""What transformers makes of a file of SentencePiece, whatever these keys of it say."""


def splitting_faults(keys: Mapping[str, Any]) -> list[str]:
    """Why text would be split otherwise than a file says.

    Args:
        keys: content of the file's ``tokenizer.ggml.*`` by their last names.
    """
    kind, how = keys.get("model"), keys.get("pre")
    if kind == "gpt2":
        if how in {*_AS_GPT_2, *_DIGIT_BY_DIGIT, *_KNOWN}:
            return []
        names = ", ".join(sorted({*_AS_GPT_2, *_DIGIT_BY_DIGIT, *_KNOWN}))
        got = "none" if how is None else shown(how)
        return [f"tokenizer.ggml.pre must be one of {names}, got {got}: how text is split decides its tokens"]
    if kind != "llama":
        return []  # transformers refuses others, or has a reader of its own for them
    return [
        f"tokenizer.ggml.{name} must be {'true' if value else 'false'}, got {shown(keys[name])}: not implemented"
        for name, value in _NEUTRAL.items()
        if keys.get(name, value) != value
    ]


def set_splitting(tokenizer: PreTrainedTokenizerBase, how: str | None) -> None:
    """Sets the splitting that transformers does not know: each digit for itself."""
    if how in _DIGIT_BY_DIGIT:
        digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
