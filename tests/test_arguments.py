"""Odd arguments to whatever is public: only this project's errors and ``ValueError`` come out, and nothing is lost."""

import os
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from melt_runtime import (
    BundleError,
    BusyError,
    CapacityError,
    CudaOptions,
    GenerationConfig,
    LoadCache,
    MeltError,
    MeltModel,
    Timings,
    TokenError,
    plan_state,
    read_manifest,
)
from melt_runtime.arguments import is_whole, shown, whole_number

CAPACITY, CHUNK, VOCABULARY = 64, 8, 703
EXPECTED_IDS = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]


@pytest.fixture(scope="module")
def model(random_bundle) -> MeltModel:
    return MeltModel.load(random_bundle(), device="cpu", capacity=CAPACITY)


@pytest.fixture(scope="module")
def expected(model) -> tuple[int, ...]:
    return model.generate(EXPECTED_IDS, max_new_tokens=4, stop_ids=()).token_ids


class Strange:
    """Nothing that anybody asks for."""


class Broken:
    """Cannot even be shown."""

    def __repr__(self):
        raise RuntimeError


class Named:
    """Is a path to whoever asks, and what it gives is none."""

    def __init__(self, given):
        self.given = given

    def __fspath__(self):
        return self.given


class Lying(list):
    """Is empty, and says otherwise."""

    def __len__(self):
        return 1


PATHS = {
    "bytes": (Named(b"bytes"), "must be the path of a (folder|file), got <"),
    "int": (Named(5), "must be the path of a (folder|file), got <"),
    "null": ("a\0b", r"must be a path without null characters and half characters, got 'a\\x00b'"),
    "half": ("a\ud800b", r"must be a path without null characters and half characters, got 'a\\ud800b'"),
}
"""What no file system takes as a path, and what is said of it."""


whole = st.one_of(st.integers(-3, 70), st.sampled_from([2**31, 2**63, -(2**63), 10**5000]), st.integers())
odd = st.one_of(
    st.none(),
    st.booleans(),
    whole,
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.one_of(st.integers(-2, 800), st.floats(), st.text(max_size=2), st.booleans(), st.none()), max_size=4),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from([Strange(), Strange, np.array(3), np.array([[1]]), np.float32(2), np.int64(3), np.bool_(True), ()]),
)
FIELDS = (
    *("max_new_tokens", "loops", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"),
    *("stop", "stop_ids"),
)
odd_prompt = st.one_of(
    odd,
    st.lists(st.fixed_dictionaries({}, optional={"role": odd, "content": odd, "x": odd}), max_size=3),
    st.lists(st.integers(0, 702), max_size=80),
    st.sampled_from(
        ["\ud800", "\0", " ", range(5), np.arange(3), np.arange(3, dtype=np.uint8), np.zeros(2), iter([1])]
    ),
)
few = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.filterwarnings("ignore:loops=:RuntimeWarning")
@few
@given(prompt=odd_prompt, changes=st.dictionaries(st.sampled_from(FIELDS), odd, max_size=3), raw=st.booleans())
def test_odd_calls_are_refused_or_answered(model, expected, prompt, changes, raw):
    short = {"max_new_tokens": 3, "loops": 2, **changes}
    if is_whole(short["loops"]) and short["loops"] > 4:
        short["loops"] = max(short["loops"], 1025)  # hundreds of loops are allowed, and slow
    with suppress(MeltError, ValueError):
        assert 1 <= len(model.generate(prompt, raw=raw, **short).token_ids) <= CAPACITY
    assert model.generate(EXPECTED_IDS, max_new_tokens=4, stop_ids=()).token_ids == expected


@few
@given(
    ids=odd_prompt,
    loops=st.one_of(st.integers(1, 4), odd),
    chunk=st.one_of(st.none(), odd),
    row=st.one_of(st.just(1), odd),
)
def test_odd_calls_of_a_runner_are_refused_or_computed(runner, ids, loops, chunk, row):
    runner.reset()
    if is_whole(loops) and loops > 4:
        loops = max(loops, 1025)
    for call in (
        lambda: runner.prefill(ids, loops, chunk, row),
        lambda: runner.decode(ids, loops),
        lambda: runner.slots[row].advance(ids, loops),
        lambda: runner.slots[row].truncate(ids),
        lambda: runner.prefill_and_draw(ids, loops),
        lambda: runner.decode_and_draw(ids, loops),
    ):
        with suppress(MeltError, ValueError):
            call()
    runner.reset()
    assert int(runner.prefill(EXPECTED_IDS, 4, sequence=1).argmax()) == runner.expected


@pytest.fixture(scope="module")
def runner(model, expected):
    runner = model.new_runner(batch=2)
    runner.expected = expected[0]
    return runner


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sequence": -1}, ValueError, "sequence must be at least 0, got -1"),
        ({"sequence": 2}, ValueError, r"sequence must be at most 1 \(batch 2\), got 2"),
        ({"sequence": True}, ValueError, "sequence must be a whole number, got True"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1"),
        ({"chunk": 9}, ValueError, r"chunk must be at most 8 \(the state's chunk\), got 9"),
        ({"chunk": True}, ValueError, "chunk must be a whole number, got True"),
        ({"loops": 1.5}, ValueError, "loops must be a whole number, got 1.5"),
        ({"loops": 2**31}, ValueError, "loops must be at most 1024"),
        ({"ids": b"abc"}, TokenError, "sequence of whole numbers, got b'abc'"),
        ({"ids": [True]}, TokenError, "whole numbers, got True"),
        ({"ids": [1] * 65}, CapacityError, "65 more tokens do not fit"),
        ({"observe": 5}, ValueError, "observe must be callable, got 5"),
        ({"progress": "x"}, ValueError, "progress must be callable, got 'x'"),
    ],
    ids=str,
)
def test_a_runner_says_what_it_cannot_take(runner, arguments, error, message):
    runner.reset()
    with pytest.raises(error, match=message):
        runner.prefill(**{"ids": [1], "loops": 2, **arguments})
    assert runner.slots.lengths == [0, 0]


