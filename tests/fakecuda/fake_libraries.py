"""Builds the fake CUDA libraries that ONNX Runtime's real CUDA provider then loads: see runtime.c.

Session creation, placement, insertion of copies, bindings with device buffers and capture of CUDA graphs are the
provider's own; only the libraries below it are fake. In a process that was started with the libraries' folder on
LD_LIBRARY_PATH, ``read_counters()`` tells what was called.
"""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
HEADERS = ("nvidia-cuda-runtime", "nvidia-cuda-crt")
"""Packages with the headers of the CUDA runtime; they are unpacked, never installed: their libraries would be found."""
COUNTERS = (
    *("allocations", "frees", "to_device", "to_host", "on_device", "launches", "graph_launches", "synchronizations"),
    *("bytes_to_device", "bytes_to_host", "bytes_allocated"),
)
_PRODUCTS = "products"
"""Counted by the fake cuBLAS itself: matrix products, whose kernels would be launched inside of it."""
_STATUS_NAMES = ("cublasGetStatusName", "cublasGetStatusString")
_CREATORS = ("cublasCreate_v2", "cublasLtCreate")
_DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuTensorMapEncodeTiled() { return 0; }
"""


def obstacle() -> str | None:
    """Why the libraries cannot be built here, in one line; None where they can."""
    if sys.platform != "linux":
        return "the fake CUDA runtime is for Linux"
    if provider() is None:
        return "this onnxruntime has no CUDA provider"
    missing = [name for name in ("gcc", "nm") if shutil.which(name) is None]
    return f"there is no {' and no '.join(missing)}" if missing else None


def provider() -> Path | None:
    """The CUDA provider's library of the installed ONNX Runtime."""
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "capi" / "libonnxruntime_providers_cuda.so"
    return path if path.is_file() else None


def build(out: Path) -> Path:
    """Makes the libraries in ``out`` where they are not there yet; headers are fetched from the package index.

    Raises:
        RuntimeError: the headers cannot be fetched.
    """
    if (out / "ready").is_file():
        return out
    out.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path.parent}" for path in _fetch_headers(out / "headers").rglob("driver_types.h")]
    includes += [f"-I{path.parent.parent}" for path in (out / "headers").rglob("crt/host_config.h")]
    written = set(re.findall(r"^(?:\w+ )+\*?(_*cuda\w+)\(", (HERE / "runtime.c").read_text(), flags=re.MULTILINE))
    library = provider()
    assert library is not None
    for soname, names in _taken_from_cuda(library).items():
        runtime = "cudart" in soname
        source = (HERE / "runtime.c").read_text() if runtime else "#include <stdlib.h>\nlong fakecuda_products;\n"
        source += "".join(_success(name) for name in names if not (runtime and name in written))
        _compile(out, soname, source, includes)
    _compile(out, "libcuda.so.1", _DRIVER, [], versioned=False)
    _compile(out, "libcurand.so.10", "int curandCreateGenerator() { return 0; }\n", [], versioned=False)
    (out / "ready").touch()
    return out


def read_counters() -> dict[str, int]:
    """What this process called so far, by name."""
    values = (ctypes.c_long * len(COUNTERS))()
    ctypes.CDLL(_loaded("libcudart.so")).fakecuda_read(values)
    products = ctypes.c_long.in_dll(ctypes.CDLL(_loaded("libcublas.so")), "fakecuda_products").value
    return {**dict(zip(COUNTERS, values, strict=True)), _PRODUCTS: products}


def _loaded(library: str) -> str:
    """The full name of a library that this process has loaded."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(line.split("/")[-1].strip() for line in lines if library in line)


def _fetch_headers(folder: Path) -> Path:
    with tempfile.TemporaryDirectory() as wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels, *HEADERS]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the CUDA headers cannot be fetched:\n{done.stderr}")
        for wheel in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder, [name for name in archive.namelist() if "/include/" in name])
    return folder


def _taken_from_cuda(library: Path) -> dict[str, list[str]]:
    """Names that the provider takes from each CUDA library, by that library's soname."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    names: dict[str, list[str]] = {}
    for name, soname in re.findall(r"(\w+)@+(lib(?:cudart|cublas|cublasLt)\.so\.\d+)", listed.stdout):
        names.setdefault(soname, []).append(name)
    return names


def _success(name: str) -> str:
    """A function that does nothing and says that it went well."""
    if name in _CREATORS:
        return f"int {name}(void **handle) {{ *handle = malloc(64); return 0; }}\n"
    if name in _STATUS_NAMES:
        return f'const char *{name}(int status) {{ return "a fake status"; }}\n'
    if "cublas" in name and re.search("[Gg]emm|Matmul$", name):
        return f"int {name}() {{ fakecuda_products++; return 0; }}\n"
    return f"int {name}() {{ return 0; }}\n"


def _compile(out: Path, soname: str, source: str, includes: list[str], versioned: bool = True) -> None:
    code, script = out / f"{soname}.c", out / f"{soname}.map"
    code.write_text(source)
    script.write_text(f"{soname} {{ global: *; }};\n")
    flags = [f"-Wl,--version-script={script}"] if versioned else []
    command = ["gcc", "-w", "-shared", "-fPIC", "-O1", *includes, f"-Wl,-soname,{soname}", *flags]
    subprocess.run([*command, "-o", out / soname, code], check=True)


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
