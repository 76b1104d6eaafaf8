"""Bad bundles: one clear error that lists every fault, before anything is loaded."""

import json
import shutil

import pytest

from melt_runtime import BundleError, MeltModel, read_manifest
from melt_runtime.manifest import MANIFEST_NAME


def edit_manifest(bundle, change) -> None:
    path = bundle / MANIFEST_NAME
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"manifest.json does not exist.*export.py"):
        MeltModel.load(tmp_path / "nowhere")


def test_not_json(bundle_copy):
    (bundle_copy / MANIFEST_NAME).write_text("{")
    with pytest.raises(BundleError, match="is not JSON"):
        MeltModel.load(bundle_copy)


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
        "python export.py",
    ):
        assert fault in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=1), "schema_version must be 3, got 1"),
        (lambda m: m.pop("schema_version"), "schema_version must be 3, got None"),
        (lambda m: m.update(extra=1), "extra is unknown"),
        (lambda m: m.pop("precision"), "precision is missing"),
        (lambda m: m.update(precision="int3"), "one of float32, float16, bfloat16, int8, int4, got 'int3'"),
        (lambda m: m.update(activations="int8"), "activations must be one of float32, float16, bfloat16, got 'int8'"),
        (lambda m: m.update(providers=["cuda"]), "providers must be ['cpu'] for float32 activations, got ['cuda']"),
        (lambda m: m["model"].update(layers="two"), "model.layers must be int, got 'two'"),
        (lambda m: m["model"].update(heads=0), "model.heads must be at least 1, got 0"),
        (lambda m: m["model"].pop("kv_heads"), "model.kv_heads is missing"),
        (lambda m: m["model"].update(cache_kind="many"), "cache_kind must be 'shared' or 'per_loop'"),
        (lambda m: m["graphs"].pop("loop"), "loop does not follow the contract"),
        (lambda m: m["graphs"]["head"]["inputs"][0].update(dtype="float16"), "head does not follow the contract"),
        (lambda m: m["graphs"].update(other=m["graphs"]["head"]), "other does not follow the contract"),
        (lambda m: m["files"].pop("loop.onnx"), "loop.onnx is not listed"),
        (lambda m: m["files"].pop("loop_int4.onnx"), "loop_int4.onnx is not listed"),
        (lambda m: m["files"].pop("weights.data"), "weights.data is not listed"),
        (lambda m: m["files"].update({"../x": m["files"]["loop.onnx"]}), "'../x' leaves the bundle"),
        (lambda m: m["files"].update({"/etc/x": m["files"]["loop.onnx"]}), "'/etc/x' leaves the bundle"),
        (lambda m: m["files"].update({"a/../../x": m["files"]["loop.onnx"]}), "leaves the bundle"),
        (lambda m: m["files"].update({"..\\x": m["files"]["loop.onnx"]}), "leaves the bundle"),
        (lambda m: m["files"].update({"C:x": m["files"]["loop.onnx"]}), "leaves the bundle"),
        (lambda m: m["files"]["loop.onnx"].update(size="big"), "size must be int, got 'big'"),
        (lambda m: m.update(files=[]), "files must be dict"),
    ],
)
def test_bad_manifests(bundle_copy, change, message):
    edit_manifest(bundle_copy, change)
    with pytest.raises(BundleError) as raised:
        read_manifest(bundle_copy)
    assert message in str(raised.value)


def test_several_manifest_faults_are_reported_at_once(bundle_copy):
    edit_manifest(bundle_copy, lambda m: (m.update(extra=1), m.pop("precision")))
    with pytest.raises(BundleError, match=r"(?s)extra is unknown.*precision is missing"):
        read_manifest(bundle_copy)


def test_graphs_of_another_model_are_refused(bundle_copy, random_bundle):
    """Files that fit the manifest's hashes, but not its contract."""
    for name in ("loop.onnx", "weights.data"):
        shutil.copyfile(random_bundle() / name, bundle_copy / name)
    entries = json.loads((random_bundle() / MANIFEST_NAME).read_text())["files"]
    edit_manifest(bundle_copy, lambda m: m["files"].update({k: entries[k] for k in ("loop.onnx", "weights.data")}))
    with pytest.raises(BundleError, match=r"loop.onnx: inputs .* differ from the manifest"):
        MeltModel.load(bundle_copy, device="cpu")


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
