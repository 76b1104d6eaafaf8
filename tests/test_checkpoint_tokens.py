"""L0: a checkpoint's tokenizer is the one of transformers: special tokens of the files beside it, Llama's spaces."""

import json
import re

import pytest
from conftest import MELT_TINY
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from melt_export.texts import examine_tokenizer

TEXTS = ("hi", " hi", "hi</s>hi", "<s>hi</s> hi", "  ", "a  b </s>\n<s> a", "é<own>hi<own> hi", "hi<end>", "<pad>")


def sentence_pieces(style: str) -> Tokenizer:
    """As Llama's: spaces as a mark, byte fallback; ``style`` is how the mark is put in front."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁hiab", "▁h", "▁hi", "▁a", "hi"]
    merges = [("▁", "h"), ("▁h", "i"), ("▁", "a"), ("h", "i")]
    vocabulary = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if style == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", style, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in words[:3]])
    return tokenizer


def write(folder, tokenizer: Tokenizer, **files) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in {"config": {"model_type": "llama"}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(values))


def ids(tokenizer, text: str) -> list[int]:
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return encoded if isinstance(encoded, list) else encoded.ids


def assert_ids_of_transformers(folder, vocab_size: int = 600) -> list[str]:
    faults: list[str] = []
    text, notes = examine_tokenizer(folder, vocab_size, faults)
    assert faults == []
    ours, theirs = Tokenizer.from_str(text), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for sample in TEXTS:
        assert ids(ours, sample) == ids(theirs, sample), sample
        assert ours.decode(ids(ours, sample)) == theirs.decode(ids(theirs, sample), skip_special_tokens=True)
    return notes


@pytest.mark.parametrize("style", ["prepend", "first", "always"])
@pytest.mark.parametrize("kind", [None, "PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast"])
@pytest.mark.parametrize(
    "more", [{}, {"legacy": False}, {"legacy": True}, {"legacy": False, "add_prefix_space": False}]
)
def test_a_llama_tokenizer_puts_spaces_where_transformers_does(tmp_path, style, kind, more):
    settings = ({} if kind is None else {"tokenizer_class": kind}) | more
    write(tmp_path, sentence_pieces(style), **({"tokenizer_config": settings} if settings else {}))
    notes = assert_ids_of_transformers(tmp_path)
    changed = style == "prepend" and (kind or "").startswith("Llama")
    assert any("text is split as it does" in note for note in notes) or not changed


END = {"content": "<end>", "lstrip": False, "rstrip": True, "normalized": False, "single_word": False, "special": True}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"added_tokens_decoder": {"268": END}}},
        {"tokenizer_config": {"eos_token": "<end>", "pad_token": "<pad>", "additional_special_tokens": ["<own>"]}},
        {"tokenizer_config": {"extra_special_tokens": {"image_token": "<own>"}}},
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "eos_token": {"__type": "AddedToken", **END}}},
        {"special_tokens_map": {"eos_token": "<end>", "pad_token": {"content": "<pad>", "lstrip": True}}},
        {"special_tokens_map": {"eos_token": "hi"}},
        {"added_tokens": {"<end>": 268, "<own>": 269}},
        {"added_tokens": {"<end>": 268}, "special_tokens_map": {"eos_token": "<end>"}, "tokenizer_config": {}},
    ],
)
def test_tokens_that_only_the_files_beside_it_have_are_taken(tmp_path, files):
    tokenizer = sentence_pieces("first")
    assert tokenizer.get_vocab_size() == 268
    write(tmp_path, tokenizer, **files)
    notes = assert_ids_of_transformers(tmp_path)
    lacking = [token for token in ("<end>", "<own>", "<pad>") if token in json.dumps(files)]
    assert all(any(f"{token!r} (" in note for note in notes) for token in lacking)


@pytest.mark.parametrize(
    ("files", "vocab_size", "message"),
    [
        (
            {"added_tokens": {"<end>": 300}},
            600,
            "added_tokens.json: the token '<end>' must have the id 268 .*, got 300",
        ),
        ({"added_tokens": {"</s>": 7}}, 600, "added_tokens.json: the token '</s>' must have the id 2 .*, got 7"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"268": END}}},
            268,
            r"tokenizer_config.json: the token '<end>' has the id 268, which must be below vocab_size \(268\)",
        ),
        (
            {"special_tokens_map": {"eos_token": "<end>"}},
            268,
            "special_tokens_map.json: the token '<end>' has the id 268",
        ),
        (
            {
                "tokenizer_config": {"added_tokens_decoder": {"2": {**END, "content": "</s>"}}},
                "added_tokens": {"<own>": 268},
            },
            600,
            "added_tokens.json: the token '<own>' is not in tokenizer.json, and transformers does not take it from",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"a": 3}}},
            600,
            "tokenizer_config.json: transformers refuses them",
        ),
        ({"added_tokens": []}, 600, "added_tokens.json must hold a JSON object"),
    ],
)
def test_tokens_that_contradict_the_tokenizer_are_named(tmp_path, files, vocab_size, message):
    write(tmp_path, sentence_pieces("first"), **files)
    faults: list[str] = []
    examine_tokenizer(tmp_path, vocab_size, faults)
    assert len(faults) == 1
    assert re.search(message, faults[0])


def test_a_padding_token_without_a_row_is_left_out(tmp_path):
    """Nothing is ever filled up, and many files have one that the embedding has no row for."""
    write(tmp_path, sentence_pieces("first"), added_tokens={"<pad>": 268}, special_tokens_map={"pad_token": "<pad>"})
    faults: list[str] = []
    text, notes = examine_tokenizer(tmp_path, 268, faults)
    assert faults == []
    assert Tokenizer.from_str(text).get_vocab_size() == 268
    assert "the padding token '<pad>' has no row in the embedding and is left out" in notes[0]


def test_files_that_change_no_id_leave_the_tokenizer_as_it_is(tmp_path):
    """Also where transformers 5 would make it anew without its splitting: that of GPT-2, which Ouro names."""
    text = (MELT_TINY / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", "chat_template": "{{ x }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert examine_tokenizer(tmp_path, 703, []) == (text, [])


@pytest.mark.parametrize("settings", [{"legacy": False, "tokenizer_class": "LlamaTokenizer"}, None])
def test_a_vocabulary_that_is_lost_when_it_is_written_anew_is_named(tmp_path, settings):
    tokenizer = sentence_pieces("prepend")
    if settings is None:
        tokenizer.enable_padding()
    write(tmp_path, tokenizer, **({} if settings is None else {"tokenizer_config": settings}))
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"]["▁h"] = values["model"]["vocab"]["b"]  # two tokens of one id
    path.write_text(json.dumps(values))
    faults: list[str] = []
    assert examine_tokenizer(tmp_path, 600, faults) == ("", [])
    (fault,) = faults
    assert fault.startswith("tokenizer.json: tokens 'b' and '▁h' share an id")
