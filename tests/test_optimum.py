"""optimum-cli exports a MELT checkpoint, and ORTModelForCausalLM, which knows no loops, gives our tokens."""

import json
import subprocess
from pathlib import Path

import onnx
import pytest
from conftest import MELT_TINY, ROOT, environment, new_user, random_model, save_checkpoint
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tolerances import assert_greedy

from melt_runtime import BundleError, MeltModel

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "melt-tiny.json").read_text())
PINS = ("optimum-onnx==0.1.0", "transformers==4.57.6", "onnxruntime==1.31.1")


COMPARE = """
import sys
from pathlib import Path
from transformers_melt import MeltForCausalLM
from transformers_melt.onnx_config import require_parity
model = MeltForCausalLM.from_pretrained(sys.argv[1]).eval()
require_parity(Path(sys.argv[2]), model)
model.config.total_ut_steps -= 1
try:
    require_parity(Path(sys.argv[2]), model)
except ValueError as error:
    print(error)
"""


EACH = """
import json, sys
from optimum.commands.optimum_cli import main
errors = []
for command in json.loads(sys.argv[1]):
    sys.argv[1:] = command
    try:
        main()
        errors.append("")
    except Exception as error:
        errors.append(str(error))
print(json.dumps(errors))
"""
"""Runs commands of optimum-cli in one process and prints how each ended."""


@pytest.fixture(scope="session")
def optimum() -> Path:
    """The programs of an environment with optimum, and with our two distributions as they stand now."""
    programs = environment("optimum", *PINS)
    pip = [programs / "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    sources = [ROOT, ROOT / "integrations" / "optimum"]
    subprocess.run([*pip, "--no-build-isolation", "--force-reinstall", *sources], check=True)
    return programs


def command(checkpoint: Path, options: tuple[str, ...], out: Path) -> list[str | Path]:
    """What ``optimum-cli`` is told, without any option that a model of transformers would not need."""
    return ["export", "onnx", "--model", checkpoint, "--task", "text-generation-with-past", *options, out]


def export(optimum: Path, checkpoint: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    run = [optimum / "optimum-cli", *command(checkpoint, options, out)]
    return subprocess.run(run, capture_output=True, text=True, env=new_user(out.parent / "home"))


def generate(optimum: Path, folder: Path, prompts: list[list[int]], new_tokens: int) -> dict:
    worker = Path(__file__).parent / "optimum_worker.py"
    run = [optimum / "python", worker, folder, json.dumps(prompts), str(new_tokens)]
    user = new_user(folder.parent / "home")
    return json.loads(subprocess.run(run, check=True, capture_output=True, text=True, env=user).stdout)


@pytest.mark.parametrize(("loops", "options"), [(4, ()), (1, ("--model-kwargs", '{"loops": 1}'))])
def test_optimum_gives_our_tokens(loops, options, optimum, tmp_path):
    done = export(optimum, MELT_TINY, tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()  # optimum's own comparison with torch says it that way
    prompts = [GOLDEN["prompt"], GOLDEN["prompt"][-12:]]
    got = generate(optimum, tmp_path / "out", prompts, 200)
    # The whole prompt is one chunk here; the goldens have a chunk of 64, and the prompt is shorter.
    assert len(GOLDEN["prompt"]) <= GOLDEN["chunk"]
    assert got["alone"][0] == GOLDEN["loops"][str(loops)]["tokens"]
    assert got["batch"] == got["alone"]
    assert got["text"] == Tokenizer.from_file(str(MELT_TINY / "tokenizer.json")).decode(
        GOLDEN["prompt"], skip_special_tokens=False
    )
    assert got["loops"] == loops
    assert got["ours"] == []
    assert not (tmp_path / "home").exists()  # no telemetry
    assert "`model_kwargs` are not used by the model: ['loops']" in got["error"]
    graph = onnx.load(tmp_path / "out" / "model.onnx")
    assert {entry.key: entry.value for entry in graph.metadata_props}["melt.loops"] == str(loops)
    with pytest.raises(BundleError, match="is a model for optimum, whose number of loops is fixed"):
        MeltModel.load(tmp_path / "out", device="cpu")
    caches = [value.name for value in graph.graph.input if value.name.startswith("past_key_values")]
    assert caches == [f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")]


def test_other_gates_and_norms_give_torchs_tokens(optimum, tmp_path):
    model = random_model(gate_kind="mean", norm_placement="pre", tie_word_embeddings=False, eos_token_id=[3, 7])
    checkpoint = save_checkpoint(model, tmp_path / "checkpoint")
    done = export(optimum, checkpoint, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    ids = [7, 400, 31, 9, 9, 220, 5]
    (tokens,) = generate(optimum, tmp_path / "out", [ids], 20)["alone"]
    assert len(tokens) == 20
    assert_greedy(model, ids, tokens, loops=4, chunk_size=len(ids))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [3, 7]
    # The export's own comparison: beside another depth the graph differs.
    run = [optimum / "python", "-c", COMPARE, checkpoint, tmp_path / "out" / "model.onnx"]
    found = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert found.startswith("model.onnx and torch differ in ")
    assert ", tolerance " in found


def test_a_stored_head_counts_where_it_is_not_the_embedding(optimum, tmp_path):
    """Although the configuration ties the two, as transformers 5 reads such files."""
    model = random_model(gate_kind="mean", tie_word_embeddings=False)
    checkpoint = save_checkpoint(model, tmp_path / "checkpoint")
    values = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))
    done = export(optimum, checkpoint, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr
    ids = [7, 400, 31, 9, 9, 220, 5]
    (tokens,) = generate(optimum, tmp_path / "out", [ids], 12)["alone"]
    assert_greedy(model, ids, tokens, loops=4, chunk_size=len(ids))


def test_what_a_plain_decoder_cannot_be_is_refused(optimum, tmp_path):
    looplm = save_checkpoint(random_model(gate_kind="none"), tmp_path / "looplm")
    odd = save_checkpoint(random_model(), tmp_path / "odd")
    values = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**values, "head_dim": "16", "rope_parameters": 5}))
    more = save_checkpoint(random_model(), tmp_path / "more")
    values = json.loads((more / "config.json").read_text()) | {"num_loops": 8, "rope_scaling": {"rope_type": "llama3"}}
    (more / "config.json").write_text(json.dumps(values))
    lacking = save_checkpoint(random_model(), tmp_path / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    gate = next(name for name in tensors if ".gate." in name)
    save_file(
        {name: tensors[name] for name in tensors if name != gate},
        lacking / "model.safetensors",
        metadata={"format": "pt"},
    )
    cases = (
        (more, (), "num_loops is unknown, got 8: it may change what is computed; rope_scaling must be None"),
        (lacking, (), f"missing {gate}"),
        (odd, (), "head_dim must be a whole number of at least 1, got '16'; rope_parameters must be an object"),
        (looplm, (), "a LoopLM with 4 loops needs one for each loop"),
        (MELT_TINY, ("--model-kwargs", '{"loops": 0}'), "loops must be a whole number of at least 1, got 0"),
        (MELT_TINY, ("--model-kwargs", '{"depth": 2}'), "--model-kwargs of a MELT model knows only loops, got 'depth'"),
    )
    commands = [[str(part) for part in command(*case[:2], tmp_path / "out")] for case in cases]
    done = subprocess.run([optimum / "python", "-c", EACH, json.dumps(commands)], capture_output=True, text=True)
    for (*_, message), error in zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert message in error
    assert not list(tmp_path.glob("out/*.onnx"))
