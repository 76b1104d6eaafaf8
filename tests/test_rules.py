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
}
ALLOWED = {
    "melt_files": {"melt_files"},
    "melt_plots": {"matplotlib", "cycler", "melt_plots"},
    "melt_runtime": {
        *("numpy", "onnxruntime", "tokenizers", "jinja2", "pydantic", "pydantic_core", "annotated_types"),
        *("prompt_toolkit", "tqdm", "melt_files", "melt_plots", "melt_runtime"),
    },
    "melt_layers": {"torch", "melt_layers"},
    "melt_models": {
        *("torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "tqdm"),
        *("datasets", "pyarrow", "matplotlib", "pydantic", "pydantic_core", "typing_extensions"),
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
}
HERE = [name for name in PACKAGES if name != "transformers_melt"]
"""What this environment can import: optimum wants another transformers."""
# Inside the runtime, an earlier floor never imports a later one.
FLOORS = (
    {"errors", "contract", "version", "streams", "progress"},
    {"arguments", "hold", "measured"},
    {"manifest", "generation_config", "process_memory"},
    {"cuda", "load_cache", "plan"},
    {"providers", "memory"},
    {"state", "plots"},
    {"sampler", "messages", "template_meter", "device_sampler", "prepacked"},
    {"template_values"},
    {"template_filters"},
    {"templates"},
    {"text"},
    {"loop"},
    {"history"},
    {"generate"},
    {"session", "opening"},
    {"model", "chat"},
    {"doctor", "cli_options"},
    {"bench", "cli_info", "cli_answer", "cli_cache", "cli_plan"},
    {"bench_report"},
    {"cli_bench"},
    {"cli_demo"},
    {"cli"},
    {"__main__"},
)


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


def test_dependencies_inside_the_runtime_run_one_way():
    height = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
    for path in PACKAGES["melt_runtime"].glob("*.py"):
        if path.stem == "__init__":
            continue
        for name in imports(path):
            if name.startswith("melt_runtime."):
                target = name.split(".")[1]
                assert height[target] <= height[path.stem], f"{path.stem} imports {target}"


def test_the_runtime_runs_without_torch():
    code = (
        "import sys, melt_runtime, melt_runtime.cli.main, melt_runtime.memory.estimate, melt_runtime.device.doctor;"
        "print([m for m in ('torch', 'transformers', 'onnx', 'melt_models', 'melt_export') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", [*HERE, "melt_models.tiny", "melt_models.training"])
def test_every_package_says_what_it_offers(package):
    module = importlib.import_module(package)
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
