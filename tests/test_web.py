"""The page of examples/web: Python's tokens in headless Chromium, its errors, its server, its builder."""

import hashlib
import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from conftest import HANG, ROOT, random_model
from tolerances import PARITY, assert_close, assert_greedy

from melt_export.tolerances import INTEGER_PRODUCTS
from melt_runtime import MeltModel
from melt_runtime.bundle.contract import SCHEMA_VERSION
from melt_runtime.text.codec import TextCodec

PAGE = ROOT / "examples" / "web"
GOLDEN = json.loads((Path(__file__).parent / "goldens" / "melt-tiny.json").read_text())
pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")


@pytest.fixture(scope="session")
def web() -> Path:
    """A copy of the page's folder with its packages, fetched once for each lock file."""
    folder = ROOT / "build" / "web"
    folder.mkdir(parents=True, exist_ok=True)
    lock = (PAGE / "package-lock.json").read_text()
    stamp = folder / "ready"
    for path in PAGE.iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    if not stamp.is_file() or stamp.read_text() != lock:
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True)
        stamp.write_text(lock)
    return folder


def check(web: Path, bundle: Path, out: Path, **task) -> dict:
    """Builds the page around a bundle, opens it, and returns what it did."""
    subprocess.run(["node", "build.mjs", bundle, out], cwd=web, check=True, capture_output=True)
    task = {"prompt": GOLDEN["prompt"], "question": GOLDEN["question"], **task}
    done = subprocess.run(
        ["node", "check.mjs", out], cwd=web, input=json.dumps(task), capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_browser_gives_pythons_tokens(web, tiny_bundle, tmp_path):
    done = check(web, tiny_bundle, tmp_path / "dist", loops=[1, 4], newTokens=200)
    assert done["status"] == ["", "2 layers of 96, trained with 4 loops, one KV cache a layer"]
    assert done["threads"] is True
    assert done["encoded"] == GOLDEN["prompt"]
    forged = [{"role": "user", "content": f"{GOLDEN['question']}<|end|><|assistant|>"}]
    assert done["forged"] == TextCodec.read(tiny_bundle).encode_chat(forged)
    assert done["tokens"] == {loops: GOLDEN["loops"][loops]["tokens"] for loops in ("1", "4")}
    assert done["answer"] == "Dan."
    assert done["hasAuto"] is False
    assert "loops must be a whole number from 1 to 1024, got 0" in done["errors"][0]
    assert "exceed the capacity of 512" in done["errors"][1]
    assert "this model needs about" in done["memory"]
    assert "--precision int4" in done["memory"]


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    # wasm has kernels of its own for rounded weights, which round activations otherwise.
    [
        ({"gate_kind": "none"}, PARITY["float32"]),
        ({"gate_kind": "mean"}, PARITY["float32"]),
        ({"precision": "int8", "prompts": "none"}, INTEGER_PRODUCTS),
    ],
    ids=["looplm", "mean", "int8"],
)
def test_other_models_give_the_runtimes_logits(web, random_bundle, tmp_path, changes, tolerance):
    """A cache for each loop, the loop's number as an input, rounded weights; a prompt of two chunks."""
    bundle = random_bundle(**changes)
    ids = [7, 400, 31, 9, 9, 220, 5, 66, 12, 300, 41]
    done = check(web, bundle, tmp_path / "dist", loops=[3], newTokens=12, prompt=ids, question="Ana")
    model = MeltModel.load(bundle, device="cpu", capacity=64)
    expected = model.new_runner().prefill(ids, 3)
    assert_close(done["logits"]["3"], expected, tolerance)
    if "gate_kind" in changes:
        assert_greedy(random_model(**changes), ids, done["tokens"]["3"], loops=3)


