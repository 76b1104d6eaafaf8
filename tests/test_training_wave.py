"""Waves in training: every token finds its neighbours at the loops that they have reached; gradients go through all."""

import dataclasses

import pytest
import torch
from conftest import random_model
from test_training import CHUNK, DISTILLED, LOOPS, batch_of, student_of, tokens
from tolerances import TORCH, assert_close, assert_far

from melt_layers import Frame
from melt_models import MeltCausalLM
from melt_models.training import Phase, Recipe, TrainingError
from melt_models.training.forward import TrainingCache, forward_chunk
from melt_models.training.objective import IGNORED, Objective, Step, TokenBatch
from melt_models.training.trainer import draw_step
from melt_models.training.wave import ROUNDS, forward_wave, settle_wave


def read_wave(model: MeltCausalLM, ids: torch.Tensor, known: int, lag: int) -> tuple[torch.Tensor, TrainingCache]:
    cache = TrainingCache()
    forward_chunk(model.model, ids[:, :known], LOOPS, cache)
    got = forward_wave(model.model, ids[:, known:], LOOPS, lag, cache)
    return torch.stack(got.states), cache


def by_definition(model: MeltCausalLM, ids: torch.Tensor, known: int, lag: int) -> torch.Tensor:
    """Token by token: what stands j places before is at loop t + j * lag, or at the last."""
    cache, backbone = TrainingCache(), model.model
    forward_chunk(backbone, ids[:, :known], LOOPS, cache)
    rows, hidden, latents = {}, {}, {}
    count = ids.shape[1] - known
    moments = sorted((token * lag + loop, token, loop) for token in range(count) for loop in range(LOOPS))
    frames = [Frame.of(model.config, known + token, 1, ids.device) for token in range(count)]
    for now in sorted({moment for moment, _, _ in moments}):
        running = [(token, loop) for moment, token, loop in moments if moment == now]
        x = {token: hidden.get(token, backbone.embed_tokens(ids[:, known + token, None])) for token, _ in running}
        for index, layer in enumerate(backbone.layers):
            queries = {}
            for token, loop in running:
                queries[token] = a = layer.input_layernorm(x[token])
                latents[token, index] = h = layer.gate(a, latents.get((token, index)), loop)
                rows[token, index, loop] = layer.self_attn.keys_values(h, frames[token])
            for token, loop in running:
                seen = [rows[other, index, min(loop + (token - other) * lag, LOOPS - 1)] for other in range(token + 1)]
                keys, values = (torch.cat(parts, dim=2) for parts in zip(*cache.final[index], *seen, strict=True))
                attended = layer.self_attn.attend(queries[token], (keys, values), frames[token])
                x[token] = layer.after_attention(x[token] + layer.input_layernorm_2(attended))
        for token, loop in running:
            hidden[token] = backbone.norm(x[token])
            rows[token, "state", loop] = hidden[token]
    return torch.stack(
        [torch.cat([rows[token, "state", loop] for token in range(count)], dim=1) for loop in range(LOOPS)]
    )


@pytest.mark.parametrize("gate_kind", ["elementwise", "scalar", "ema", "last"])
@pytest.mark.parametrize("lag", [1, 2, 3])
@torch.no_grad()
def test_a_wave_is_what_its_definition_says(gate_kind, lag):
    student, ids = student_of(random_model(gate_kind="none"), gate_kind), tokens()[:, :15]
    states, _ = read_wave(student, ids, CHUNK, lag)
    assert_close(states, by_definition(student, ids, CHUNK, lag), TORCH)
    if lag < LOOPS - 1:
        assert_far(states, read_wave(student, ids, CHUNK, LOOPS)[0], TORCH)


@torch.no_grad()
def test_at_the_longest_lag_a_wave_is_one_token_after_another():
    student, ids = student_of(random_model(gate_kind="none")), tokens()[:, :15]
    cache, states, attended = TrainingCache(), [], []
    forward_chunk(student.model, ids[:, :CHUNK], LOOPS, cache)
    for token in ids[:, CHUNK:].split(1, dim=1):
        got = forward_chunk(student.model, token, LOOPS, cache)
        states.append(torch.stack(got.states))
        attended.append(torch.stack(got.attended))
    for lag in (LOOPS - 1, LOOPS):
        waved = TrainingCache()
        forward_chunk(student.model, ids[:, :CHUNK], LOOPS, waved)
        got = forward_wave(student.model, ids[:, CHUNK:], LOOPS, lag, waved)
        assert_close(torch.stack(got.states), torch.cat(states, dim=2), TORCH)
        assert_close(torch.stack(got.attended), torch.cat(attended, dim=2), TORCH)
        assert waved.length == cache.length
        for layer, rows in cache.final.items():
            for one, other in zip(zip(*waved.final[layer], strict=True), zip(*rows, strict=True), strict=True):
                assert_close(torch.cat(one, dim=2), torch.cat(other, dim=2), TORCH)


