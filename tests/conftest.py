"""Checkpoints and bundles that tests share; each is made once a run, whatever the number of workers."""

import os

# Workers share the processors: torch takes one thread in each, and in what they start. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import hashlib
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from torch.onnx._internal.exporter._registration import ONNXRegistry
from traces import remembered

from melt_export import trace as trace_module
from melt_export.bundle import ExportOptions, export_bundle
from melt_files import staged
from melt_models import MeltCausalLM, MeltConfig, load_checkpoint

settings.register_profile("melt", deadline=None)  # machines differ; no test waits on time
settings.load_profile("melt")

# torch builds its table of some 500 operators anew for every graph, a third of the time of an export as small as ours.
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))

HANG = 1200
"""Seconds after which a test gives up on a process that does not end; a busy machine needs far less."""

LONG = (
    "optimum",
    "smollm2",
    "quantized_bundles",
    "documents",
    "exit_gate",
    "training_run",
    "prompts",
    "fuzz",
    "repeat",
)
"""Files that take longest: their workers begin with them, so that none is left with one at the end."""

LOOKED_UP: list[str] = []
"""Hosts beyond this machine that this process looked up."""


def _look_up(host, *args, real=socket.getaddrinfo, **options):
    name = host.decode() if isinstance(host, bytes) else host
    try:
        is_here = name in (None, "", "localhost") or ip_address(name).is_loopback or ip_address(name).is_unspecified
    except ValueError:
        is_here = False
    if not is_here:
        LOOKED_UP.append(str(name))
        raise socket.gaierror(socket.EAI_NONAME, f"no test calls another machine, got {name}")
    return real(host, *args, **options)


socket.getaddrinfo = _look_up

ROOT = Path(__file__).parent.parent
MELT_TINY = ROOT / "models" / "melt-tiny"

SMALL = {
    "vocab_size": 703,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "chunk_size": 8,
    "total_ut_steps": 4,
    "initializer_range": 0.1,
    "gate_bias_init": -0.5,
}
"""A shape in which no two sizes are equal, with a gate that is half open and weights large enough to matter."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [f"test_{name}" for name in LONG]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


@pytest.fixture(autouse=True)
def _nothing_leaves_this_machine() -> Iterator[None]:
    yield
    found = LOOKED_UP.copy()
    LOOKED_UP.clear()
    assert found == []


def random_model(seed: int = 0, **changes) -> MeltCausalLM:
    """A model with random weights, norms and gates included, so that no term vanishes."""
    torch.manual_seed(seed)
    model = MeltCausalLM(MeltConfig(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "gate.w_z" in name or "gate.u_z" in name:
                parameter.normal_(-0.5 if name.endswith("bias") else 0.0, 0.1)
    return model


def save_checkpoint(model: MeltCausalLM, folder: Path) -> Path:
    """Saves a model with melt-tiny's tokenizer."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(MELT_TINY / name, folder / name)
    return folder


def environment(name: str, *requirements: str) -> Path:
    """The programs of a virtual environment for a tool whose requirements are not ours; made once for each choice.

    Packages that it does not ask for in another version are those of this environment: torch is not installed twice.
    """
    venv = ROOT / "build" / "environments" / name
    ready = venv / "ready"
    wanted = "\n".join([*requirements, sys.prefix])
    if not ready.is_file() or ready.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        own, ours = (sysconfig.get_path("purelib", vars={"base": str(base)}) for base in (venv, sys.prefix))
        (Path(own) / "ours.pth").write_text(ours)
        pip = [venv / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        subprocess.run([*pip, "-c", ROOT / "constraints-torch.txt", *requirements], check=True)
        ready.write_text(wanted)
    return venv / "bin"


def new_user(home: Path) -> dict[str, str]:
    """Variables of a user who set none for telemetry, whose home folder is new: telemetry would make it."""
    unset = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "CI")
    return {**{name: value for name, value in os.environ.items() if name not in unset}, "HOME": str(home)}


def run_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a run share."""
    folder = factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def _graphs_are_traced_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = run_folder(tmp_path_factory) / "traces"
    folder.mkdir(exist_ok=True)
    trace_module._trace = remembered(trace_module._trace, folder)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one worker of a run makes and every other reads: no test may change it.

    Args:
        factory: gives each worker a folder inside the run's own.
        name: tells this folder from every other of the run.
        make: called with where to make it.
    """
    folder = run_folder(factory) / f"shared-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            make(folder)
    return folder


BundleMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def random_bundle(tmp_path_factory: pytest.TempPathFactory) -> BundleMaker:
    """Makes (once for each choice) the bundle of a random model, with its parity and quality where ``verified``."""

    def bundle(
        precision: str = "float32",
        layers: dict[str, str] | None = None,
        verified: bool = False,
        activations: str | None = None,
        prompts: str | None = None,
        **changes,
    ) -> Path:
        def make(folder: Path) -> None:
            with staged(folder) as place:
                checkpoint = save_checkpoint(random_model(**changes), place / "checkpoint")
                options = ExportOptions(
                    precision, layers or {}, activations=activations, verified=verified, prompts=prompts
                )
                export_bundle(checkpoint, place / "bundle", options)

        name = f"random {precision} {layers} {verified} {activations} {prompts} {sorted(changes.items())}"
        return made_once(tmp_path_factory, name, make) / "bundle"

    return bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the shipped model."""
    return made_once(tmp_path_factory, "melt-tiny", lambda out: export_bundle(MELT_TINY, out))


@pytest.fixture(scope="session")
def tiny_int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same at 4 bits."""
    return made_once(
        tmp_path_factory, "melt-tiny int4", lambda out: export_bundle(MELT_TINY, out, ExportOptions("int4"))
    )


@pytest.fixture(scope="session")
def tiny_model() -> MeltCausalLM:
    """The shipped model in torch."""
    return load_checkpoint(MELT_TINY)


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
