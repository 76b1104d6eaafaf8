"""One decoder graph with a fixed number of loops: our own numbers, and ONNX Runtime GenAI itself, unchanged."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from conftest import MELT_TINY, environment, new_user, random_model, save_checkpoint
from tolerances import assert_greedy

from melt_export import ExportError, ExportOptions, cli, genai
from melt_export.bundle import export_source
from melt_export.genai import decode, export_genai, genai_config, open_decoder
from melt_export.genai_graph import join_graphs
from melt_export.source import checkpoint_source
from melt_export.trace import model_shape
from melt_export.verify import ParityError
from melt_models.checkpoint import Checkpoint
from melt_runtime import BundleError, GenerationConfig, MeltModel
from melt_runtime.bundle.manifest import GENAI_CONFIG_NAME

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "melt-tiny.json").read_text())
QUICK = ExportOptions(verified=False)


@pytest.fixture(scope="session")
def genai_python() -> Path:
    """An environment of its own, made once: GenAI wants the package ``onnxruntime``, we have ``onnxruntime-gpu``."""
    return environment("genai", "onnxruntime-genai==0.18.0", "onnxruntime==1.31.1") / "python"


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory) -> Callable[[int], Path]:
    """Makes (once for each depth) the shipped model's decoder."""

    @functools.cache
    def make(loops: int) -> Path:
        out = tmp_path_factory.mktemp("genai") / "melt-tiny"
        export_genai(checkpoint_source(MELT_TINY), out, loops, QUICK)
        return out

    return make


def with_config(folder: Path, copy: Path, values: dict) -> Path:
    """The same decoder with another ``genai_config.json``."""
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).hardlink_to(path)
    (copy / GENAI_CONFIG_NAME).unlink()
    (copy / GENAI_CONFIG_NAME).write_text(json.dumps(values))
    return copy


def run_genai(python: Path, folder: Path) -> list[int]:
    """What GenAI itself answers to the golden prompt, 200 tokens at most."""
    run = [python, Path(__file__).parent / "genai_worker.py", folder, json.dumps(GOLDEN["prompt"])]
    home = folder.parent / "home"
    answer = json.loads(subprocess.run(run, check=True, capture_output=True, text=True, env=new_user(home)).stdout)
    assert not home.exists()  # no telemetry
    return answer


@pytest.mark.parametrize("gate_kind", ["elementwise", "mean"])
def test_the_decoder_gives_torchs_tokens(gate_kind, tmp_path):
    model = random_model(gate_kind=gate_kind, eos_token_id=[3, 7])
    source = checkpoint_source(save_checkpoint(model, tmp_path / "checkpoint"))
    manifest = export_genai(source, tmp_path / "out", 3, QUICK)
    ids = [7, 400, 31, 9, 9, 220, 5]
    tokens = decode(open_decoder(tmp_path / "out"), manifest, ids, 20).argmax(-1).tolist()
    assert_greedy(model, ids, tokens, loops=3, chunk_size=len(ids))
    assert tokens != model.generate_greedy(torch.tensor([ids]), 20, loops=2, chunk_size=len(ids))[0].tolist()
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert {entry.key: entry.value for entry in graph.metadata_props}["melt.loops"] == "3"
    assert [node.op_type for node in graph.graph.node].count("Loop") == 1
    assert json.loads((tmp_path / "out" / GENAI_CONFIG_NAME).read_text())["model"]["eos_token_id"] == [3, 7]


@pytest.mark.parametrize("loops", [1, 4])
def test_genai_gives_our_tokens(loops, genai_python, tiny_decoder, tmp_path):
    """The answer up to its end-of-text token; and two hundred tokens where the list of such tokens is emptied."""
    expected = GOLDEN["loops"][str(loops)]["tokens"]
    # GenAI prefills the whole prompt at once; the goldens have a chunk of 64, and the prompt is shorter.
    assert len(GOLDEN["prompt"]) <= GOLDEN["chunk"]
    folder = tiny_decoder(loops)
    assert run_genai(genai_python, folder) == expected[: expected.index(3) + 1]
    values = json.loads((folder / GENAI_CONFIG_NAME).read_text())
    values["model"]["eos_token_id"] = []  # what a model without such a token has
    assert run_genai(genai_python, with_config(folder, tmp_path / "endless", values)) == expected


def test_genai_is_told_the_bundles_defaults(genai_python, tiny_decoder, tmp_path):
    """Every token that ends a text, and sampling: with one candidate the greedy tokens, with all of them others."""
    source, folder = checkpoint_source(MELT_TINY), tiny_decoder(4)
    shape = model_shape(source.config)
    greedy = GOLDEN["loops"]["4"]["tokens"]
    assert genai_config(source.config, shape, GenerationConfig())["search"]["do_sample"] is False
    settings = GenerationConfig(
        temperature=5.0, top_k=1, top_p=0.9, repetition_penalty=1.0, stop_ids=(source.config.vocab_size - 1, greedy[9])
    )
    values = genai_config(source.config, shape, settings)
    assert values["model"]["eos_token_id"] == list(settings.stop_ids)
    assert values["search"].items() >= {"do_sample": True, "temperature": 5.0, "top_k": 1, "top_p": 0.9}.items()
    answer = run_genai(genai_python, with_config(folder, tmp_path / "one", values))
    assert answer == greedy[: greedy.index(greedy[9]) + 1]
    wide = genai_config(source.config, shape, GenerationConfig(temperature=5.0, repetition_penalty=1.1))
    assert run_genai(genai_python, with_config(folder, tmp_path / "wide", wide)) != greedy


