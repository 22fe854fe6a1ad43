"""The README says what is so: what it takes from the code is fresh, and what it names exists."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

import tuner
from tuner import errors
from tuner.cli.commands import EXIT_INTERRUPTED, app
from tuner.results import query
from tuner.spec.load import parse_spec
from tuner.spec.reference import with_reference
from tuner.spec.text import parse_yaml
from tuner.spec.trial import Outcome

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def table(first_cell: str) -> dict[str, list[str]]:
    """The rows of the table whose header begins so, by their first cell."""
    found = re.search(rf"^\| {re.escape(first_cell)} \|.*\n\| ---.*\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert found, first_cell
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[1].splitlines()]
    return {row[0].strip("` |"): row for row in rows}


def test_the_spec_reference_is_fresh():
    assert with_reference(README) == README, "run `make readme`"


def test_the_json_document_is_the_one_that_its_function_describes():
    assert f"```text\n{inspect.getdoc(query.document)}\n```" in README


def tree() -> Iterator[Path]:
    """Every path that the tree names; several may share a line, and an indented one lies in the folder above it."""
    (block,) = [block for block in blocks("text") if block.startswith("tuner/\n")]
    folder = Path()
    for line in block.splitlines():
        depth = len(line) - len(line.lstrip())
        names = re.match(r"[\w.]+/?(, [\w.]+/?)*", line.strip())
        assert names, line
        for name in names[0].split(", "):
            path = {0: Path(), 2: Path("tuner"), 4: folder}[depth] / name
            yield path
        if name.endswith("/") and depth < 4:
            folder = path


def test_every_path_of_the_tree_exists_and_no_folder_is_left_out():
    named = list(tree())
    assert [path for path in named if not (ROOT / path).exists()] == []
    stations = {path.parent.relative_to(ROOT) for path in ROOT.glob("tuner/*/__init__.py")}
    assert stations <= set(named)


def test_every_module_of_the_picture_exists():
    (picture,) = [block for block in blocks("text") if "SweepSpec  what was asked" in block]
    modules = re.findall(r"[a-z]+/[a-z]+\.py", picture)
    assert len(modules) > 10
    assert [module for module in modules if not (ROOT / "tuner" / module).is_file()] == []


def test_every_command_has_its_row_and_every_example_is_one_that_the_command_line_takes():
    assert {row.split()[1] for row in table("command")} == set(COMMANDS)
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("tuner ")]
    assert len(lines) > 8
    for line in lines:
        words = shlex.split(line.partition(" | ")[0], comments=True)[1:]
        command = COMMANDS[words[0]]
        command.make_context(words[0], words[1:])  # raises for an option or argument that is not there


def test_every_exit_code_is_in_its_table():
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.TunerError)]
    assert {int(code) for code in table("exit code")} == {0, EXIT_INTERRUPTED, *(kind.exit_code for kind in kinds)}


def test_every_outcome_is_in_its_table():
    assert set(table("outcome")) == set(Outcome.__args__)  # type: ignore[attr-defined]


def test_every_environment_variable_that_is_read_is_named():
    for file in ROOT.glob("tuner/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            read = isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv")
            if read and isinstance(node.args[0], ast.Constant):  # type: ignore[attr-defined]
                assert f"`{node.args[0].value}`" in README, file  # type: ignore[attr-defined]


def test_the_small_spec_is_right(tmp_path):
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 3)
    (text,) = blocks("yaml")
    assert parse_spec(parse_yaml(text), tmp_path).name == "my-first-sweep"


@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_examples_name_what_there_is(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "tuner":
                assert node.attr in tuner.__all__
            if node.value.id == "sweep":
                assert hasattr(tuner.Sweep, node.attr)


def test_every_link_leads_somewhere():
    titles = re.findall(r"^#+ (.*)", README, re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_no_path_of_one_machine_is_in_it():
    assert not re.search(r"/(home|root|work|Users)/", README)
    assert os.path.expanduser("~") + "/" not in README
