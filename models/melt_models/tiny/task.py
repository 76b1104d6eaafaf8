"""Multi-hop questions in plain English, from a seeded generator.

A context states who follows whom (bosses, parents, trains, rooms, a ball) in shuffled order; a question asks who or
what stands 1 to 4 steps further. Each step depends on the one before. The answer is a name, or where the question asks
for it a sentence, or every step on the way. Knows nothing of tokens or models.
"""

import hashlib
import itertools
import random
from dataclasses import dataclass

MAX_HOPS = 4
NUMBER_WORDS = ("zero", "one", "two", "three", "four")
FACTS = (8, 12)
REQUESTS = {"name": "", "sentence": " Answer in a sentence.", "steps": " Go step by step."}
"""What a question says to be answered by a name, in a sentence, or step by step."""
KINDS = tuple(REQUESTS)
NAMES = ("name",)
MIXED = ("name", "name", "sentence", "steps")
"""Kinds of answers to draw from: names alone, or half of them names."""
HELD_OUT_FRACTION = 1 / 16

_PEOPLE = """\
Ana Ben Cleo Dan Eva Finn Gina Hugo Iris Jack Kara Liam Mona Nils Olga Paul Quinn Rosa Sven Tara
Uma Vera Wim Xena Yara Zack Amir Bela Carl Dora Emil Faye Greg Hana Ivan Jana Kurt Lena Marc Nora"""
_CITIES = """\
Oslo Rome Paris Lima Cairo Delhi Tokyo Quito Dakar Milan Turin Lyon Bern Riga Porto Kyoto Perth Boston
Dublin Vienna Prague Madrid Zagreb Athens Lisbon Berlin Munich Geneva Naples Havana"""
PEOPLE, CITIES = tuple(_PEOPLE.split()), tuple(_CITIES.split())
ROOMS = tuple(str(number) for number in range(10, 70))


@dataclass(frozen=True)
class Domain:
    """One kind of chain: who or what takes part, and how facts, questions and answers in sentences are worded.

    ``{x}`` is followed by ``{y}``; ``{n}`` is a number word and ``{s}`` a plural ending. A step is told in the first
    wording of the facts.
    """

    name: str
    entities: tuple[str, ...]
    facts: tuple[str, ...]
    questions: tuple[str, ...]
    sentence: str
    plural: str = "s"


DOMAINS = (
    Domain(
        "work",
        PEOPLE,
        ("{x} reports to {y}.", "{x} works for {y}."),
        ("Who is {n} level{s} above {x}?", "Start with {x} and go up {n} level{s}. Who is it?"),
        "The person {n} level{s} above {x} is {y}.",
    ),
    Domain(
        "family",
        PEOPLE,
        ("{x} is a child of {y}.", "The parent of {x} is {y}."),
        ("Who is {n} generation{s} before {x}?", "Start with {x} and go back {n} generation{s}. Who is it?"),
        "The person {n} generation{s} before {x} is {y}.",
    ),
    Domain(
        "route",
        CITIES,
        ("The train from {x} goes to {y}.", "After {x} comes {y}."),
        ("Where are you {n} stop{s} after {x}?", "You leave {x} and ride {n} stop{s}. Where are you?"),
        "The city {n} stop{s} after {x} is {y}.",
    ),
    Domain(
        "rooms",
        ROOMS,
        ("Room {x} leads to room {y}.", "A door in room {x} opens into room {y}."),
        (
            "Which room is {n} door{s} after room {x}?",
            "Start in room {x} and take {n} door{s}. Which room is it?",
        ),
        "The room {n} door{s} after room {x} is {y}.",
    ),
    Domain(
        "ball",
        PEOPLE,
        ("{x} passes the ball to {y}.", "{x} throws the ball to {y}."),
        ("Who has the ball {n} pass{s} after {x}?", "{x} has the ball. Who has it after {n} pass{s}?"),
        "The person {n} pass{s} after {x} is {y}.",
        plural="es",
    ),
)


@dataclass(frozen=True)
class Question:
    """A question, the way to its answer and the text of it.

    Attributes:
        text: the question, with what it asks for.
        path: ``path[k]`` is what ``k`` steps from the start find.
        kind: one of ``KINDS``.
        reply: the answer's text; of every kind it ends with what the last step finds and a full stop.
    """

    text: str
    path: tuple[str, ...]
    kind: str
    reply: str

    @property
    def hops(self) -> int:
        """Number of dependent steps."""
        return len(self.path) - 1

    @property
    def answer(self) -> str:
        """What the last step finds."""
        return self.path[-1]


