"""One decoder graph with a fixed number of loops: our own numbers, and ONNX Runtime GenAI itself, unchanged."""

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from conftest import MELT_TINY, environment, random_model, save_checkpoint
from tolerances import assert_greedy

from melt_export import ExportError, ExportOptions, cli
from melt_export.genai import decode_greedy, export_genai, open_decoder
from melt_export.source import checkpoint_source
from melt_runtime import BundleError, MeltModel

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "melt-tiny.json").read_text())
QUICK = ExportOptions(verified=False)


@pytest.fixture(scope="session")
def genai_python() -> Path:
    """An environment of its own, made once: GenAI wants the package ``onnxruntime``, we have ``onnxruntime-gpu``."""
    return environment("genai", "onnxruntime-genai==0.18.0", "onnxruntime==1.31.1") / "python"


@pytest.mark.parametrize("gate_kind", ["elementwise", "mean", "last"])
def test_the_decoder_gives_torchs_tokens(gate_kind, tmp_path):
    model = random_model(gate_kind=gate_kind)
    source = checkpoint_source(save_checkpoint(model, tmp_path / "checkpoint"))
    manifest = export_genai(source, tmp_path / "out", 3, QUICK)
    ids = [7, 400, 31, 9, 9, 220, 5]
    tokens = decode_greedy(open_decoder(tmp_path / "out"), manifest, ids, 20)
    assert_greedy(model, ids, tokens, loops=3, chunk_size=len(ids))
    assert tokens != model.generate_greedy(torch.tensor([ids]), 20, loops=2, chunk_size=len(ids))[0].tolist()
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert {entry.key: entry.value for entry in graph.metadata_props}["melt.loops"] == "3"
    assert [node.op_type for node in graph.graph.node].count("Loop") == 1


@pytest.mark.parametrize("loops", [1, 4])
def test_genai_gives_our_tokens(loops, genai_python, tmp_path):
    """The answer up to its end-of-text token; and two hundred tokens where the list of such tokens is emptied."""
    export_genai(checkpoint_source(MELT_TINY), tmp_path / "out", loops, QUICK)
    run = [genai_python, Path(__file__).parent / "genai_worker.py", tmp_path / "out", json.dumps(GOLDEN["prompt"])]
    expected = GOLDEN["loops"][str(loops)]["tokens"]
    # GenAI prefills the whole prompt at once; the goldens have a chunk of 64, and the prompt is shorter.
    assert len(GOLDEN["prompt"]) <= GOLDEN["chunk"]
    answer = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert answer == expected[: expected.index(3) + 1]
    path = tmp_path / "out" / "genai_config.json"
    values = json.loads(path.read_text())
    values["model"]["eos_token_id"] = []  # what a model without such a token has
    path.write_text(json.dumps(values))
    assert json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout) == expected


def test_int4_weights_give_the_bundles_tokens(tmp_path):
    """The export itself compares the decoder with its bundle, and that with torch."""
    checkpoint = save_checkpoint(random_model(hidden_size=128), tmp_path / "checkpoint")
    arguments = [str(checkpoint), "--out", str(tmp_path / "out"), "--format", "genai", "--loops", "2"]
    assert cli.main([*arguments, "--precision", "int4"]) == 0
    assert not list(tmp_path.glob(".out*"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("chat_template.jinja", "genai_config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"),
        "weights.data",
    ]


def test_intermediate_loops_do_not_hold_a_second_cache(tmp_path):
    """One token over a full cache of eight layers grows the process by less than two layers' share of it."""
    sizes = {"num_hidden_layers": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 16384}
    model = random_model(**sizes)
    source = checkpoint_source(save_checkpoint(model, tmp_path / "checkpoint"))
    export_genai(source, tmp_path / "out", 3, QUICK)
    run = [sys.executable, Path(__file__).parent / "genai_memory.py", tmp_path / "out"]
    done = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert done["cache"] > 100e6
    assert done["growth"] < 2 * done["cache"] / 8


def test_what_a_fixed_graph_cannot_do_is_refused(tmp_path, capsys):
    looplm = checkpoint_source(save_checkpoint(random_model(gate_kind="none"), tmp_path / "looplm"))
    with pytest.raises(ExportError, match="a LoopLM with 4 loops needs one for each loop"):
        export_genai(looplm, tmp_path / "out", None, QUICK)
    melt = checkpoint_source(save_checkpoint(random_model(), tmp_path / "melt"))
    with pytest.raises(ExportError, match="loops must be at least 1, got 0"):
        export_genai(melt, tmp_path / "out", 0, QUICK)
    with pytest.raises(ExportError, match="cannot run bfloat16"):
        export_genai(melt, tmp_path / "out", 2, ExportOptions(activations="bfloat16", precision="int8"))
    assert cli.main([str(tmp_path / "melt"), "--out", str(tmp_path / "out"), "--loops", "2"]) == 1
    assert "--loops is for --format genai" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    export_genai(melt, tmp_path / "out", 2, QUICK)
    with pytest.raises(BundleError, match="is a model for ONNX Runtime GenAI, whose number of loops is fixed"):
        MeltModel.load(tmp_path / "out", device="cpu")
    with pytest.raises(ExportError, match="exists"):
        export_genai(melt, tmp_path / "out", 2, QUICK)
