"""L4 and L5: the shipped model through ONNX Runtime: logits, 200 greedy tokens, and how many questions it answers."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MELT_TINY, ROOT
from tolerances import GOLDEN_LOGITS, assert_close, assert_greedy
from transformers import AutoTokenizer

from melt_models.modeling import KVCache
from melt_models.tiny.data import Encoder
from melt_models.tiny.depth import measure_depth
from melt_models.tiny.evaluate import exact_match
from melt_models.tiny.task import MAX_HOPS, make_problem
from melt_runtime import MeltModel, read_manifest

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "melt-tiny.json").read_text())
DEPTHS = tuple(range(1, MAX_HOPS + 1))


@pytest.fixture(scope="module")
def model(tiny_bundle) -> MeltModel:
    return MeltModel.load(tiny_bundle, device="cpu", capacity=512)


def test_the_prompt_is_tokenized_as_in_torch(model):
    chat = [{"role": "user", "content": GOLDEN["question"]}]
    assert model.codec.encode(model.codec.render(chat)) == GOLDEN["prompt"]


def test_export_verified_every_loop(tiny_bundle):
    """Over every KV cache, and every first choice of the trained model is torch's: its margins are clear."""
    parity = read_manifest(tiny_bundle).parity
    assert [run.kv_cache for run in parity.runs] == ["float", "int8", "int4"]
    for run in parity.runs:
        assert run.greedy_tokens_equal == run.greedy_tokens == 34
        assert list(run.hidden_by_loop) == ["1", "2", "3", "4"]
        assert all(found.error <= found.allowed for found in run.tensors.values())


@pytest.mark.parametrize("loops", DEPTHS)
def test_logits_equal_the_goldens(model, loops):
    model.reset()
    expected = np.array(GOLDEN["loops"][str(loops)]["logits"])
    actual = model.new_runner().prefill(GOLDEN["prompt"], loops)
    assert_close(actual, expected, GOLDEN_LOGITS)


@pytest.mark.parametrize("loops", DEPTHS)
@torch.no_grad()
def test_the_goldens_leave_no_doubt(tiny_model, loops):
    """Every token of them is torch's by more than rounding can move: whoever runs the model must give these tokens."""
    tokens, cache = GOLDEN["loops"][str(loops)]["tokens"], KVCache(tiny_model.config)
    logits = tiny_model(torch.tensor([GOLDEN["prompt"]]), past_key_values=cache, loops=loops).logits[0, -1]
    for token in tokens:
        best, second = logits.topk(2).values.tolist()
        assert int(logits.argmax()) == token
        assert best - second > 2 * GOLDEN_LOGITS.allowed(logits.numpy())
        logits = tiny_model(torch.tensor([[token]]), past_key_values=cache, loops=loops, chunk_size=1).logits[0, -1]


@pytest.mark.parametrize("loops", DEPTHS)
def test_two_hundred_greedy_tokens_equal_the_goldens(model, loops):
    result = model.generate(GOLDEN["prompt"], loops=loops, max_new_tokens=200, stop_ids=())
    assert list(result.token_ids) == GOLDEN["loops"][str(loops)]["tokens"]


def test_held_out_questions_through_onnx(model):
    """Accuracy climbs with loops, hop by hop; the card's table is measured on more problems."""
    rng = random.Random(11)
    problems = [make_problem(rng, held_out=True, questions=1) for _ in range(120)]
    right = dict.fromkeys(((loops, hops) for loops in DEPTHS for hops in DEPTHS), 0)
    asked = dict.fromkeys(DEPTHS, 0)
    for problem in problems:
        (question,) = problem.questions
        asked[question.hops] += 1
        for loops in DEPTHS:
            result = model.generate(problem.messages()[:1], loops=loops, max_new_tokens=8)
            right[loops, question.hops] += result.text.strip() == f"{question.answer}."
    assert sum(right[4, hops] for hops in DEPTHS) >= 0.93 * len(problems), (right, asked)
    for loops in DEPTHS:
        for hops in DEPTHS:
            share = right[loops, hops] / asked[hops]
            assert share >= 0.85 if hops <= loops else share <= 0.3, (loops, hops, right, asked)


