"""Damaged bundles: manifest, texts, graphs, weights, with hashes that fit so that the damage is reached.

A case loads one, describes it, plans its memory and lets it answer. Allowed are an error of this project's, or an
answer; from a manifest whose damage says nothing of the model the same answer as before.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from fuzz.edits import as_text, edit_bytes, edit_json, edit_text
from fuzz.graphs import edit_graph
from fuzz.pool import ANSWERED, FINDING, REFUSED, Case, Outcome, Tell
from melt_runtime import MeltError, MeltModel, read_manifest
from melt_runtime.bundle.contract import KVCacheKind
from melt_runtime.bundle.manifest import check_files
from melt_runtime.cli.info import describe_bundle
from melt_runtime.loading.load_cache import LoadCache
from melt_runtime.memory.estimate import format_plan, plan_memory

PROMPT, IDS = "Who is it?", [5, 6, 7, 8, 9, 10]
MOST_MEMORY = 8 << 30  # of addresses, so that what asks for everything fails here and not elsewhere
_BINDING = ("model", "precision", "activations", "providers", "graphs", "files", "weight_bytes", "schema_version")
"""Parts of a manifest that must fit the files; any other value in them may not give an answer."""
TEMPLATES = (
    "{{ 10**10000000 }}",
    "{{ 'a' * 10**9 }}",
    "{{ lipsum(n=100000) }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{% for x in range(10**12) %}x{% endfor %}",
    "{% for m in messages %}{{ m.nothing.at.all }}{% endfor %}",
    "{{ messages.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('no') }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ 1 // 0 }}",
    "{{ [] | first }}",
    "{% if %}",
    "{{ strftime_now(5) }}",
    "{{ '%0*d' % (10**9, 1) }}",
    "{{ namespace(a=namespace) }}",
    "x" * 3_000_000,
    "\0",
)


def make(base: Path, place: Path) -> Case:
    """The cases over an undamaged bundle.

    Args:
        base: the bundle.
        place: where damaged copies are made.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    warnings.simplefilter("ignore")  # of prepacked copies that cannot be made
    return Bundles(base, place / f"{os.getpid()}").run


