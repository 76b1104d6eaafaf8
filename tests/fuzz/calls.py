"""Odd arguments to whatever is public. Only this project's errors and ``ValueError`` may come out, or it works.

After every call the next valid one answers as before, and a refused one changed nothing of a conversation.
"""

import collections
import itertools
import os
import random
import resource
import warnings
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.bundles import MOST_MEMORY
from fuzz.edits import ODD_VALUES, edit_json
from fuzz.pool import ANSWERED, FINDING, REFUSED, Case, Outcome, Tell
from melt_runtime import (
    BatchError,
    CudaOptions,
    GenerationConfig,
    LoadCache,
    MeltError,
    MeltModel,
    plan_state,
    read_manifest,
)
from melt_runtime.arguments import is_whole, shown

CAPACITY = 64
IDS = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
FIELDS = tuple(GenerationConfig.__dataclass_fields__)
_LOADS = ("device", "capacity", "chunk", "loops", "threads", "kv_cache", "cache", "cuda", "progress")


class Strange:
    """Nothing that anybody asks for."""


class Hollow(list[int]):
    """A list that is longer than what it holds."""

    def __len__(self) -> int:
        return 3


_STRANGE: tuple[Callable[[], Any], ...] = (  # made anew for each call: some can be used once
    Strange,
    lambda: Strange,
    lambda: len,
    lambda: iter([1, 2]),
    lambda: itertools.count(),
    lambda: itertools.repeat("x"),
    lambda: range(5),
    lambda: {1, 2},
    lambda: (1, 2, 3),
    lambda: b"bytes",
    lambda: bytearray(b"bytes"),
    lambda: memoryview(b"bytes"),
    lambda: 1 + 2j,
    lambda: 10**5000,
    lambda: np.array(3),
    lambda: np.array([[1, 2]]),
    lambda: np.arange(3),
    lambda: np.arange(3, dtype=np.uint8),
    lambda: np.array([1.0, np.nan]),
    lambda: np.array(["a", None], dtype=object),
    lambda: np.zeros((0,), dtype=np.int64),
    lambda: np.float32(2),
    lambda: np.int64(3),
    lambda: np.bool_(True),
    lambda: np.datetime64("nat"),
    lambda: np.timedelta64(3),
    lambda: [1, True],
    lambda: [1, 2.0],
    lambda: [2**63, -1],
    lambda: [[1], [2]],
    lambda: ["a", 1],
    lambda: [1] * 200,
    lambda: "word " * 500,
    lambda: Path("nowhere"),
    lambda: Path("\0"),
    lambda: "x" * 5000,
    lambda: float("nan"),
    lambda: float("inf"),
    lambda: -float("inf"),
    lambda: 1e300,
    lambda: np.float64("nan"),
    lambda: (number for number in (1, 2)),
    lambda: ({"role": "user", "content": "Who?"} for _ in range(2)),
    lambda: ({"role": "user", "content": "Who?"},),
    lambda: {"role": "user", "content": "Who?"},
    lambda: {0: {"role": "user", "content": "Who?"}},
    lambda: collections.deque([{"role": "user", "content": "Who?"}]),
    lambda: collections.UserList([{"role": "user", "content": "Who?"}]),
    lambda: [{"role": "user", "content": "Who?"}, None],
    lambda: Hollow(),
)


def odd(chance: random.Random) -> Any:
    """Any value at all."""
    kind = chance.random()
    if kind < 0.2:
        return chance.choice((chance.randint(-3, 70), chance.uniform(-1, 2), chance.randint(0, 702)))
    if kind < 0.6:
        return chance.choice(_STRANGE)()
    value: Any = [chance.choice(ODD_VALUES)]
    edit_json(value, chance)
    return value[0] if value else []


