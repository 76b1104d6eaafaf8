"""Slots and files: sequences that are copied, written and read again go on as if nothing had happened."""

import errno
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from melt_runtime import BusyError, CapacityError, MeltModel, SavedError, Session
from melt_runtime.execute.saved import _digest

CAPACITY, CHUNK = 90, 8
FREE = {"stop_ids": (), "temperature": 1.0, "seed": 1}
"""Drawn, so that a random model says some text: greedily it may repeat one token, even one that has none."""
KINDS = {"MELT": {}, "LoopLM": {"gate_kind": "none"}}


@pytest.fixture(scope="module")
def model(random_bundle) -> MeltModel:
    return load(random_bundle)


def load(random_bundle, capacity: int = CAPACITY, loops: int | None = None, **changes) -> MeltModel:
    bundle = random_bundle(**changes)
    return MeltModel.load(bundle, device="cpu", capacity=capacity, chunk=CHUNK, loops=loops)


def talk(session: Session) -> Session:
    session.generate("Ana reports to Ben.", max_new_tokens=7, loops=3, **FREE)
    session.generate("Who is Cleo?", max_new_tokens=5, loops=3, **FREE)
    return session


def look(session: Session) -> tuple:
    slot = session._slot
    return session.token_ids, list(session.messages), slot.depths.tolist(), slot.length


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_cache", ["float", "int8", "int4"])
def test_a_saved_session_goes_on_in_another_process_state(random_bundle, tmp_path, kind, kv_cache):
    bundle, path = random_bundle(**KINDS[kind]), tmp_path / "talk"
    model, other = (
        MeltModel.load(bundle, device="cpu", capacity=capacity, chunk=CHUNK, kv_cache=kv_cache)
        for capacity in (CAPACITY, CAPACITY + 5)
    )
    session = talk(model.new_session())
    session.save(path)
    restored = other.new_session()
    restored.generate([9] * 40, max_new_tokens=2, **FREE)
    restored.restore(path)
    assert look(restored)[:2] == look(session)[:2]
    for prompt in ("And Dan?", [4, 5, 6]):
        first, second = (one.generate(prompt, max_new_tokens=6, loops=3, **FREE) for one in (session, restored))
        assert (first.token_ids, first.text, first.cached_tokens) == (
            second.token_ids,
            second.text,
            second.cached_tokens,
        )
        assert second.cached_tokens > 0


def test_a_session_that_lost_rows_and_an_empty_one_are_saved_too(model, tmp_path):
    path, session, fresh = tmp_path / "talk", talk(model.new_session()), talk(model.new_session())

    def fail(done: int, total: int) -> None:
        if done > 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.generate([{"role": "user", "content": "x" * 50}], progress=fail)
    assert session._slot.length < fresh._slot.length  # the rest is run again
    session.save(path)
    restored = model.new_session()
    restored.restore(path)
    results = [one.generate("And Dan?", max_new_tokens=6, loops=3, **FREE) for one in (restored, fresh)]
    assert results[0].token_ids == results[1].token_ids
    model.new_session().save(path)
    restored.restore(path)
    assert look(restored)[:2] == ((), [])
    assert restored.generate("Who?", max_new_tokens=3).text == model.generate("Who?", max_new_tokens=3).text


