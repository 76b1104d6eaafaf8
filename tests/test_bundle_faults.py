"""Bad bundles: one clear error that lists every fault, before anything is loaded."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from melt_runtime import BundleError, MeltModel, NumericalError, RunError, read_manifest
from melt_runtime.bundle.contract import METADATA_KEY, SCHEMA_VERSION
from melt_runtime.bundle.manifest import MANIFEST_NAME, file_entry, write_manifest


def edit_manifest(bundle, change) -> None:
    path = bundle / MANIFEST_NAME
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def list_again(bundle, *names) -> None:
    """Gives the manifest the sizes and hashes that the files have now, so that what is in them is reached."""
    edit_manifest(bundle, lambda m: m["files"].update({name: vars(file_entry(bundle / name)) for name in names}))


def test_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"manifest.json does not exist.*melt-export CHECKPOINT"):
        MeltModel.load(tmp_path / "nowhere")


def test_every_damaged_file_is_listed_with_the_way_to_remake_it(bundle_copy):
    (bundle_copy / "head.onnx").unlink()
    weights = bundle_copy / "weights.data"
    weights.write_bytes(weights.read_bytes()[:-1])
    with (bundle_copy / "embed.onnx").open("ab") as stream:
        stream.write(b"x")
    text = bundle_copy / "tokenizer.json"
    text.write_text(text.read_text().replace("Ana", "Anb"))
    with pytest.raises(BundleError) as raised:
        MeltModel.load(bundle_copy)
    message = str(raised.value)
    for fault in (
        "head.onnx is missing",
        "weights.data is truncated",
        "embed.onnx is too large",
        "tokenizer.json was altered",
        "melt-export CHECKPOINT --out BUNDLE",
    ):
        assert fault in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=1), f"schema_version must be {SCHEMA_VERSION}, got 1"),
        (lambda m: m.update(schema_version=float(SCHEMA_VERSION)), f"schema_version must be {SCHEMA_VERSION}, got"),
        (lambda m: m.pop("schema_version"), f"schema_version must be {SCHEMA_VERSION}, got None"),
        (lambda m: m.update(extra=1), "extra is unknown"),
        (lambda m: m.pop("precision"), "precision is missing"),
        (lambda m: m.update(precision="int3"), "precision must be 'float32', 'float16', 'bfloat16', 'int8' or 'int4'"),
        (lambda m: m.update(activations="int8"), "activations must be 'float32', 'float16' or 'bfloat16', got 'int8'"),
        (lambda m: m.update(providers=["cuda"]), "providers must be ['cpu'] for float32 activations, got ['cuda']"),
        (lambda m: m.update(providers=5), "providers must be a valid array, got 5"),
        (lambda m: m.update(producer=None), "producer must be an object, got None"),
        (lambda m: m["producer"].update(torch=2), "producer.torch must be a valid string, got 2"),
        (lambda m: m["quantization"].update(formats="int4"), "quantization.formats must be a valid array, got 'int4'"),
        (lambda m: m["quantization"].update(layers=[]), "quantization.layers must be an object, got []"),
        (lambda m: m["model"].update(layers="two"), "model.layers must be a valid integer, got 'two'"),
        (lambda m: m["model"].update(layers=True), "model.layers must be a valid integer, got True"),
        (lambda m: m["model"].update(layers=2**31), "model.layers must be less than or equal to 1024, got 2147483648"),
        (lambda m: m["model"].update(trained_loops=2**31), "model.trained_loops must be less than or equal to 1024"),
        (lambda m: m["model"].update(heads=0), "model.heads must be greater than or equal to 1, got 0"),
        (lambda m: m["model"].update(heads=7), "model.heads must be a multiple of model.kv_heads (2), got 7"),
        (lambda m: m["model"].update(gate_kind="n" * 5000), "model.gate_kind must be 'elementwise'"),
        (lambda m: m["model"].pop("kv_heads"), "model.kv_heads is missing"),
        (lambda m: m["model"].update(cache_kind="many"), "model.cache_kind must be 'shared' or 'per_loop', got 'many'"),
        (lambda m: m["graphs"].pop("loop"), "graphs.loop does not follow the contract"),
        (lambda m: m["graphs"].update(loop=7), "graphs.loop must be an object, got 7"),
        (lambda m: m["graphs"]["head"]["inputs"][0].update(dtype="float16"), "head does not follow the contract"),
        (lambda m: m["graphs"]["head"]["inputs"][0].update(shape=[None]), "graphs.head.inputs.0.shape.0"),
        (lambda m: m["graphs"].update(other=m["graphs"]["head"]), "graphs.other does not follow the contract"),
        (lambda m: m["files"].pop("loop.onnx"), "files.loop.onnx is missing"),
        (lambda m: m["files"].pop("loop_int4.onnx"), "files.loop_int4.onnx is missing"),
        (lambda m: m["files"].pop("weights.data"), "files.weights.data is missing"),
        (lambda m: m["files"].update({"x.onnx": m["files"]["loop.onnx"]}), "files.x.onnx must belong to one of graphs"),
        *(
            (lambda m, name=name: m["files"].update({name: m["files"]["loop.onnx"]}), f"got {name!r}")
            for name in ("../x", "/etc/x", "a/../../x", "..\\x", "C:x", "..", "a\0b")
        ),
        (lambda m: m["files"].update({"n" * 5000: m["files"]["loop.onnx"]}), "must have at most 100 characters"),
        (lambda m: m["files"]["loop.onnx"].update(size="big"), "files.loop.onnx.size must be a valid integer"),
        (lambda m: m.update(files=[]), "files must be an object"),
        (lambda m: m.update(weight_bytes=1), "weight_bytes must be the size of weights.data"),
        (lambda m: m["quality"].update(waves=[]), "quality.waves must be an object, got []"),
        (lambda m: m["quality"]["waves"]["1"].pop("held"), "quality.waves.1.held is missing"),
        (lambda m: m["quality"]["waves"]["1"].update(kept=1), "quality.waves.1.kept is unknown"),
        (lambda m: m["quality"]["waves"]["2"].update(agreement="all"), "waves.2.agreement must be a valid number"),
        (lambda m: m.update(streamed_bytes={}), "streamed_bytes must have loop and head, got []"),
    ],
)
def test_bad_manifests(bundle_copy, change, message):
    edit_manifest(bundle_copy, change)
    with pytest.raises(BundleError) as raised:
        read_manifest(bundle_copy)
    assert message in str(raised.value)
    assert "melt-export CHECKPOINT --out BUNDLE" in str(raised.value)
    assert len(str(raised.value)) < 5000


def test_a_manifest_without_waves_opens(bundle_copy):
    """Bundles from before they were measured."""
    edit_manifest(bundle_copy, lambda m: m["quality"].pop("waves"))
    assert read_manifest(bundle_copy).quality.waves == {}


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"[]", "not an object"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"a": 1, "a": 2}', "the same key twice"),
        (nested(20_000).encode(), "nested too deep"),
        (f'{{"schema_version": {SCHEMA_VERSION}, "model": {nested(400)}}}'.encode(), "model"),
        (f'{{"schema_version": {SCHEMA_VERSION}, "weight_bytes": NaN}}'.encode(), "got nan"),
        (f'{{"schema_version": {SCHEMA_VERSION}, "weight_bytes": {"9" * 4000}}}'.encode(), "weight_bytes"),
        (f'{{"schema_version": {SCHEMA_VERSION}, "precision": "\\ud800"}}'.encode(), "Invalid JSON"),
        (b" " * (9 << 20), "more than 8388608 bytes"),
    ],
    ids=lambda value: None if isinstance(value, str) else f"{value[:20]!r}",
)
def test_manifests_that_are_hardly_json(bundle_copy, content, message):
    (bundle_copy / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(BundleError) as raised:
        read_manifest(bundle_copy)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 5000


def test_what_is_not_finite_is_not_written(bundle_copy, tmp_path):
    """No reader would take it: JSON has no such numbers."""
    manifest = read_manifest(bundle_copy)
    quality = replace(manifest.quality, perplexity_of_float32=math.inf)
    with pytest.raises(BundleError, match="not finite"):
        write_manifest(tmp_path, replace(manifest, quality=quality))


def test_a_thousand_faults_are_told_in_a_few_lines(bundle_copy):
    edit_manifest(bundle_copy, lambda m: m.update({f"extra{number}": 1 for number in range(1000)}))
    with pytest.raises(BundleError, match="and 960 more"):
        read_manifest(bundle_copy)


def test_a_large_value_is_told_in_a_few_lines(bundle_copy):
    value: object = "x" * 80
    for _ in range(6):
        value = [value] * 6
    edit_manifest(bundle_copy, lambda m: m.update(weight_bytes=value))
    with pytest.raises(BundleError, match="weight_bytes must be a valid integer, got") as raised:
        read_manifest(bundle_copy)
    assert len(str(raised.value)) < 5000


def test_several_manifest_faults_are_reported_at_once(bundle_copy):
    edit_manifest(bundle_copy, lambda m: (m.update(extra=1), m.pop("precision")))
    with pytest.raises(BundleError, match=r"(?s)precision is missing.*extra is unknown"):
        read_manifest(bundle_copy)


def test_graphs_of_another_model_are_refused(bundle_copy, random_bundle):
    """Files that fit the manifest's hashes, but not its contract."""
    for name in ("loop.onnx", "weights.data"):
        shutil.copyfile(random_bundle() / name, bundle_copy / name)
    entries = json.loads((random_bundle() / MANIFEST_NAME).read_text())["files"]
    edit_manifest(bundle_copy, lambda m: m["files"].update({k: entries[k] for k in ("loop.onnx", "weights.data")}))
    edit_manifest(bundle_copy, lambda m: m.update(weight_bytes=entries["weights.data"]["size"]))
    with pytest.raises(BundleError, match=r"(?s)loop.onnx is not what the manifest says:.*inputs .* differ"):
        MeltModel.load(bundle_copy, device="cpu")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("heads", 2),
        ("gate_kind", "last"),
        ("gate_kind", "none"),
        ("cache_kind", "per_loop"),
        ("trained_chunk", 16),
        ("trained_loops", 5),
        ("max_positions", 1 << 20),
        ("intermediate_size", 32),
    ],
)
def test_what_the_graphs_know_better(bundle_copy, field, value):
    """Values that no input or output shows; beyond the rotary tables ONNX Runtime would fail in the middle."""
    edit_manifest(bundle_copy, lambda m: m["model"].update({field: value}))
    with pytest.raises(
        BundleError, match=rf"embed.onnx .*\n.*model.{field} is {value!r} in the manifest, .* in the graph"
    ):
        MeltModel.load(bundle_copy, device="cpu", capacity=64)