def odd_prompt(chance: random.Random) -> Any:
    """Token ids, texts and messages, sound or not."""
    how = chance.choice(("sound", "sound", "odd", "ids", "text", "messages", "messages"))
    if how == "sound":
        return chance.choice(("Who?", [5, 6, 7], np.arange(3), [{"role": "user", "content": "Who?"}]))
    if how == "odd":
        return odd(chance)
    if how == "ids":
        return [
            chance.randint(-1 if chance.random() < 0.1 else 0, 702) for _ in range(chance.choice((0, 1, 9, 9, 30, 70)))
        ]
    if how == "text":
        return chance.choice(("Who?", "", " ", "\0", "\ud800", "\U0001f642 ä", "<|user|>", "x" * 100_000))
    messages: Any = [
        {"role": role, "content": content}
        for role, content in (("system", "Short."), ("user", "Who?"), ("assistant", "Ana."), ("user", "Why?"))
    ]
    messages = messages[: chance.randint(1, 4)]
    for _ in range(chance.choice((0, 0, 1, 1, 2))):
        if messages:
            edit_json(messages, chance)
    if messages and chance.random() < 0.2:
        messages[0] = odd(chance)
    elif messages and isinstance(messages[0], dict) and chance.random() < 0.3:
        messages[0][chance.choice(("role", "content", "name", 5))] = odd(chance)
    return messages


