"""The distribution as a user gets it: what sdist and wheel carry, and that every kind of installation works.

The artefacts are built from a copy of this checkout, with planted files that they must contain. Each
installation goes into an environment of its own that sees torch and the other dependencies of the running one through a
path file: Python does not execute path files found through another, so this checkout's own installation stays unseen.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("dinov2_fast", "kernels", "csrc", "docs", "tests", "bench", "examples")
PLANTED = ("kernels/configs/planted.json", "csrc/planted.cu", "csrc/planted.cuh", "dinov2_fast/ops/planted.json")

CHECKS = """
import importlib.metadata, importlib.resources, importlib.util, sys
import dinov2_fast, dinov2_fast.kernels, dinov2_fast.configs
assert importlib.metadata.version("dinov2_fast") == dinov2_fast.__version__
assert (importlib.resources.files("dinov2_fast") / "py.typed").is_file()
assert (importlib.resources.files("dinov2_fast.kernels") / "configs" / "planted.json").is_file()
print(dinov2_fast.__file__)
print(importlib.util.find_spec("kernels"))
"""


class Artefacts(NamedTuple):
    sdist: Path
    wheel: Path
    log: str


def run(*command: object, cwd: Path) -> str:
    """Standard output and error of a command that must succeed, in an environment that does not point back here."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["CUDA_HOME"] = "/there is no nvcc here"  # compiling the extension would take minutes
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("source") / "checkout"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", ".*_cache", "*.so")
    )
    for name in PLANTED:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("{}", encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def artefacts(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    log = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return Artefacts(sdist, wheel, log)


def make_environment(folder: Path) -> Path:
    """A new environment that sees the dependencies of this one, but not what is installed here from this checkout."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return folder / "bin"


def pip_install(programs: Path, *what: object) -> None:
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", programs / "python", "install", *options, *what, cwd=programs)


def check_commands(programs: Path, cwd: Path) -> None:
    for command in ([programs / "dinov2-fast"], [programs / "python", "-m", "dinov2_fast"]):
        assert "usage: dinov2-fast" in run(*command, "--help", cwd=cwd)


def shipped_files(source: Path) -> set[str]:
    files = (path for top in SOURCES for path in (source / top).rglob("*") if path.is_file())
    return {path.relative_to(source).as_posix() for path in files if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_the_sdist_carries_every_source_file(source: Path, artefacts: Artefacts) -> None:
    with tarfile.open(artefacts.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    top = {"setup.py", "pyproject.toml", "constraints.txt", "Makefile", "hubconf.py", "LICENSE", "README.md"}
    assert (shipped_files(source) | top | {"CHANGELOG.md", "CONTRIBUTING.md"}) - names == set()
    assert not [name for name in names if "__pycache__" in name or name.startswith(".venv")]


@pytest.mark.slow
def test_the_wheel_carries_the_package_and_nothing_beside_it(source: Path, artefacts: Artefacts) -> None:
    with zipfile.ZipFile(artefacts.wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {
        "dinov2_fast",
        artefacts.wheel.name.split("-py3")[0] + ".dist-info",
    }
    expected = {
        name if name.startswith("dinov2_fast/") else f"dinov2_fast/{name}"
        for name in shipped_files(source)
        if name.startswith(("dinov2_fast/", "kernels/", "csrc/"))
    }
    assert expected - names == set()
    assert "dinov2_fast: pure Python build, without the CUDA extension: nvcc is not installed" in artefacts.log


@pytest.mark.slow
def test_building_warns_of_nothing(artefacts: Artefacts) -> None:
    harmless = ("no previously-included files matching", "byte-compiling is disabled")
    warnings = [line for line in artefacts.log.splitlines() if "warning" in line.lower()]
    assert [line for line in warnings if not any(words in line for words in harmless)] == []


@pytest.mark.slow
def test_the_wheel_works_from_another_folder(artefacts: Artefacts, tmp_path: Path) -> None:
    programs = make_environment(tmp_path / "environment")
    pip_install(programs, artefacts.wheel)
    module, kernels = run(programs / "python", "-c", CHECKS, cwd=tmp_path).splitlines()
    assert Path(module).is_relative_to(tmp_path / "environment")
    assert kernels == "None"
    check_commands(programs, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "strict", "compat"])
def test_an_editable_installation_works(mode: str, source: Path, tmp_path: Path) -> None:
    checkout = shutil.copytree(source, tmp_path / "checkout")
    programs = make_environment(tmp_path / "environment")
    setting = [] if mode == "default" else ["--config-settings", f"editable_mode={mode}"]
    pip_install(programs, *setting, "--editable", checkout)
    module, kernels = run(programs / "python", "-c", CHECKS, cwd=tmp_path).splitlines()
    assert Path(module).is_relative_to(checkout)
    if mode != "compat":  # which puts the whole checkout on sys.path
        assert kernels == "None"
    check_commands(programs, tmp_path)


@pytest.mark.slow
def test_a_checkout_works_without_an_installation(source: Path, tmp_path: Path) -> None:
    programs = make_environment(tmp_path / "environment")
    output = run(programs / "python", "-c", "import dinov2_fast.kernels as k; print(*k.__path__)", cwd=source)
    assert Path(output.strip()) == source / "kernels"
    assert "usage: dinov2-fast" in run(programs / "python", "-m", "dinov2_fast", "--help", cwd=source)


def test_the_environment_is_the_one_that_constraints_describe() -> None:
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("constraints.txt describes .venv; these tests run in another environment on purpose")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    installed = {pin: version_of(pin.name) for pin in pins if pin.marker is None or pin.marker.evaluate()}
    wrong = {str(pin): version for pin, version in installed.items() if not pin.specifier.contains(version)}
    assert wrong == {}, "run `make setup`"


def version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "0"


def test_the_hooks_run_the_versions_that_constraints_name() -> None:
    hooks = re.findall(r"\[([\w-]+==[\d.]+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(hooks) == 3
    assert {*hooks} <= {*(ROOT / "constraints.txt").read_text().splitlines()}
