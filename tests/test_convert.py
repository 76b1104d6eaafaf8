"""L1/L3: a LoopLM checkpoint becomes a MELT checkpoint with fresh gates."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import MELT_TINY
from published import OURO, ouro_forward, ouro_tensors, write_ouro
from tolerances import TORCH, assert_close
from torch import nn

from melt_export.bundle import export_bundle
from melt_export.cli import main
from melt_layers import Gate, layers
from melt_models import CheckpointError, MeltCausalLM, load_checkpoint
from melt_models import convert as convert_module
from melt_models.checkpoint import Checkpoint
from melt_models.convert import looplm_to_melt


@pytest.fixture(scope="module")
def looplm(tmp_path_factory):
    return write_ouro(tmp_path_factory.mktemp("ouro"), 2)


def test_export_melt_writes_a_checkpoint_that_loads_and_exports(looplm, tmp_path, capsys):
    out = tmp_path / "melt"
    assert main([str(looplm), "--out", str(out), "--melt"]) == 0
    said = capsys.readouterr()
    assert "a MELT checkpoint of 3 layers with fresh gates (bias -4)" in said.out
    assert "note: the special token ids of Ouro's published files" in said.err
    values = json.loads((out / "config.json").read_text())
    assert (values["model_type"], values["gate_kind"], values["eos_token_id"]) == ("melt", "elementwise", 2)
    assert values["architectures"] == ["MeltCausalLM"]
    made = Checkpoint(out)
    assert made.notes == ()
    for name, tensor in ouro_tensors(OURO).items():
        assert torch.equal(made.read(name), tensor), name
    gates = [name for name in made.tensors if ".gate." in name]
    assert len(gates) == 3 * OURO["num_hidden_layers"]
    assert all(made.read(name).dtype == torch.bfloat16 for name in gates)
    assert (out / "tokenizer.json").read_bytes() == (looplm / "tokenizer.json").read_bytes()
    manifest = export_bundle(out, tmp_path / "bundle")
    assert manifest.model.cache_kind == "shared"


@torch.no_grad()
def test_closed_gates_compute_the_looplm(looplm, tmp_path):
    """In one chunk, where the caches are the same too."""
    looplm_to_melt(Checkpoint(looplm), tmp_path / "melt")
    model = load_checkpoint(tmp_path / "melt").float()
    for layer in model.model.layers:
        layer.gate.w_z.bias.fill_(-1e9)
    ids = list(range(40, 60))
    logits, _ = ouro_forward(ouro_tensors(OURO), OURO, ids)
    assert_close(model(torch.tensor([ids])).logits[0], logits[-1], TORCH)


@pytest.mark.parametrize(("kind", "gates"), [("scalar", 9), ("mean", 0)])
def test_other_gates(looplm, tmp_path, kind, gates):
    config = looplm_to_melt(Checkpoint(looplm), tmp_path / "melt", gate_kind=kind)
    assert config.gate_kind == kind
    assert sum(".gate." in name for name in Checkpoint(tmp_path / "melt").tensors) == gates


@pytest.mark.parametrize("load", [load_checkpoint, MeltCausalLM.from_pretrained])
def test_a_checkpoint_in_one_file_keeps_its_gates(tmp_path, load):
    """transformers reads ``model.safetensors`` alone where it stands, whatever the index beside it names."""
    looplm_to_melt(Checkpoint(write_ouro(tmp_path / "ouro")), tmp_path / "melt", seed=5)
    checkpoint, model = Checkpoint(tmp_path / "melt"), load(tmp_path / "melt")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, checkpoint.read(name)), name


class OwnGate(Gate):
    """A gate with a parameter and a buffer of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.rate = nn.Parameter(torch.empty(config.hidden_size))


class OwnBuffer(Gate):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("rate", torch.zeros(config.hidden_size))


@pytest.mark.parametrize("gate", [OwnGate, OwnBuffer])
def test_no_parameter_of_a_gate_is_left_as_it_was_found(looplm, tmp_path, monkeypatch, gate):
    checkpoint = Checkpoint(looplm)
    monkeypatch.setattr(layers, "Gate", gate)
    with pytest.raises(ValueError, match=r"rate (has|got) no initial value.* MeltPreTrainedModel._init_weights"):
        looplm_to_melt(checkpoint, tmp_path / "melt")
    assert not (tmp_path / "melt").exists()


def test_a_gate_of_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="gate_kind must be one of none, elementwise, .*, got 'own'"):
        Gate(SimpleNamespace(gate_kind="own", gate_ema=0.2, hidden_size=4))


def test_the_seed_decides_the_gates(looplm, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        looplm_to_melt(Checkpoint(looplm), tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model-gates.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_what_is_no_looplm_is_refused(looplm, tmp_path):
    with pytest.raises(CheckpointError, match=r"is a MELT checkpoint already \(gate_kind elementwise\)"):
        looplm_to_melt(Checkpoint(MELT_TINY), tmp_path / "out")
    once = write_ouro(tmp_path / "once", total_ut_steps=1)
    with pytest.raises(CheckpointError, match="has no loops"):
        looplm_to_melt(Checkpoint(once), tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists: choose another --out"):
        looplm_to_melt(Checkpoint(looplm), looplm)


def test_a_full_disk_leaves_nothing(looplm, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        looplm_to_melt(Checkpoint(looplm), tmp_path / "made" / "melt")
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "int4"], "--precision is for bundles"),
        (["--layer", "*=int8"], "--layer is for bundles"),
        (["--eval-text", "x.txt"], "--eval-text is for bundles"),
    ],
)
def test_options_of_bundles_are_refused(looplm, tmp_path, capsys, options, message):
    assert main([str(looplm), "--out", str(tmp_path / "out"), "--melt", *options]) == 1
    assert f"error: {message}" in capsys.readouterr().err
    assert main(["--shape", "melt-1.6b:1", "--out", str(tmp_path / "out"), "--melt"]) == 1
    assert "--melt needs a checkpoint" in capsys.readouterr().err


@pytest.fixture
def hub(looplm, tmp_path, monkeypatch):
    """A hub cache in which ``somebody/ouro-small`` was downloaded before, and no network."""
    snapshot = tmp_path / "hub" / "models--somebody--ouro-small" / "snapshots" / "abc"
    shutil.copytree(looplm, snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("hub")
def test_a_name_of_the_hub_is_found_in_its_cache(tmp_path):
    """In a process of its own: the hub's library reads its variables at its import."""
    commands = [
        ["--melt", "--out", name, f"somebody/{asked}"] for name, asked in (("out", "ouro-small"), ("other", "unknown"))
    ]
    code = f"from melt_export.cli import main; print([main(command) for command in {commands}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.endswith("[0, 1]\n"), done.stderr
    assert (tmp_path / "out" / "model-gates.safetensors").is_file()
    error = done.stderr.partition("error: ")[2]
    assert error.startswith("somebody/unknown is not a folder here, and could not be fetched from https:")
    assert str(tmp_path / "hub") in error
    assert not (tmp_path / "other").exists()
