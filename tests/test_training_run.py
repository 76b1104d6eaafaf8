"""Training runs as users start them: killed and resumed, refused, and from an Ouro checkpoint to a bundle."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import random_model, save_checkpoint
from datasets import Dataset, disable_progress_bars, load_from_disk
from matplotlib.figure import Figure
from published import write_ouro
from transformers import PreTrainedTokenizerFast

from melt_export import cli as export
from melt_files.locks import lock
from melt_models import hub, load_checkpoint
from melt_models.training import cli, plot, prepare, read_recipe, saving, train
from melt_models.training.processes import Processes
from melt_runtime.cli import main as melt

disable_progress_bars()  # they would stand between the errors

RECIPE = """
chunk_sizes = [8, 12]
batch_size = 4
micro_batch_size = 2
base_learning_rate = 1e-3
gate_learning_rate = 1e-2
shallow_steps = 0.4
deep_steps = 0.3
most_loops = 6
leaving_steps = 0.3
wave_steps = 0.5
muon_learning_rate = 1e-3
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
    assert [path.name for path in out.rglob(".*")] == [".lock"]
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
    assert {record["loops"] for record in records} >= {4, 5, 6}  # of a model of four
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


def refuse(capsys, arguments: list[str], *fragments: str) -> None:
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err.partition("error: ")[2]
    assert error
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


