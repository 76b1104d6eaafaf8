"""Where an export's weights and texts come from: a checkpoint folder, or random weights of a given shape."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from melt_export.generation import read_generation
from melt_export.templates import chat_template
from melt_export.texts import examine_tokenizer
from melt_models.checkpoint import Checkpoint, empty_model, examine_config
from melt_models.configuration import MeltConfig
from melt_models.errors import CheckpointError, list_faults
from melt_models.evaluation import EVALUATION_NAME, Example, examine_examples
from melt_runtime.errors import MeltError
from melt_runtime.request.generation_config import GenerationConfig

HEAD_DIM_MULTIPLE = 16
"""GroupQueryAttention rotates heads of this multiple only."""
LEAST_POSITIONS = 64
"""Prompt and answer over which graphs are compared with torch."""


class ExportError(MeltError):
    """A checkpoint that cannot be exported, or an output folder that cannot be written."""


@dataclass(frozen=True)
class Source:
    """What an export reads.

    Attributes:
        config: the model's configuration.
        read: gives one tensor by its name in the checkpoint.
        tokenizer: content of ``tokenizer.json``.
        chat_template: a Jinja template, self-contained; empty where there is none.
        examples: the model's own evaluation; empty where it has none.
        generation: the defaults of generation, end-of-text tokens among them.
        notes: what of the published files was corrected or passed over, a sentence each.
    """

    config: MeltConfig
    read: Callable[[str], Tensor]
    tokenizer: str
    chat_template: str
    examples: tuple[Example, ...]
    generation: GenerationConfig
    notes: tuple[str, ...] = ()


def checkpoint_source(folder: Path) -> Source:
    """Opens a checkpoint folder and finds what would fail late, before any long work begins: all faults in one list.

    Every weight is read once: a damaged one would only show as a model that answers nonsense.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or does not fit its configuration.
        ExportError: it has what the graphs cannot express, or texts beside the weights cannot be used.
    """
    faults: list[str] = []
    checkpoint: Checkpoint | None = None
    try:
        checkpoint = Checkpoint(folder)
        config: MeltConfig | None = checkpoint.config
    except CheckpointError as error:
        faults += error.faults
        config, _ = examine_config(folder, [])  # what lies beside it is still held against it
    if config is not None:
        faults += _inexpressible(config)
    generation, notes = read_generation(folder, config, faults)
    text, passed = examine_tokenizer(folder, config.vocab_size if config else None, faults)
    template, doubts = chat_template(folder, config, Tokenizer.from_str(text) if text else None, faults)
    examples = examine_examples(folder, faults)
    if examples and not template:
        doubts = (*doubts, f"{EVALUATION_NAME} is passed over: its chats need a chat template, and there is none")
        examples = ()
    if checkpoint is None:
        raise CheckpointError(f"{folder} cannot be exported:", faults)
    if faults:
        raise ExportError(f"{folder} cannot be exported:{list_faults(faults)}")
    checkpoint.require_finite()
    notes = [*checkpoint.notes, *notes, *passed, *doubts]
    return Source(checkpoint.config, checkpoint.read, text, template, examples, generation, tuple(notes))


def _inexpressible(config: MeltConfig) -> list[str]:
    """What a configuration may say and the graphs cannot."""
    faults = []
    if config.head_dim % HEAD_DIM_MULTIPLE:
        faults.append(f"head_dim must be a multiple of {HEAD_DIM_MULTIPLE}, got {config.head_dim}")
    if config.max_position_embeddings < LEAST_POSITIONS:
        faults.append(
            f"max_position_embeddings must be at least {LEAST_POSITIONS}, got {config.max_position_embeddings}: "
            "the graphs are compared with torch over so many tokens"
        )
    return faults


def random_source(config: MeltConfig, seed: int = 0) -> Source:
    """Random weights of any shape, the same for the same seed, made tensor by tensor; for benchmarks."""

    def read(name: str) -> Tensor:
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        name = "model.embed_tokens.weight" if tied else name
        shape = shapes[name]
        if "norm" in name:
            return torch.ones(shape)
        if name.endswith("bias"):
            return torch.zeros(shape)
        draw = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]))
        return torch.randn(shape, generator=draw) * config.initializer_range

    shapes = tensor_shapes(config)
    return Source(
        config, read, _numbered_tokenizer(config.vocab_size), "", (), GenerationConfig(stop_ids=config.stop_ids)
    )


def tensor_shapes(config: MeltConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of every tensor of a model, by name."""
    return {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}


def _numbered_tokenizer(vocab_size: int) -> str:
    """A tokenizer whose words are ``t0``, ``t1``, ..., for models that know no words."""
    tokenizer = Tokenizer(models.WordLevel({f"t{token}": token for token in range(vocab_size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text: str = tokenizer.to_str()
    return text
