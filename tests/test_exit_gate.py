"""The exit gate: its rule, its target and loss, its phase of a run, and tokens that leave in torch."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model, save_checkpoint
from datasets import disable_progress_bars
from hypothesis import given
from hypothesis import strategies as st
from test_training_run import log_of, write_data
from tolerances import TORCH, assert_close

from melt_models import MeltCausalLM, load_checkpoint
from melt_models.exits import exit_log_probabilities, exit_loops, exit_probabilities
from melt_models.modeling import KVCache
from melt_models.tiny.depth import answer, run_chunk
from melt_models.training import Exit, Joint, TrainingError, cli, plot, read_recipe, train
from melt_models.training.exit_gate import continue_targets, gate_loss, joint_terms
from melt_models.training.objective import IGNORED, Objective, Step, TokenBatch

disable_progress_bars()  # they would stand between the errors

LOOPS, CHUNK, LENGTH = 4, 8, 24
PHASE = Exit(steps=1, learning_rate=0.1, margin=0.05, sharpness=20.0, threshold=0.6)
JOINT = Joint(steps=1, learning_rate=0.1, entropy=0.05)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=6), st.floats(0.01, 0.99))
def test_probabilities_cumulate_as_ouro_says(logits, threshold):
    lambdas = [torch.tensor(logit, dtype=torch.double).sigmoid().item() for logit in logits]
    direct, still = [], 1.0
    for chance in lambdas[:-1]:
        direct.append(still * chance)
        still *= 1 - chance
    direct.append(still)  # the last loop takes the rest
    assert_close(exit_probabilities(torch.tensor(logits)), direct, TORCH)
    total, first = 0.0, len(logits)
    for loop, chance in enumerate(direct, start=1):
        total += chance
        if abs(total - threshold) < 1 / 512:
            return  # rounding may decide
        if total >= threshold:
            first = loop
            break
    assert exit_loops(torch.tensor(logits), threshold).item() == first


def test_tokens_leave_on_their_own_and_the_last_loop_takes_the_rest():
    sure, unsure = 9.0, -9.0
    logits = torch.tensor([[sure, unsure, unsure], [unsure, sure, unsure], [unsure] * 3, [0.0, 0.0, 0.0]])
    assert exit_loops(logits, 0.75).tolist() == [1, 2, 3, 2]
    assert exit_loops(logits[:, None], 0.5).tolist() == [[1], [2], [3], [1]]
    assert exit_loops(logits, 1.0).tolist() == [3, 3, 3, 3]


def test_a_gate_that_is_sure_has_no_entropy_and_finite_gradients():
    """Probabilities that round to 0 have logarithms all the same."""
    logits = torch.tensor([[200.0, -200.0, 0.0], [200.0, 0.0, 3.0], [-200.0, -200.0, 7.0]], requires_grad=True)
    losses = torch.tensor([[3.0, 2.0, 1.0]] * 3).T
    terms = joint_terms(losses, logits.T)
    half = torch.tensor(2.0).log()
    assert_close(terms["entropy"], 0.0, TORCH)
    assert_close(terms["expected_cross_entropy"], 3.0 + 3.0 + 1.0, TORCH)
    (terms["expected_cross_entropy"] - terms["entropy"]).backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(exit_log_probabilities(logits)).all()
    even = joint_terms(losses[:2], torch.zeros(2, 3))
    assert_close(even["entropy"], 3 * half, TORCH)
    assert_close(even["expected_cross_entropy"], 3 * 2.5, TORCH)


def targets_of(*losses: float, margin: float = 0.1, sharpness: float = 1000.0) -> list[float]:
    return continue_targets(torch.tensor(losses)[:, None], margin, sharpness)[:, 0].round(decimals=3).tolist()


def test_the_target_looks_at_what_all_later_loops_can_save():
    assert targets_of(9.0, 9.0, 0.1, 0.1) == [1, 1, 0]  # three hops: the next loop alone saves nothing
    assert targets_of(0.1, 0.1, 0.1, 0.1) == [0, 0, 0]
    assert targets_of(9.0, 9.0, 9.0, 9.0) == [0, 0, 0]  # what no loop finds is not worth one
    assert targets_of(9.0, 0.15, 9.0, 0.0) == [1, 0, 1]  # not 0.15 for two loops more at 0.1 each
    assert targets_of(9.0, 0.25, 9.0, 0.0) == [1, 1, 1]
    assert targets_of(2.0, 1.0, 3.0, 4.0) == [1, 0, 0]
    assert targets_of(1.0, 0.85, 0.7, 0.55) == [1, 1, 1]
    assert targets_of(1.0, 0.95, 0.9, 0.85) == [0, 0, 0]


def test_one_loop_before_the_last_the_target_is_ouros():
    losses = torch.tensor([[3.0, 0.2], [1.0, 0.21], [0.4, 0.2]])
    got = continue_targets(losses, margin=0.005, sharpness=50.0)
    assert got.shape == (2, 2)
    assert_close(got[-1], torch.sigmoid(50 * (losses[1] - losses[2] - 0.005)), TORCH)
    assert_close(continue_targets(losses.double().half(), 0.005, 50.0)[0, 0], 1.0, TORCH)


def test_a_gate_learns_at_which_loop_an_answer_settles():
    """A state that says how far the answer is; leaving too early is wrong, leaving late is waste."""
    draw = torch.Generator().manual_seed(0)
    settles = torch.randint(1, LOOPS + 1, (256,), generator=draw)
    after = torch.arange(1, LOOPS + 1)[:, None]
    losses = torch.where(after < settles, 6.0, 0.01)
    remaining = (settles - after).clamp(min=0)
    states = torch.nn.functional.one_hot(remaining, LOOPS) + 0.1 * torch.randn(LOOPS, 256, LOOPS, generator=draw)
    torch.manual_seed(0)
    gate = torch.nn.Linear(LOOPS, 1)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.1)
    targets = continue_targets(losses, margin=0.1, sharpness=50.0)
    for _ in range(200):
        loss = gate_loss(gate(states)[:-1, :, 0], targets) / targets.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(exit_loops(gate(states)[..., 0].T, 0.5), settles)
    ouros = torch.sigmoid(50 * (losses[:-1] - losses[1:] - 0.1))  # one loop ahead: away from a question of four hops
    assert ((1 - ouros)[0, settles > 2] > 0.9).all()


def gated_batch() -> TokenBatch:
    ids = torch.randint(703, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    targets = torch.cat((ids[:, 1:], torch.full((2, 1), IGNORED)), dim=1)
    targets[0, :5] = targets[1, 10:] = IGNORED
    return TokenBatch(ids, targets, torch.ones_like(ids, dtype=torch.bool))


@pytest.mark.parametrize("gate_kind", ["elementwise", "none"])
def test_the_loss_is_what_its_name_says(gate_kind):
    """Written out over the model's own forward pass, tokens without a label left out; only the gate has gradients."""
    model, batch = random_model(gate_kind=gate_kind), gated_batch()
    model.requires_grad_(False)
    model.model.early_exit_gate.requires_grad_(True)
    got = Objective(model, None)(batch, Step(PHASE, LOOPS, CHUNK, None))
    states, said = model.model(batch.input_ids, LOOPS, CHUNK, KVCache(model.config))
    total, expected, count = torch.zeros(()), torch.zeros(()), 0
    for row, place in (batch.targets != IGNORED).nonzero().tolist():
        losses = [-model.lm_head(state[row, place]).log_softmax(-1)[batch.targets[row, place]] for state in states]
        for loop in range(LOOPS - 1):
            gain = max(losses[loop] - losses[s] - PHASE.margin * (s - loop) for s in range(loop + 1, LOOPS))
            goes_on = torch.sigmoid(PHASE.sharpness * gain)
            leaves = said[row, place, loop].sigmoid()
            total = total - ((1 - goes_on) * leaves.log() + goes_on * (1 - leaves).log())
            count += 1
        expected = expected + sum((t + 1) * p for t, p in enumerate(exit_probabilities(said[row, place])))
    assert_close(got["loss"], total / count, TORCH)
    assert_close(got["exit"], got["loss"], TORCH)
    assert_close(got["expected_loops"], expected / (count / (LOOPS - 1)), TORCH)
    got["loss"].backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "model.early_exit_gate.weight",
        "model.early_exit_gate.bias",
    }