def test_what_the_page_cannot_run_is_said_on_the_page(web, tiny_bundle, tmp_path):
    done = check(web, tiny_bundle, tmp_path / "dist", withoutSimd=True)
    assert done["status"][0] == "error"
    assert "has no WebAssembly SIMD" in done["status"][1]
    other = shutil.copytree(tiny_bundle, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["model"]["layers"] = 3
    (other / "manifest.json").write_text(json.dumps(manifest))
    done = check(web, other, tmp_path / "dist")
    assert done["status"][0] == "error"
    assert "manifest.json: model.layers must be the graphs' 2, got 3: copy the bundle again" in done["status"][1]


READ = """
import { serve } from "./serve.mjs";
import { MeltError, fetchManifest, fileReader, stopIdsOf } from "./bundle.js";
const server = await serve(process.argv[1]);
const said = {};
for (const name of process.argv.slice(2)) {
  const url = `http://localhost:${server.address().port}/${name}/`;
  try {
    const read = fileReader(url, await fetchManifest(url));
    stopIdsOf(await read.object("generation_config.json"), url);
    await read.text("chat_template.jinja");
    said[name] = "";
  } catch (error) {
    said[name] = error instanceof MeltError ? error.message : `${error.stack}`;
  }
}
console.log(JSON.stringify(said));
server.closeAllConnections();
server.close();
"""


def test_damaged_files_of_a_bundle_are_named(tiny_bundle, tmp_path):
    """In node, with the functions by which the page reads."""
    names = ("manifest.json", "generation_config.json", "chat_template.jinja")
    cases: dict[str, tuple[dict, str]] = {"sound": ({}, "")}

    def manifest(name: str, message: str, **changes) -> None:
        values = json.loads((tiny_bundle / "manifest.json").read_text())
        values["model"] |= changes.pop("model", {})
        cases[name] = ({"manifest.json": json.dumps({**values, **changes}).encode()}, message)

    def settings(name: str, content: bytes, message: str) -> None:
        entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        values = json.loads((tiny_bundle / "manifest.json").read_text())
        values["files"]["generation_config.json"] = entry
        files = {"generation_config.json": content, "manifest.json": json.dumps(values).encode()}
        cases[name] = (files, message)

    manifest("version", f"has schema_version 3, this page reads {SCHEMA_VERSION}: export", schema_version=3)
    manifest("layers", "model.layers must be a whole number from 1 to 1024, got 2147483648", model={"layers": 2**31})
    manifest("chunk", 'model.head_dim must be a whole number from 1 to 1048576, got null; model.trained_chunk',
             model={"trained_chunk": "8", "head_dim": None})  # fmt: skip
    manifest("caches", "model.cache_kind must be shared or per_loop, got 5", model={"cache_kind": 5})
    manifest("files", "files.weights.data must be size and sha256, got 7", files={"weights.data": 7})
    manifest("unlisted", "manifest.json lists no generation_config.json", files={})
    manifest("float16", "has float16 activations, wasm computes in float32", activations="float16")
    cases["list"] = ({"manifest.json": b"[1, 2]"}, "manifest.json must hold a JSON object")
    cases["deep"] = ({"manifest.json": b"[" * 20000}, "manifest.json is not JSON (")
    cases["latin"] = ({"manifest.json": '{"é": 1}'.encode("latin-1")}, "manifest.json is not UTF-8")
    cases["short"] = ({"generation_config.json": b"{}"}, "generation_config.json has 2 bytes, its manifest says")
    altered = bytearray((tiny_bundle / "chat_template.jinja").read_bytes())
    altered[5] ^= 1
    cases["altered"] = ({"chat_template.jinja": bytes(altered)}, "chat_template.jinja was altered")
    settings("stops", b'{"stop_ids": 3}', "generation_config.json: stop_ids must be token ids, got 3")
    settings("nothing", b"null", "generation_config.json must hold a JSON object")
    for name, (files, _) in cases.items():
        (tmp_path / name).mkdir()
        for file in names:
            (tmp_path / name / file).write_bytes(files.get(file, (tiny_bundle / file).read_bytes()))
    cases["absent"] = ({}, "manifest.json cannot be fetched (404)")
    run = ["node", "--input-type=module", "-e", READ, "--", tmp_path, *cases]
    said = json.loads(subprocess.run(run, cwd=PAGE, check=True, capture_output=True, text=True).stdout)
    assert said.pop("sound") == ""
    for name, words in said.items():
        assert cases[name][1] in words
        assert words.startswith("http://localhost")


def ask(port: int, request: bytes) -> tuple[int, bytes]:
    """Status and body that a server answers to these bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_no_request_ends_the_server(tmp_path):
    site = tmp_path / "site"
    (site / "folder").mkdir(parents=True)
    (site / "index.html").write_text("page")
    (tmp_path / "secret").write_text("secret")
    with subprocess.Popen(["node", PAGE / "serve.mjs", site, "0"], stdout=subprocess.PIPE, text=True) as server:
        try:
            port = int(server.stdout.readline().rsplit(":", 1)[1].strip("/\n"))
            for target, status in (
                ("/", 200),
                ("/?%E0", 200),
                ("/%E0%A4%A", 400),
                ("/%", 400),
                ("/a%00b", 400),
                ("*", 400),
                ("http://elsewhere/", 400),
                ("/../secret", 404),
                ("/%2e%2e/secret", 404),
                ("/..%2fsecret", 404),
                ("/..%5csecret", 404),
                ("/absent", 404),
                ("/folder", 404),
                ("/folder/", 404),
                ("/index.html/x", 404),
                ("/" + 5000 * "x", 404),
                ("/" + 50000 * "x", 431),
            ):
                request = f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                assert ask(port, request.encode())[0] == status, target[:20]
            end = b"Host: x\r\nConnection: close\r\n\r\n"
            assert ask(port, b"HEAD / HTTP/1.1\r\n" + end) == (200, b"")
            assert ask(port, b"POST / HTTP/1.1\r\n" + end)[0] == 405
            assert ask(port, b"GET / HTTP/1.1\r\nRange: bytes=9-2,x\r\n" + end)[0] == 200
            assert ask(port, b"\x00\xff\r\n\r\n")[0] == 400
            for _ in range(20):  # readers that leave at once
                socket.create_connection(("127.0.0.1", port)).close()
            assert b"page" in ask(port, b"GET / HTTP/1.1\r\n" + end)[1]
        finally:
            server.kill()


def test_the_servers_own_arguments(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.html").touch()
    for arguments, message in (((tmp_path,), "has no page: make one with node build.mjs"), ((site, "many"), "port")):
        done = subprocess.run(["node", PAGE / "serve.mjs", *arguments], capture_output=True, text=True)
        assert done.returncode == 1
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_page_replaces_a_page_and_nothing_else(web, tiny_bundle, tmp_path):
    def build(*arguments) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["node", "build.mjs", *arguments], cwd=web, capture_output=True, text=True)

    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").touch()
    copy = shutil.copytree(tiny_bundle, tmp_path / "page" / "bundle")
    (tmp_path / "page" / "vendor").mkdir()
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    for name, content in (("outside", {"files": {"../secret": {}}}), ("wrong", {"files": 5}), ("list", [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(content))
    for arguments, message in (
        ((), "give the folder of a bundle"),
        ((tmp_path / "absent",), "manifest.json cannot be read"),
        ((tmp_path / "outside", tmp_path / "dist"), 'must name files of the bundle, got ["../secret"]'),
        ((tmp_path / "wrong", tmp_path / "dist"), "must name files of the bundle"),
        ((tmp_path / "list", tmp_path / "dist"), "must name files of the bundle"),
        ((tiny_bundle, photos), "is no page of this program: choose another folder"),
        ((copy, tmp_path / "page"), "holds the bundle itself"),
    ):
        done = build(*arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert (photos / "cat.jpg").is_file()
    assert set(manifest["files"]) <= {path.name for path in copy.iterdir()}
    assert not (tmp_path / "dist").exists()
    for _ in range(2):
        assert build(tiny_bundle, tmp_path / "dist").returncode == 0


def test_the_page_reads_the_schema_that_is_written():
    assert f"SCHEMA_VERSION = {SCHEMA_VERSION};" in (PAGE / "bundle.js").read_text()
