"""Problems as tensors: token ids, and for every loop the token that should follow at the answers."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from melt_models.tiny.task import DOMAINS, Problem
from melt_models.tiny.tokenizer import ASSISTANT, PAD

IGNORED = -100
ANSWER_TOKENS = 3
"""An answer ends with its name, a full stop and the end-of-text token; one by a name is nothing else."""
NO_QUESTION = -1


@dataclass
class Batch:
    """Problems of one batch, padded on the right.

    Attributes:
        input_ids: [B, L] int64.
        targets: the token that should follow position i at loop t, ``IGNORED`` outside answers, [T, B, L] int64.
            At loop t the right name is what min(t, hops) steps find, so that every depth learns to answer.
        subjects: at the second name of each fact the first one, ``IGNORED`` elsewhere, [B, L] int64.
        is_name: where the name should follow that an answer ends with, [B, L] bool.
        hops: hop count of the question there, [B, L] int64.
        question: which question a target answers, counted over the batch, ``NO_QUESTION`` elsewhere, [B, L] int64.
        kinds: each question's kind of answer.
    """

    input_ids: Tensor
    targets: Tensor
    subjects: Tensor
    is_name: Tensor
    hops: Tensor
    question: Tensor
    kinds: list[str]


class Encoder:
    """Turns problems into batches with melt-tiny's tokenizer, in which every name is one token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        """Looks up every name's token.

        Raises:
            ValueError: of another tokenizer, where a name has several.
        """
        self.tokenizer = tokenizer
        self.pad_id = int(tokenizer.convert_tokens_to_ids(PAD))
        self._begin_id = int(tokenizer.convert_tokens_to_ids(ASSISTANT))
        names = {name for domain in DOMAINS for name in domain.entities}
        self._answer_ids = {}
        for name in names:
            ids = tokenizer.encode(name)
            if len(ids) != 1:
                raise ValueError(f"{name!r} must be one token, got {len(ids)}: give melt-tiny's own tokenizer")
            self._answer_ids[name] = ids[0]
        self._name_ids = frozenset(self._answer_ids.values())

    def answer_id(self, name: str) -> int:
        """The one token of a name."""
        return self._answer_ids[name]

    def answer_begin(self, ids: list[int]) -> int:
        """Where the only answer of a chat begins."""
        return ids.index(self._begin_id) + 1

    def batch(self, problems: list[Problem], loops: int) -> Batch:
        """Encodes ``problems`` with targets for ``loops`` loops."""
        texts = [self.tokenizer.apply_chat_template(p.messages(), tokenize=False) for p in problems]
        rows = self.tokenizer(texts)["input_ids"]
        length = max(map(len, rows))
        input_ids = torch.full((len(rows), length), self.pad_id)
        targets = torch.full((loops, len(rows), length), IGNORED)
        subjects = torch.full((len(rows), length), IGNORED)
        is_name = torch.zeros((len(rows), length), dtype=torch.bool)
        hops = torch.zeros((len(rows), length), dtype=torch.long)
        number = torch.full((len(rows), length), NO_QUESTION)
        kinds: list[str] = []
        for row, (ids, problem) in enumerate(zip(rows, problems, strict=True)):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            names = [place for place, token in enumerate(ids) if token in self._name_ids]
            pairs = names[: 2 * problem.facts.count(".")]  # every fact names its subject, then what follows it
            subjects[row, pairs[1::2]] = input_ids[row, pairs[::2]]
            begins, ends = (
                [place for place, token in enumerate(ids) if token == mark]
                for mark in (self._begin_id, self.tokenizer.eos_token_id)
            )
            for begin, end, question in zip(begins, ends, problem.questions, strict=True):
                before = end - ANSWER_TOKENS  # the position whose next token is the answer's name
                is_name[row, before] = True
                hops[row, before] = question.hops
                number[row, begin:end] = len(kinds)
                kinds.append(question.kind)
                targets[:, row, begin:end] = torch.tensor(ids[begin + 1 : end + 1])
                if question.kind != "steps":  # whose steps give the name, at any depth
                    for loop_idx in range(loops):
                        found = question.path[min(loop_idx + 1, question.hops)]
                        targets[loop_idx, row, before] = self.answer_id(found)
        return Batch(input_ids, targets, subjects, is_name, hops, number, kinds)