@pytest.mark.parametrize("gate_kind", ["elementwise", "none"])
def test_the_joint_loss_is_what_its_name_says_and_reaches_model_and_gate(gate_kind):
    """Written out over the model's own forward pass, tokens without a label left out."""
    model, batch = leaving_model(gate_kind), gated_batch()
    got = Objective(model, None)(batch, Step(JOINT, LOOPS, CHUNK, None))
    got["loss"].backward()
    assert {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()} == set()
    kept = Objective(model, None, recompute=True)(batch, Step(JOINT, LOOPS, CHUNK, None))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    kept["loss"].backward()
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    model.zero_grad()
    states, said = model.model(batch.input_ids, LOOPS, CHUNK, KVCache(model.config))
    cross, entropy, loops, count = torch.zeros(()), torch.zeros(()), 0.0, 0
    for row, place in (batch.targets != IGNORED).nonzero().tolist():
        still = torch.ones(())
        for loop, state in enumerate(states):
            leaves = said[row, place, loop].sigmoid() if loop < LOOPS - 1 else 1.0
            chance, still = still * leaves, still * (1 - leaves)
            loss = -model.lm_head(state[row, place]).log_softmax(-1)[batch.targets[row, place]]
            cross, entropy = cross + chance * loss, entropy - chance * chance.log()
            loops += (loop + 1) * chance.item()
        count += 1
    assert_close(got["expected_cross_entropy"], cross / count, TORCH)
    assert_close(got["entropy"], entropy / count, TORCH)
    assert_close(got["expected_loops"], loops / count, TORCH)
    ((cross - JOINT.entropy * entropy) / count).backward()
    assert_close(got["loss"], (cross - JOINT.entropy * entropy) / count, TORCH)
    for name, parameter in model.named_parameters():
        assert_close(gradients[name], parameter.grad, TORCH)