@pytest.mark.parametrize("said", [None, "{", "[]", nested(20_000), '{"precision": "float32"}'])
def test_a_graph_that_does_not_say_what_it_is(bundle_copy, said):
    path = bundle_copy / "loop.onnx"
    model = onnx.load(path, load_external_data=False)
    del model.metadata_props[:]
    if said is not None:
        onnx.helper.set_model_props(model, {METADATA_KEY: said})
    path.write_bytes(model.SerializeToString())
    list_again(bundle_copy, "loop.onnx")
    with pytest.raises(BundleError, match=r"loop.onnx (is not what the manifest says|does not say what it is)"):
        MeltModel.load(bundle_copy, device="cpu", capacity=64)


def test_a_graph_that_cannot_be_read_prints_nothing(bundle_copy, capfd):
    """ONNX Runtime would say on standard output, among an answer's text, that it tries again."""
    path = bundle_copy / "loop.onnx"
    path.write_bytes(path.read_bytes().replace(b"QuickGelu", b"QuickGel\xff"))
    list_again(bundle_copy, "loop.onnx")
    with pytest.raises(BundleError, match="loop.onnx"):
        MeltModel.load(bundle_copy, device="cpu", capacity=64)
    assert capfd.readouterr().out == ""


def test_a_graph_that_cannot_run(bundle_copy):
    """It says the right things, and its positions end after one row."""
    path = bundle_copy / "loop.onnx"
    model = onnx.load(path, load_external_data=False)
    tables = [tensor for tensor in model.graph.initializer if "cos" in tensor.name or "sin" in tensor.name]
    assert tables
    for tensor in tables:
        width = tensor.dims[1]
        tensor.dims[0] = 1
        place = {entry.key: entry for entry in tensor.external_data}
        place["length"].value = str(4 * width)
    path.write_bytes(model.SerializeToString())
    list_again(bundle_copy, "loop.onnx")
    model = MeltModel.load(bundle_copy, device="cpu", capacity=64)
    with pytest.raises(RunError, match="ONNX Runtime cannot run a graph of the bundle"):
        model.generate([5, 6, 7], max_new_tokens=2)


