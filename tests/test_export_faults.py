"""Bad checkpoints, an existing output, an interrupted export: one clear error, nothing left behind."""

import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import HANG, MELT_TINY, ROOT, random_model, save_checkpoint
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import GenerationConfig as TransformersGenerationConfig

from melt_export import ExportError, ExportOptions, ParityError, export_bundle
from melt_export import bundle as bundle_module
from melt_export import cli as cli_module
from melt_export.bundle import write_text_files
from melt_export.cli import main
from melt_export.generation import read_generation
from melt_export.source import checkpoint_source
from melt_models import CheckpointError, load_checkpoint
from melt_models.checkpoint import read_config
from melt_runtime import GenerationConfig, read_manifest


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


NONSENSE = {
    "vocab_size": (True, "a valid integer"),
    "hidden_size": (64.0, "a valid integer"),
    "intermediate_size": (2**62, "at most 1048576"),
    "num_hidden_layers": (2**31, "at most 1024"),
    "max_position_embeddings": (10**12, "at most 1048576"),
    "total_ut_steps": (10**30, "at most 1024"),
    "rms_norm_eps": (float("inf"), "a finite number"),
    "initializer_range": (float("nan"), "a finite number"),
    "rope_parameters": ({"rope_theta": "4"}, "a valid number"),
    "eos_token_id": ([3, 2**40], "less than 1048576"),
    "pad_token_id": (-2, "at least 0"),
    "tie_word_embeddings": ("no", "a valid boolean"),
    "gate_ema": (2, "at most 1"),
    "gate_kind": ("maybe", "'none', 'elementwise', 'scalar', 'ema', 'mean' or 'last'"),
    "hidden_act": (None, "'silu'"),
}


def test_nonsense_is_listed_whole_before_anything_is_made(checkpoint, tmp_path):
    """Types and ranges together, of every file: one run shows all that must be corrected."""
    edit_config(checkpoint, colour="red", **{name: value for name, (value, _) in NONSENSE.items()})
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "tokenizer_config.json").write_text('{"chat_template": 5, "eos_token": {"content": null}}')
    (checkpoint / "generation_config.json").write_text('{"top_p": 1.4}')
    (checkpoint / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    (checkpoint / "evaluation.jsonl").write_text('{"messages": ["hi"], "answer": "x", "group": "g"}\nnot json\n')
    (checkpoint / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError) as raised:
        export_bundle(checkpoint, tmp_path / "out")
    for name, (_, rule) in NONSENSE.items():
        assert re.search(rf"config.json: {name}\S* must be {rule}, got ", str(raised.value)), name
    for message in (
        "config.json: unknown configuration keys ['colour']",
        "generation_config.json: top_p must be at most 1, got 1.4",
        "tokenizer_config.json: chat_template must be text, or a list of such as ",
        "tokenizer.json cannot be used: ",
        "evaluation.jsonl, line 1: messages[0] must be",
        "evaluation.jsonl, line 2 is not JSON",
        "model.safetensors cannot be read",
    ):
        assert message in str(raised.value), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_id": 703}, r"eos_token_id must be below vocab_size \(703\), got 703"),
        ({"chunk_size": 257}, r"chunk_size must be at most max_position_embeddings \(256\), got 257"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads, got 4 and 3"),
        ({"hidden_size": 66, "head_dim": None}, "hidden_size must be a multiple of num_attention_heads, got 66 and 4"),
    ],
)
def test_values_are_held_against_each_other(checkpoint, changes, message):
    edit_config(checkpoint, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint)


DEEP = b'{"a": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"


@pytest.mark.parametrize("content", [DEEP, b'{"a": "\xff"}', b'{"a": "\\ud83d"}', b"[1, 2]", b"", b"{"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json"]
)
def test_what_is_no_json_is_named_with_its_file(checkpoint, name, content):
    (checkpoint / name).write_bytes(content)
    with pytest.raises((CheckpointError, ExportError), match=f"\n  {name} (is not JSON|must hold a JSON object)"):
        checkpoint_source(checkpoint)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map is missing"),
        ({"weight_map": {}}, "weight_map must have at least 1 item"),
        ({"weight_map": {"a": 5}}, "weight_map.a must be a valid string, got 5"),
        ({"weight_map": {"a": "../model.safetensors"}}, "weight_map must name files of this folder"),
        ({"weight_map": {"a": "x" * 5000}}, "missing weight file xxx"),
    ],
)
def test_an_index_is_checked(checkpoint, index, message):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint)


OPTIONAL = (
    *("chat_template.jinja", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("evaluation.jsonl", "model.safetensors.index.json", "additional_chat_templates/more.jinja"),
)


@pytest.mark.parametrize("name", [*OPTIONAL, "config.json", "tokenizer.json"])
@pytest.mark.parametrize(("kind", "said"), [("folder", "a folder"), ("pipe", "a pipe"), ("link", "a link to nothing")])
def test_what_is_no_file_is_neither_read_nor_taken_as_absent(checkpoint, name, kind, said):
    path = checkpoint / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("nowhere")}[kind]()
    with pytest.raises((CheckpointError, ExportError), match=f"\n  {path.name} must be a file, got {said}"):
        checkpoint_source(checkpoint)


