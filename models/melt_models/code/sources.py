"""Python sources that stand on this machine, chosen so that the same versions give the same texts.

The standard library (PSF licence) and installed packages whose metadata name a permissive licence. Left out: tests,
vendored copies, generated files and tables, what repeats earlier files, and the comments that open a file, which are
mostly licences. Held-out packages give no line to training, and held-out files that share windows with it are left out.
"""

import hashlib
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from melt_models.training.errors import TrainingError

STANDARD_LIBRARY = "python"
TRAINED = (
    *(STANDARD_LIBRARY, "accelerate", "anyio", "click", "datasets", "filelock", "fonttools", "h11", "httpcore2"),
    *("httpx2", "huggingface_hub", "markdown-it-py", "matplotlib", "mpmath", "mypy", "numpy", "onnx", "onnx-ir"),
    *("onnxscript", "packaging", "pandas", "pip", "pluggy", "prompt_toolkit", "protobuf", "psutil", "pydantic"),
    *("pygments", "pyparsing", "pytest", "python-dateutil", "requests", "setuptools", "sortedcontainers", "sympy"),
    *("torch", "transformers", "typer", "urllib3"),
)
HELD_OUT = ("fsspec", "jinja2", "networkx", "rich")

_PERMISSIVE = re.compile(r"\b(MIT|BSD|0BSD|Apache|PSF|Python Software Foundation|ISC|HPND)\b", re.IGNORECASE)
_OTHERS = re.compile(r"\b([AL]?GPL|MPL|Mozilla|EUPL|CDDL|EPL|proprietary|commercial)", re.IGNORECASE)
_LEFT_OUT = re.compile(
    r"(^|/)(tests?|testing|_?vendor\w*|_vendored|idlelib|lib2to3|site-packages)/|(^|/)(test_|conftest)"
)
_GENERATED = re.compile(r"generated (by|from|automatically)|auto-?generated|do not edit", re.IGNORECASE)
_HEAD = 1000
_BYTES = (400, 200_000)
"""Smallest and largest file."""
_LONGEST_LINE, _MOST_DIGITS = 240, 0.15
"""A file beyond them is a table."""
_WINDOW, _MOST_SEEN = 4, 0.5
"""Lines of a window, and the share of a file's windows that earlier files may have had."""


@dataclass(frozen=True)
class Text:
    """A source file.

    Attributes:
        package: that it belongs to.
        path: inside it.
        content: without the comments that open it.
    """

    package: str
    path: str
    content: str


@dataclass(frozen=True)
class Package:
    """What stands in the list of sources: name, version, licence as the package says it."""

    name: str
    version: str
    license: str
    files: tuple[tuple[str, Path], ...]


def find_package(name: str) -> Package:
    """An installed package and its Python files.

    Raises:
        TrainingError: not installed, or its metadata name no permissive licence.
    """
    if name == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        files = sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
        return Package(name, platform.python_version(), "PSF-2.0", tuple(files))
    try:
        found = distribution(name)
    except PackageNotFoundError as error:
        raise TrainingError(
            f"package {name} is not installed: make .venv/ready installs all that the texts need"
        ) from error
    said = _license(found)
    if not _PERMISSIVE.search(said) or _OTHERS.search(said):
        raise TrainingError(f"package {name} {found.version} must have a permissive licence, its metadata say {said!r}")
    files = sorted(
        (str(path), Path(str(found.locate_file(path)))) for path in found.files or () if path.suffix == ".py"
    )
    return Package(name, found.version, said, tuple(files))


def read_texts(package: Package, most_bytes: int) -> Iterator[Text]:
    """The package's files that are worth reading, in an order of their own, until there are ``most_bytes``."""
    left = most_bytes
    for path, place in sorted(package.files, key=lambda file: hashlib.sha256(file[0].encode()).digest()):
        content = None if _LEFT_OUT.search(path) else _read(place)
        if content is not None and left >= len(content):
            left -= len(content)
            yield Text(package.name, path, content)


class Unrepeated:
    """Passes texts on whose windows of lines were mostly not seen before."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def __call__(self, texts: Iterable[Text], most_seen: float = _MOST_SEEN) -> Iterator[Text]:
        """Those that have at most a share ``most_seen`` of seen windows; their own count as seen from then on."""
        for text in texts:
            windows = _windows(text.content)
            if windows and len(windows & self._seen) <= most_seen * len(windows):
                self._seen |= windows
                yield text


def _license(found: Distribution) -> str:
    """Every word of the metadata on it: the expression, the old field's first line, classifiers."""
    expressions, fields, classifiers = (
        found.metadata.get_all(name) or [] for name in ("License-Expression", "License", "Classifier")
    )
    said = expressions or [field.strip().split("\n")[0] for field in fields]
    said = [*said, *(entry.split(" :: ")[-1] for entry in classifiers if entry.startswith("License"))]
    return "; ".join(dict.fromkeys(filter(None, said)))


def _read(place: Path) -> str | None:
    """A file's text; None for one that nobody wrote for people to read."""
    try:
        content = place.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    is_generated = _GENERATED.search(content[:_HEAD])
    content = _without_opening_comments(content.replace("\r\n", "\n"))
    lines = content.split("\n")
    if not _BYTES[0] <= len(content) <= _BYTES[1] or max(map(len, lines)) > _LONGEST_LINE:
        return None
    if is_generated or sum(map(str.isdigit, content)) > _MOST_DIGITS * len(content):
        return None
    return content


def _without_opening_comments(content: str) -> str:
    lines = content.split("\n")
    first = next((place for place, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    return "\n".join(lines[first:])


def _windows(content: str) -> set[int]:
    lines = [line.strip() for line in content.split("\n")]
    lines = [line for line in lines if len(line) > 3]
    count = max(0, len(lines) - _WINDOW + 1)
    return {int.from_bytes(_digest("\n".join(lines[place : place + _WINDOW])), "big") for place in range(count)}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
