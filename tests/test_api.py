"""The public API: what it gives is exported; a model is a context; what may be asked of one that is closed."""

import gc
import inspect
import typing
import weakref
from collections.abc import Iterator

import pytest

import melt_runtime
from melt_runtime import BusyError, ClosedError, MeltModel

FREE = {"stop_ids": (), "temperature": 1.0, "seed": 1}
INNER = {"LoopRunner"}
"""Classes whose methods give parts of the runtime, for drivers and the exporter."""


def classes_in(hint: object) -> Iterator[type]:
    """A type, and those that it is made of."""
    for part in typing.get_args(hint):
        yield from classes_in(part)
    for part in (hint, typing.get_origin(hint)):
        if isinstance(part, type):
            yield part


def given_by(kind: type) -> Iterator[tuple[str, type]]:
    """What the fields, properties and methods of a class give."""
    for name, hint in typing.get_type_hints(kind).items():
        yield from ((name, part) for part in classes_in(hint) if not name.startswith("_"))
    for name, member in inspect.getmembers(kind):
        function = member.fget if isinstance(member, property) else member
        if (
            callable(function)
            and not name.startswith("_")
            and str(getattr(function, "__module__", "")).startswith("melt_")
        ):
            hint = typing.get_type_hints(inspect.unwrap(function)).get("return")
            yield from ((name, part) for part in classes_in(hint))


def test_what_the_api_gives_can_be_imported_from_it():
    """So that applications name it in annotations. Partial copies are of a package of their own, ``melt_files``."""
    exported = {name: getattr(melt_runtime, name) for name in melt_runtime.__all__}
    assert {"Part", "LogitsProcessor", "Reply", "Service", "StatePlan", "TokenLogprob"} <= exported.keys()
    kinds = {name: kind for name, kind in exported.items() if isinstance(kind, type) and name not in INNER}
    missing = {
        f"{name}.{member} gives {part.__name__}"
        for name, kind in kinds.items()
        for member, part in given_by(kind)
        if part.__module__.startswith("melt_runtime.") and exported.get(part.__name__) is not part
    }
    assert missing == set()
    assert [name for name, kind in kinds.items() if not inspect.getdoc(kind)] == []


def test_a_model_is_closed_at_the_end_of_its_block(random_bundle):
    with MeltModel.load(random_bundle(), device="cpu", capacity=64) as model:
        session, graphs = model.new_session(), weakref.ref(model._sessions)
        expected = model.generate([5, 6, 7], max_new_tokens=4, **FREE).token_ids
        stream = model.stream([5, 6, 7], max_new_tokens=30, **FREE)
        next(stream)
        own = weakref.ref(model.session)
    assert list(stream) == []
    for use in (
        lambda: model.generate("x"),
        lambda: model.stream("x"),
        lambda: model.generate_batch(["x"]),
        lambda: model.session,
        lambda: model.state_bytes,
        model.new_session,
        model.new_runner,
        model.new_service,
        model.reset,
    ):
        with pytest.raises(ClosedError, match="this model was closed: load it again"):
            use()
    model.close()
    assert session.generate([5, 6, 7], max_new_tokens=4, **FREE).token_ids == expected
    del session, stream
    gc.collect()
    assert own() is None
    assert graphs() is None


def test_a_model_is_not_closed_under_a_service(random_bundle):
    model = MeltModel.load(random_bundle(), device="cpu", capacity=64)
    with model.new_service(), pytest.raises(BusyError):
        model.close()
    model.close()