def test_a_decoder_that_is_not_its_bundle_is_refused(tmp_path, monkeypatch):
    """One loop less: the export ends and leaves nothing."""
    quick = lambda source, out, options: export_source(source, out, replace(options, verified=False))  # noqa: E731
    monkeypatch.setattr(genai, "export_source", quick)
    monkeypatch.setattr(genai, "join_graphs", lambda parts, shape, dtype, loops: join_graphs(parts, shape, dtype, 3))
    with pytest.raises(ParityError, match="the decoder's logits differ from the bundle's by"):
        export_genai(checkpoint_source(MELT_TINY), tmp_path / "out", 4, ExportOptions())
    assert not list(tmp_path.iterdir())


def test_int4_weights_give_the_bundles_tokens(tmp_path):
    """The export itself compares the decoder with its bundle, and that with torch."""
    checkpoint = save_checkpoint(random_model(hidden_size=128, gate_kind="last"), tmp_path / "checkpoint")
    arguments = [str(checkpoint), "--out", str(tmp_path / "out"), "--format", "genai", "--loops", "2"]
    assert cli.main([*arguments, "--precision", "int4"]) == 0
    assert not list(tmp_path.glob(".out*"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("chat_template.jinja", "genai_config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"),
        "weights.data",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads address space from /proc")
def test_intermediate_loops_do_not_hold_a_second_cache(tmp_path):
    """One token over a full cache asks for less than half of what a second cache takes."""
    sizes = {"num_hidden_layers": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 16384}
    model = random_model(**sizes)
    source = checkpoint_source(save_checkpoint(model, tmp_path / "checkpoint"))
    export_genai(source, tmp_path / "out", 3, QUICK)
    run = [sys.executable, Path(__file__).parent / "genai_memory.py", tmp_path / "out"]
    done = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert done["cache"] == 2 * 8 * 4 * 16384 * 32 * 4
    assert done["growth"] < done["cache"] / 2


def test_what_a_fixed_graph_cannot_do_is_refused(tiny_decoder, tmp_path, capsys, monkeypatch):
    looplm = save_checkpoint(random_model(gate_kind="none"), tmp_path / "looplm")
    melt = checkpoint_source(MELT_TINY)
    for source, loops, options, message in (
        (checkpoint_source(looplm), None, QUICK, "a LoopLM with 4 loops needs one for each loop"),
        (melt, 0, QUICK, "loops must be a whole number from 1 to 1024, got 0"),
        (melt, 2**31, QUICK, "loops must be a whole number from 1 to 1024, got 2147483648"),
        (melt, 2.5, QUICK, "loops must be a whole number from 1 to 1024, got 2.5"),
        (melt, True, QUICK, "loops must be a whole number from 1 to 1024, got True"),
        (melt, 2, ExportOptions(activations="bfloat16", precision="int8"), "cannot run bfloat16"),
    ):
        with pytest.raises(ExportError, match=message):
            export_genai(source, tmp_path / "out", loops, options)
    with pytest.raises(BundleError, match="is a model for ONNX Runtime GenAI, whose number of loops is fixed"):
        MeltModel.load(tiny_decoder(4), device="cpu")
    with pytest.raises(ExportError, match="exists"):
        export_genai(melt, tiny_decoder(4), 2, QUICK)

    # The command line says so before it reads a weight.
    monkeypatch.setattr(Checkpoint, "require_finite", lambda checkpoint: pytest.fail("the weights were read"))
    to = ["--out", str(tmp_path / "out")]
    for arguments, message in (
        ([str(MELT_TINY), *to, "--loops", "2"], "--loops is for --format genai"),
        (
            [str(MELT_TINY), *to, "--format", "genai", "--loops", "0"],
            "loops must be a whole number from 1 to 1024, got 0",
        ),
        ([str(looplm), *to, "--format", "genai"], "a LoopLM with 4 loops needs one for each loop"),
        ([str(MELT_TINY), "--out", str(tiny_decoder(4)), "--format", "genai"], "exists"),
        ([str(tmp_path / "absent"), *to, "--format", "genai"], "absent"),
    ):
        assert cli.main(arguments) == 1
        assert message in capsys.readouterr().err
    for arguments in (["--loops", "two"], ["--loops", ""], ["--format", "onnx"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main([str(MELT_TINY), *to, *arguments])
    assert not (tmp_path / "out").exists()