def test_a_damaged_run_is_refused_by_its_files_name(recipe, teacher, data, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = command(recipe, teacher, data, out)
    assert cli.main(arguments) == 0
    shutil.rmtree(out / "model")

    def damaged(path: Path, content: bytes, *fragments: str) -> None:
        before = path.read_bytes()
        path.write_bytes(content)
        refuse(capsys, arguments, str(path), *fragments)
        path.write_bytes(before)

    lines = (out / "log.jsonl").read_bytes().splitlines(keepends=True)
    damaged(out / "log.jsonl", b"".join([lines[0], b"{oops\n", *lines[2:]]), "line 2 is not JSON", "remove the line")
    damaged(out / "log.jsonl", b"".join([lines[0], b'{"step": "2"}\n']), "line 2 is not the record of a step")
    damaged(out / "run.json", (out / "run.json").read_bytes()[:50], "not JSON", "choose another --out")
    damaged(out / "run.json", b"[1]", "not the settings of a run")
    damaged(out / "run.json", b"[" * 100_000, "not JSON")
    damaged(out / "checkpoints" / "step-000020" / "optimizer.pt", b"half", "is damaged", "put it back from a copy")
    (tmp_path / "file").write_text("x")
    refuse(capsys, command(recipe, teacher, data, tmp_path / "file"), "exists and is not a training run")
    assert cli.main(arguments) == 0
    assert [record["step"] for record in log_of(out)] == list(range(1, 21))


def test_only_one_process_trains_in_a_folder(recipe, teacher, data, tmp_path, capsys):
    arguments = command(recipe, teacher, data, tmp_path / "run")
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("ab") as other:
        assert lock(other.fileno(), wait=False)
        refuse(capsys, arguments, f"another process trains in {tmp_path / 'run'}: wait for it")
    assert cli.main(arguments) == 0


def test_the_newest_checkpoint_is_that_of_the_largest_number(tmp_path):
    for name in ("step-999999", "step-1000000", "step-0000x", ".step-2000000.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with saving.RunFolder(tmp_path / "other", {}, Processes()) as folder:
        folder.out = tmp_path
        assert folder.newest() == tmp_path / "checkpoints" / "step-1000000"


def test_a_line_that_was_not_written_to_its_end_is_no_record(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [record["step"] for record in saving.read_log(tmp_path)] == [1, 2]


def test_teacher_and_student_must_fit(recipe, teacher, data, tmp_path, capsys):
    student = save_checkpoint(random_model(num_hidden_layers=1, hidden_size=32), tmp_path / "narrow")
    arguments = command(recipe, teacher, data, tmp_path / "run", "--student", str(student))
    refuse(capsys, arguments, "hidden_size 32, teacher 64", "was made from this teacher")
    mean = save_checkpoint(random_model(num_hidden_layers=1, gate_kind="mean"), tmp_path / "mean")
    arguments = command(recipe, teacher, data, tmp_path / "run", "--student", str(mean))
    refuse(capsys, arguments, "gate_kind 'mean', recipe 'elementwise'")
    refuse(capsys, command(recipe, mean, data, tmp_path / "run"), "must be a LoopLM, got gate_kind 'mean'")
    refuse(capsys, command(recipe, tmp_path / "no", data, tmp_path / "run"), "config.json does not exist")
    recipe.write_text(RECIPE.replace("most_loops = 6", "most_loops = 4"))
    message = "most_loops must be above the model's total_ut_steps 4 where deep_steps is above 0, got 4: raise it"
    refuse(capsys, command(recipe, teacher, data, tmp_path / "run"), message)
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
        ({"input_ids": None}, ("row 2", "input_ids is missing")),
        ({"input_ids": [*range(15), None]}, ("row 2", "has a place without a number")),
        ({"input_ids": list(range(16)), "labels": None}, ("row 2", "labels is missing")),
        ({"input_ids": [1] * 257}, ("row 2", "257 tokens are more than the teacher's max_position_embeddings of 256")),
    ],
)
def test_bad_rows_are_named(recipe, teacher, tmp_path, capsys, row, fragments):
    rows = [{name: value for name, value in GOOD_ROW.items() if name in row}] * 2
    folder = write_data(tmp_path / "tokens", [*rows, row])
    refuse(capsys, command(recipe, teacher, folder, tmp_path / "run"), *fragments)
    assert not (tmp_path / "run").exists()


def test_bad_data_folders_are_refused(recipe, teacher, data, tmp_path, capsys):
    def refused(folder: Path, *fragments: str) -> None:
        refuse(capsys, command(recipe, teacher, folder, tmp_path / "run"), *fragments)
        assert not (tmp_path / "run").exists()

    refused(tmp_path / "no", "is not a data set on disk")
    refused(write_data(tmp_path / "texts", [{"text": "Ana"}]), "must have a column input_ids, got text")
    floats = write_data(tmp_path / "floats", [{"input_ids": [0.5] * 20}])
    refused(floats, "input_ids must be lists of whole numbers, got list<", "double")
    refused(write_data(tmp_path / "flat", [{"input_ids": 3}]), "must be lists of whole numbers, got int")
    labels = write_data(tmp_path / "labels", [{"input_ids": [1] * 20, "labels": ["a"] * 20}])
    refused(labels, "labels must be lists of whole numbers")
    damaged = write_data(tmp_path / "damaged")
    (damaged / "state.json").write_text('{"_data_files": 3}')
    refused(damaged, "is not a data set on disk")


@pytest.mark.parametrize("device", ["tpu9", "meta", "cpu:1", "cuda:-1", "cuda:1000", ""])
def test_what_is_no_device_is_refused(recipe, teacher, data, tmp_path, capsys, device):
    refuse(capsys, command(recipe, teacher, data, tmp_path / "run", "--device", device), f"got {device!r}")


def test_a_device_that_is_not_there_is_refused(recipe, teacher, data, tmp_path, capsys, monkeypatch):
    arguments = command(recipe, teacher, data, tmp_path / "run", "--device")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refuse(capsys, [*arguments, "cuda"], "sees no CUDA: use cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    refuse(capsys, [*arguments, "cuda:2"], "there are 2: the last is cuda:1")


def test_memory_that_is_full_is_a_sentence(recipe, teacher, data, tmp_path, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("melt_models.training.trainer._Loop.accumulate", full)
    arguments = command(recipe, teacher, data, tmp_path / "run")
    refuse(capsys, arguments, "step 1 needs more memory than cpu has: lower micro_batch_size")


def test_a_picture_that_cannot_be_drawn_is_refused_before_training(
    recipe, teacher, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(cli, "find_spec", lambda _: None)
    refuse(capsys, command(recipe, teacher, data, tmp_path / "run", "--plot"), "pip install 'melt-onnx[plot]'")
    assert not (tmp_path / "run").exists()


def test_an_axis_has_a_few_plain_numbers():
    for low, high in ((0.4, 1.4), (3.6, 7.0), (0.02, 40.0), (1e-9, 0.9)):
        axis = Figure().subplots()
        axis.plot([1, 2], [low, high])
        plot.choose_scale(axis, [low, high])
        bottom, top = axis.get_ylim()
        axis.figure.canvas.draw()
        ticks = zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
        labels = [label.get_text() for tick, label in ticks if bottom <= tick <= top]
        assert 3 <= len(labels) <= 10
        assert all(re.fullmatch(r"\d+(\.\d+)?", label) for label in labels), labels


def test_a_loss_that_is_not_finite_stops_the_run(recipe, teacher, data, tmp_path, capsys):
    recipe.write_text(RECIPE.replace("base_learning_rate = 1e-3", "base_learning_rate = 1e30"))
    refuse(capsys, command(recipe, teacher, data, tmp_path / "run"), "lower the learning rates", "there was none yet")


def limit_files(size: int) -> None:
    """As on a full disk: what grows beyond ``size`` bytes cannot be written."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_keeps_the_last_good_checkpoint(recipe, teacher, data, tmp_path):
    out = tmp_path / "run"
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
    assert [record["phase"] for record in log] == ["transition"] * 10 + ["distillation"] * 10 + [
        *["joint"] * 5,
        *["exit"] * 10,
    ]


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
        ("a.jsonl", "", 8, "a.jsonl is empty"),
        ("a.jsonl", "[1]\n", 8, "text 1 must be a text, got 1"),
        ("a.jsonl", '{"text": "Ana"}\n{"text": null}\n', 8, "text 2 must be a text, got None"),
        ("a.jsonl", '{"text": 3}\n', 8, "text 1 must be a text, got 3"),
        ("a.jsonl", '{"messages": "hi"}\n', 8, "text 1 cannot be tokenized"),
        ("a.jsonl", '{"messages": [{"role": "king", "content": "x"}]}\n', 8, "knows the roles user and assistant"),
        ("a.jsonl", '{"prose": "x"}\n', 8, "must have a column text or messages, got prose"),
        ("a.jsonl", '{"text": "Ana"}\n', 8, "fewer than one row of 8"),
        ("a.jsonl", "{not json\n", 8, "cannot be read as json"),
        ("a.jsonl", '{"text": "Ana"}\n', 1, "length must be at least 2"),
    ],
)
def test_bad_texts_are_refused(teacher, tmp_path, capsys, name, text, length, message):
    (tmp_path / name).write_text(text)
    assert prepared(tmp_path / name, teacher, tmp_path / "tokens", length) == 1
    error = capsys.readouterr().err.partition("error: ")[2]
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_bad_tokenizers_are_refused(teacher, tmp_path, capsys):
    source = write_texts(tmp_path / "a.jsonl", [{"text": "Ana"}])
    assert prepared(source, tmp_path, tmp_path / "tokens", 8) == 1
    assert "config.json" in capsys.readouterr().err
    shutil.copyfile(teacher / "config.json", tmp_path / "config.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert prepared(source, tmp_path, tmp_path / "tokens", 8) == 1
    assert "has no tokenizer that can be read" in capsys.readouterr().err
    assert not (tmp_path / "tokens").exists()


def test_a_tokenizer_of_the_hub_comes_without_weights(teacher, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **how: asked.append((name, how)) or str(teacher))
    source = write_texts(tmp_path / "texts.jsonl", [{"text": "Ana reports to Ben."}] * 9)
    assert prepared(source, Path("ByteDance/Ouro-1.4B"), tmp_path / "tokens", 8) == 0
    assert len(load_from_disk(str(tmp_path / "tokens"))) > 0
    assert asked == [("ByteDance/Ouro-1.4B", {"allow_patterns": ["*.json", "*.jsonl", "*.jinja"]})]


WITHOUT_TORCH = """
import sys, tempfile
sys.modules["torch"] = None
from melt_models.training import cli, prepare
for main in (cli.main, prepare.main):
    try:
        main(["--help"])
    except SystemExit as end:
        print(end.code, [name for name in ("transformers", "datasets") if name in sys.modules], file=sys.stderr)
cli.main(["r.toml", "--teacher", "t", "--data", "d", "--out", "o"])
prepare.main(["t.jsonl", "--tokenizer", "t", "--out", "o"])
"""


def test_help_needs_no_torch_and_work_says_how_to_get_it(tmp_path):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == 2
    lines = done.stderr.splitlines()
    assert lines[:2] == ["0 []", "0 []"]
    assert lines[2:] == [
        f"error: {what} needs torch, which is not installed: pip install 'melt-onnx[train]'"
        for what in ("melt-train", "preparing data")
    ]
