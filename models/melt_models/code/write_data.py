"""Makes what melt-code is trained from: texts of installed Python sources, their tokenizer, a LoopLM to begin with.

    python -m melt_models.code.write_data --out build/melt-code-training/data

The folder gets ``sources.json`` (packages, versions, licences, how many files and bytes, a hash of all texts),
``held_out.txt`` and ``held_out/``, ``train/`` (token data for ``melt-train``) and ``start/`` (a checkpoint with random
weights). A file ends with the tokenizer's end-of-text token. The same versions give the same folder.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch
from datasets import disable_progress_bars
from transformers.utils import logging

from melt_files import require_absent, staged
from melt_models.code.sources import HELD_OUT, TRAINED, Package, Text, Unrepeated, find_package, read_texts
from melt_models.code.tokenizer import END, PAD, VOCAB_SIZE, train_tokenizer
from melt_models.configuration import MeltConfig
from melt_models.errors import CheckpointError
from melt_models.fresh import new_looplm
from melt_models.progress import Progress
from melt_models.training.errors import TrainingError
from melt_models.training.packing import pack_texts

_MOST_SHARED = 0.1
"""Of a held-out file's windows of lines that training may have."""


def code_config(layers: int, hidden_size: int) -> MeltConfig:
    """The shape of melt-code's LoopLM: heads of 64 channels, half as many of keys and values."""
    return MeltConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 128,
        head_dim=64,
        max_position_embeddings=4096,
        initializer_range=0.04,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=1,
        total_ut_steps=4,
        chunk_size=64,
        gate_kind="none",
        gate_bias_init=-2.0,
    )


def write_data(out: Path, length: int, most_bytes: int, layers: int, hidden_size: int, seed: int) -> None:
    """Makes the folder ``out``.

    Raises:
        TrainingError: it exists, a package is missing or not permissively licensed, or texts are too few for a row.
    """
    require_absent(out, TrainingError)
    packages = {name: find_package(name) for name in (*TRAINED, *HELD_OUT)}
    unrepeated, texts = Unrepeated(), dict[str, list[Text]]()
    with Progress("reading sources", len(packages), "package") as progress:
        for name, package in packages.items():
            share = {"most_seen": _MOST_SHARED} if name in HELD_OUT else {}
            texts[name] = list(unrepeated(read_texts(package, most_bytes), **share))
            progress.advance()
    for names in (TRAINED, HELD_OUT):
        if not any(texts[name] for name in names):
            raise TrainingError(f"--most-bytes {most_bytes} leaves no file of {', '.join(names)}: raise it")
    with staged(out) as folder:
        _describe(folder / "sources.json", packages, texts)
        (folder / "held_out.txt").write_text(
            "".join(text.content for name in HELD_OUT for text in texts[name]), encoding="utf-8"
        )
        tokenizer = train_tokenizer(text.content for name in TRAINED for text in texts[name])
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1), (END, PAD)
        torch.manual_seed(seed)
        new_looplm(code_config(layers, hidden_size)).save_pretrained(folder / "start")
        tokenizer.save_pretrained(folder / "start")
        for split, names in (("train", TRAINED), ("held_out", HELD_OUT)):
            source = folder / f"{split}.jsonl"
            with source.open("w", encoding="utf-8") as stream:
                stream.writelines(json.dumps({"text": text.content}) + "\n" for name in names for text in texts[name])
            rows, _ = pack_texts(source, folder / "start", length, folder / split)
            print(f"{split}: {rows} rows of {length} tokens", flush=True)
            source.unlink()


def _describe(path: Path, packages: dict[str, Package], texts: dict[str, list[Text]]) -> None:
    every = hashlib.sha256()
    for text in (text for name in packages for text in texts[name]):
        every.update(f"{text.package}/{text.path}\0{text.content}\0".encode())
    listed = [
        {
            "name": name,
            "version": package.version,
            "license": package.license,
            "held_out": name in HELD_OUT,
            "files": len(texts[name]),
            "bytes": sum(len(text.content.encode()) for text in texts[name]),
        }
        for name, package in packages.items()
    ]
    path.write_text(json.dumps({"packages": listed, "sha256": every.hexdigest()}, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Writes the folder; returns the exit status: 0 done, 1 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m melt_models.code.write_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--most-bytes", type=int, default=6_000_000, help="of a package (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="of the model (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256, help="a multiple of 128 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: %(default)s)")
    args = parser.parse_args(argv)
    disable_progress_bars()
    logging.disable_progress_bar()
    try:
        for name in ("length", "most_bytes", "layers"):
            if getattr(args, name) < 1:
                raise TrainingError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
        if args.hidden_size < 128 or args.hidden_size % 128:
            raise TrainingError(f"--hidden-size must be a multiple of 128, got {args.hidden_size}")
        write_data(args.out, args.length, args.most_bytes, args.layers, args.hidden_size, args.seed)
    except (TrainingError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
