"""Damaged checkpoints: configurations, tokenizer, template, weights and examples, as an export reads them.

A case opens one as far as an export does before any long work. Allowed are this project's errors, or that it is taken.
"""

import json
import os
import random
import resource
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.bundles import MOST_MEMORY, TEMPLATES
from fuzz.edits import as_text, edit_bytes, edit_json, edit_text
from fuzz.pool import ANSWERED, FINDING, REFUSED, Case, Outcome, Tell
from melt_export.bundle import write_text_files
from melt_export.probe import choose_probe
from melt_export.source import checkpoint_source
from melt_models import CheckpointError
from melt_runtime import MeltError

_EXAMPLES = 4
_LONGEST = 20_000  # characters of a message
_GENERATION = {
    **{"_from_model_config": True, "bos_token_id": 0, "eos_token_id": [0, 3], "pad_token_id": 0, "num_beams": 1},
    **{"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1},
    **{"max_new_tokens": 50, "stop_strings": ["x"], "transformers_version": "5.0.0"},
}
_SETTINGS = {
    "bos_token": "<|user|>",
    "eos_token": {"content": "<|end|>", "special": True},
    "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
}
_SPECIALS = {"bos_token": "<|user|>", "eos_token": {"content": "<|end|>", "lstrip": False}}


def write_checkpoints(place: Path) -> Path:
    """Two checkpoints with all that they may have beside their weights: this project's form, and Ouro's in shards."""
    from conftest import MELT_TINY, random_model, save_checkpoint
    from published import write_ouro

    folder = place / "checkpoints"
    for checkpoint in (
        save_checkpoint(random_model(num_hidden_layers=1), folder / "melt"),
        write_ouro(folder / "ouro", 2),
    ):
        (checkpoint / "generation_config.json").write_bytes(as_text(_GENERATION))
        (checkpoint / "tokenizer_config.json").write_bytes(as_text(_SETTINGS))
        (checkpoint / "special_tokens_map.json").write_bytes(as_text(_SPECIALS))
        lines = (MELT_TINY / "evaluation.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (checkpoint / "evaluation.jsonl").write_text("".join(lines[:_EXAMPLES]), encoding="utf-8")
    return folder


def make(base: Path, place: Path) -> Case:
    """The cases over undamaged checkpoints.

    Args:
        base: as ``write_checkpoints`` made them.
        place: where damaged copies are made.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    warnings.simplefilter("error")  # nothing is to be said beside an error
    folder = place / f"checkpoint-{os.getpid()}"
    for checkpoint in sorted(base.iterdir()):
        _open(checkpoint, folder / "texts")  # undamaged they are taken

    def run(number: int, tell: Tell) -> Outcome:
        chance = random.Random(number)
        shutil.rmtree(folder, ignore_errors=True)
        checkpoint = folder / "checkpoint"
        shutil.copytree(chance.choice(sorted(base.iterdir())), checkpoint)
        what = ", ".join(_damage(checkpoint, chance) for _ in range(chance.choice((1, 1, 1, 2, 3))))
        tell(what)
        try:
            _open(checkpoint, folder / "texts")
        except (CheckpointError, MeltError) as error:
            text = str(error)
            if len(text) > _LONGEST or not text.strip() or text.rstrip().endswith(":"):
                return Outcome(FINDING, f"a message of {len(text)} characters\n{text[:500]}")
            return Outcome(REFUSED, f"{type(error).__name__}: {text[:200]}")
        return Outcome(ANSWERED, what)

    return run


def _open(checkpoint: Path, texts: Path) -> None:
    source = checkpoint_source(checkpoint)
    texts.mkdir(parents=True, exist_ok=True)
    write_text_files(source, texts)
    choose_probe(source, texts, None)


def _damage(checkpoint: Path, chance: random.Random) -> str:
    """Damages one file."""
    path = chance.choice(sorted(checkpoint.iterdir()))
    if chance.random() < 0.04 or not path.is_file():
        return f"{path.name}: {_replace(path, chance)}"
    ends = [end for end in _EDITS if path.name.endswith(end)]
    edit = edit_bytes if chance.random() < 0.1 else _EDITS[ends[0]]
    content, said = edit(path.read_bytes(), chance)
    path.write_bytes(content)
    return f"{path.name}: {said}"


def _replace(path: Path, chance: random.Random) -> str:
    how = chance.choice(("missing", "folder", "link", "pipe"))
    shutil.rmtree(path) if path.is_dir() else path.unlink()  # damaged before, or not
    if how == "folder":
        path.mkdir()
    elif how == "link":
        path.symlink_to(path.name)
    elif how == "pipe":
        os.mkfifo(path)
    return how


def _edit_values(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    if chance.random() < 0.2:
        return edit_text(content, chance)
    try:
        values: Any = json.loads(content)
    except (ValueError, RecursionError):  # damaged before
        return edit_bytes(content + b"x", chance)
    said = ", ".join(edit_json(values, chance) for _ in range(chance.choice((1, 1, 2, 5))))
    return as_text(values), said


def _edit_lines(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    lines = content.splitlines() or [b"{}"]
    place = chance.randrange(len(lines))
    lines[place], said = _edit_values(lines[place], chance)
    return b"\n".join(lines), said


def _edit_template(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    if chance.random() < 0.5:
        return edit_bytes(content + b"x", chance)
    template = chance.choice(TEMPLATES).encode()
    return template, repr(template[:60])


def _edit_weights(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Mostly the header, with a length that fits so that the damage is reached."""
    if chance.random() < 0.2 or len(content) < 8:
        return edit_bytes(content + b"x", chance)
    (length,) = struct.unpack("<Q", content[:8])
    header, said = _edit_values(content[8 : 8 + length], chance)
    sizes = (len(header),) * 9 + (chance.choice((0, 1, 2**31, 2**63, max(0, len(header) - 1))),)
    return struct.pack("<Q", chance.choice(sizes)) + header + content[8 + length :], said


_EDITS: dict[str, Callable[[bytes, random.Random], tuple[bytes, str]]] = {
    ".jsonl": _edit_lines,
    ".json": _edit_values,
    ".jinja": _edit_template,
    ".safetensors": _edit_weights,
}
"""How to damage a file, by the end of its name."""