def make(base: Path, place: Path) -> Case:
    """The cases over a bundle.

    Args:
        base: the bundle.
        place: where what is written goes.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "loops=", RuntimeWarning)  # deeper than trained, said once
    warnings.filterwarnings("ignore", "no prepacked copy in ", RuntimeWarning)  # a cache that cannot be written
    folder = place / f"calls-{os.getpid()}" / "a" / "b"
    folder.mkdir(parents=True)
    os.chdir(folder)  # relative names lead nowhere else
    os.environ["MELT_CACHE_DIR"] = str(folder / "default")
    return Calls(base).run


class Calls:
    """Calls one model in odd ways; one number, one call, and after it a valid one."""

    def __init__(self, base: Path):
        self.base, self.manifest = base, read_manifest(base)
        self.model = MeltModel.load(base, device="cpu", threads=1, capacity=CAPACITY)
        self.runner = self.model.new_runner(batch=2)
        self.slots = MeltModel.load(base, device="cpu", threads=1, capacity=CAPACITY, slots=3)
        self.expected = self._valid()
        self.before = self.model.new_session()
        self.before.generate("Who?", max_new_tokens=3)
        self.next = self.before.generate("Why?", max_new_tokens=3).token_ids

    def run(self, number: int, tell: Tell) -> Outcome:
        """Calls, and then asks what was asked before."""
        chance = random.Random(number)
        name = chance.choice(KINDS)
        try:
            kind = getattr(self, f"_{name}")(chance, lambda *what: tell(f"{name}: {', '.join(map(shown, what))[:500]}"))
        except (MeltError, ValueError) as error:
            text = str(error)
            if type(error) not in (ValueError,) and not isinstance(error, MeltError):
                return Outcome(FINDING, f"{type(error).__name__}: {text[:200]}")  # a ValueError of another's making
            if not text.strip() or len(text) > 20_000:
                return Outcome(FINDING, f"a message of {len(text)} characters\n{text[:500]}")
            kind = REFUSED
        if self._valid() != self.expected:
            return Outcome(FINDING, "another answer afterwards")
        return Outcome(kind, "")

    def _valid(self) -> tuple[Any, ...]:
        self.runner.reset()
        logits = self.runner.prefill(IDS, 2, sequence=1).tobytes()
        return logits, self.model.generate(IDS, max_new_tokens=4, stop_ids=()).token_ids

    def _options(self, chance: random.Random) -> dict[str, Any]:
        changes = {chance.choice(FIELDS): odd(chance) for _ in range(chance.choice((0, 0, 0, 1, 1, 2)))}
        options: dict[str, Any] = {"max_new_tokens": 3, "loops": 2, **changes}
        options["loops"] = _few(options["loops"])
        for name, value in (("raw", odd(chance)), ("config", odd(chance)), ("progress", 5), ("x", 1)):
            if chance.random() < 0.06:
                options[name] = value
        if chance.random() < 0.3:
            options["raw"] = chance.random() < 0.5
        return options

    def _load(self, chance: random.Random, tell: Tell) -> str:
        options = {chance.choice(_LOADS): odd(chance) for _ in range(chance.choice((1, 1, 2, 3)))}
        bundle = odd(chance) if chance.random() < 0.1 else self.base
        if callable(options.get("progress")):
            del options["progress"]  # what it raises is its own
        tell(bundle, options)
        MeltModel.load(**{"bundle": bundle, "device": "cpu", "threads": 1, "capacity": 8, **options})
        return ANSWERED

    def _generate(self, chance: random.Random, tell: Tell) -> str:
        prompt, options = odd_prompt(chance), self._options(chance)
        tell(prompt, options)
        result = self.model.generate(prompt, **options)
        return ANSWERED if 1 <= len(result.token_ids) <= CAPACITY else FINDING

    def _stream(self, chance: random.Random, tell: Tell) -> str:
        """Consumed, half consumed, never, closed, all that again."""
        prompt, options, use = odd_prompt(chance), self._options(chance), chance.choice(_USES)
        tell(use, prompt, options)
        stream = self.model.stream(prompt, **options)
        if use == "with":
            with stream:
                next(stream, None)
        elif use == "close":
            next(stream, None)
            stream.close()
            stream.close()
        elif use == "half":
            next(stream, None)
        elif use == "whole":
            "".join(stream)
            next(stream, None)
        elif use == "result":
            next(stream, None)
            _ = stream.result
        return ANSWERED

    def _batch(self, chance: random.Random, tell: Tell) -> str:
        """Several prompts, some of them odd, over several slots; what is sound is answered all the same."""
        prompts: Any = [odd_prompt(chance) for _ in range(chance.choice((0, 1, 3, 5)))]
        place = chance.randint(0, len(prompts))
        prompts.insert(place, IDS)
        if chance.random() < 0.1 and isinstance(strange := odd(chance), Sized):  # others may never end
            prompts = strange
        options = self._options(chance) if chance.random() < 0.3 else {"max_new_tokens": 3, "loops": 2}
        if chance.random() < 0.2:
            configs: Any = [GenerationConfig(max_new_tokens=3) for _ in prompts] if isinstance(prompts, list) else []
            options = {"config": chance.choice((configs, configs[1:], odd(chance)))}
        tell(prompts, options)
        try:
            results = self.slots.generate_batch(prompts, **options)
            return ANSWERED if all(result.token_ids for result in results) else FINDING
        except BatchError as error:
            sound = any(prompt is IDS for prompt in prompts) and options == {"max_new_tokens": 3, "loops": 2}
            return FINDING if sound and place not in error.results else REFUSED

    def _saved(self, chance: random.Random, tell: Tell) -> str:
        """A session written and read again, with bytes of the file changed."""
        session = self.model.new_session()
        session.generate("Who?", max_new_tokens=3)
        path = Path("saved") if chance.random() < 0.8 else odd(chance)
        tell(path)
        try:
            session.save(path)
            if path == Path("saved"):
                data = bytearray(path.read_bytes())
                for _ in range(chance.choice((0, 1, 3))):
                    data[chance.randrange(min(len(data), chance.choice((64, 3000, len(data)))))] = chance.randrange(256)
                path.write_bytes(data[: chance.choice((len(data), len(data), chance.randrange(len(data))))])
            before = session.token_ids, session.messages
            try:
                session.restore(path)
            except MeltError:
                if (session.token_ids, session.messages) != before:
                    raise AssertionError("a refused file changed the conversation") from None
                raise
            session.generate("Why?", max_new_tokens=2)
        except OSError:
            return REFUSED
        return ANSWERED

    def _session(self, chance: random.Random, tell: Tell) -> str:
        """A turn, odd calls, a turn; the second as if nothing was between where all were refused."""
        session = self.model.new_session()
        session.generate("Who?", max_new_tokens=3)
        refused = True
        for _ in range(chance.choice((1, 2, 4))):
            prompt, options, use = odd_prompt(chance), self._options(chance), chance.choice(_USES)
            tell(use, prompt, options)
            state = session.token_ids, session.messages
            try:
                stream = session.stream(prompt, **options)
                if use != "never":
                    refused = False
                    "".join(stream) if use == "whole" else next(stream, None)
                    stream.close()
            except (MeltError, ValueError):
                if use == "never" and (session.token_ids, session.messages) != state:
                    raise AssertionError("a refused call changed the conversation") from None
        if not refused:
            session.reset()
            session.generate("Who?", max_new_tokens=3)
        if session.generate("Why?", max_new_tokens=3).token_ids != self.next:
            raise AssertionError("another answer in the conversation")
        return REFUSED if refused else ANSWERED

    def _driver(self, chance: random.Random, tell: Tell) -> str:
        runner = self.runner
        ids = odd_prompt(chance) if chance.random() < 0.6 else [1, 2, 3]
        loops, row = (_few(odd(chance)) if chance.random() < 0.5 else 2 for _ in range(2))
        more = {name: odd(chance) for name in ("chunk", "sequence", "observe", "progress") if chance.random() < 0.2}
        for name in ("observe", "progress"):
            if callable(more.get(name)):
                del more[name]  # what it raises is its own
        which = chance.randrange(13)
        tell(which, ids, loops, row, more)
        calls: tuple[Callable[[], object], ...] = (
            lambda: runner.prefill(ids, loops, **more),
            lambda: runner.prefill([1, 2, 3], loops, **more),
            lambda: runner.decode(ids, loops, **({"observe": more["observe"]} if "observe" in more else {})),
            lambda: runner.slots[row].advance(ids, loops),
            lambda: runner.slots[row].truncate(ids),
            lambda: runner.slots[row].room,
            lambda: runner.prefill_and_draw(ids, loops),
            lambda: runner.decode_and_draw(row, loops),
            lambda: self.model.new_runner(row),
            lambda: runner.slots.is_free(ids),
            lambda: runner.slots.release(ids),
            lambda: runner.slots.fork(ids, row),
            lambda: runner.slots.fork(runner.slots[1], ids),
        )
        calls[which]()
        return ANSWERED

    def _config(self, chance: random.Random, tell: Tell) -> str:
        values = {chance.choice(FIELDS): odd(chance) for _ in range(chance.choice((1, 2, 4)))}
        tell(values)
        which = chance.randrange(3)
        if which == 0:
            GenerationConfig().with_changes(**values)
        elif which == 1:
            CudaOptions(**{chance.choice(("graphs", "tf32", "memory_limit")): odd(chance)})
        else:
            GenerationConfig(**values)
        return ANSWERED

    def _text(self, chance: random.Random, tell: Tell) -> str:
        prompt, other, which = odd_prompt(chance), odd(chance), chance.randrange(6)
        tell(prompt, other, which)
        codec, sound = self.model.codec, [{"role": "user", "content": "Who?"}]
        calls: tuple[Callable[[], object], ...] = (
            lambda: codec.encode(prompt),
            lambda: codec.render(prompt),
            lambda: codec.render(other),
            lambda: codec.render(sound, other),
            lambda: codec.encode_chat(prompt, max_tokens=CAPACITY),
            lambda: codec.encode_chat(sound, other, max_tokens=CAPACITY),
        )
        calls[which]()
        return ANSWERED

    def _service(self, chance: random.Random, tell: Tell) -> str:
        """Odd calls of a service; afterwards a sound request is answered, and nothing waits."""
        prompt, value, which = odd_prompt(chance), odd(chance), chance.randrange(12)
        config = odd(chance) if chance.random() < 0.3 else GenerationConfig(max_new_tokens=3, loops=2)
        tell(which, prompt, config, value)
        if chance.random() < 0.2:
            self.slots.new_service(value).close()
            return ANSWERED
        with self.slots.new_service() as service:
            sound = GenerationConfig(max_new_tokens=3, loops=2)
            reply = service.submit(IDS, sound)
            calls: tuple[Callable[[], object], ...] = (
                lambda: service.submit(prompt, config).wait(),
                lambda: service.submit(prompt, config, value).wait(),
                lambda: service.submit(IDS, sound, on_part=value).wait(),
                lambda: service.submit(IDS, sound, on_end=value).wait(),
                lambda: service.encode(prompt, value),
                lambda: service.prepare(value, sound),
                lambda: service.prepare(service.encode(IDS), config, value),
                lambda: service.submit_all(value),
                lambda: service.save(prompt, Path("kept")),
                lambda: service.save(IDS, value),
                lambda: service.restore(value),
                lambda: service.close(value if is_whole(value) or isinstance(value, float) else repr(value)),
            )
            try:
                if callable(value) and which in (2, 3):
                    return REFUSED  # what it raises is its own
                calls[which]()
                reply.wait(value)
            except (OSError, TimeoutError):
                pass
            finally:
                if service.is_open and service.submit(IDS, sound).wait(60).token_ids != reply.wait(60).token_ids:
                    raise AssertionError("another answer of the service")
        return ANSWERED

    def _cache(self, chance: random.Random, tell: Tell) -> str:
        more = {name: odd(chance) for name in ("folder", "limit", "min_bytes") if chance.random() < 0.4}
        if isinstance(more.get("folder"), str) and more["folder"].startswith("/"):
            more["folder"] = "x"  # a place that is someone's
        key, which = odd(chance), chance.randrange(7)
        tell(more, key, which)
        cache = LoadCache(**more)
        calls: tuple[Callable[[], object], ...] = (
            cache.entries,
            cache.partials,
            cache.clear,
            lambda: cache.find(key),
            lambda: cache.remove(key),
            lambda: _make_entry(cache, key),
            lambda: MeltModel.load(self.base, device="cpu", threads=1, capacity=8, cache=cache),
        )
        try:
            calls[which]()
        except OSError:
            if which != 5:  # of a folder that cannot be made it says so
                raise
        return ANSWERED

    def _plan(self, chance: random.Random, tell: Tell) -> str:
        names = ("capacity", "batch", "chunk", "loops", "kv_cache")
        options = {chance.choice(names): odd(chance) for _ in range(chance.choice((1, 2, 3)))}
        manifest = odd(chance) if chance.random() < 0.2 else self.manifest
        tell(manifest is self.manifest or manifest, options)
        plan_state(manifest, **options)
        return ANSWERED

    def _manifest(self, chance: random.Random, tell: Tell) -> str:
        folder = odd(chance)
        tell(folder)
        read_manifest(folder)
        return ANSWERED


KINDS = (
    *("generate",) * 5,
    *("stream",) * 5,
    *("session",) * 4,
    *("driver",) * 4,
    *("batch",) * 3,
    *("saved",) * 2,
    *("load",) * 3,
    *("service",) * 3,
    *("config", "text", "cache", "plan", "manifest"),
)
"""Kinds of calls, each a method, as often as each comes."""
_USES = ("with", "close", "half", "whole", "result", "never")


def _few(loops: Any) -> Any:
    """Hundreds of loops are allowed, and slow: such numbers become too many."""
    return max(loops, 1025) if is_whole(loops) and loops > 4 else loops


def _make_entry(cache: LoadCache, key: Any) -> None:
    with cache.making(key, "graph") as folder:
        (folder / "graph.data").write_bytes(b"x")
