"""Damaged inputs, some of the many that ``tests/fuzz/run.py`` makes: each is answered or refused, soon."""

import json
import random
from collections import Counter

import pytest
from fuzz import bundles, calls, checkpoints, odd
from fuzz.edits import as_text, edit_bytes, edit_json, edit_text
from fuzz.pool import ANSWERED, FINDING, REFUSED, run_cases

UNWRITABLE = 500_056  # loads through a cache that cannot be written, which costs a warning and no answer
COUNT, SECONDS = 150, 60.0  # on a machine that does much else; a case takes a tenth of a second


def test_damaged_bundles(random_bundle, tmp_path):
    outcomes = list(run_cases(bundles.make, (random_bundle(verified=True), tmp_path), range(COUNT), 2, SECONDS))
    assert sorted(outcome.number for outcome in outcomes) == list(range(COUNT))
    assert [outcome for outcome in outcomes if outcome.kind == FINDING] == []
    kinds = Counter(outcome.kind for outcome in outcomes)
    assert kinds[REFUSED] > COUNT / 2  # else nothing is reached
    assert kinds[ANSWERED] > COUNT / 20
    assert {outcome.damage.partition(":")[0] for outcome in outcomes} == set(bundles.KINDS)


def test_damaged_checkpoints(tmp_path):
    base = checkpoints.write_checkpoints(tmp_path)
    outcomes = list(run_cases(checkpoints.make, (base, tmp_path), range(COUNT // 2), 2, SECONDS))
    assert [outcome for outcome in outcomes if outcome.kind == FINDING] == []
    kinds = Counter(outcome.kind for outcome in outcomes)
    assert kinds[REFUSED] > COUNT / 4
    assert kinds[ANSWERED] > COUNT / 30


def test_odd_calls(random_bundle, tmp_path):
    numbers = [*range(COUNT), UNWRITABLE]
    outcomes = list(run_cases(calls.make, (random_bundle(verified=True), tmp_path), numbers, 2, SECONDS))
    assert [outcome for outcome in outcomes if outcome.kind == FINDING] == []
    kinds = Counter(outcome.kind for outcome in outcomes)
    assert kinds[REFUSED] > COUNT / 3
    assert kinds[ANSWERED] > COUNT / 8
    assert {outcome.damage.partition(":")[0] for outcome in outcomes} == set(calls.KINDS)


def test_a_process_that_dies_or_hangs_is_a_finding_and_not_the_end():
    outcomes = {outcome.number: outcome for outcome in run_cases(odd.make, ("damage",), range(6), 2, 5.0)}
    assert [outcomes[number].kind for number in range(6)] == [REFUSED, FINDING, FINDING, FINDING, REFUSED, REFUSED]
    assert [outcomes[number].damage for number in range(6)] == [f"damage {number}" for number in range(6)]
    assert "KeyError: 'raw'" in outcomes[1].what
    assert "ended with status 7" in outcomes[2].what
    assert "took more than 5 seconds" in outcomes[3].what


@pytest.mark.parametrize("seed", range(5))
def test_the_same_number_makes_the_same_damage(seed):
    content = as_text({"a": [1, {"b": "text"}], "c": {"d": 1.5, "e": True}})
    for edit in (edit_text, edit_bytes):
        assert edit(content, random.Random(seed)) == edit(content, random.Random(seed))
    one, other = (json.loads(content) for _ in range(2))
    assert edit_json(one, random.Random(seed)) == edit_json(other, random.Random(seed))
    assert as_text(one) == as_text(other)
