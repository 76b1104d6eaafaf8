"""Training runs as users start them: killed and resumed, refused, and from an Ouro checkpoint to a bundle."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import random_model, save_checkpoint
from datasets import Dataset, disable_progress_bars, load_from_disk
from published import write_ouro
from tolerances import TORCH, assert_close
from transformers import PreTrainedTokenizerFast

from melt_export import cli as export
from melt_models import load_checkpoint
from melt_models.training import cli, prepare, read_recipe, train
from melt_runtime import cli as melt

disable_progress_bars()  # they would stand between the errors

RECIPE = """
chunk_sizes = [8, 12]
batch_size = 4
micro_batch_size = 2
base_learning_rate = 1e-3
gate_learning_rate = 1e-2
shallow_steps = 0.5
warmup_steps = 2
weight_decay = 0.1
checkpoint_every = 10
[transition]
steps = 12
cross_entropy = 1
[distillation]
steps = 8
distillation = 1.0
attention = 0.1
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    model = random_model(gate_kind="none", num_hidden_layers=1, eos_token_id=3)
    return save_checkpoint(model, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "tokens")


def write_data(folder: Path, rows: list[dict] | None = None) -> Path:
    draw = torch.Generator().manual_seed(0)
    if rows is None:
        lengths = [14 + index % 5 for index in range(30)]
        rows = [{"input_ids": torch.randint(703, (length,), generator=draw).tolist()} for length in lengths]
    Dataset.from_list(rows).save_to_disk(str(folder))
    return folder


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def command(recipe: Path | str, teacher: Path, data: Path, out: Path, *more: str) -> list[str]:
    paths = ["--teacher", str(teacher), "--data", str(data), "--out", str(out)]
    return [str(recipe), *paths, "--device", "cpu", *more]


def log_of(out: Path) -> list[dict]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


MOMENTS = (
    "text",  # run.json
    "half a line:3",
    "checkpoint",  # the first one: there is none yet
    "random:0:4",
    "step:7",
    "text",  # the log, when it is cut to the last checkpoint
    "before removal",
    "step:13",
    "removal",
    "random:1:17",
    "random:2:19",
    "step:20",
    "model",
)
WHOLE = re.compile(
    r"run\.json|log\.jsonl|checkpoints(/step-\d{6}(/(config|generation_config)\.json|/model\.safetensors|/optimizer\.pt)?)?"
)