def test_a_runner_and_a_session_do_not_meet(model, expected):
    """Both over the same graphs, each over a state of its own; a stream between its pieces."""
    stream = model.stream(EXPECTED_IDS, max_new_tokens=4, stop_ids=())
    next(stream)
    runner = model.new_runner()
    runner.prefill([1, 2, 3], 4)
    for token in range(10):
        runner.decode([token], 3)
    list(stream)
    assert stream.result.token_ids == expected
    for batch in (0, 1.0, 2**20):
        with pytest.raises(ValueError, match="batch must be"):
            model.new_runner(batch)


def test_a_runner_calls_back_while_it_is_held(model):
    runner = model.new_runner()

    def again(loop_idx: int) -> None:
        with pytest.raises(BusyError, match=r"this runner is at work .*model.new_runner\(\)"):
            runner.decode([1], 1)

    runner.prefill([1, 2], 2, observe=again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": "256"}, "capacity must be a whole number, got '256'"),
        ({"capacity": 257}, r"capacity must be at most 256 \(max_positions\), got 257"),
        ({"capacity": 10**5000}, "capacity must be at most 256 .*got a number of 16610 bits"),
        ({"device": 5}, "device must be one of cpu, cuda, auto, or cuda:N, got 5"),
        ({"device": None}, "device must be one of cpu, cuda, auto, or cuda:N, got None"),
        ({"threads": 4096}, rf"threads must be at most {os.cpu_count()} \({os.cpu_count()} processors\), got 4096"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"threads": 1.0}, "threads must be a whole number, got 1.0"),
        ({"kv_cache": 5}, "kv_cache must be one of float, int8, int4.*got 5"),
        ({"kv_cache": np.array(["float", "int8"])}, r"kv_cache must be one of float, int8, int4.*got array\("),
        ({"device": "cuda:" + "9" * 5000}, "device must be one of cpu, cuda, auto, or cuda:N, got 'cuda:999"),
        ({"chunk": True}, "chunk must be a whole number, got True"),
        ({"chunk": 65, "capacity": 64}, r"chunk must be at most 64 \(the capacity\), got 65"),
        ({"loops": 2**31}, "loops must be at most 1024"),
        ({"cuda": {"graphs": True}}, "cuda must be CudaOptions or None, got"),
        ({"cache": "/tmp"}, "cache must be a LoadCache or None, got '/tmp'"),
        ({"progress": 5}, "progress must be callable, got 5"),
        ({"bundle": None}, "bundle must be the path of a folder, got None"),
        ({"bundle": 5}, "bundle must be the path of a folder, got 5"),
    ],
    ids=lambda value: shown(value)[:40],
)
def test_loading_says_what_it_cannot_take(random_bundle, monkeypatch, options, message):
    monkeypatch.setattr("melt_runtime.model.check_bundle", lambda *_: pytest.fail("files were read first"))
    with pytest.raises(ValueError, match=message):
        MeltModel.load(**{"bundle": random_bundle(), "device": "cpu", **options})


@pytest.mark.parametrize("kind", PATHS)
def test_a_path_that_no_file_system_takes_is_refused(model, kind):
    path, message = PATHS[kind]
    session = model.new_session()
    for name, call in (
        ("bundle", lambda: MeltModel.load(path)),
        ("folder", lambda: read_manifest(path)),
        ("folder", lambda: LoadCache(path)),
        ("path", lambda: session.save(path)),
        ("path", lambda: session.restore(path)),
    ):
        with pytest.raises(ValueError, match=f"^{name} {message}"):
            call()


@few
@given(
    options=st.dictionaries(
        st.sampled_from(["device", "capacity", "chunk", "loops", "threads", "kv_cache", "cache", "cuda"]),
        odd.filter(lambda value: value is not None),
        min_size=1,
        max_size=3,
    )
)
def test_odd_loads_are_refused(random_bundle, options):
    """What is odd and allowed loads; the capacity is small, so that it is quick."""
    with suppress(MeltError, ValueError):
        MeltModel.load(**{"bundle": random_bundle(), "device": "cpu", "capacity": 8, **options})


