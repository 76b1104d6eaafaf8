"""L0: sizes of the state, known before allocation, and its rules."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tolerances import PUBLISHED

from melt_runtime.bundle.contract import ModelShape
from melt_runtime.errors import CapacityError
from melt_runtime.execute.slots import Slot, Slots
from melt_runtime.loading.opening import require_state_memory
from melt_runtime.memory.buffers import State
from melt_runtime.memory.estimate import format_bytes
from melt_runtime.memory.plan import StatePlan
from melt_runtime.memory.process import available_bytes
from melt_runtime.schedule.depth import Depth

SHAPE = ModelShape(
    layers=3,
    hidden_size=32,
    intermediate_size=48,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab_size=50,
    max_positions=128,
    trained_loops=4,
    trained_chunk=8,
    gate_kind="elementwise",
    cache_kind="shared",
    has_latent=True,
    has_exit_gate=True,
)
LOOPLM = replace(SHAPE, gate_kind="none", cache_kind="per_loop", has_latent=False)
OURO = ModelShape(24, 2048, 5632, 16, 16, 128, 49152, 65536, 4, 500, "elementwise", "shared", True, True)


def plan(shape=SHAPE, **sizes) -> StatePlan:
    return StatePlan(
        **{"shape": shape, "dtype": "float32", "batch": 1, "capacity": 64, "chunk": 8, "loops": 4, **sizes}
    )


@pytest.mark.parametrize("shape", [SHAPE, LOOPLM, replace(SHAPE, gate_kind="mean")])
@pytest.mark.parametrize(
    ("dtype", "kv_cache"), [("float32", "float"), ("float16", "float"), ("float32", "int8"), ("float32", "int4")]
)
@pytest.mark.parametrize(("batch", "chunk"), [(1, 8), (3, 2)])
def test_the_plan_is_what_gets_allocated(shape, dtype, kv_cache, batch, chunk):
    sizes = plan(shape, dtype=dtype, kv_cache=kv_cache, batch=batch, chunk=chunk)
    state = State(sizes, "cpu")
    assert state.nbytes + Slots(state).nbytes == sizes.total_bytes


def test_melt_state_is_the_same_for_every_depth_and_looplm_grows_with_it():
    assert {plan(loops=loops).total_bytes for loops in range(1, 17)} == {plan().total_bytes}
    one = plan(LOOPLM, loops=1)
    for loops in range(1, 17):
        assert plan(LOOPLM, loops=loops).cache_bytes == loops * one.cache_bytes


def test_quantized_caches_are_a_quarter_and_an_eighth():
    sizes = {kind: plan(kv_cache=kind).cache_bytes for kind in ("float", "int8", "int4")}
    assert sizes["float"] == 4 * sizes["int8"] == 8 * sizes["int4"]
    with pytest.raises(ValueError, match="kv_cache must be one of float, int8, int4, got 'int2'"):
        plan(kv_cache="int2")


def test_published_cache_sizes():
    """arXiv 2605.07721: 0.197 MB a token and 6.29 GB at 32,000 tokens for MELT, four times that for Ouro."""
    melt = StatePlan(OURO, "float16", 1, 32000, 500, 4)
    ouro = replace(melt, shape=replace(OURO, cache_kind="per_loop", has_latent=False))
    assert melt.cache_bytes / melt.capacity == pytest.approx(0.197e6, rel=PUBLISHED)
    assert melt.cache_bytes == pytest.approx(6.29e9, rel=PUBLISHED)
    assert ouro.cache_bytes == pytest.approx(25.17e9, rel=PUBLISHED)


@pytest.mark.parametrize("name", ["batch", "capacity", "chunk", "loops"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        plan(**{name: 0})
    for value in (1.0, "1", True):
        with pytest.raises(ValueError, match=f"{name} must be a whole number, got {value!r}"):
            plan(**{name: value})


def test_sizes_have_bounds():
    for sizes, message in (
        ({"chunk": 65}, r"chunk must be at most 64 \(the capacity\), got 65"),
        ({"batch": 2**20}, "batch must be at most 4096"),
        ({"loops": 2**31}, "loops must be at most 1024"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(**sizes)


def test_capacity_beyond_the_positions_is_refused():
    with pytest.raises(ValueError, match=r"capacity must be at most 128 \(max_positions\), got 129"):
        plan(capacity=129)


def slot(**sizes) -> Slot:
    return Slot(0, plan(**sizes))


def test_overflow_changes_nothing():
    one = slot(capacity=4, chunk=4)
    one.advance(3, loops=4)
    with pytest.raises(CapacityError, match=r"2 more tokens do not fit: capacity 4, in use 3; load with capacity=5"):
        one.advance(2, loops=4)
    assert one.length == 3


def test_forget_and_truncate_forget():
    one = slot()
    one.advance(5, loops=4)
    one.truncate(2)
    assert (one.length, one.depth, one.room) == (2, None, 62)
    for tokens in (-1, 3, 1.0, True):
        with pytest.raises(ValueError, match="tokens must be"):
            one.truncate(tokens)
    assert one.length == 2
    one.forget()
    assert (one.length, one.depth) == (0, None)


def test_depth_is_free_for_melt_and_fixed_for_looplm():
    melt, looplm = slot(), slot(shape=LOOPLM)
    for one in (melt, looplm):
        one.advance(1, loops=2)
        with pytest.raises(ValueError, match="loops must be at least 1, got 0"):
            one.require_loops(0, kept=1)
    melt.require_loops(100, kept=1)
    with pytest.raises(ValueError, match="loops must stay 2 until reset, got 3"):
        looplm.require_loops(3, kept=1)
    with pytest.raises(ValueError, match=r"loops must be at most 4, got 5.*load with loops=5"):
        looplm.require_loops(5, kept=0)


def test_slices_are_bound_by_address():
    hidden = State(plan(), "cpu").chunk.hidden
    values = np.arange(hidden.nbytes // 4, dtype=np.float32).reshape(hidden.shape)
    hidden.write(values)
    assert hidden.address(3) - hidden.address() == 12
    np.testing.assert_array_equal(hidden.read(), values)


def test_bytes_for_people():
    assert [format_bytes(n) for n in (12, 1500, 12_580_000, 6_290_000_000)] == [
        "12 B",
        "1.50 kB",
        "12.58 MB",
        "6.29 GB",
    ]


def test_only_rows_that_a_prompt_makes_again_are_reusable():
    """Over MELT's cache: whole chunks of the same depth, divided as the prompt's are; more in tests/test_reuse.py."""
    one = slot()
    for tokens, loops in ((8, 4), (8, 4), (8, 2), (5, 2), (1, 2)):
        one.advance(tokens, loops)
    one.ids = list(range(30))

    def reusable(tokens: int, loops: int = 4) -> int:
        return one.reusable([*range(tokens), 40], Depth.fixed(loops))

    assert [reusable(tokens) for tokens in (0, 7, 8, 15, 16, 24, 30)] == [0, 0, 8, 8, 16, 16, 16]
    assert reusable(30, loops=2) == 0
    one.truncate(12)  # half of a chunk is no chunk
    assert reusable(12) == 8
    for chunks in ((5, 3, 8), (24,)):  # divided otherwise: what follows a chunk of 24 saw all of it
        one.truncate(0)
        for tokens in chunks:
            one.advance(tokens, loops=4)
        assert reusable(sum(chunks)) == (0 if chunks[0] < 8 else 8)


def test_a_chunk_that_was_kept_in_part_is_lost_as_a_whole():
    """Where a turn failed: MELT's chunks cannot be divided; the turn before is run again just as it was."""
    one = slot()
    for tokens in (8, 8, 5, 1):
        one.advance(tokens, loops=4)
    one.ids = list(range(23))
    before = one.snapshot()
    prompt = list(range(20))
    one.begin(prompt, one.reusable(prompt, Depth(4, 1, "settled", 0.1)), loops=4)
    assert one.length == 19  # by a rule the last token is run alone
    one.undo(before, kept=19)
    assert (one.length, one.ran, one.ids) == (16, 22, before.ids)
    again = one.next_span(Depth.fixed(4))
    assert (again.start, list(again.ids), again.depth) == (16, [16, 17, 18, 19, 20], 4)