RECIPE = """
chunk_sizes = [8, 12]
batch_size = 4
micro_batch_size = 2
warmup_steps = 2
checkpoint_every = 4
[exit]
steps = 10
learning_rate = 0.05
margin = 0.05
sharpness = 20
threshold = 0.6
"""
MODEL_PHASES = """
[transition]
steps = 3
cross_entropy = 1
[distillation]
steps = 3
distillation = 1.0
"""
JOINT_PHASE = """
[joint]
steps = 3
learning_rate = 0.05
entropy = 0.05
"""
RATES = "base_learning_rate = 1e-3\ngate_learning_rate = 1e-2\n"


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return save_checkpoint(
        random_model(num_hidden_layers=1, eos_token_id=3).bfloat16(), tmp_path_factory.mktemp("student")
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def command(recipe: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [str(recipe), "--data", str(data), "--out", str(out), "--device", "cpu", *more]


def test_the_phase_changes_the_gate_and_nothing_else(recipe, student, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(command(recipe, data, out, "--student", str(student), "--plot")) == 0
    before, after = load_checkpoint(student), load_checkpoint(out / "model")
    assert (before.config.early_exit_threshold, after.config.early_exit_threshold) == (1.0, 0.6)
    weights, trained = before.state_dict(), after.state_dict()
    changed = {name for name in weights if not torch.equal(weights[name], trained[name])}
    assert changed == {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}
    assert {tensor.dtype for tensor in trained.values()} == {torch.bfloat16}
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["phase"] for record in records] == ["exit"] * 10
    assert all(1 <= record["expected_loops"] <= 4 and record["loops"] == 4 for record in records)
    assert records[-1]["exit"] < records[0]["exit"]
    assert (out / "model" / "tokenizer.json").is_file()
    assert (out / plot.PLOT_NAME).stat().st_size > 10_000


@pytest.mark.parametrize("gate_kind", ["elementwise", "none"])
def test_the_joint_phase_trains_the_whole_model_and_leaves_no_threshold(recipe, data, tmp_path, gate_kind):
    given = random_model(num_hidden_layers=1, gate_kind=gate_kind, early_exit_threshold=0.5)
    folder = save_checkpoint(given, tmp_path / "given")
    recipe.write_text(RATES + RECIPE.partition("[exit]")[0] + JOINT_PHASE.replace("steps = 3", "steps = 20"))
    out = tmp_path / "run"
    assert cli.main(command(recipe, data, out, "--student", str(folder), "--plot")) == 0
    trained = load_checkpoint(out / "model")
    assert trained.config.early_exit_threshold == 1.0
    before, after = given.state_dict(), trained.state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(record["phase"], record["loops"]) for record in records] == [("joint", 4)] * 20
    for record in records:
        assert_close(record["loss"], record["expected_cross_entropy"] - 0.05 * record["entropy"], TORCH)
        assert 1 <= record["expected_loops"] <= 4
    assert records[-1]["expected_cross_entropy"] < records[0]["expected_cross_entropy"]
    assert (out / plot.PLOT_NAME).stat().st_size > 10_000


def test_a_killed_run_goes_on_to_the_same_gate_bit_for_bit(recipe, data, tmp_path):
    """After the phases that train the model, of which the last one trains the gate, too."""
    looplm = save_checkpoint(random_model(gate_kind="none", num_hidden_layers=1, eos_token_id=3), tmp_path / "looplm")
    recipe.write_text(RATES + RECIPE + MODEL_PHASES + JOINT_PHASE)
    straight = train(read_recipe(recipe), looplm, data, tmp_path / "straight", device="cpu")
    moments = ("step:2", "checkpoint", "step:7", "step:9", "step:10", "random:0:14", "model")
    run = command(recipe, data, tmp_path / "killed", "--teacher", str(looplm))
    script = [sys.executable, str(Path(__file__).parent / "killed_training.py"), json.dumps(moments)]
    done = subprocess.run([*script, *run], capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [entry["status"] for entry in found] == [-signal.SIGKILL] * len(moments), done.stderr
    assert cli.main(run) == 0
    expected, resumed = (load_checkpoint(folder).state_dict() for folder in (straight, tmp_path / "killed" / "model"))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    gate = "model.early_exit_gate.weight"
    assert not torch.equal(expected[gate], load_checkpoint(looplm).state_dict()[gate])
    phases = [json.loads(line)["phase"] for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert phases == [name for name in ("transition", "distillation", "joint") for _ in range(3)] + ["exit"] * 10


def test_the_last_phase_leaves_the_model_as_the_others_made_it(recipe, data, tmp_path):
    teacher = save_checkpoint(random_model(gate_kind="none", num_hidden_layers=1, eos_token_id=3), tmp_path / "looplm")
    results = {}
    for name, text in (("two", RECIPE.partition("[exit]")[0]), ("three", RECIPE)):
        recipe.write_text(RATES + text + MODEL_PHASES)
        results[name] = load_checkpoint(train(read_recipe(recipe), teacher, data, tmp_path / name, device="cpu"))
    assert [results[name].config.early_exit_threshold for name in ("two", "three")] == [1.0, 0.6]
    two, three = (results[name].state_dict() for name in ("two", "three"))
    changed = {name for name in two if not torch.equal(two[name], three[name])}
    assert changed == {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}
    start = load_checkpoint(teacher).state_dict()
    assert torch.equal(two["model.early_exit_gate.weight"], start["model.early_exit_gate.weight"])


def test_two_processes_share_every_phase(recipe, data, tmp_path):
    """As on two GPUs: first the model's weights are theirs to average, then the gate's, too, then the gate's alone."""
    teacher = save_checkpoint(random_model(gate_kind="none", num_hidden_layers=1, eos_token_id=3), tmp_path / "looplm")
    recipe.write_text(RATES + RECIPE + MODEL_PHASES + JOINT_PHASE)
    alone = train(read_recipe(recipe), teacher, data, tmp_path / "alone", device="cpu")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = command(recipe, data, tmp_path / "two", "--teacher", str(teacher))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, "-m", "melt_models.training", *run], check=True, env=environment)
    expected, got = (load_checkpoint(folder).state_dict() for folder in (alone, tmp_path / "two" / "model"))
    for name, tensor in expected.items():
        assert_close(got[name], tensor, TORCH)
    pairs = list(zip(log_of(tmp_path / "alone"), log_of(tmp_path / "two"), strict=True))
    assert all(one["tokens"] == two["tokens"] for one, two in pairs)
    assert_close([one["loss"] for one, _ in pairs], [two["loss"] for _, two in pairs], TORCH)


def test_a_model_that_learns_on_loses_its_gates_threshold(recipe, student, data, tmp_path):
    """A gate that was trained for other weights is not a trained gate; its threshold is no fault of a student's."""
    gated = train(read_recipe(recipe), None, data, tmp_path / "gated", student, "cpu")
    teacher = save_checkpoint(random_model(gate_kind="none", num_hidden_layers=1, eos_token_id=3), tmp_path / "looplm")
    recipe.write_text(RATES + RECIPE.partition("[exit]")[0] + MODEL_PHASES)
    again = train(read_recipe(recipe), teacher, data, tmp_path / "again", gated, "cpu")
    assert load_checkpoint(again).config.early_exit_threshold == 1.0


def refuse(capsys, arguments: list[str], *fragments: str) -> None:
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err.partition("error: ")[2]
    assert error
    for fragment in fragments:
        assert fragment in error


def test_models_that_do_not_fit_are_refused(recipe, student, data, tmp_path, capsys):
    run = command(recipe, data, tmp_path / "run")
    refuse(capsys, run, "--student is missing: no phase of this recipe learns from a LoopLM")
    both = [*run, "--student", str(student), "--teacher", str(student)]
    refuse(capsys, both, "--teacher must be left out where no phase learns from a LoopLM")
    gateless = save_checkpoint(random_model(num_hidden_layers=1, exit_gate=False), tmp_path / "gateless")
    refuse(capsys, [*run, "--student", str(gateless)], "must have an exit gate and several loops, got exit_gate False")
    single = save_checkpoint(random_model(num_hidden_layers=1, total_ut_steps=1), tmp_path / "single")
    refuse(capsys, [*run, "--student", str(single)], "total_ut_steps 1: take [joint] and [exit] out of the recipe")
    refuse(capsys, [*run, "--student", str(tmp_path / "no")], "config.json does not exist")
    recipe.write_text(RATES + RECIPE + MODEL_PHASES)
    refuse(capsys, run, "--teacher is missing: this recipe has phases that learn from a LoopLM")
    looplm = random_model(gate_kind="none", num_hidden_layers=1, exit_gate=False)
    teacher = save_checkpoint(looplm, tmp_path / "looplm")
    refuse(capsys, [*run, "--teacher", str(teacher)], "must have an exit gate and several loops")
    recipe.write_text(RATES + RECIPE.partition("[exit]")[0] + JOINT_PHASE)
    refuse(capsys, [*run, "--student", str(gateless)], "must have an exit gate and several loops")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 10", "steps = 0", "exit.steps must be at least 1, got 0"),
        ("steps = 10", "", "exit.steps is missing"),
        ("learning_rate = 0.05", "learning_rate = 0", "exit.learning_rate must be above 0, got 0.0"),
        ("margin = 0.05", "margin = -1", "exit.margin must be at least 0, got -1.0"),
        ("margin = 0.05", "margin = nan", "exit.margin must be a finite number, got nan"),
        ("sharpness = 20", "sharpness = 0", "exit.sharpness must be above 0, got 0.0"),
        ("threshold = 0.6", "threshold = 1", "exit.threshold must be above 0 and below 1, got 1.0"),
        ("threshold = 0.6", "threshold = 0", "exit.threshold must be above 0 and below 1, got 0.0"),
        ("threshold = 0.6", "q = 0.6", "unknown key exit.q: .*exit.threshold is missing"),
        ("[exit]", "exit = 3\n[other]", "exit must be a table, got 3"),
        ("batch_size = 4", "batch_size = 4\nbase_learning_rate = 1", "base_learning_rate must be left out where only"),
        ("[exit]", MODEL_PHASES + "[exit]", "base_learning_rate must be above 0, got 0.0"),
        ("[exit]", JOINT_PHASE + "[exit]", "base_learning_rate must be above 0, .* gate_learning_rate must be above 0"),
        ("[exit]", JOINT_PHASE.replace("= 3", "= 0") + "[exit]", "joint.steps must be at least 1, got 0"),
        ("[exit]", JOINT_PHASE.replace("steps = 3", "") + "[exit]", "joint.steps is missing"),
        (
            "[exit]",
            JOINT_PHASE.replace("entropy = 0.05", "entropy = 0") + "[exit]",
            "joint.entropy must be above 0, got 0",
        ),
        (
            "[exit]",
            JOINT_PHASE.replace("rate = 0.05", "rate = -1") + "[exit]",
            "joint.learning_rate must be above 0, got",
        ),
        (
            "[exit]",
            JOINT_PHASE.replace("entropy", "beta") + "[exit]",
            "unknown key joint.beta: .*joint.entropy is missing",
        ),
        ("[exit]", "joint = 3\n[exit]", "joint must be a table, got 3"),
        ("[exit]", "deep_steps = 0.5\nmost_loops = 6\n[exit]", "deep_steps must be left out where phases 1 and 2 are"),
    ],
)
def test_a_bad_phase_is_refused_with_key_and_rule(recipe, old, new, message):
    read_recipe(recipe)
    recipe.write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(TrainingError, match=message):
        read_recipe(recipe)