def test_cuda_options_are_checked():
    for options, message in (
        ({"graphs": 1}, "graphs must be True or False, got 1"),
        ({"tf32": None}, "tf32 must be True or False, got None"),
        ({"memory_limit": 0}, "memory_limit must be at least 1, got 0"),
        ({"memory_limit": "1"}, "memory_limit must be a whole number, got '1'"),
    ):
        with pytest.raises(ValueError, match=message):
            CudaOptions(**options)


@pytest.mark.parametrize(
    "options", [{"folder": 5}, {"folder": "n" * 5000}, {"limit": "1"}, {"limit": -1}, {"min_bytes": 1.5}], ids=shown
)
def test_a_cache_says_what_it_cannot_take(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must (be|have a shorter name)"):
        LoadCache(**options)


@pytest.mark.parametrize("key", ["../other", "/other", "", "A" * 32, 5, None], ids=str)
def test_a_caches_key_never_leads_out_of_its_folder(tmp_path, key):
    cache = LoadCache(str(tmp_path / "cache"))
    (tmp_path / "other").mkdir()
    cache.make_folder()
    for call in (cache.find, cache.remove, lambda key: cache.making(key, "graph").__enter__()):
        with pytest.raises(ValueError, match="key must be 32 hexadecimal digits"):
            call(key)
    assert (tmp_path / "other").is_dir()


def test_what_reads_and_plans_says_what_it_cannot_take(model):
    with pytest.raises(ValueError, match="folder must be the path of a folder, got 5"):
        read_manifest(5)
    with pytest.raises(BundleError, match="'nnnn.*cannot be read: File name too long"):
        read_manifest("n" * 5000)
    with pytest.raises(ValueError, match="manifest must be a Manifest, got 'x'"):
        plan_state("x")
    with pytest.raises(ValueError, match="kv_cache must be one of float, int8, int4.*got array"):
        plan_state(model.manifest, kv_cache=np.array(["float", "int8"]))
    with pytest.raises(TokenError, match="the prompt must be text, got list"):
        model.codec.encode(["x"])


def test_a_cache_says_what_it_cannot_compare(model, tmp_path):
    cache = LoadCache(tmp_path / "cache")
    for call in (cache.unchanged, cache.remember):
        with pytest.raises(ValueError, match="bundle must be the path of a folder, got 5"):
            call(5, model.manifest)
        with pytest.raises(ValueError, match="manifest must be a Manifest, got None"):
            call("x", None)
    assert not cache.folder.exists()


def test_a_config_is_merged_with_a_config_only():
    with pytest.raises(ValueError, match="other must be a GenerationConfig, got 5"):
        GenerationConfig().over(5)
    with pytest.raises(ValueError, match="unknown generation options .*; known: max_new_tokens") as raised:
        GenerationConfig().with_changes(**{"x" * 100_000: 1})
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Lying(), "prompt must hold at least one message or token id"),
        ([{"role": "user", "content": "x", Broken(): 1}], r"messages\[0\] must have names as keys, got <Broken"),
        ([{"role": "user", "content": "x", "k" * 100_000: {1}}], r"messages\[0\].kkk.*kkk must be a plain value"),
        (
            [{"role": "user", "content": [{"type": "t" * 100_000}]}],
            r"messages\[0\].content\[0\] must be .*got type 'ttt",
        ),
        ([{"role": "user", "content": [{"type": 10**5000}]}], "got type a number of 16610 bits"),
    ],
    ids=["lying", "broken", "name", "type", "number"],
)
def test_a_refused_prompt_is_said_in_a_few_words(model, prompt, message):
    with pytest.raises(TokenError, match=message) as raised:
        model.generate(prompt)
    assert len(str(raised.value)) < 1000


def test_messages_are_counted_by_what_is_in_them(model):
    with pytest.raises(TokenError, match="messages must hold at least one message"):
        model.codec.render(Lying())


def test_no_time_gives_no_rate():
    timings = Timings(0, 0, 0, 0)
    assert (timings.prefill_rate, timings.decode_rate) == (0.0, 0.0)
    assert Timings(2.0, 8, 0.0, 3).decode_rate == 0.0
    assert Timings(2.0, 8, 4.0, 2).prefill_rate == 4.0


def test_what_is_shown_stays_short_and_never_fails():
    nested: object = "x" * 80
    for _ in range(8):
        nested = {str(place): [nested] * 8 for place in range(8)}
    assert len(shown(nested)) < 5000
    assert shown(type("int", (), {})()) == "an object of type int"
    assert len(shown("x" * 10_000)) < 100
    assert shown(10**5000) == "a number of 16610 bits"
    assert "Broken" in shown(Broken())
    assert whole_number("n", np.uint8(3), 0, 5) == 3
    with pytest.raises(ValueError, match="n must be a whole number, got"):
        whole_number("n", np.timedelta64(3), 0, 5)
