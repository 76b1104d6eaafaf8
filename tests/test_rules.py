"""House rules that a machine can check: directions of imports, no torch in the runtime, complete ``__all__``."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = {
    "melt_files": ROOT / "runtime" / "melt_files",
    "melt_plots": ROOT / "runtime" / "melt_plots",
    "melt_runtime": ROOT / "runtime" / "melt_runtime",
    "melt_layers": ROOT / "models" / "melt_layers",
    "melt_models": ROOT / "models" / "melt_models",
    "melt_export": ROOT / "melt_export",
    "transformers_melt": ROOT / "integrations" / "optimum" / "transformers_melt",
    "melt_ray": ROOT / "integrations" / "ray" / "melt_ray",
}
ALLOWED = {
    "melt_files": {"melt_files"},
    "melt_plots": {"matplotlib", "cycler", "melt_plots"},
    "melt_runtime": {
        *(
            "numpy",
            "onnxruntime",
            "tokenizers",
            "jinja2",
            "pydantic",
            "pydantic_core",
            "annotated_types",
            "safetensors",
        ),
        *("fastapi", "starlette", "uvicorn", "h11", "prometheus_client", "llguidance"),
        *("prompt_toolkit", "tqdm", "melt_files", "melt_plots", "melt_runtime"),
    },
    "melt_layers": {"torch", "melt_layers"},
    "melt_models": {
        *("torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "tqdm"),
        *("datasets", "gguf", "pyarrow", "matplotlib", "pydantic", "pydantic_core", "typing_extensions"),
        *("melt_files", "melt_plots", "melt_layers", "melt_models"),
    },
    "melt_export": {
        *("torch", "numpy", "onnx_ir", "onnxruntime", "transformers", "tokenizers", "tqdm"),
        *("pydantic", "typing_extensions"),
        *("melt_files", "melt_layers", "melt_models", "melt_runtime", "melt_export"),
    },
    "transformers_melt": {
        *("torch", "numpy", "onnx", "onnxruntime", "transformers", "optimum", "melt_layers", "transformers_melt"),
    },
    "melt_ray": {"ray", "pyarrow", "pydantic", "starlette", "uvicorn", "melt_files", "melt_runtime", "melt_ray"},
}
HERE = [name for name in PACKAGES if name not in ("transformers_melt", "melt_ray")]
"""What this environment can import: optimum wants another transformers, and Ray is not in it."""
# Inside the runtime, an earlier floor never imports a later one: rooms are folders, the others single modules.
FLOORS = (
    {"errors", "version", "progress"},
    {"arguments", "hold"},
    {"bundle"},
    {"device"},
    {"memory"},
    {"text"},
    {"schedule"},
    {"request"},
    {"execute"},
    {"loading", "engine", "runner"},
    {"stream", "reply", "conversations"},
    {"session", "waiting"},
    {"batch", "service"},
    {"model"},
    {"asynchronous", "bench"},
    {"serve"},
    {"cli"},
    {"__main__"},
)
PURE = {"arguments", "errors", "progress", "bundle", "text", "request", "schedule"}
"""Floors that run without ONNX Runtime, and what of ``memory`` they need: its plan."""


def imports(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_keep_to_their_floor(package):
    for path in PACKAGES[package].rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        assert roots <= ALLOWED[package], f"{path}: {roots - ALLOWED[package]}"


def rooms() -> list[tuple[str, Path]]:
    """(floor's name, file) of every module of the runtime but its door."""
    base = PACKAGES["melt_runtime"]
    files = [path for path in base.rglob("*.py") if path != base / "__init__.py"]
    return [(path.relative_to(base).parts[0].removesuffix(".py"), path) for path in files]


def test_dependencies_inside_the_runtime_run_one_way():
    height = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
    for room, path in rooms():
        for name in imports(path):
            if name.startswith("melt_runtime."):
                target = name.split(".")[1]
                assert target == room or height[target] < height[room], f"{path} imports {name}"


def test_what_decides_runs_without_onnxruntime():
    """Which tokens run next, and what becomes of an answer, can be tried with neither graphs nor buffers."""
    for room, path in rooms():
        if room in PURE:
            assert not {"onnxruntime", "melt_runtime.device.ort", "melt_runtime.memory.buffers"} & imports(path), path


SENDS_TELEMETRY = re.compile(
    r"^ *(?:import|from) (onnxruntime|onnxruntime_genai|optimum\.onnxruntime)\b.*", re.MULTILINE
)
TURNS_IT_OFF = re.compile(r"^ *os\.environ(?:\.setdefault\(|\[)\"ORT_DISABLE_TELEMETRY\"", re.MULTILINE)


def test_onnxruntime_is_imported_with_its_telemetry_off():
    """Through ``melt_runtime.device.ort``, or below a line that turns it off; in documents too."""
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    door = "runtime/melt_runtime/device/ort.py"
    optimum = "integrations/optimum/transformers_melt/"  # its __init__.py has the line
    seen = []
    for name in listed.stdout.split():
        text = (ROOT / name).read_text(encoding="utf-8")
        # In a document each block of code is a program of its own.
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if name.endswith(".md") else [text]:
            found = SENDS_TELEMETRY.search(block)
            if found is None:
                continue
            seen.append(name)
            off = TURNS_IT_OFF.search(block)
            off_before = off is not None and off.start() < found.start()
            assert name == door or name.startswith(optimum) or off_before, f"{name}: {found[0]}"
    assert {door, "docs/other-runtimes.md", "benchmarks/peers/worker.py"} <= set(seen)
    first = (ROOT / optimum / "__init__.py").read_text(encoding="utf-8")
    assert TURNS_IT_OFF.search(first).start() < first.index("\nfrom transformers")


def test_the_runtime_runs_without_torch():
    code = (
        "import sys, melt_runtime, melt_runtime.cli.main, melt_runtime.memory.estimate, melt_runtime.device.doctor;"
        "print([m for m in ('torch', 'transformers', 'onnx', 'melt_models', 'melt_export') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def packages() -> list[str]:
    """Every package that can be imported here, by its name."""
    found = [
        (name, init) for name in HERE for init in PACKAGES[name].rglob("__init__.py") if "__pycache__" not in str(init)
    ]
    return sorted(".".join((name, *init.parent.relative_to(PACKAGES[name]).parts)) for name, init in found)


@pytest.mark.parametrize("package", packages())
def test_every_package_says_what_it_offers(package):
    module = importlib.import_module(package)
    assert module.__doc__
    assert isinstance(module.__all__, list)
    assert all(hasattr(module, name) for name in module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)


TOLERANCE = re.compile(
    r"\b(?:atol|rtol|rel|abs)\s*=\s*[-(]*[\d.]"  # an argument that is a number
    r"|allclose\(|testing\.assert_close\("  # what has a tolerance of its own where none is given
    r"|[<>]=?\s*[\d.]+e-\d"  # a comparison with a small number
)


@pytest.mark.parametrize("folder", ["tests", "melt_export", "benchmarks"])
def test_tolerances_stand_in_one_place(folder):
    """``tolerances.py`` of the tests and of the exporter: a number beside a tensor knows nothing of its magnitude."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if path.name != "tolerances.py" and path != Path(__file__) and TOLERANCE.search(line)
    ]
    assert found == []


def test_files_stay_small():
    for folder in PACKAGES.values():
        for path in folder.rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path


def test_the_loop_over_loops_and_layers_stands_once():
    """Inference, training and optimum's export run the same one: another would drift."""

    def is_over(node: ast.AST, name: str) -> bool:
        return isinstance(node, ast.For) and any(
            isinstance(n, ast.Name) and n.id == name for n in ast.walk(node.target)
        )

    found = [
        path.name
        for folder in PACKAGES.values()
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if is_over(node, "loop_idx") and any(is_over(inner, "layer_idx") for inner in ast.walk(node))
    ]
    assert found == ["loops.py"]