def test_weights_that_are_no_numbers(bundle_copy):
    path = bundle_copy / "weights.data"
    path.write_bytes(b"\xff" * path.stat().st_size)
    list_again(bundle_copy, "weights.data")
    with pytest.raises(NumericalError):
        MeltModel.load(bundle_copy, device="cpu", capacity=64).generate([5, 6, 7], max_new_tokens=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stop_ids": [1, 703]}, r"stop_ids must be below the vocabulary's 703, got \(703,\)"),
        ({"logit_bias": {"3": 1.0, "703": -100}}, r"logit_bias must be below the vocabulary's 703, got \(703,\)"),
        ({"loops": "auto", "min_loops": 3, "max_loops": 2}, r"min_loops must be at most max_loops \(2\), got 3"),
        ({"loops": 1, "decode": "wave"}, "decode must be 'plain' with one loop, got 'wave'"),
        ({"loops": 2, "decode": "wave", "lag": 2}, r"lag must be below the loops \(2\), got 2"),
        ({"loops": "auto", "exit_rule": "gate"}, "exit_rule must be 'settled', got 'gate'"),
        ({"loops": 5}, "loops must be at most 4, got 5: a LoopLM has one KV cache per loop; load with loops=5"),
    ],
)
def test_defaults_with_which_no_answer_would_come(random_bundle, tmp_path, values, message):
    """Checked as a request's are, before anything is allocated."""
    folder = Path(shutil.copytree(random_bundle(gate_kind="none", exit_gate=False), tmp_path / "copy"))
    (folder / "generation_config.json").write_text(json.dumps(values))
    list_again(folder, "generation_config.json")
    with pytest.raises(BundleError, match=rf"^generation_config.json: {message}"):
        MeltModel.load(folder, device="cpu", capacity=64)


