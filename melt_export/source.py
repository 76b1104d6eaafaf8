"""Where an export's weights and texts come from: a checkpoint folder, or random weights of a given shape."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from melt_export.templates import chat_template
from melt_models.checkpoint import Checkpoint, empty_model
from melt_models.configuration import MeltConfig
from melt_models.evaluation import Example, read_examples
from melt_runtime.errors import MeltError
from melt_runtime.manifest import TOKENIZER_NAME

HEAD_DIM_MULTIPLE = 16
"""GroupQueryAttention rotates heads of this multiple only."""


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
        notes: what of the published files was corrected or passed over, a sentence each.
    """

    config: MeltConfig
    read: Callable[[str], Tensor]
    tokenizer: str
    chat_template: str
    examples: tuple[Example, ...]
    notes: tuple[str, ...] = ()


def checkpoint_source(folder: Path) -> Source:
    """Opens a checkpoint folder and finds what would fail late, before any long work begins.

    Every weight is read once: a damaged one would only show as a model that answers nonsense.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or does not fit its configuration.
        ExportError: it has what the graphs cannot express.
    """
    checkpoint = Checkpoint(folder)
    config, tokenizer = checkpoint.config, folder / TOKENIZER_NAME
    faults = []
    if config.head_dim % HEAD_DIM_MULTIPLE:
        faults.append(f"head_dim must be a multiple of {HEAD_DIM_MULTIPLE}, got {config.head_dim}")
    if not tokenizer.is_file():
        faults.append(f"{TOKENIZER_NAME} is missing")
    else:
        highest = max(_token_ids(tokenizer), default=-1)
        if highest >= config.vocab_size:
            faults.append(f"{TOKENIZER_NAME} has token id {highest}, but vocab_size is {config.vocab_size}")
    if faults:
        raise ExportError(f"{folder} cannot be exported:\n  " + "\n  ".join(faults))
    examples = read_examples(folder)
    checkpoint.require_finite()
    text = tokenizer.read_text(encoding="utf-8")
    template, notes = chat_template(folder, config, Tokenizer.from_str(text), faults)
    if faults:
        raise ExportError(f"{folder} cannot be exported:\n  " + "\n  ".join(faults))
    return Source(config, checkpoint.read, text, template, examples, checkpoint.notes + notes)


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
    return Source(config, read, _numbered_tokenizer(config.vocab_size), "", ())


def tensor_shapes(config: MeltConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of every tensor of a model, by name."""
    return {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}


def _token_ids(tokenizer: Path) -> list[int]:
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    ids = [token["id"] for token in content.get("added_tokens", [])]
    vocabulary = content["model"]["vocab"]
    return ids + (list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1])


def _numbered_tokenizer(vocab_size: int) -> str:
    """A tokenizer whose words are ``t0``, ``t1``, ..., for models that know no words."""
    tokenizer = Tokenizer(models.WordLevel({f"t{token}": token for token in range(vocab_size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text: str = tokenizer.to_str()
    return text
