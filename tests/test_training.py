"""The two phases' mathematics: interpolation, chunks, gradients through gates and cache, the losses."""

import dataclasses
import functools
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_model
from tolerances import FINITE_DIFFERENCE, HALF, TORCH, assert_close, assert_far

from melt_layers import Gate
from melt_models import MeltCausalLM
from melt_models.convert import as_melt
from melt_models.modeling import KVCache
from melt_models.training import Joint, Phase, Recipe, TrainingError, read_recipe
from melt_models.training.forward import TrainingCache, forward_chunk
from melt_models.training.objective import IGNORED, Objective, Step, TokenBatch, draw_leaving
from melt_models.training.recipe_files import RECIPES, recipe_path
from melt_models.training.trainer import draw_step

LENGTH, CHUNK, LOOPS, MOST_LOOPS = 24, 8, 4, 6
DISTILLED = Phase(1, distillation=1.0, attention=0.1)
TRAINED_KINDS = ("elementwise", "scalar", "ema", "mean", "last")


def student_of(teacher: MeltCausalLM, gate_kind: str = "elementwise", seed: int = 3) -> MeltCausalLM:
    """The teacher's weights with gates that are half open, so that a mistake shows."""
    student = random_model(seed, **as_melt(teacher.config, gate_kind=gate_kind).to_diff_dict())
    student.load_state_dict(teacher.state_dict(), strict=False)
    return student


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(703, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch_of(ids: torch.Tensor) -> TokenBatch:
    targets = torch.cat((ids[:, 1:], torch.full((len(ids), 1), IGNORED)), dim=1)
    return TokenBatch(ids, targets, torch.ones_like(ids, dtype=torch.bool))


def states_of(model: MeltCausalLM, ids: torch.Tensor, alpha: float | None, loops: int = LOOPS) -> torch.Tensor:
    """Normed values of every loop, chunk by chunk, [T, B, L, D]."""
    cache = TrainingCache()
    passes = [forward_chunk(model.model, part, loops, cache, alpha) for part in ids.split(CHUNK, dim=1)]
    return torch.stack([torch.cat(parts, dim=1) for parts in zip(*(p.states for p in passes), strict=True)])


def reference(model: MeltCausalLM, ids: torch.Tensor, loops: int) -> torch.Tensor:
    return torch.stack(model.model(ids, loops, CHUNK, KVCache(model.config))[0])


@pytest.mark.parametrize("loops", [LOOPS, MOST_LOOPS])
@pytest.mark.parametrize("gate_kind", TRAINED_KINDS)
@torch.no_grad()
def test_alpha_0_is_the_looplm_and_alpha_1_is_melt_exactly(gate_kind, loops):
    """At as many loops as the models were made for, and at more."""
    teacher, ids = random_model(gate_kind="none"), tokens()
    student = student_of(teacher, gate_kind)
    looplm, melt = reference(teacher, ids, loops), reference(student, ids, loops)
    assert_far(looplm, melt, TORCH)
    assert torch.equal(states_of(student, ids, 0.0, loops), looplm)
    assert torch.equal(states_of(student, ids, 1.0, loops), melt)
    assert torch.equal(states_of(student, ids, None, loops), melt)
    assert torch.equal(states_of(teacher, ids, None, loops), looplm)
    between = states_of(student, ids, 0.5, loops)
    assert_far(between, looplm, TORCH)
    assert_far(between, melt, TORCH)


@torch.no_grad()
def test_rows_of_tokens_that_leave_are_those_of_their_loop_and_read_by_the_chunks_after_them():
    student, ids = student_of(random_model(gate_kind="none")), tokens()
    first, second = ids[:, :1], ids[:, 1:CHUNK]
    caches = {depth: TrainingCache() for depth in (1, 3, LOOPS)}
    for depth, cache in caches.items():
        forward_chunk(student.model, first, depth, cache)
    cache = TrainingCache(left=torch.tensor([[1] + [LOOPS] * (CHUNK - 1), [3] + [LOOPS] * (CHUNK - 1)]))
    forward_chunk(student.model, first, LOOPS, cache)
    for layer, rows in cache.final.items():
        for part, got in enumerate(rows[0]):
            for row, depth in enumerate((1, 3)):
                assert torch.equal(got[row], caches[depth].final[layer][0][part][row])
    read, full = (forward_chunk(student.model, second, LOOPS, one).states[-1] for one in (cache, caches[LOOPS]))
    expected = torch.stack([forward_chunk(student.model, second, LOOPS, caches[d]).states[-1][d // 3] for d in (1, 3)])
    assert_close(read, expected, TORCH)
    assert_far(read, full, TORCH)


@torch.no_grad()
def test_a_token_that_leaves_a_looplm_fills_the_caches_of_later_loops_with_copies():
    looplm, ids = random_model(gate_kind="none"), tokens()[:, :3]
    full, cache = TrainingCache(), TrainingCache(left=torch.tensor([[2, 2, 2], [LOOPS] * 3]))
    forward_chunk(looplm.model, ids, LOOPS, full)
    forward_chunk(looplm.model, ids, LOOPS, cache)
    for (loop_idx, layer_idx), ((keys, values),) in cache.per_loop.items():
        copied, own = (full.per_loop[loop, layer_idx][0] for loop in (min(loop_idx, 1), loop_idx))
        assert torch.equal(keys[0], copied[0][0])
        assert torch.equal(values[0], copied[1][0])
        assert torch.equal(keys[1], own[0][1])


def test_supervised_tokens_leave_at_all_loops_and_others_at_the_last():
    supervised = torch.rand(400, 30, generator=torch.Generator().manual_seed(2)) < 0.7
    left = draw_leaving(supervised, LOOPS, seed=9)
    assert torch.equal(left, draw_leaving(supervised, LOOPS, seed=9))
    assert (left[~supervised] == LOOPS).all()
    counts = torch.bincount(left[supervised], minlength=LOOPS + 1)
    assert counts[0] == 0
    # After loop t leave p (1 - p)^(t - 1), p even in [0, 1]: 1/2, 1/6, 1/12, and the last takes the rest, 1/4.
    expected = torch.tensor([1 / 2, 1 / 6, 1 / 12, 1 / 4])
    assert ((counts[1:] / counts.sum() - expected).abs() < 0.06).all()
    assert draw_leaving(supervised, 1, seed=9).unique().tolist() == [1]


@pytest.mark.parametrize("gate_kind", ["elementwise", "scalar"])
def test_gate_gradients_match_finite_differences(gate_kind):
    config = random_model(gate_kind=gate_kind, hidden_size=8).config
    gate = Gate(config).double()
    names = [name for name, _ in gate.named_parameters()]
    torch.manual_seed(0)
    values = [torch.randn_like(parameter, requires_grad=True) for parameter in gate.parameters()]
    a, latent = (torch.randn(1, 3, 8, dtype=torch.double, requires_grad=True) for _ in range(2))

    def apply(a, latent, *values):
        return torch.func.functional_call(gate, dict(zip(names, values, strict=True)), (a, latent, 1))

    assert torch.autograd.gradcheck(apply, (a, latent, *values))


def test_gradients_flow_to_the_gates_through_the_cache():
    """The loss of the last chunk alone, by the gates of the chunks before it: against a finite difference."""
    teacher = random_model(gate_kind="none")
    student, ids = student_of(teacher), tokens()

    def last_chunk_loss() -> torch.Tensor:
        return states_of(student, ids, None)[-1, :, -1].double().pow(2)[:, :8].sum()

    parameters = [layer.gate.w_z.bias for layer in student.model.layers]
    gradients = torch.autograd.grad(last_chunk_loss(), parameters)
    assert all(gradient.any() for gradient in gradients)
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in parameters]
    losses = []
    with torch.no_grad():
        for shift in (1e-2, -2e-2):
            for parameter, way in zip(parameters, direction, strict=True):
                parameter += shift * way
            losses.append(last_chunk_loss())
    slope = sum((g * w).sum() for g, w in zip(gradients, direction, strict=True))
    assert_close((losses[0] - losses[1]) / 2e-2, slope, FINITE_DIFFERENCE)


@pytest.mark.parametrize("chunk_size", [LENGTH, LENGTH + 9, 0])
def test_the_loss_of_one_chunk_is_that_of_an_unchunked_computation(chunk_size):
    teacher, ids = random_model(gate_kind="none"), tokens()
    student = student_of(teacher)
    objective = Objective(student, teacher)
    got = objective(batch_of(ids), Step(Phase(1, cross_entropy=1.0), LOOPS, chunk_size, None))
    wanted = student(ids, labels=ids, loops=LOOPS, chunk_size=LENGTH).loss
    assert_close(got["loss"], wanted, TORCH)
    chunked = objective(batch_of(ids), Step(Phase(1, cross_entropy=1.0), LOOPS, CHUNK, None))
    assert_close(chunked["loss"], student(ids, labels=ids, loops=LOOPS, chunk_size=CHUNK).loss, TORCH)
    assert chunked["loss"].item() != wanted.item()


def test_distillation_is_zero_for_a_student_equal_to_its_teacher_and_not_for_another():
    teacher, ids = random_model(gate_kind="none"), tokens()
    objective = Objective(student_of(teacher), teacher, every_loop=True)
    same = objective(batch_of(ids), Step(DISTILLED, LOOPS, 0, alpha=0.0))
    assert same["distillation"].item() == same["attention"].item() == same["loss"].item() == 0.0
    other = objective(batch_of(ids), Step(DISTILLED, LOOPS, CHUNK, alpha=None))
    assert other["distillation"].item() > 0
    assert other["attention"].item() > 0


@pytest.mark.parametrize("loops", [LOOPS - 1, MOST_LOOPS])
@torch.no_grad()
def test_the_terms_are_what_their_names_say(loops):
    """Written out with torch's own functions, padding and unlabelled tokens left out."""
    teacher, ids = random_model(gate_kind="none"), tokens()
    student = student_of(teacher)
    batch = batch_of(ids)
    batch.real[1, 16:] = False
    batch.targets[1, 15:] = IGNORED
    batch.targets[0, :5] = IGNORED
    counted = batch.targets != IGNORED
    got = Objective(student, teacher, every_loop=True)(
        batch, Step(Phase(1, cross_entropy=0.5, distillation=2.0, attention=0.1), loops, CHUNK, None)
    )
    ours, theirs = (m.model(ids, loops, CHUNK, KVCache(m.config))[0] for m in (student, teacher))
    logits = [(student.lm_head(o)[counted], teacher.lm_head(t)[counted]) for o, t in zip(ours, theirs, strict=True)]
    divergence = torch.stack([(t.softmax(-1) * (t.log_softmax(-1) - o.log_softmax(-1))).sum(-1) for o, t in logits])
    entropy = torch.nn.functional.cross_entropy(logits[-1][0], batch.targets[counted])
    assert_close(got["distillation"], divergence.mean(), TORCH)
    assert_close(got["cross_entropy"], entropy, TORCH)
    outputs = []
    for model in (student, teacher):
        cache = TrainingCache()
        parts = [forward_chunk(model.model, part, loops, cache).attended for part in ids.split(CHUNK, dim=1)]
        outputs.append(torch.stack([torch.cat(p, dim=1) for p in zip(*parts, strict=True)]))
    distance = (outputs[0] - outputs[1]).square().sum(-1)[:, batch.real].mean()
    assert_close(got["attention"], distance, TORCH)
    total = 0.5 * got["cross_entropy"] + 2.0 * got["distillation"] + 0.1 * got["attention"]
    assert_close(got["loss"], total, TORCH)


@pytest.mark.parametrize(
    "step",
    [Step(DISTILLED, LOOPS, CHUNK, alpha=0.3), Step(DISTILLED, LOOPS, CHUNK, None, lag=2)],
    ids=["chunks", "wave"],
)
def test_recomputation_changes_nothing_but_memory(step):
    teacher, ids = random_model(gate_kind="none"), tokens()
    gradients, kept = [], []
    for recompute in (False, True):
        student = student_of(teacher)
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            objective = Objective(student, teacher, recompute=recompute)
            loss = objective(batch_of(ids), step)["loss"]
        loss.backward()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
        kept.append(sum(sizes))
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert kept[1] < kept[0] / 5


@pytest.mark.filterwarnings("ignore")  # of the compiler about torch itself
def test_compiled_pieces_give_the_same_loss_and_gradients(monkeypatch):
    """Traced and differentiated as torch's compiler does it; the code that it generates then is torch's own."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    ids, found = tokens(), []
    for compiles in (False, True):
        model = random_model(gate_kind="none", num_hidden_layers=1)
        got = Objective(model, None, compiles=compiles)(batch_of(ids), Step(Joint(1, 0.1, 0.05), 2, 0, alpha=None))
        got["loss"].backward()
        found.append((got["loss"].detach(), {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (fused, others) = found
    assert_close(fused, loss, TORCH)
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, TORCH)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's own")
def test_freed_memory_is_kept_for_the_next_step():
    """In a process of its own, since the setting stays: a block that came and went leaves its room."""
    code = """
from address_space import mapped_bytes
from melt_models.training.allocator import keep_freed_memory

def kept():
    before = mapped_bytes()
    bytearray(1 << 26)
    return mapped_bytes() - before

without = kept()
assert keep_freed_memory()
print(without, kept(), kept())
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    without, first, again = map(int, done.stdout.split())
    assert (without, again) == (0, 0)
    assert first >= 1 << 26


def test_mixed_precision_stays_near_full_precision():
    teacher, ids = random_model(gate_kind="none"), tokens()
    student = student_of(teacher)
    step = Step(DISTILLED, LOOPS, CHUNK, alpha=None)
    exact = Objective(student, teacher)(batch_of(ids), step)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = Objective(student, teacher)(batch_of(ids), step)["loss"]
    mixed.backward()
    assert_close(mixed, exact, HALF)
    assert student.model.layers[0].gate.w_z.weight.grad.dtype == torch.float32


def test_steps_are_drawn_from_recipe_and_number_alone():
    recipe = Recipe(
        *((4, 8), 2, 1, Phase(5, 1.0), Phase(3, 0.0, 1.0, 0.1)),
        base_learning_rate=1e-3,
        gate_learning_rate=1e-2,
        shallow_steps=0.5,
        decay_steps=4,
    )
    assert [recipe.alpha_of(step) for step in range(8)] == [0.0, 0.25, 0.5, 0.75, 1.0, None, None, None]
    assert [recipe.rate_of(step) for step in range(8)] == [1, 1, 1, 1, 1.0, 0.75, 0.5, 0.25]
    assert recipe.phase_of(4).cross_entropy == recipe.phase_of(5).distillation == 1.0
    recipe = dataclasses.replace(recipe, distillation=Phase(195, distillation=1.0))
    drawn = [draw_step(recipe, step, LOOPS) for step in range(200)]
    random.seed(5)
    assert drawn == [draw_step(recipe, step, LOOPS) for step in range(200)]
    assert {step.chunk_size for step in drawn} == {4, 8}
    assert {step.loops for step in drawn} == {1, 2, 3, 4}
    assert 60 < sum(step.loops == 4 for step in drawn) < 140
    fixed = dataclasses.replace(recipe, shallow_steps=0.0)
    assert {draw_step(fixed, step, LOOPS).loops for step in range(50)} == {4}
    deep = [draw_step(dataclasses.replace(recipe, deep_steps=0.3, most_loops=6), step, LOOPS) for step in range(200)]
    assert {step.loops for step in deep} == {1, 2, 3, 4, 5, 6}
    assert 30 < sum(step.loops > 4 for step in deep) < 90
    for one, other in zip(drawn, deep, strict=True):  # what is drawn without deep steps stays
        assert other.chunk_size == one.chunk_size
        assert other.loops == one.loops or (one.loops == 4 and other.loops > 4)
    leaving = [draw_step(dataclasses.replace(recipe, leaving_steps=0.4), step, LOOPS) for step in range(200)]
    assert [dataclasses.replace(step, leaving=None) for step in leaving] == drawn
    assert all(step.leaving is None for step in leaving[:5])  # phase 1 mixes two caches
    assert 50 < len({step.leaving for step in leaving if step.leaving is not None}) < 110
    first = ((8, 2), (8, 4), (8, 4), (4, 2), (8, 4), (8, 3))  # as recipes without them always drew
    assert tuple((step.chunk_size, step.loops) for step in drawn[:6]) == first


def test_the_papers_recipe_has_the_papers_numbers():
    recipe = read_recipe(recipe_path("ouro-1.4b"))
    assert recipe.chunk_sizes == (500,)
    assert recipe.batch_size * 10_000 == 320_000
    assert (recipe.base_learning_rate, recipe.gate_learning_rate) == (8e-6, 5e-4)
    assert (recipe.transition.steps, recipe.distillation.steps) == (500, 300)
    assert (recipe.distillation.distillation, recipe.distillation.attention) == (1.0, 0.1)


GOOD = """
chunk_sizes = [8]
batch_size = 4
micro_batch_size = 2
base_learning_rate = 1e-3
gate_learning_rate = 1
[transition]
steps = 2
cross_entropy = 1
[distillation]
steps = 2
distillation = 1.0
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_size = 4", "batch_size = 3", "batch_size must be a multiple of micro_batch_size 2, got 3"),
        ("\nbatch_size = 4", "", "batch_size is missing"),
        ("\nbatch_size = 4", "\nbatch_size = 4.5", "batch_size must be int of at most 1000000000, got 4.5"),
        ("batch_size = 4", "batch_size = '4'", "batch_size must be int of at most 1000000000, got '4'"),
        ("batch_size = 4", "batch_size = true", "batch_size must be int of at most 1000000000, got True"),
        ("batch_size = 4", "batch_size = -4", "batch_size must be at least 1, got -4"),
        ("chunk_sizes = [8]", f"chunk_sizes = [{2**70}]", "chunk_sizes must be a list of int, got"),
        ("chunk_sizes = [8]", "seed = -1\nchunk_sizes = [8]", "seed must be at least 0, got -1"),
        ("1e-3", "nan", "base_learning_rate must be a finite number, got nan"),
        ("1e-3", "inf", "base_learning_rate must be a finite number, got inf"),
        ("1e-3", "true", "base_learning_rate must be a finite number, got True"),
        ("cross_entropy = 1", "cross_entropy = nan", "transition.cross_entropy must be a finite number, got nan"),
        ("cross_entropy = 1", "cross_entropy = -1", "transition must be made of weights of at least 0"),
        ("chunk_sizes = [8]", "chunk_sizes = " + "[" * 5000, "is not TOML"),
        ("chunk_sizes = [8]", 'chunk_sizes = ["8"]', r"chunk_sizes must be a list of int, got \['8'\]"),
        ("chunk_sizes = [8]", "chunk_sizes = []", r"chunk_sizes must be one or more numbers of at least 0, got \[\]"),
        ("chunk_sizes", "gate_kind = 'none'\nchunk_sizes", "gate_kind must be one of elementwise, .*, got 'none'"),
        ("chunk_sizes", "precision = 'float16'\nchunk_sizes", "precision must be one of float32, bfloat16"),
        ("chunk_sizes", "warmup = 3\nchunk_sizes", "unknown key warmup: remove it or correct its spelling"),
        ("chunk_sizes", "shallow_steps = 2\nchunk_sizes", r"shallow_steps must be in \[0, 1\], got 2.0"),
        ("chunk_sizes", "deep_steps = -1\nchunk_sizes", r"deep_steps must be in \[0, 1\], got -1.0"),
        (
            "chunk_sizes",
            "deep_steps = 0.5\nchunk_sizes",
            "most_loops must be given where deep_steps is above 0, .* got 0",
        ),
        ("chunk_sizes", "leaving_steps = 2\nchunk_sizes", r"leaving_steps must be in \[0, 1\], got 2.0"),
        (
            "[transition]\nsteps = 2\ncross_entropy = 1\n[distillation]\nsteps = 2",
            "leaving_steps = 0.5\n[transition]\nsteps = 2\ncross_entropy = 1\n[distillation]\nsteps = 0",
            "leaving_steps must be left out where neither phase 2 nor the exit gate's is, got 0.5",
        ),
        ("chunk_sizes", "most_loops = 6\nchunk_sizes", "most_loops must be left out where deep_steps is 0, got 6"),
        (
            "chunk_sizes",
            "shallow_steps = 0.75\ndeep_steps = 0.5\nmost_loops = 6\nchunk_sizes",
            r"shallow_steps \+ deep_steps must be at most 1, got 1.25",
        ),
        ("1e-3", "0", "base_learning_rate must be above 0, got 0.0"),
        ("cross_entropy = 1", "cross = 1", "unknown key transition.cross"),
        ("cross_entropy = 1", "", "transition must be given a term with a weight above 0"),
        ("[transition]\nsteps = 2", "[transition]", "transition.steps is missing"),
        ("[transition]", "transition = 3\n[other]", "transition must be a table, got 3"),
        ("chunk_sizes = [8]", "chunk_sizes = [", "is not TOML"),
    ],
)
def test_a_bad_recipe_is_refused_with_key_and_rule(tmp_path, old, new, message):
    assert read_recipe(write(tmp_path / "good.toml", GOOD)).gate_learning_rate == 1.0
    with pytest.raises(TrainingError, match=message) as caught:
        read_recipe(write(tmp_path / "bad.toml", GOOD.replace(old, new, 1)))
    assert "bad.toml" in str(caught.value)


def test_every_fault_of_a_recipe_is_named_at_once(tmp_path):
    text = GOOD.replace("micro_batch_size = 2", "micro_batch_size = '2'").replace("cross_entropy = 1", "cross = 1")
    with pytest.raises(TrainingError) as caught:
        read_recipe(write(tmp_path / "bad.toml", text.replace("[distillation]\nsteps = 2", "[distillation]")))
    for fault in ("unknown key transition.cross", "distillation.steps is missing", "micro_batch_size must be int"):
        assert fault in str(caught.value)


def test_a_recipe_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "bad.toml").write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(TrainingError, match="bad.toml is not TOML: .* codec can't decode"):
        read_recipe(tmp_path / "bad.toml")
    with pytest.raises(TrainingError, match="cannot be read: Is a directory"):
        read_recipe(tmp_path)


def test_every_recipe_that_ships_can_be_read():
    recipes = sorted(RECIPES.glob("*.toml"))
    assert len(recipes) >= 3
    assert all(read_recipe(path).steps > 0 for path in recipes)
    with pytest.raises(TrainingError, match="cannot be read: No such file"):
        read_recipe(recipe_path(str(ROOT / "nowhere.toml")))
    with pytest.raises(
        TrainingError,
        match="a .toml file or one of melt-code, .*, melt-tiny, melt-tiny-exit, .*, ouro-1.4b, smoke, got",
    ):
        recipe_path("ouro")