@pytest.mark.parametrize("kind", ["sentence", "steps"])
def test_sentences_and_steps_through_onnx(model, kind):
    """As the question asks; in a wave as well, in half the passes of plain decoding, with as many right answers."""
    rng, settings = random.Random(13), {"loops": 4, "max_new_tokens": 48}
    right, passes, tokens = {"plain": 0, "wave": 0}, 0, 0
    for _ in range(40):
        problem = make_problem(rng, held_out=True, questions=1, kinds=(kind,))
        (question,) = problem.questions
        plain = model.generate(problem.messages()[:1], **settings)
        wave = model.generate(problem.messages()[:1], decode="wave", lag=1, **settings)
        right["plain"] += plain.text == question.reply
        right["wave"] += wave.text == question.reply
        passes += wave.passes
        tokens += len(wave.token_ids) - 1
    assert min(right.values()) >= 36, right
    assert abs(right["plain"] - right["wave"]) <= 2, right
    assert passes <= 2.2 * tokens


def test_a_loop_too_many_does_not_walk_past_the_answer(tiny_model):
    encoder = Encoder(AutoTokenizer.from_pretrained(MELT_TINY))
    table = exact_match(tiny_model, encoder, problems=64, loops=(4, 6))
    for hops in DEPTHS:
        assert table[6][hops] >= table[4][hops] - 0.08, table


def test_torch_and_onnx_answer_alike(model, tiny_model):
    rng = random.Random(12)
    for _ in range(10):
        messages = make_problem(rng, held_out=True, questions=1).messages()[:1]
        ids = model.codec.encode(model.codec.render(messages))
        tokens = list(model.generate(messages, max_new_tokens=3, stop_ids=()).token_ids)
        assert len(tokens) == 3
        assert_greedy(tiny_model, ids, tokens)


def test_turns_of_a_chat(model):
    """Questions about the same facts, one after another, without repeating the facts."""
    problem = make_problem(random.Random(3), held_out=True, questions=5)
    session, right = model.new_session(), 0
    for message, question in zip(problem.messages()[::2], problem.questions, strict=True):
        result = session.generate(message["content"], max_new_tokens=8)
        right += result.text.strip() == f"{question.answer}."
    assert right >= 4
    assert result.cached_tokens > 60


def test_the_evaluation_counts_what_it_says(tiny_model):
    encoder = Encoder(AutoTokenizer.from_pretrained(MELT_TINY))
    table = exact_match(tiny_model, encoder, problems=64, loops=(1, 4))
    assert table[4][4] > 0.85 > 0.3 > table[1][4]


@pytest.fixture(scope="module")
def depths(tiny_model) -> dict:
    """Measures over a small held-out set, at every loop and by the shipped gate with the threshold beside it."""
    encoder, threshold = Encoder(AutoTokenizer.from_pretrained(MELT_TINY)), tiny_model.config.early_exit_threshold
    cases = {"every loop": (None, "apart"), "apart": (threshold, "apart"), "leaving": (threshold, "leaving")}
    return {name: measure_depth(tiny_model, encoder, *case, problems=128) for name, case in cases.items()}


def test_the_shipped_gate_takes_as_many_loops_as_a_question_has_hops(tiny_model, depths):
    """As its card says, and no answer is lost by it; limits that hold on any processor."""
    assert 0 < tiny_model.config.early_exit_threshold < 1
    gated, full = depths["apart"], depths["every loop"]
    assert set(full.on_name.values()) == set(full.on_prompt.values()) == {4.0}
    for hops in DEPTHS:
        assert -0.4 < gated.on_name[hops] - hops < 1.2, gated
        assert gated.on_rest[hops] < 1.5, gated
        assert gated.exact[hops] >= full.exact[hops] - 0.05, (gated, full)
    assert set(gated.on_prompt.values()) == {4.0}


def test_chunks_of_a_prompt_may_leave_too(depths):
    leaving, full = depths["leaving"], depths["every loop"]
    assert sum(leaving.on_prompt.values()) / 4 < 3.5
    assert sum(leaving.exact.values()) / 4 >= sum(full.exact.values()) / 4 - 0.05, (leaving, full)


def test_the_repository_stays_small():
    assert sum(path.stat().st_size for path in MELT_TINY.iterdir()) < 20_000_000
    assert (MELT_TINY / "README.md").is_file()
    assert (ROOT / "LICENSE").is_file()