def run_killed(moments: Sequence[str], arguments: list[str]) -> list[dict]:
    """Runs in processes of their own that die without a warning; what lay in the folder after each."""
    script = [sys.executable, str(Path(__file__).parent / "killed_training.py"), json.dumps(moments)]
    done = subprocess.run([*script, *arguments], capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [entry["moment"] for entry in found] == list(moments), done.stderr
    assert {entry["status"] for entry in found} == {-signal.SIGKILL}, found
    return found


def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(recipe, teacher, data, tmp_path):
    """Killed at every kind of moment and at random ones: nothing half-made is visible, and nothing of it stays."""
    straight = train(read_recipe(recipe), teacher, data, tmp_path / "straight", device="cpu")
    recipe.write_text(RECIPE.replace("checkpoint_every = 10", "checkpoint_every = 5"))
    out = tmp_path / "killed"
    for entry in run_killed(MOMENTS, command(recipe, teacher, data, out)):
        visible = [path for path in entry["there"] if not re.search(r"(^|/)\.", path)]
        assert [path for path in visible if not WHOLE.fullmatch(path)] == [], entry
        checkpoints = {path.split("/")[1] for path in visible if path.startswith("checkpoints/")}
        for name in checkpoints:
            assert {f"checkpoints/{name}/{file}" for file in ("model.safetensors", "optimizer.pt")} <= set(visible)
        newest = {"step:7": ["step-000005"], "step:13": ["step-000010"], "model": ["step-000020"]}
        assert sorted(checkpoints) == newest.get(entry["moment"], sorted(checkpoints))
    assert cli.main(command(recipe, teacher, data, out)) == 0
    assert [path for path in out.rglob(".*") if path.suffix == ".old"] == []
    assert [path.name for path in (out / "checkpoints").glob("step-*")] == ["step-000020"]
    expected, resumed = load_checkpoint(straight).state_dict(), load_checkpoint(out / "model").state_dict()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert log_of(out) == log_of(tmp_path / "straight")
    records = log_of(out)
    assert [record["step"] for record in records] == list(range(1, 21))
    assert records[0]["alpha"] == 0.0
    assert records[11]["alpha"] == 1.0
    assert records[12]["alpha"] is None
    assert {record["phase"] for record in records[12:]} == {"distillation"}
    start_state = load_checkpoint(teacher).state_dict()
    assert not torch.equal(expected["model.norm.weight"], start_state["model.norm.weight"])
    assert torch.equal(expected["model.early_exit_gate.weight"], start_state["model.early_exit_gate.weight"])


def test_a_run_draws_its_log_and_repeats_nothing_when_done(recipe, teacher, data, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = command(recipe, teacher, data, out, "--plot")
    assert cli.main(arguments) == 0
    assert (out / "log.png").stat().st_size > 10_000
    before = (out / "log.jsonl").read_bytes()
    assert cli.main(arguments) == 0
    assert (out / "log.jsonl").read_bytes() == before
    assert f"model: {out / 'model'}" in capsys.readouterr().out
    assert (out / "model" / "tokenizer.json").is_file()


def test_two_processes_share_a_batch(recipe, teacher, data, tmp_path):
    """As on two GPUs: the same weights as alone, to rounding, and one log."""
    alone = train(read_recipe(recipe), teacher, data, tmp_path / "alone", device="cpu")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = [*torchrun, "-m", "melt_models.training", *command(recipe, teacher, data, tmp_path / "two")]
    subprocess.run(run, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    expected, got = (load_checkpoint(folder).state_dict() for folder in (alone, tmp_path / "two" / "model"))
    for name, tensor in expected.items():
        assert_close(got[name], tensor, TORCH)
    pairs = list(zip(log_of(tmp_path / "alone"), log_of(tmp_path / "two"), strict=True))
    assert all(one["tokens"] == two["tokens"] for one, two in pairs)
    assert_close([one["loss"] for one, _ in pairs], [two["loss"] for _, two in pairs], TORCH)


def refuse(capsys, arguments: list[str], *fragments: str) -> None:
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    for fragment in fragments:
        assert fragment in error


def test_a_run_refuses_to_go_on_with_other_settings(recipe, teacher, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(command(recipe, teacher, data, out)) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    recipe.write_text(RECIPE.replace("weight_decay = 0.1", "weight_decay = 0.2"))
    message = "recipe.weight_decay was 0.1, now 0.2"
    refuse(capsys, command(recipe, teacher, data, out), message, "choose another --out")
    recipe.write_text(RECIPE)
    fewer = write_data(tmp_path / "fewer", [{"input_ids": list(range(20))}])
    refuse(capsys, command(recipe, teacher, fewer, out), "data.rows was 30, now 1")
    other = save_checkpoint(random_model(1, gate_kind="none", num_hidden_layers=1, eos_token_id=3), tmp_path / "other")
    refuse(capsys, command(recipe, other, data, out), "teacher.sum_of_magnitudes was")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    refuse(capsys, command(recipe, teacher, data, tmp_path / "mine"), "exists and is not a training run")


def test_teacher_and_student_must_fit(recipe, teacher, data, tmp_path, capsys):
    student = save_checkpoint(random_model(num_hidden_layers=1, hidden_size=32), tmp_path / "narrow")
    arguments = command(recipe, teacher, data, tmp_path / "run", "--student", str(student))
    refuse(capsys, arguments, "hidden_size 32, teacher 64", "was made from this teacher")
    mean = save_checkpoint(random_model(num_hidden_layers=1, gate_kind="mean"), tmp_path / "mean")
    arguments = command(recipe, teacher, data, tmp_path / "run", "--student", str(mean))
    refuse(capsys, arguments, "gate_kind 'mean', recipe 'elementwise'")
    refuse(capsys, command(recipe, mean, data, tmp_path / "run"), "must be a LoopLM, got gate_kind 'mean'")
    refuse(capsys, command(recipe, tmp_path / "no", data, tmp_path / "run"), "config.json does not exist")
    assert not (tmp_path / "run").exists()


def test_a_student_can_be_given(recipe, teacher, data, tmp_path):
    first = train(read_recipe(recipe), teacher, data, tmp_path / "first", device="cpu")
    second = train(read_recipe(recipe), teacher, data, tmp_path / "second", student=first, device="cpu")
    starts = [log_of(tmp_path / name)[0]["cross_entropy"] for name in ("first", "second")]
    assert starts[1] < starts[0]  # it has seen the data
    assert not torch.equal(
        load_checkpoint(first).model.layers[0].gate.w_z.weight, load_checkpoint(second).model.layers[0].gate.w_z.weight
    )


GOOD_ROW = {"input_ids": list(range(16)), "labels": [-100] * 8 + list(range(8, 16))}


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        ({"input_ids": [*range(15), 703]}, ("row 2", "token id 703 is outside the vocabulary of 703")),
        ({"input_ids": [*range(15), -1]}, ("row 2", "token id -1 is outside")),
        ({"input_ids": list(range(11))}, ("row 2", "11 tokens are fewer than a chunk of 12")),
        ({"input_ids": list(range(16)), "labels": [1] * 15}, ("row 2", "as long as input_ids (16), got 15")),
        ({"input_ids": list(range(16)), "labels": [-7] * 16}, ("row 2", "label -7 is neither -100")),
    ],
)
def test_bad_rows_are_named(recipe, teacher, tmp_path, capsys, row, fragments):
    rows = [{name: value for name, value in GOOD_ROW.items() if name in row}] * 2
    folder = write_data(tmp_path / "tokens", [*rows, row])
    refuse(capsys, command(recipe, teacher, folder, tmp_path / "run"), *fragments)
    assert not (tmp_path / "run").exists()


def test_bad_data_folders_are_refused(recipe, teacher, data, tmp_path, capsys):
    refuse(capsys, command(recipe, teacher, tmp_path / "no", tmp_path / "run"), "is not a data set on disk")
    texts = write_data(tmp_path / "texts", [{"text": "Ana"}])
    refuse(capsys, command(recipe, teacher, texts, tmp_path / "run"), "must have a column input_ids, got text")
    refuse(capsys, command(recipe, teacher, data, tmp_path / "run", "--device", "tpu9"), "got 'tpu9'")
    if not torch.cuda.is_available():
        refuse(capsys, command(recipe, teacher, data, tmp_path / "run", "--device", "cuda"), "sees no CUDA")


def test_a_loss_that_is_not_finite_stops_the_run(recipe, teacher, data, tmp_path, capsys):
    recipe.write_text(RECIPE.replace("base_learning_rate = 1e-3", "base_learning_rate = 1e30"))
    refuse(capsys, command(recipe, teacher, data, tmp_path / "run"), "lower the learning rates", "there was none yet")


def limit_files(size: int) -> None:
    """As on a full disk: what grows beyond ``size`` bytes cannot be written."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_keeps_the_last_good_checkpoint(recipe, teacher, data, tmp_path):
    out = tmp_path / "run"
    assert cli.main(command(recipe, teacher, data, tmp_path / "whole")) == 0
    recipe.write_text(RECIPE.replace("checkpoint_every = 10", "checkpoint_every = 5"))
    run_killed(["step:7"], command(recipe, teacher, data, out))
    (kept,) = (out / "checkpoints").glob("step-*")
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    limited = subprocess.run(
        [sys.executable, "-m", "melt_models.training", *command(recipe, teacher, data, out)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: limit_files(100_000),
    )
    assert limited.returncode == 1
    assert "could not be written" in limited.stderr
    assert f"The last good checkpoint is {kept}" in limited.stderr
    assert list((out / "checkpoints").iterdir()) == [kept]
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert cli.main(command(recipe, teacher, data, out)) == 0
    expected, resumed = (load_checkpoint(folder / "model").state_dict() for folder in (tmp_path / "whole", out))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def write_texts(path: Path, texts: list[dict]) -> Path:
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return path


def prepared(source: Path, tokenizer: Path, out: Path, length: int = 64) -> int:
    return prepare.main([str(source), "--tokenizer", str(tokenizer), "--length", str(length), "--out", str(out)])


def test_the_guide_from_an_ouro_checkpoint_to_a_bundle(tmp_path, capsys):
    """The commands of docs/training.md on a small model with the published files' form."""
    ouro = write_ouro(tmp_path / "ouro")
    texts = [{"text": f"Ana reports to Ben, {n} works for {n + 1}."} for n in range(80)]
    assert prepared(write_texts(tmp_path / "texts.jsonl", texts), ouro, tmp_path / "tokens") == 0
    assert "rows of 64 tokens" in capsys.readouterr().out
    assert cli.main(command("smoke", ouro, tmp_path / "tokens", tmp_path / "run")) == 0
    model = load_checkpoint(tmp_path / "run" / "model")
    assert (model.config.gate_kind, model.config.cache_kind, model.dtype) == ("elementwise", "shared", torch.bfloat16)
    assert model.config.eos_token_id == load_checkpoint(ouro).config.eos_token_id
    assert export.main([str(tmp_path / "run" / "model"), "--out", str(tmp_path / "bundle"), "--precision", "int4"]) == 0
    assert melt.main(["generate", str(tmp_path / "bundle"), "Who?", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    log = log_of(tmp_path / "run")
    assert [record["phase"] for record in log] == ["transition"] * 10 + ["distillation"] * 10


def test_texts_and_chats_become_rows_of_one_length(teacher, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher)
    chat = [{"role": "user", "content": "Who is above Ana?"}, {"role": "assistant", "content": "Ben."}]
    source = write_texts(tmp_path / "chats.jsonl", [{"messages": chat}] * 40)
    assert prepared(source, teacher, tmp_path / "chats", 16) == 0
    rows = load_from_disk(str(tmp_path / "chats"))["input_ids"]
    one = tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False))
    assert one[-1] == load_checkpoint(teacher).config.eos_token_id
    joined = [token for row in rows for token in row]
    assert joined == (one * 40)[: len(joined)]
    assert len(one) * 40 - len(joined) < 16
    lines = tmp_path / "lines.txt"
    lines.write_text("Ana reports to Ben.\nBen reports to Dan.\n" * 5)
    assert prepared(lines, teacher, tmp_path / "lines", 8) == 0
    assert tokenizer.decode(load_from_disk(str(tmp_path / "lines"))["input_ids"][0]).startswith("Ana reports to Ben.")


@pytest.mark.parametrize(
    ("name", "text", "length", "message"),
    [
        ("a.csv", "x", 8, "must end in .jsonl"),
        ("a.jsonl", '{"prose": "x"}\n', 8, "must have a column text or messages, got prose"),
        ("a.jsonl", '{"text": "Ana"}\n', 8, "fewer than one row of 8"),
        ("a.jsonl", "{not json\n", 8, "cannot be read as json"),
        ("a.jsonl", '{"text": "Ana"}\n', 1, "length must be at least 2"),
    ],
)
def test_bad_texts_are_refused(teacher, tmp_path, capsys, name, text, length, message):
    (tmp_path / name).write_text(text)
    assert prepared(tmp_path / name, teacher, tmp_path / "tokens", length) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tokens").exists()
    assert prepared(tmp_path / name, tmp_path, tmp_path / "tokens", 8) == 1
