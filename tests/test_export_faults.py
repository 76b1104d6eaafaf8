"""Bad checkpoints, an existing output, an interrupted export: one clear error, nothing left behind."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, random_model, save_checkpoint
from safetensors.torch import load_file, save_file

from melt_export import ExportError, ParityError, export_bundle
from melt_export import bundle as bundle_module
from melt_export.cli import main
from melt_models import CheckpointError, load_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(random_model(), tmp_path / "checkpoint")


def edit_config(checkpoint, **changes) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(checkpoint, change) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(checkpoint):
    def change(tensors):
        tensors["model.extra"] = tensors["model.norm.weight"].clone()
        del tensors["model.layers.1.gate.w_z.bias"]
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()

    edit_tensors(checkpoint, change)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(checkpoint)
    message = str(raised.value)
    assert "missing model.layers.1.gate.w_z.bias [64]" in message
    assert "unexpected model.extra [64]" in message
    assert "model.norm.weight has shape [63], expected [64]" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, r"unknown configuration keys \['colour'\]"),
        ({"model_type": "gpt2"}, "model_type must be one of melt, ouro, llama, got 'gpt2'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_bad_configurations(checkpoint, changes, message):
    edit_config(checkpoint, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint)


def test_missing_and_damaged_files(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        load_checkpoint(checkpoint)
    weights.unlink()
    with pytest.raises(CheckpointError, match="missing weight files: model.safetensors"):
        load_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match="config.json does not exist"):
        load_checkpoint(checkpoint / "nowhere")


def test_what_the_graphs_cannot_express_is_said_first(tmp_path):
    checkpoint = save_checkpoint(random_model(head_dim=8, vocab_size=300), tmp_path / "checkpoint")
    with pytest.raises(ExportError) as raised:
        export_bundle(checkpoint, tmp_path / "out")
    assert "head_dim must be a multiple of 16, got 8" in str(raised.value)
    assert "but vocab_size is 300" in str(raised.value)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match="tokenizer.json is missing"):
        export_bundle(checkpoint, tmp_path / "out")


def test_an_existing_output_is_kept(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    assert main([str(checkpoint), "--out", str(out)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {out} exists: choose another --out")
    assert (out / "mine").read_text() == "keep"


def test_a_failed_verification_fails_the_export_and_names_the_place(checkpoint, tmp_path, monkeypatch):
    traced = bundle_module.trace_graph

    def trace_another(name, module, spec):
        graph = traced(name, module, spec)
        if name == "loop":  # the second layer's gate adds where it should subtract
            [node for node in graph.graph if node.op_type == "Sub"][1].op_type = "Add"
        return graph

    monkeypatch.setattr(bundle_module, "trace_graph", trace_another)
    with pytest.raises(ParityError, match=r"first differ in latent at layer 1, loop 1 of prefill from token 0"):
        export_bundle(checkpoint, tmp_path / "made" / "out")
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_an_export_leaves_no_bundle(checkpoint, tmp_path, signum):
    made = tmp_path / "made"
    command = [sys.executable, str(ROOT / "export.py"), str(checkpoint), "--out", str(made / "out")]
    # A shell that runs the tests in the background lets them ignore SIGINT; the export shall not inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, preexec_fn=heed)
    while not list(made.glob(".out.*.partial/*")):  # until it has begun to write
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(process.pid, signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().endswith("error: interrupted; nothing was written")
    assert list(made.iterdir()) == []


def test_sharded_weights_load(checkpoint, tmp_path):
    model = load_checkpoint(checkpoint)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="100KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    loaded = load_checkpoint(sharded)
    for name, tensor in model.state_dict().items():
        assert tensor.equal(loaded.state_dict()[name]), name
    shutil.move(next(sharded.glob("model-00001*")), tmp_path / "lost")
    with pytest.raises(CheckpointError, match="missing weight files: model-00001"):
        load_checkpoint(sharded)