def test_each_part_of_a_run_has_its_own_warm_up_and_decay(recipe):
    recipe.write_text(RATES + "decay_steps = 2\n" + RECIPE + MODEL_PHASES + JOINT_PHASE)
    found = read_recipe(recipe)
    model, joint, gate = [0.5, 1, 1, 1, 1, 0.5], [0.5, 1, 0.5], [0.5, *[1] * 8, 0.5]
    assert [found.rate_of(step) for step in range(found.steps)] == model + joint + gate


def leaving_model(gate_kind: str) -> MeltCausalLM:
    """Random weights whose tokens leave after different loops at a threshold of 0.5."""
    model = random_model(4, gate_kind=gate_kind)
    with torch.no_grad():
        model.model.early_exit_gate.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(2))
        model.model.early_exit_gate.bias.fill_(-0.7)
    return model


@torch.no_grad()
def test_what_leaves_is_what_runs_that_many_loops():
    """MELT told again, one sequence at a time, by the model's own pass with as many loops as each token took."""
    model, ids = leaving_model("elementwise"), torch.randint(703, (3, 21), generator=torch.Generator().manual_seed(1))
    got, taken, read = answer(model, ids, 12, LOOPS, CHUNK, 0.5)
    assert len(set(taken.flatten().tolist())) >= 3
    assert read.tolist() == [4.0] * 3
    for row in range(len(ids)):
        cache = KVCache(model.config)
        model(ids[row : row + 1, :-1], past_key_values=cache)
        token = ids[row, -1:]
        for chosen, loops in zip(got[row], taken[row].tolist(), strict=True):
            out = model(token[None], past_key_values=cache, loops=loops, chunk_size=1)
            assert out.logits[0, -1].argmax() == chosen
            assert exit_loops(torch.cat((out.exit_logits[0, 0], torch.full((4 - loops,), -9.0))), 0.5) >= loops
            token = chosen[None]