def edit(path, change, digested: bool = True) -> None:
    """Changes a file; ``digested``: as if it had been written so."""
    with safe_open(path, "np") as file:
        header = json.loads(file.metadata()["melt"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    change(header, tensors)
    if digested:
        header["sha256"] = _digest(header, tensors)
    save_file(tensors, path, {"melt": json.dumps(header)})


DAMAGE = {
    "model": lambda header, tensors: header.update(model="x"),
    "kv_cache": lambda header, tensors: header.update(kv_cache="int8"),
    "format": lambda header, tensors: header.update(format="melt sequence 9"),
    "length": lambda header, tensors: header.update(length=-1),
    "length type": lambda header, tensors: header.update(length="5"),
    "shorter": lambda header, tensors: header.update(length=header["length"] - 1),
    "depth": lambda header, tensors: header.update(depth=2),
    "messages": lambda header, tensors: header.update(more={"messages": [1], "holds_raw": False}),
    "no more": lambda header, tensors: header.pop("more"),
    "ids": lambda header, tensors: tensors.update(ids=tensors["ids"] + 700),
    "ids type": lambda header, tensors: tensors.update(ids=tensors["ids"].astype(np.float32)),
    "few ids": lambda header, tensors: tensors.update(ids=tensors["ids"][:-3]),
    "depths": lambda header, tensors: tensors.update(depths=2000 * tensors["depths"]),
    "no depths": lambda header, tensors: tensors.pop("depths"),
    "rows": lambda header, tensors: tensors.update({"keys.0.1": tensors["keys.0.1"][:, :-1]}),
    "rows type": lambda header, tensors: tensors.update({"keys.0.1": tensors["keys.0.1"].astype(np.float64)}),
    "no rows": lambda header, tensors: tensors.pop("values.0.0"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_and_changes_nothing(model, tmp_path, damage):
    path = tmp_path / "talk"
    talk(model.new_session()).save(path)
    session = model.new_session()
    session.generate([1, 2, 3], max_new_tokens=4, **FREE)
    before = look(session)
    edit(path, DAMAGE[damage])
    with pytest.raises(SavedError, match="talk"):
        session.restore(path)
    assert look(session) == before


def test_a_flipped_bit_is_found(model, tmp_path):
    path = tmp_path / "talk"
    talk(model.new_session()).save(path)
    edit(path, lambda header, tensors: tensors["keys.0.0"].reshape(-1).__setitem__(3, 0.5), digested=False)
    with pytest.raises(SavedError, match="is damaged: its content is not what was saved"):
        model.new_session().restore(path)


def test_whatever_a_message_holds_is_kept(model, tmp_path):
    session = model.new_session()
    session.generate([{"role": "user", "content": "Who?", "n": 3, "tools": [1]}], max_new_tokens=2, **FREE)
    session.save(tmp_path / "talk")
    restored = model.new_session()
    restored.restore(tmp_path / "talk")
    assert restored.messages == session.messages


def test_lost_chunks_need_a_state_that_can_run_them(random_bundle, tmp_path):
    session = talk(load(random_bundle).new_session())

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.generate([{"role": "user", "content": "x" * 50}], progress=fail)
    session.save(tmp_path / "talk")
    small = MeltModel.load(random_bundle(), device="cpu", capacity=CAPACITY, chunk=4).new_session()
    with pytest.raises(CapacityError, match="has chunks of 8 tokens to run again: load with chunk=8 or more"):
        small.restore(tmp_path / "talk")


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff" * 100, b"[" * 100_000])
def test_what_is_no_such_file_is_refused(model, tmp_path, content):
    path = tmp_path / "talk"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SavedError, match="cannot be read as a saved session"):
        model.new_session().restore(path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "zeros", "longer"])
def test_what_could_hang_or_fill_the_memory_is_refused_unread(model, tmp_path, kind):
    """The last two are sparse files of 2 TB, one with the header of a sound one."""
    path = tmp_path / "talk"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        talk(model.new_session()).save(path)
        os.truncate(path, 0) if kind == "zeros" else None
        os.truncate(path, 1 << 41)
    with pytest.raises(SavedError, match="cannot be read as a saved session"):
        model.new_session().restore(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 60, 1 << 60], "data_offsets": [0, 1 << 61]},
        {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]},
        {"dtype": [], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": None, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        [],
    ],
)
def test_a_header_that_lies_about_sizes_is_refused(model, tmp_path, entry):
    header = json.dumps({"keys.0.0": entry, "__metadata__": {"melt": "{}"}}).encode()
    (tmp_path / "talk").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(SavedError, match="cannot be read as a saved session"):
        model.new_session().restore(tmp_path / "talk")


def test_memory_that_is_not_there_is_no_raw_error(model, tmp_path, monkeypatch):
    path, session = tmp_path / "talk", model.new_session()
    talk(model.new_session()).save(path)

    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("melt_runtime.execute.tensors.np.empty", fails)
    with pytest.raises(SavedError, match="not enough memory"):
        session.restore(path)
    assert look(session)[:2] == ((), [])


