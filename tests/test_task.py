"""L0: the problems of melt-tiny are right, readable and disjoint between training and evaluation."""

import random
import re
from itertools import pairwise

import pytest

from melt_models.tiny.task import DOMAINS, KINDS, MAX_HOPS, NUMBER_WORDS, REQUESTS, make_problem

FACTS = {
    domain.name: [
        re.compile("^" + re.escape(fact).replace(r"\{x\}", r"(?P<x>\w+)").replace(r"\{y\}", r"(?P<y>\w+)") + "$")
        for fact in domain.facts
    ]
    for domain in DOMAINS
}


def links_of(problem) -> dict[str, str]:
    """Reads the facts back from the text, as a person would."""
    links = {}
    for sentence in re.findall(r"[^.]+\.", problem.facts):
        (match,) = filter(None, (fact.match(sentence.strip()) for fact in FACTS[problem.domain]))
        assert match["x"] not in links, "two facts contradict each other"
        links[match["x"]] = match["y"]
    return links


@pytest.mark.parametrize("held_out", [False, True])
def test_answers_follow_from_the_facts(held_out):
    rng = random.Random(5)
    seen = set()
    for _ in range(300):
        problem = make_problem(rng, held_out)
        links = links_of(problem)
        assert 8 <= len(links) <= 12
        for question in problem.questions:
            place = question.path[0]
            for step in question.path[1:]:
                assert links[place] == step
                place = step
            assert question.answer == place
            assert re.search(rf"\b{question.path[0]}\b", question.text)
            assert NUMBER_WORDS[question.hops] in question.text
            seen.add(question.hops)
    assert seen == set(range(1, MAX_HOPS + 1))


def test_answers_are_of_the_kind_that_the_question_asks_for():
    rng, seen = random.Random(6), set()
    for _ in range(100):
        problem = make_problem(rng, held_out=False, kinds=KINDS)
        links = links_of(problem)
        for question in problem.questions:
            seen.add((problem.domain, question.kind))
            assert question.text.endswith(REQUESTS[question.kind])
            assert question.reply.endswith(f" {question.answer}." if question.kind != "name" else f"{question.answer}.")
            sentences = re.findall(r"[^.]+\.", question.reply)
            if question.kind == "steps":
                told = [m for s in sentences[:-1] for fact in FACTS[problem.domain] if (m := fact.match(s.strip()))]
                assert [(match["x"], match["y"]) for match in told] == list(pairwise(question.path))
                assert all(links[match["x"]] == match["y"] for match in told)
                assert sentences[-1] == f" So {question.answer}."
            else:
                assert len(sentences) == 1
            if question.kind == "sentence":
                number, start = NUMBER_WORDS[question.hops], question.path[0]
                assert re.search(rf"{number} \w+ (above|before|after) .*{start} is", question.reply)
    assert len(seen) == len(DOMAINS) * len(KINDS)


def test_held_out_chains_never_appear_in_training():
    chains = {}
    for held_out in (False, True):
        rng = random.Random(0)
        problems = [make_problem(rng, held_out) for _ in range(1000)]
        chains[held_out] = {(p.domain, frozenset(links_of(p).items())) for p in problems}
    assert not chains[False] & chains[True]


def test_the_same_seed_gives_the_same_problem():
    assert make_problem(random.Random(7), False) == make_problem(random.Random(7), False)