@pytest.mark.parametrize("gate_kind", ["elementwise", "none"])
@pytest.mark.parametrize("prompt", ["apart", "whole", "leaving"])
@torch.no_grad()
def test_without_a_threshold_every_loop_is_taken(gate_kind, prompt):
    model, ids = leaving_model(gate_kind), torch.randint(703, (2, 17), generator=torch.Generator().manual_seed(1))
    got, taken, _ = answer(model, ids, 5, LOOPS, CHUNK, None, prompt)
    assert (taken == LOOPS).all()
    if prompt != "apart":  # its last chunk is another one
        assert torch.equal(got, model.generate_greedy(ids, 5, LOOPS, CHUNK))


@torch.no_grad()
def test_a_chunk_leaves_when_each_token_would_and_a_looplm_fills_its_caches():
    model, ids = leaving_model("none"), torch.randint(703, (3, CHUNK), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.config)
    state, taken = run_chunk(model, ids, LOOPS, cache, 0.5)
    states, said = model.model(ids, LOOPS, CHUNK, KVCache(model.config))
    assert torch.equal(taken, exit_loops(said, 0.5).amax(dim=1))
    for row, loops in enumerate(taken.tolist()):
        assert torch.equal(state[row], states[loops - 1][row])
        for loop in range(loops, LOOPS):
            for late, last in zip(cache.past(loop, 0), cache.past(loops - 1, 0), strict=True):
                assert torch.equal(late[row], last[row])