class Bundles:
    """Damages a bundle in many ways; one number, one way."""

    def __init__(self, base: Path, place: Path):
        self.base, self.place = base, place
        self.manifest: dict[str, Any] = json.loads((base / "manifest.json").read_text(encoding="utf-8"))
        self.graphs = [name for name in self.manifest["files"] if name.endswith(".onnx")]
        self.answers = {kind: self._answer(base, 0, kind) for kind in read_manifest(base).kv_caches}

    def run(self, number: int, tell: Tell) -> Outcome:
        """Makes one damaged bundle, uses it and says what came out."""
        chance = random.Random(number)
        shutil.rmtree(self.place, ignore_errors=True)
        folder = self.place / "bundle"
        shutil.copytree(self.base, folder, copy_function=os.link)
        names, weights = zip(*KINDS.items(), strict=True)
        kind = chance.choices(names, weights)[0]
        what = f"{kind}: {getattr(self, f'_{kind}')(folder, chance)}"
        tell(what)
        kv_cache = chance.choice(list(self.answers))
        try:
            answer = self._answer(folder, 0 if chance.random() < 0.1 else sys.maxsize, kv_cache)
        except MeltError as error:
            text = str(error)
            if len(text) > 20_000:
                return Outcome(FINDING, f"a message of more than 20,000 characters\n{text[:500]}")
            return Outcome(REFUSED, f"{what}: {type(error).__name__}: {text[:200]}")
        wrong = self._contradiction(folder, kind, answer, self.answers[kv_cache])
        return Outcome(FINDING, wrong) if wrong else Outcome(ANSWERED, what)

    def _answer(self, folder: Path, min_bytes: int, kv_cache: KVCacheKind) -> tuple[Any, ...]:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        describe_bundle(folder, manifest, graphs=True)
        format_plan(plan_memory(manifest))
        cache = LoadCache(self.place / "cache", min_bytes=min_bytes)
        model = MeltModel.load(folder, device="cpu", threads=1, kv_cache=kv_cache, cache=cache)
        model.new_session().generate(PROMPT, max_new_tokens=3)
        return model.generate(IDS, max_new_tokens=4).token_ids

    def _contradiction(self, folder: Path, kind: str, answer: tuple[Any, ...], expected: tuple[Any, ...]) -> str:
        """Why there should have been no such answer; empty where it is right."""
        if kind == "unlisted":
            return "an answer from files that are not the manifest's"
        if kind not in ("value", "text"):
            return ""
        values = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name in _BINDING:
            if json.dumps(values.get(name), sort_keys=True) != json.dumps(self.manifest[name], sort_keys=True):
                return f"an answer, though the manifest says otherwise in {name}"
        return "" if answer == expected else "another answer from the same files"

    def _value(self, folder: Path, chance: random.Random) -> str:
        """Values of the manifest."""
        values = json.loads(json.dumps(self.manifest))
        within = chance.choice(((), (), ("model",), ("model",), ("quality",), ("parity",), ("quantization",)))
        said = [edit_json(values, chance, within) for _ in range(chance.choice((1, 1, 1, 2, 5)))]
        _write(folder / "manifest.json", as_text(values))
        return ", ".join(said)

    def _text(self, folder: Path, chance: random.Random) -> str:
        """Bytes of the manifest."""
        content, said = edit_text((folder / "manifest.json").read_bytes(), chance)
        _write(folder / "manifest.json", content)
        return said

    def _tokenizer(self, folder: Path, chance: random.Random) -> str:
        return self._json(folder, "tokenizer.json", chance)

    def _generation(self, folder: Path, chance: random.Random) -> str:
        return self._json(folder, "generation_config.json", chance)

    def _template(self, folder: Path, chance: random.Random) -> str:
        path = folder / "chat_template.jinja"
        template, said = chance.choice(TEMPLATES).encode(), "another"
        if chance.random() < 0.5:
            template, said = edit_bytes(path.read_bytes(), chance)
        _write(path, template)
        self._list(folder, path.name)
        return f"{said} {template[:60]!r}"

    def _graph(self, folder: Path, chance: random.Random) -> str:
        path = folder / chance.choice(self.graphs)
        content, said = (edit_graph if chance.random() < 0.7 else edit_bytes)(path.read_bytes(), chance)
        _write(path, content)
        self._list(folder, path.name)
        return f"{path.name}: {said}"

    def _weights(self, folder: Path, chance: random.Random) -> str:
        path = folder / "weights.data"
        content, said = edit_bytes(path.read_bytes(), chance)
        _write(path, content)
        self._list(folder, path.name)
        return said

    def _unlisted(self, folder: Path, chance: random.Random) -> str:
        """Any file, and the manifest knows nothing of it."""
        path = folder / chance.choice(sorted(self.manifest["files"]))
        content, said = edit_bytes(path.read_bytes(), chance)
        if content == path.read_bytes():
            content, said = content + b"x", "longer"
        path.unlink()
        how = chance.choice(("content", "content", "content", "missing", "folder", "link", "pipe"))
        if how == "content":
            path.write_bytes(content)
        elif how == "folder":
            path.mkdir()
        elif how == "link":
            path.symlink_to(path)
        elif how == "pipe":
            os.mkfifo(path)
        return f"{path.name}: {said if how == 'content' else how}"

    def _json(self, folder: Path, name: str, chance: random.Random) -> str:
        path = folder / name
        if chance.random() < 0.3:
            content, said = edit_text(path.read_bytes(), chance)
        else:
            values = json.loads(path.read_text(encoding="utf-8"))
            said = ", ".join(edit_json(values, chance) for _ in range(chance.choice((1, 1, 3))))
            content = as_text(values)
        _write(path, content)
        self._list(folder, name)
        return said

    def _list(self, folder: Path, name: str) -> None:
        """Lets the manifest say what the file is now."""
        content = (folder / name).read_bytes()
        values = json.loads(json.dumps(self.manifest))
        values["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if name == "weights.data":
            values["weight_bytes"] = len(content)
        _write(folder / "manifest.json", as_text(values))


KINDS = {
    "value": 40,
    "text": 8,
    "tokenizer": 10,
    "generation": 10,
    "template": 4,
    "graph": 16,
    "weights": 6,
    "unlisted": 6,
}
"""Kinds of damage, each a method, with how often each comes."""


def _write(path: Path, content: bytes) -> None:
    path.unlink()  # a hard link to the undamaged file
    path.write_bytes(content)