def test_a_file_may_be_a_link(checkpoint, tmp_path):
    """As in the hub's cache."""
    for path in sorted(checkpoint.iterdir()):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert checkpoint_source(checkpoint).chat_template


@pytest.mark.parametrize("written", [False, True])
def test_an_evaluation_of_chats_needs_a_template(checkpoint, tmp_path, capsys, written):
    """What is measured then is what is measured where there is no evaluation."""
    (checkpoint / "chat_template.jinja").unlink()
    if written:
        (checkpoint / "chat_template.jinja").touch()
    lines = (MELT_TINY / "evaluation.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (checkpoint / "evaluation.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    assert main([str(checkpoint), "--out", str(tmp_path / "out")]) == 0
    note = "note: evaluation.jsonl is passed over: its chats need a chat template, and there is none"
    assert capsys.readouterr().err.count(note) == 1
    quality = read_manifest(tmp_path / "out").quality
    assert (quality.text, quality.examples) == ("seeded random tokens", 0)


def write_generation(checkpoint, **values) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps(values))


def test_generation_defaults_are_carried_over(checkpoint, tmp_path):
    """The file counts and config.json does not, as in transformers; what the runtime has not is said."""
    edit_config(checkpoint, eos_token_id=3)
    assert checkpoint_source(checkpoint).generation == GenerationConfig(stop_ids=(3,))
    write_generation(
        checkpoint,
        **{"_from_model_config": True, "eos_token_id": [3, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9},
        **{"repetition_penalty": 1.1, "max_new_tokens": 40, "stop_strings": "END", "num_beams": 1, "length_penalty": 2},
    )
    source = checkpoint_source(checkpoint)
    wanted = {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": 0.0}
    wanted |= {"repetition_penalty": 1.1, "max_new_tokens": 40}
    assert source.generation == GenerationConfig(stop_ids=(3, 7), stop=("END",), **wanted)
    assert source.notes == (
        "generation_config.json ends a text at [3, 7], config.json at [3]: the first counts, as in transformers",
        "keys of generation_config.json that the runtime does not have are passed over: length_penalty",
    )
    write_text_files(source, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["stop_ids"] == [3, 7]
    theirs = TransformersGenerationConfig.from_pretrained(checkpoint)
    assert (theirs.eos_token_id, theirs.temperature, theirs.top_p) == ([3, 7], 0.6, 0.9)


def test_without_do_sample_an_answer_is_greedy(checkpoint):
    edit_config(checkpoint, eos_token_id=3)
    write_generation(checkpoint, temperature=0.6, top_k=20)
    source = checkpoint_source(checkpoint)
    assert source.generation == GenerationConfig(stop_ids=(3,))
    assert source.notes == (
        "generation_config.json does not set do_sample: answers are greedy, and temperature 0.6, top_k 20 passed over",
    )


def test_faults_of_generation_defaults_are_listed(checkpoint):
    write_generation(checkpoint, eos_token_id=[3, 703], temperature=0, do_sample=True, top_p=1.4, min_p="x", top_k=True)
    with pytest.raises(ExportError) as raised:
        checkpoint_source(checkpoint)
    for message in (
        "eos_token_id must be below vocab_size (703), got 703",
        "temperature must be above 0 where do_sample is true, got 0",
        "top_p must be at most 1, got 1.4",
        "min_p must be a valid number, got 'x'",
        "top_k must be a valid integer, got True",
    ):
        assert f"\n  generation_config.json: {message}" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        ("pad_token_id", 703, "703"),
        ("suppress_tokens", [1, 704, 705], "704, 705"),
        ("begin_suppress_tokens", [900], "900"),
        ("bad_words_ids", [[1, 2], [3, 703]], "703"),
        ("forced_bos_token_id", 703, "703"),
        ("forced_eos_token_id", [3, 703], "703"),
        ("decoder_start_token_id", 703, "703"),
        ("forced_decoder_ids", [[900, 703]], "703"),
        ("sequence_bias", [[[45, 703], -800]], "703"),
        ("logit_bias", {"3": 1000, "703": 1}, "703"),
    ],
)
def test_tokens_outside_the_vocabulary_are_named_wherever_they_stand(checkpoint, name, value, wrong):
    """Of fields too that the runtime does not have."""
    write_generation(checkpoint, **{name: value})
    faults: list[str] = []
    read_generation(checkpoint, read_config(checkpoint)[0], faults)
    assert faults == [f"generation_config.json: {name} must be below vocab_size (703), got {wrong}"]


def test_a_tokenizer_neither_cuts_nor_fills(checkpoint):
    path = checkpoint / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    words = "Ana reports to Ben. Ben reports to Cleo."
    ids = tokenizer.encode(words).ids
    assert checkpoint_source(checkpoint).tokenizer == path.read_text()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    path.write_text(tokenizer.to_str())
    source = checkpoint_source(checkpoint)
    assert Tokenizer.from_str(source.tokenizer).encode(words).ids == ids
    assert source.notes == ("truncation and padding of tokenizer.json is left out: a prompt is never cut or filled up",)


def test_missing_and_damaged_files(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        load_checkpoint(checkpoint)
    weights.unlink()
    with pytest.raises(CheckpointError, match="missing weight file model.safetensors"):
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


def test_an_output_that_is_a_link_to_nothing_is_refused_before_any_work(checkpoint, tmp_path, capsys):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    for more in ((), ("--format", "genai")):
        assert main([str(checkpoint), "--out", str(tmp_path / "out"), *more]) == 1
        assert (
            capsys.readouterr().err == f"error: {tmp_path / 'out'} exists: choose another --out, or remove it first\n"
        )
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda manifest: replace(manifest, model=replace(manifest.model, gate_kind="own")), "gate_kind"),
        (lambda manifest: replace(manifest, graphs={**manifest.graphs, "more": manifest.graphs["head"]}), "more"),
    ],
)
def test_an_export_that_cannot_be_loaded_is_none(checkpoint, tmp_path, monkeypatch, capsys, spoil, message):
    """What the exporter knows and the runtime does not."""
    write = bundle_module.write_manifest
    monkeypatch.setattr(bundle_module, "write_manifest", lambda folder, manifest: write(folder, spoil(manifest)))
    monkeypatch.setattr(bundle_module, "ExportOptions", lambda **values: ExportOptions(**{**values, "verified": False}))
    assert main([str(checkpoint), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "error: " in said.err
    assert message in said.err
    assert "wrote" not in said.err + said.out
    assert not (tmp_path / "out").exists()


def test_an_output_that_another_export_made_meanwhile_is_one_error(checkpoint, tmp_path, monkeypatch, capsys):
    out, write_manifest = tmp_path / "made" / "out", bundle_module.write_manifest

    def finish_first(*arguments):
        write_manifest(*arguments)
        out.mkdir()
        (out / "manifest.json").touch()

    monkeypatch.setattr(bundle_module, "write_manifest", finish_first)
    monkeypatch.setattr(bundle_module, "ExportOptions", lambda **values: ExportOptions(**{**values, "verified": False}))
    assert main([str(checkpoint), "--out", str(out)]) == 1
    assert f"error: {out} was made by another process meanwhile: it is left as it is" in capsys.readouterr().err
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["manifest.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_folder_in_which_nothing_can_be_made_is_named(checkpoint, capsys):
    assert main([str(checkpoint), "--out", "/proc/x"]) == 1
    assert capsys.readouterr().err == f"error: the folder /proc cannot be written: {os.strerror(errno.ENOENT)}\n"


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


@pytest.mark.parametrize("ignored", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_export_and_a_closed_terminal_are_heeded(monkeypatch, ignored):
    """Both clean up as an interruption does; what nohup ignores stays ignored."""
    heeded = {}
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN if number == ignored else signal.SIG_DFL)
    monkeypatch.setattr(signal, "signal", heeded.__setitem__)
    cli_module._heed_signals()
    (other,) = {signal.SIGTERM, signal.SIGHUP} - {ignored}
    assert heeded == {other: cli_module._stop}


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "safetensors", "pydantic", "onnx_ir", "onnx", "huggingface_hub"):
    sys.modules[name] = None
from melt_export.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_help_needs_no_torch_and_work_says_what_is_missing(tmp_path):
    command = [sys.executable, "-c", WITHOUT_TORCH]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "melt, ouro, llama" in shown.stdout
    done = subprocess.run([*command, str(MELT_TINY), "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: melt-export needs \w+, which is not installed: pip install 'melt-onnx\[export\]'\n", done.stderr
    )


def test_the_command_lines_defaults_are_those_of_the_options():
    parser = cli_module._parser()
    for name in ("precision", "block", "rounding", "activations"):
        assert parser.get_default(name) == getattr(ExportOptions, name)


@pytest.mark.parametrize("name", ["precision", "rounding"])
@pytest.mark.parametrize("value", [5, "x" * 100_000, np.array(["int8", "search"])], ids=["number", "long", "array"])
def test_an_option_is_one_of_its_names(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be one of .*, got ") as raised:
        ExportOptions(**{name: value})
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_interrupting_an_export_leaves_no_bundle(checkpoint, tmp_path, signum):
    made = tmp_path / "made"
    command = [sys.executable, str(ROOT / "export.py"), str(checkpoint), "--out", str(made / "out")]
    # Tests that run in the background ignore SIGINT, under nohup SIGHUP; the export shall not inherit that.
    heed = functools.partial(signal.signal, signum, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, preexec_fn=heed)
    while not list(made.glob(".out.*.partial/*")):  # until it has begun to write
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(process.pid, signum)
    _, errors = process.communicate(timeout=HANG)
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
    with pytest.raises(CheckpointError, match="missing weight file model-00001"):
        load_checkpoint(sharded)
