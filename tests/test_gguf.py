"""GGUF files that say or hold more than transformers reads, or less than a model has: refused by name."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer, pre_tokenizers

from melt_models import CheckpointError
from melt_models.gguf import gguf_to_checkpoint


def llama(file: Path, words: int) -> GGUFWriter:
    """Writes a file; so far it says the sizes of a Llama of one layer."""
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(words)
    return writer


def written(writer: GGUFWriter, file: Path) -> Path:
    """Ends the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_llama(file: Path, numbers: dict[str, float], tensors: tuple[str, ...] = ()) -> Path:
    """A file of a small Llama's keys, with further ones, and of no tensors but those named."""
    writer = llama(file, 16)
    for key, value in numbers.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"llama.{key}", value)
    for name in tensors:
        writer.add_tensor(name, np.zeros(8, np.float32))
    return written(writer, file)


def faults_of(file: Path, out: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        gguf_to_checkpoint(file, out)
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("rope.scaling.factor", 4.0, "0 or 1"),
        ("rope.scale_linear", 2.0, "0 or 1"),
        ("attention.sliding_window", 512, "0"),
        ("expert_used_count", 2, "0"),
        ("logit_scale", 0.5, "1"),
        ("attention.key_length", 8, "16"),
        ("loop_count", 4, "absent"),
    ],
)
def test_keys_that_may_change_what_is_computed_are_refused(tmp_path, key, value, rule):
    file = write_llama(tmp_path / "model.gguf", {key: value})
    assert f"llama.{key} must be {rule}, got {value}" in faults_of(file, tmp_path / "out")


def test_tensors_that_are_not_read_are_refused(tmp_path):
    tensors = ("output_norm.weight", "rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate_exps.weight")
    said = faults_of(write_llama(tmp_path / "model.gguf", {}, tensors), tmp_path / "out")
    assert all(f"tensor {name} [8] is none of the model's" in said for name in tensors[1:])
    assert tensors[0] not in said


def test_keys_that_say_what_is_computed_anyway_pass(tmp_path):
    numbers = {"attention.key_length": 16, "expert_count": 0, "logit_scale": 1.0, "rope.scaling.factor": 1.0}
    file = write_llama(tmp_path / "model.gguf", numbers, ("rope_freqs.weight",))
    assert "must be" not in faults_of(file, tmp_path / "out")


WORDS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "123", "1234"]
LAYER = {
    **dict.fromkeys(("attn_norm", "ffn_norm"), (32,)),
    **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (32, 32)),
    **{"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)},
}


def write_whole(file: Path, splitting: str | None, left_out: str = "", more: str = "", kind: str = "gpt2") -> Path:
    """A whole file of one layer, with a tokenizer that has merged digits; ``more`` is a key of it that is false."""
    writer = llama(file, len(WORDS))
    writer.add_tokenizer_model(kind)
    writer.add_token_list(WORDS)
    writer.add_token_merges(["1 2", "12 3", "123 4"])
    if splitting is not None:
        writer.add_tokenizer_pre(splitting)
    if more:
        writer.add_bool(f"tokenizer.ggml.{more}", False)
    shapes = {"token_embd": (len(WORDS), 32), "output_norm": (32,), **{f"blk.0.{name}": LAYER[name] for name in LAYER}}
    for name, shape in shapes.items():
        if name != left_out:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    return written(writer, file)


@pytest.mark.parametrize("name", ["token_embd", "output_norm", "blk.0.attn_q", "blk.0.ffn_down"])
def test_tensors_that_are_missing_are_not_made_up(tmp_path, name):
    said = faults_of(write_whole(tmp_path / "model.gguf", "gpt-2", left_out=name), tmp_path / "out")
    assert f"tensor {name}.weight is missing" in said


def test_layers_beyond_the_count_are_refused(tmp_path):
    said = faults_of(write_llama(tmp_path / "model.gguf", {}, ("blk.1.attn_q.weight",)), tmp_path / "out")
    assert "tensor blk.1.attn_q.weight [8] is none of the model's" in said


@pytest.mark.parametrize(
    ("splitting", "tokens"),
    [
        ("gpt-2", ["1234", "5"]),
        ("smollm", ["1", "2", "3", "4", "5"]),
        ("tekken", ["1", "2", "3", "4", "5"]),
        ("llama-bpe", ["123", "4", "5"]),
    ],
)
def test_text_is_split_as_the_file_says(tmp_path, splitting, tokens):
    gguf_to_checkpoint(write_whole(tmp_path / "model.gguf", splitting), tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("12345", add_special_tokens=False).tokens == tokens


@pytest.mark.parametrize(("splitting", "got"), [("of-nobody", "'of-nobody'"), ("default", "'default'"), (None, "none")])
def test_a_splitting_that_is_unknown_is_refused(tmp_path, splitting, got):
    said = faults_of(write_whole(tmp_path / "model.gguf", splitting), tmp_path / "out")
    assert "tokenizer.ggml.pre must be one of " in said
    assert f"got {got}: how text is split decides its tokens" in said


def test_a_space_in_front_that_a_file_does_not_want_is_refused(tmp_path):
    file = write_whole(tmp_path / "model.gguf", None, more="add_space_prefix", kind="llama")
    assert "tokenizer.ggml.add_space_prefix must be true, got False" in faults_of(file, tmp_path / "out")