def test_a_full_disk_is_an_oserror_and_leaves_the_old_file(model, tmp_path):
    """A limit on the size of files, which the system refuses in the same place."""
    path, session = tmp_path / "talk", talk(model.new_session())
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            session.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("talk", "old")]


def test_another_models_session_and_one_that_does_not_fit(random_bundle, model, tmp_path):
    path = tmp_path / "talk"
    talk(model.new_session()).save(path)
    with pytest.raises(SavedError, match=r"saved by another model, or over another KV cache: its \['model'\] differ"):
        load(random_bundle, seed=1).new_session().restore(path)
    with pytest.raises(CapacityError, match="holds .* tokens, the capacity is 16"):
        load(random_bundle, capacity=16).new_session().restore(path)
    talk(load(random_bundle, gate_kind="none").new_session()).save(path)
    with pytest.raises(CapacityError, match="needs 3 caches, there are 2: load with loops=3"):
        load(random_bundle, loops=2, gate_kind="none").new_session().restore(path)


def test_saving_replaces_in_one_step_and_waits_for_nobody(model, tmp_path):
    path, session = tmp_path / "talk", talk(model.new_session())
    path.write_text("old")
    stream = session.stream("Who?", max_new_tokens=5, **FREE)
    next(stream)
    for call in (session.save, session.restore):
        with pytest.raises(BusyError):
            call(path)
    assert path.read_text() == "old"
    stream.close()
    session.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["talk"]
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "link", tmp_path / "pipe"):
        with pytest.raises(ValueError, match="path must be a file that may be replaced"):
            session.save(other)
    with pytest.raises(ValueError, match="path must lie in a folder that exists"):
        session.save(tmp_path / "missing" / "talk")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_goes_on_like_its_source(random_bundle, kind):
    runner = load(random_bundle, **KINDS[kind]).new_runner(batch=3)
    slots = runner.slots
    source = slots.acquire()
    ids = list(range(30, 51))
    runner.prefill(ids, 4, sequence=source.number)
    whole, part = slots.fork(source), slots.fork(source, 16)
    assert [whole.ids, part.ids, slots.free] == [ids, ids[:16], 0]
    with pytest.raises(CapacityError, match="all 3 slots are taken: load with slots=4"):
        slots.fork(source)
    for other in (0, None, load(random_bundle).new_runner().slots[0]):
        for call in (slots.fork, slots.release, slots.is_free):
            with pytest.raises(ValueError, match="a slot must be one of this state's 3"):
                call(other)
    logits = [runner.prefill([7, 8], 4, sequence=slot.number).copy() for slot in (source, whole)]
    np.testing.assert_array_equal(*logits)
    runner.prefill(ids[16:], 4, sequence=part.number)
    np.testing.assert_array_equal(runner.prefill([7, 8], 4, sequence=part.number), logits[0])
    slots.release(part)
    with pytest.raises(ValueError, match="tokens must end where a chunk does, got 11"):
        slots.fork(source, 11)
    assert slots.free == 1


@pytest.mark.parametrize("lag", [1, 3])
def test_a_conversation_of_waves_is_kept_too(random_bundle, tmp_path, lag):
    """Tokens of a short lag are marked as such in the file; what comes after them is the same."""
    model = MeltModel.load(random_bundle(), device="cpu", capacity=100, chunk=8)
    said = {"loops": 4, "max_new_tokens": 12, "stop_ids": (), "decode": "wave", "lag": lag}
    session = model.new_session()
    session.generate([5, 6, 7], **said)
    session.save(tmp_path / "waves")
    other = model.new_session()
    other.restore(tmp_path / "waves")
    assert other.generate([8, 9], **said).token_ids == session.generate([8, 9], **said).token_ids
    np.testing.assert_array_equal(other._slot.depths, session._slot.depths)
    assert bool((session._slot.depths < 0).any()) == (lag == 1)
