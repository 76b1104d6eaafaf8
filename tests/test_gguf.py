"""GGUF files that say or hold more than transformers reads: refused by name."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from melt_models import CheckpointError
from melt_models.gguf import gguf_to_checkpoint


def write_llama(file: Path, numbers: dict[str, float], tensors: tuple[str, ...] = ()) -> Path:
    """A file of a small Llama's keys, with further ones, and of no tensors but those named."""
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(16)
    for key, value in numbers.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"llama.{key}", value)
    for name in tensors:
        writer.add_tensor(name, np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


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
