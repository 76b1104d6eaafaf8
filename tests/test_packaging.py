"""What an installation brings: the wheel's content, the lock's pins, the version."""

import re
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

import melt_runtime
from melt_models.training.recipe_files import RECIPES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]["find"]
SOURCES = {
    name: folder
    for name in (pattern.removesuffix("*") for pattern in PACKAGES["include"])
    for folder in PACKAGES["where"]
    if (ROOT / folder / name).is_dir()
}
"""The folder that each package lies in."""
SERVED = [
    {"python_full_version": f"3.{minor}.0", "python_version": f"3.{minor}", **platform}
    for minor in (11, 12, 13)
    for platform in (
        {"sys_platform": "linux", "platform_machine": "x86_64"},
        {"sys_platform": "linux", "platform_machine": "aarch64"},
        {"sys_platform": "darwin", "platform_machine": "arm64"},
        {"sys_platform": "win32", "platform_machine": "AMD64"},
    )
]
OPEN = {"pyarrow"}
"""Packages whose every release is a major one: their ranges have no end."""


def tracked() -> list[str]:
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of the files that git knows, built where it cannot leave anything in the tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    parts = (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        *(f"{folder}/{name}/".removeprefix("./") for name, folder in SOURCES.items()),
    )
    for name in tracked():
        if name.startswith(parts):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, capture_output=True, check=True)
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_carries_every_file_of_its_packages(wheel):
    prefixes = {f"{folder}/{name}/".removeprefix("./"): f"{name}/" for name, folder in SOURCES.items()}
    expected = {
        short + name.removeprefix(long)
        for name in tracked()
        for long, short in prefixes.items()
        if name.startswith(long)
    }
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected
    assert len(SOURCES) == len(PACKAGES["include"])
    for name in SOURCES:
        assert f"{name}/py.typed" in found
    assert {f"melt_models/recipes/{path.name}" for path in RECIPES.glob("*.toml")} <= found
    assert "melt_runtime/demo/melt-tiny/manifest.json" in found


def test_the_wheel_says_what_it_is(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = wheel.read(name).decode()
    for line in (
        f"Version: {melt_runtime.__version__}",
        "License-Expression: Apache-2.0",
        "Classifier: Typing :: Typed",
    ):
        assert f"\n{line}\n" in metadata
    assert "\nProject-URL: " in metadata
    assert name.replace("METADATA", "licenses/LICENSE") in wheel.namelist()
    assert "torch" not in re.findall(r"^Requires-Dist: ([\w-]+)[^;]*$", metadata, re.MULTILINE)


def requirements() -> list[Requirement]:
    """What the package and its extras ask for, of others."""
    project = PROJECT["project"]
    found = map(Requirement, chain(project["dependencies"], *project["optional-dependencies"].values()))
    return [requirement for requirement in found if requirement.name != project["name"]]


def pins(*names: str) -> list[Requirement]:
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if not line.startswith("#")]


def test_every_requirement_is_locked_within_its_range_on_every_platform():
    locked = pins("constraints.txt")
    for requirement in [*map(Requirement, PROJECT["build-system"]["requires"]), *requirements()]:
        for place in SERVED:
            found = [
                pin for pin in locked if pin.name == requirement.name and (not pin.marker or pin.marker.evaluate(place))
            ]
            assert len(found) == 1, f"{requirement.name} on {place}: run make lock"
            version = str(found[0].specifier).removeprefix("==")
            assert requirement.specifier.contains(version), f"{requirement}, locked {version}: run make lock"


def test_the_lock_pins_versions_only_and_no_cuda_where_there_is_none():
    for pin in pins("constraints.txt", "constraints-cuda.txt", "constraints-torch.txt"):
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin
        assert pin.url is None
    assert not [pin.name for pin in pins("constraints.txt") if re.match("cuda|nvidia|triton", pin.name)]
    assert pins("constraints-torch.txt")[0] in pins("constraints.txt")


def test_ranges_end_before_the_next_major_release():
    for requirement in requirements():
        if requirement.name not in OPEN:
            assert any(part.operator == "<" for part in requirement.specifier), requirement


@pytest.mark.parametrize(
    "command", [["-m", "melt_runtime", "--version"], ["-c", "import melt_runtime as m; print('melt', m.__version__)"]]
)
def test_the_version_can_be_asked_for(command):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    assert done.stdout == f"melt {melt_runtime.__version__}\n"