@pytest.mark.parametrize("arguments", [(0, 4), (1.0, 4), (True, 4), (1, 0), (1, 2**31), (1, 1.5)])
def test_a_chunk_that_cannot_be_is_not_counted(arguments):
    one = slot()
    with pytest.raises(ValueError, match="must be"):
        one.advance(*arguments)
    assert one.length == 0
    assert not one.depths.any()
    with pytest.raises(ValueError, match="read-only"):
        one.depths[0] = 3


def test_what_a_state_knew_before_says_where_it_is():
    state = State(plan(), "cpu")
    with pytest.raises(AttributeError, match=r"State has no lengths: it is runner.slots.lengths now"):
        _ = state.lengths
    with pytest.raises(AttributeError, match="State has no other"):
        _ = state.other


def test_nothing_is_bound_beyond_a_buffer():
    buffer = State(plan(), "cpu").chunk.hidden
    for shape, offset in (((8, 32), 1), ((9, 32), 0), ((1,), -1)):
        with pytest.raises(ValueError, match=r"must lie in a buffer of \[8, 32\]"):
            buffer.bind_input(SimpleNamespace(bind_input=print), "hidden", shape, offset)
    with pytest.raises(ValueError, match=r"values must be \[8, 32\] float32, got \[8, 32\] float64"):
        buffer.write(np.zeros((8, 32)))


def test_a_state_that_the_machine_has_no_memory_for_is_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr("melt_runtime.loading.opening.available_bytes", lambda: 1_000_000)
    require_state_memory(plan())
    message = (
        r"a state for 64 slots of 128 tokens takes .* MB, 1.00 MB of memory are free: lower slots \(now 64\) or "
        r"capacity \(now 128\), or choose kv_cache='int8'"
    )
    with pytest.raises(CapacityError, match=message):
        require_state_memory(plan(batch=64, capacity=128))
    monkeypatch.setattr("melt_runtime.loading.opening.available_bytes", lambda: None)
    require_state_memory(plan(batch=64, capacity=128))


GROUP = "/sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, None),
        ({"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 7 kB\n"}, 7 * 1024),
        ({f"{GROUP}.max": "5000", f"{GROUP}.current": "4000", f"{GROUP}.stat": "anon 1\ninactive_file 300\n"}, 1300),
        (
            {
                **{"/proc/meminfo": "MemAvailable: 1 kB", f"{GROUP}.max": "5000"},
                **{f"{GROUP}.current": "4000", f"{GROUP}.stat": "anon 1"},
            },
            1000,
        ),
        ({"/proc/meminfo": "MemAvailable: 1 kB", f"{GROUP}.max": "max", f"{GROUP}.current": "4000"}, 1024),
    ],
)
def test_free_memory_is_the_machines_or_what_its_control_group_leaves(files, available, monkeypatch):
    def read(path: Path, encoding: str) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert available_bytes() == available


def test_memory_that_cannot_be_had_says_what_to_lower():
    shape = replace(SHAPE, max_positions=2**31 - 1, head_dim=2**20)
    with pytest.raises(CapacityError, match="cannot be allocated on cpu: lower capacity"):
        State(plan(shape, capacity=2**31 - 1), "cpu")