def test_defaults_of_more_loops_load_with_the_caches_for_them(random_bundle, tmp_path):
    folder = Path(shutil.copytree(random_bundle(gate_kind="none", exit_gate=False), tmp_path / "copy"))
    (folder / "generation_config.json").write_text('{"loops": 5}')
    list_again(folder, "generation_config.json")
    assert MeltModel.load(folder, device="cpu", capacity=64, loops=5).defaults.loops == 5


def test_a_tokenizer_with_tokens_that_the_model_has_not(bundle_copy):
    size = read_manifest(bundle_copy).model.vocab_size
    path = bundle_copy / "tokenizer.json"
    values = json.loads(path.read_text())
    extra = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    values["model"]["vocab"]["far away"] = size + 3
    values["added_tokens"].append({"id": size, "content": "<more>", **extra})
    path.write_text(json.dumps(values))
    list_again(bundle_copy, "tokenizer.json")
    with pytest.raises(BundleError) as raised:
        MeltModel.load(bundle_copy, device="cpu", capacity=64)
    assert f"2 token ids must be below vocab_size ({size}), such as" in str(raised.value)
    assert f"{size + 3} 'far away'" in str(raised.value)


def test_a_bundle_can_move(bundle_copy, tmp_path):
    moved = tmp_path / "elsewhere" / "bundle"
    moved.parent.mkdir()
    bundle_copy.rename(moved)
    assert MeltModel.load(moved, device="cpu", capacity=64).generate("Who is it?", max_new_tokens=2).token_ids


def test_threads_below_one_are_refused(tiny_bundle):
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        MeltModel.load(tiny_bundle, device="cpu", threads=0)


@pytest.mark.parametrize(
    ("sizes", "message"), [({"capacity": 0}, "capacity must be at least 1"), ({"chunk": 0}, "chunk")]
)
def test_bad_sizes_are_refused_before_loading(bundle_copy, sizes, message):
    (bundle_copy / "loop.onnx").unlink()  # would be the next error
    with pytest.raises(ValueError, match=message):
        MeltModel.load(bundle_copy, **sizes)
