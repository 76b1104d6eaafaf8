"""Prints the lowest versions that pyproject.toml admits of what the runtime and its server need, for ``pip -c``."""

import re
import tomllib
from pathlib import Path

EXTRAS = ("cpu", "cuda", "serve")


def lowest(requirement: str) -> str:
    """``name==version`` of a requirement with a lower bound.

    Raises:
        ValueError: it has none.
    """
    read = re.fullmatch(r"([\w-]+)(?:\[[^]]*\])?>=([\w.]+)(?:,<[\w.]+)?", requirement)
    if read is None:
        raise ValueError(f"{requirement!r} must be NAME>=LOWEST or NAME>=LOWEST,<NEXT")
    return "==".join(read.groups())


def main() -> None:
    """Prints a line for each package."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [each for name in EXTRAS for each in project["optional-dependencies"][name]]
    print("\n".join(map(lowest, [*project["dependencies"], *extras])))


if __name__ == "__main__":
    main()
