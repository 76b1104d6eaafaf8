"""The script that makes melt-tiny's teacher: its stages, what it supervises, and that it goes on where it stopped."""

import random

import pytest
import torch

from melt_models import load_checkpoint
from melt_models.tiny import teacher
from melt_models.tiny.data import ANSWER_TOKENS, IGNORED, Encoder
from melt_models.tiny.evaluate import exact_match
from melt_models.tiny.task import KINDS, make_problem
from melt_models.tiny.tokenizer import build_tokenizer
from melt_models.training import TrainingError


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(build_tokenizer(0))


def test_targets_are_the_answers_after_each_number_of_steps(encoder):
    problems = [make_problem(random.Random(seed), held_out=False, hops=(0, 4)) for seed in range(4)]
    batch = encoder.batch(problems, loops=4)
    for row, problem in enumerate(problems):
        places = batch.is_name[row].nonzero()[:, 0].tolist()
        assert len(places) == len(problem.questions)
        for place, question in zip(places, problem.questions, strict=True):
            assert batch.hops[row, place] == question.hops
            for loop_idx in range(4):
                after = question.path[min(loop_idx + 1, question.hops)]
                name, stop, end = batch.targets[loop_idx, row, place : place + ANSWER_TOKENS].tolist()
                assert encoder.tokenizer.decode([name]) == after
                assert encoder.tokenizer.decode([stop, end]) == ".<|end|>"
            assert (batch.subjects[row] != IGNORED).sum() == problem.facts.count(".")
            # What the model reads is the true answer, whatever the loop.
            assert batch.input_ids[row, place + 1] == encoder.answer_id(question.answer)
    assert (batch.targets[0] != IGNORED).sum() == 4 * 8 * ANSWER_TOKENS


def test_sentences_name_what_each_loop_finds_and_steps_are_the_same_at_every_loop(encoder):
    problems = [make_problem(random.Random(seed), held_out=False, kinds=KINDS) for seed in range(6)]
    batch, number = encoder.batch(problems, loops=4), 0
    for row, problem in enumerate(problems):
        for question in problem.questions:
            here = batch.question[row] == number
            assert batch.kinds[number] == question.kind
            for loop_idx in range(4):
                said = encoder.tokenizer.decode(batch.targets[loop_idx, row, here])
                found = question.path[min(loop_idx + 1, question.hops)]
                wanted = question.reply
                if question.kind != "steps":
                    assert wanted.endswith(f"{question.answer}.")
                    wanted = f"{wanted.removesuffix(f'{question.answer}.')}{found}."
                assert said == f"{wanted}<|end|>"
            number += 1
    assert set(batch.kinds) == set(KINDS)
    assert number == len(batch.kinds)
    assert (batch.question >= 0).sum() == (batch.targets[0] != IGNORED).sum()


def test_every_name_of_the_task_is_one_token_and_any_text_has_tokens(encoder):
    assert encoder.tokenizer.decode(encoder.tokenizer.encode("naïve 日本 🙂")) == "naïve 日本 🙂"
    assert encoder.answer_id("Quinn") != encoder.answer_id("57")


def test_training_goes_on_after_the_last_finished_stage(tmp_path, capsys, encoder, monkeypatch):
    monkeypatch.setattr(teacher, "build_tokenizer", lambda _: encoder.tokenizer)
    monkeypatch.setattr(teacher, "exact_match", lambda model, encoder, problems: exact_match(model, encoder, 4))
    sizes = {"questions": 2, "kinds": KINDS}
    one, two = (teacher.Stage((1, n), (0, n), (2, 3), 1, teacher.NEVER, 3, recall=2.0 - n, **sizes) for n in (1, 2))
    recipe = teacher.Recipe(batch=2)

    def run(folder, stages) -> dict[str, torch.Tensor]:
        teacher.Trainer(recipe, folder, stages).run()
        return load_checkpoint(folder / f"stage-{len(stages)}").state_dict()

    straight = run(tmp_path / "straight", (one, two))
    run(tmp_path / "stopped", (one,))
    resumed = run(tmp_path / "stopped", (one, two))
    assert "stage 1 was finished before" in capsys.readouterr().out
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    with pytest.raises(TrainingError, match="was made by another recipe"):
        run(tmp_path / "stopped", (two, one))
