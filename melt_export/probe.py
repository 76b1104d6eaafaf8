"""The tokens that calibration and quality are measured on: a given text, the model's own evaluation, or random ones."""

import random
from dataclasses import dataclass
from pathlib import Path

from melt_export.source import ExportError, Source
from melt_models.configuration import MeltConfig
from melt_models.evaluation import EVALUATION_NAME
from melt_runtime.text.codec import TextCodec

MIN_TOKENS = 64
"""Shorter texts say nothing about a model."""
MAX_TOKENS = 512
_LARGE = 1 << 27  # layers x hidden size x intermediate size from which torch takes seconds a chunk
_FEW_TOKENS = 128
_EXAMPLES = 32


@dataclass(frozen=True)
class Passage:
    """Tokens read from an empty cache; what follows ``start - 1`` and later ones counts."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Probe:
    """Passages, and where they come from.

    Attributes:
        says_loss: whether what rounding costs here is what it costs in use; it is not for random tokens.
    """

    passages: tuple[Passage, ...]
    name: str
    says_loss: bool = True

    @property
    def scored(self) -> int:
        """Tokens whose prediction counts."""
        return sum(len(passage.ids) - passage.start for passage in self.passages)


def choose_probe(source: Source, folder: Path, text: str | None) -> Probe:
    """Chooses the tokens.

    Args:
        source: the model; of its own evaluation, where it has one, the answers count.
        folder: of the bundle, with its tokenizer and chat template.
        text: the caller's choice, of which everything counts.

    Raises:
        ExportError: the text has fewer than ``MIN_TOKENS`` tokens, or an example more than the model has positions.
    """
    config, codec = source.config, TextCodec.read(folder)
    large = config.hidden_size * config.num_hidden_layers * config.intermediate_size > _LARGE
    most = min(_FEW_TOKENS if large else MAX_TOKENS, config.max_position_embeddings // 2)
    if text is not None:
        ids = codec.encode(text)
        if len(ids) < MIN_TOKENS:
            raise ExportError(
                f"the text must have at least {MIN_TOKENS} tokens, got {len(ids)}: give a longer --eval-text"
            )
        return Probe((Passage(ids[:most], 1),), "the given text")
    if source.examples:
        passages = []
        for example in source.examples[:_EXAMPLES]:
            prompt = codec.encode_chat(example.chat)
            passages.append(Passage(prompt + codec.encode(example.answer), len(prompt)))
        longest = max(len(passage.ids) for passage in passages)
        if longest > config.max_position_embeddings:
            raise ExportError(
                f"{EVALUATION_NAME} has an example of {longest} tokens, and max_position_embeddings is "
                f"{config.max_position_embeddings}: shorten or remove it"
            )
        return Probe(tuple(passages), "the model's own evaluation")
    return Probe((Passage(random_ids(config, config.chunk_size, most), 1),), "seeded random tokens", says_loss=False)


def random_ids(config: MeltConfig, chunk: int, most: int) -> list[int]:
    """Token ids of one chunk and a half where that fits: every branch of prefill, whatever the model knows."""
    length = min(chunk + chunk // 2 + 1, most)
    draw = random.Random(0)
    return [draw.randrange(config.vocab_size) for _ in range(length)]