@pytest.mark.parametrize("gate_kind", ["elementwise", "scalar", "ema", "last"])
@pytest.mark.parametrize("lag", [1, 2, 3])
@pytest.mark.parametrize("known", [0, CHUNK])
@torch.no_grad()
def test_rounds_settle_on_the_wave_a_token_more_in_each(gate_kind, lag, known):
    student, ids = student_of(random_model(gate_kind="none"), gate_kind), tokens()[:, :15]

    def read(forward, *rounds):
        cache = TrainingCache()
        if known:
            forward_chunk(student.model, ids[:, :known], LOOPS, cache)
        got = forward(student.model, ids[:, known:], LOOPS, lag, cache, *rounds)
        return torch.stack(got.states), torch.stack(got.attended), cache

    states, attended, cache = read(forward_wave)
    count = 15 - known
    for rounds in (0, 1, ROUNDS):
        assert_close(read(settle_wave, False, None, rounds)[0][:, :, : rounds + 1], states[:, :, : rounds + 1], TORCH)
    settled = read(settle_wave, False, None, count - 1)
    assert_close(settled[0], states, TORCH)
    assert_close(settled[1], attended, TORCH)
    assert settled[2].length == cache.length
    for layer, rows in cache.final.items():
        for one, other in zip(zip(*settled[2].final[layer], strict=True), zip(*rows, strict=True), strict=True):
            assert_close(torch.cat(one, dim=2), torch.cat(other, dim=2), TORCH)


def test_a_step_reads_what_is_not_in_chunks_as_a_wave_and_its_gradients_reach_every_weight():
    teacher = random_model(gate_kind="none")
    student, ids = student_of(teacher), tokens()
    step = Step(DISTILLED, LOOPS, CHUNK, None)
    objective = Objective(student, teacher, every_loop=True)
    lags = ({"lag": None}, {"lag": 1}, {"lag": 1, "in_chunks": 0.5})
    plain, waved, half = (objective(batch_of(ids), dataclasses.replace(step, **lag))["loss"] for lag in lags)
    assert_far(plain, waved, TORCH)
    assert_far(half, waved, TORCH)
    known = ids.shape[1] - ROUNDS - 1  # after them so few tokens that the rounds reach all
    at_end = dataclasses.replace(step, chunk_size=1, lag=LOOPS - 1, in_chunks=known / ids.shape[1])
    same = objective(batch_of(ids), at_end)["loss"]
    assert_close(same, objective(batch_of(ids), dataclasses.replace(step, chunk_size=1))["loss"], TORCH)
    waved.backward()
    weights = {name: weight.grad for name, weight in student.named_parameters() if "early_exit" not in name}
    assert [name for name, grad in weights.items() if grad is None or not grad.abs().max() > 0] == []


def test_in_bfloat16_gradients_reach_every_weight_past_rounds_that_have_none():
    teacher = random_model(gate_kind="none")
    student = student_of(teacher)
    with torch.autocast("cpu", torch.bfloat16):
        loss = Objective(student, teacher)(batch_of(tokens()), Step(DISTILLED, LOOPS, CHUNK, None, lag=1))["loss"]
    loss.backward()
    weights = {name: weight.grad for name, weight in student.named_parameters() if "early_exit" not in name}
    assert [name for name, grad in weights.items() if grad is None or not grad.abs().max() > 0] == []


@pytest.mark.parametrize("length", [1, 2, 3, 10])
def test_padding_after_a_wave_changes_nothing(length):
    teacher, ids = random_model(gate_kind="none"), tokens(1)
    step = Step(DISTILLED, LOOPS, CHUNK, None, lag=1)
    objective = Objective(student_of(teacher), teacher, every_loop=True)
    real = torch.arange(ids.shape[1])[None] < length
    padded = TokenBatch(ids, torch.where(real, batch_of(ids).targets, IGNORED), real)
    short = TokenBatch(*(one[:, :length] for one in (padded.input_ids, padded.targets, padded.real)))
    wanted = objective(short, step)
    for name, value in objective(padded, step).items():
        assert_close(value, wanted[name], TORCH)


def test_waves_are_drawn_in_phase_two_alone_and_change_no_other_draw():
    recipe = Recipe(
        *((4, 8), 2, 1, Phase(5, 1.0), Phase(195, distillation=1.0)),
        base_learning_rate=1e-3,
        gate_learning_rate=1e-2,
        shallow_steps=0.5,
        leaving_steps=0.2,
    )
    plain = [draw_step(recipe, step, LOOPS) for step in range(200)]
    waved = [draw_step(dataclasses.replace(recipe, wave_steps=0.5), step, LOOPS) for step in range(200)]
    assert [dataclasses.replace(step, lag=None, in_chunks=0.0) for step in waved] == plain
    assert all(step.lag is None for step in waved[:5])
    lags = [(step.lag, step.loops, step.leaving) for step in waved if step.lag is not None]
    assert 30 < len(lags) < 110
    assert {lag for lag, _, _ in lags} == {1, 2, 3}
    assert all(lag < loops and leaving is None for lag, loops, leaving in lags)
    assert {step.in_chunks for step in waved if step.lag is not None} == {0.0, 0.5}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"wave_steps": 1.5}, r"wave_steps must be in \[0, 1\], got 1.5"),
        ({"wave_steps": 0.5, "gate_kind": "mean"}, "wave_steps must be left out .* the gate kind mean, got 0.5"),
        ({"wave_steps": 0.5, "distillation": Phase(0)}, "wave_steps must be left out without phase 2"),
        ({"muon_learning_rate": -1.0}, "muon_learning_rate must be at least 0, .*, got -1.0"),
    ],
)
def test_recipes_with_waves_or_rates_that_cannot_be_are_refused(changes, fault):
    recipe = Recipe((4,), 2, 1, Phase(5, 1.0), Phase(5, 1.0), base_learning_rate=1e-3, gate_learning_rate=1e-2)
    with pytest.raises(TrainingError, match=fault):
        dataclasses.replace(recipe, **changes)