@dataclass(frozen=True)
class Problem:
    """Facts in shuffled order and questions about them, asked one after another."""

    domain: str
    facts: str
    questions: tuple[Question, ...]

    def messages(self) -> list[dict[str, str]]:
        """The problem as a chat: the first user message states the facts, later ones only ask."""
        chat = []
        for number, question in enumerate(self.questions):
            text = question.text if number else f"{self.facts} {question.text}"
            chat.append({"role": "user", "content": text})
            chat.append({"role": "assistant", "content": question.reply})
        return chat


def is_held_out(domain: str, links: dict[str, str]) -> bool:
    """Whether a chain is kept from training: decided by a hash of its links, whatever their order or wording."""
    text = domain + "|" + ";".join(f"{x}>{y}" for x, y in sorted(links.items()))
    return hashlib.sha256(text.encode()).digest()[0] < 256 * HELD_OUT_FRACTION


def make_problem(
    rng: random.Random,
    held_out: bool,
    questions: int = 8,
    hops: tuple[int, int] = (1, MAX_HOPS),
    facts: tuple[int, int] = FACTS,
    wordings: int | None = None,
    kinds: tuple[str, ...] = NAMES,
) -> Problem:
    """Draws one problem.

    Args:
        rng: source of randomness; the same state gives the same problem.
        held_out: draw from the chains kept from training, or from the others.
        questions: how many questions are asked.
        hops: fewest and most hops of a question, evenly drawn; 0 asks for the start itself.
        facts: fewest and most facts, at least as many as hops.
        wordings: use only the first so many wordings of facts and of questions; default: all.
        kinds: kinds of answers, evenly drawn.
    """
    domain = rng.choice(DOMAINS)
    while True:
        links = _draw_links(rng, domain, rng.randint(*facts))
        if is_held_out(domain.name, links) == held_out:
            break
    sentences = [rng.choice(domain.facts[:wordings]).format(x=x, y=y) for x, y in links.items()]
    rng.shuffle(sentences)
    asked = tuple(_ask(rng, domain, links, rng.randint(*hops), wordings, rng.choice(kinds)) for _ in range(questions))
    return Problem(domain.name, " ".join(sentences), asked)


def _draw_links(rng: random.Random, domain: Domain, facts: int) -> dict[str, str]:
    """Draws links without a cycle: a trunk long enough for every hop count, then branches and new chains."""
    names = rng.sample(domain.entities, 2 * facts)
    trunk = names[: rng.randint(min(MAX_HOPS, facts), min(2 * MAX_HOPS, facts)) + 1]
    links = dict(itertools.pairwise(trunk))
    unused, placed = names[len(trunk) :], list(trunk)
    while len(links) < facts:
        source = unused.pop()
        target = unused.pop() if rng.random() < 0.3 else rng.choice(placed)
        links[source] = target
        placed += [source, target]
    return links


def _ask(
    rng: random.Random, domain: Domain, links: dict[str, str], hops: int, wordings: int | None, kind: str
) -> Question:
    path = rng.choice([path for start in links if len(path := _walk(links, start, hops)) == hops + 1])
    words = {"x": path[0], "n": NUMBER_WORDS[hops], "s": "" if hops == 1 else domain.plural}
    text = rng.choice(domain.questions[:wordings]).format(**words) + REQUESTS[kind]
    return Question(text, tuple(path), kind, _reply(domain, path, kind, words))


def _reply(domain: Domain, path: list[str], kind: str, words: dict[str, str]) -> str:
    if kind == "sentence":
        return domain.sentence.format(**words, y=path[-1])
    if kind == "steps":
        steps = [domain.facts[0].format(x=x, y=y) for x, y in itertools.pairwise(path)]
        return " ".join([*steps, f"So {path[-1]}."])
    return f"{path[-1]}."


def _walk(links: dict[str, str], start: str, hops: int) -> list[str]:
    path = [start]
    while len(path) <= hops and path[-1] in links:
        path.append(links[path[-1]])
    return path
