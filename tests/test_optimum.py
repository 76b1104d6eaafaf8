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


WORK = """
import json, sys
from pathlib import Path
from optimum.commands.optimum_cli import main
from transformers_melt import MeltForCausalLM
from transformers_melt.onnx_config import require_parity
errors = []
for command in json.loads(sys.argv[1]):
    sys.argv[1:] = command
    try:
        main()
        errors.append("")
    except Exception as error:
        errors.append(str(error))
checkpoint, graph = json.loads(sys.stdin.read())
model = MeltForCausalLM.from_pretrained(checkpoint).eval()
require_parity(Path(graph), model)
model.config.total_ut_steps -= 1
try:
    require_parity(Path(graph), model)
    parity = ""
except ValueError as error:
    parity = str(error)
print(json.dumps([errors, parity]))
"""
"""Runs commands of optimum-cli in one process, as its program does, and prints how each ended; then how the comparison
of an export with torch ends where the model is another."""


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


class Exports:
    """What optimum made of MELT checkpoints, and what another process, without our packages, generates from it."""

    def __init__(self, optimum: Path, folder: Path):
        self.folder, self.home = folder, folder / "home"
        # The configuration ties a head that is stored and is not the embedding, as transformers 5 reads such files.
        self.model = random_model(
            gate_kind="mean", norm_placement="pre", tie_word_embeddings=False, eos_token_id=[3, 7]
        )
        other = save_checkpoint(self.model, folder / "checkpoint")
        values = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))
        made = [
            command(MELT_TINY, (), folder / "deep"),
            command(MELT_TINY, ("--model-kwargs", '{"loops": 1}'), folder / "flat"),
            command(other, (), folder / "other"),
        ]
        cases, self.reasons = zip(*refusals(folder), strict=True)
        refused = [command(*case, folder / "refused") for case in cases]
        commands = json.dumps([[str(part) for part in one] for one in made + refused])
        done = subprocess.run(
            [optimum / "python", "-c", WORK, commands],
            input=json.dumps([str(other), str(folder / "other" / "model.onnx")]),
            capture_output=True,
            text=True,
            env=new_user(self.home),
        )
        assert done.returncode == 0, done.stderr
        errors, self.parity = json.loads(done.stdout.splitlines()[-1])
        self.said, self.errors, self.refusals = done.stderr, errors[: len(made)], errors[len(made) :]
        prompts = {name: [GOLDEN["prompt"], GOLDEN["prompt"][-12:]] for name in ("deep", "flat")} | {"other": [IDS]}
        run = [
            optimum / "python",
            Path(__file__).parent / "optimum_worker.py",
            folder,
            json.dumps(prompts),
            str(TOKENS),
        ]
        done = subprocess.run(run, capture_output=True, text=True, env=new_user(self.home))
        assert done.returncode == 0, done.stderr
        self.generated = json.loads(done.stdout)


IDS = [7, 400, 31, 9, 9, 220, 5]
TOKENS = 60


@pytest.fixture(scope="session")
def exports(optimum, tmp_path_factory) -> Exports:
    return Exports(optimum, tmp_path_factory.mktemp("optimum"))


@pytest.mark.parametrize(("name", "loops"), [("deep", 4), ("flat", 1)])
def test_optimum_gives_our_tokens(exports, name, loops):
    assert exports.errors == ["", "", ""], exports.said
    assert "warning" not in exports.said.lower()  # optimum's own comparison with torch says it that way
    got = exports.generated[name]
    # The whole prompt is one chunk here; the goldens have a chunk of 64, and the prompt is shorter.
    assert len(GOLDEN["prompt"]) <= GOLDEN["chunk"]
    assert got["alone"][0] == GOLDEN["loops"][str(loops)]["tokens"][:TOKENS]
    assert got["batch"] == got["alone"]
    assert got["text"] == Tokenizer.from_file(str(MELT_TINY / "tokenizer.json")).decode(
        GOLDEN["prompt"], skip_special_tokens=False
    )
    assert got["loops"] == loops
    assert exports.generated["ours"] == []
    assert not exports.home.exists()  # no telemetry
    assert "`model_kwargs` are not used by the model: ['loops']" in got["error"]
    graph = onnx.load(exports.folder / name / "model.onnx")
    assert {entry.key: entry.value for entry in graph.metadata_props}["melt.loops"] == str(loops)
    with pytest.raises(BundleError, match="is a model for optimum, whose number of loops is fixed"):
        MeltModel.load(exports.folder / name, device="cpu")
    caches = [value.name for value in graph.graph.input if value.name.startswith("past_key_values")]
    assert caches == [f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")]


def test_other_gates_norms_and_heads_give_torchs_tokens(exports):
    assert "newly initialized" not in exports.said
    (tokens,) = exports.generated["other"]["alone"]
    assert len(tokens) == TOKENS
    assert_greedy(exports.model, IDS, tokens, loops=4, chunk_size=len(IDS))
    assert json.loads((exports.folder / "other" / "generation_config.json").read_text())["eos_token_id"] == [3, 7]


def test_an_export_is_compared_with_torch(exports):
    """Beside another depth the graph differs."""
    assert exports.parity.startswith("model.onnx and torch differ in ")
    assert ", tolerance " in exports.parity


def refusals(folder: Path) -> list[tuple[tuple[Path, tuple[str, ...]], str]]:
    """Checkpoints and options that cannot be exported, and why."""

    def saved(name: str, **changes) -> Path:
        checkpoint = save_checkpoint(random_model(), folder / name)
        values = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps({**values, **changes}))
        return checkpoint

    looplm = save_checkpoint(random_model(gate_kind="none"), folder / "looplm")
    odd = saved("odd", head_dim="16", rope_parameters=5)
    more = saved("more", num_loops=8, rope_scaling={"rope_type": "llama3"})
    lacking = saved("lacking")
    tensors = load_file(lacking / "model.safetensors")
    gate = next(name for name in tensors if ".gate." in name)
    kept = {name: tensor for name, tensor in tensors.items() if name != gate}
    save_file(kept, lacking / "model.safetensors", metadata={"format": "pt"})
    kwargs = "--model-kwargs"
    return [
        ((more, ()), "num_loops is unknown, got 8: it may change what is computed; rope_scaling must be None"),
        ((lacking, ()), f"missing {gate}"),
        ((odd, ()), "head_dim must be a whole number of at least 1, got '16'; rope_parameters must be an object"),
        ((looplm, ()), "a LoopLM with 4 loops needs one for each loop"),
        ((MELT_TINY, (kwargs, '{"loops": 0}')), "loops must be a whole number of at least 1, got 0"),
        ((MELT_TINY, (kwargs, '{"depth": 2}')), "--model-kwargs of a MELT model knows only loops, got 'depth'"),
    ]


def test_what_a_plain_decoder_cannot_be_is_refused(exports):
    for reason, error in zip(exports.reasons, exports.refusals, strict=True):
        assert reason in error
    assert not list(exports.folder.glob("refused/*.onnx"))
