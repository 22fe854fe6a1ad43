"""Every row of the matrix has a test and figures, and the README has the table that is made from them."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.faults.conftest import third_of
from tests.faults.matrix import ROWS, read, with_matrix
from tests.faults.without import DEFENCES
from tests.faults.without import read as read_without

ROOT = Path(__file__).parents[2]


def noted() -> dict[str, set[str]]:
    """The tests that note figures of each row, as `file::name`."""
    tests: dict[str, set[str]] = {}
    for file in ROOT.glob("tests/faults/test_*.py"):
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef) or not function.name.startswith("test_"):
                continue
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "note":
                    assert isinstance(call.args[0], ast.Constant), f"{function.name}: name the row as it stands in ROWS"
                    tests.setdefault(call.args[0].value, set()).add(f"{file.relative_to(ROOT)}::{function.name}")
    return tests


def test_every_row_has_a_test_and_every_test_that_notes_something_is_of_a_row():
    assert set(noted()) == set(ROWS)


def test_every_row_has_figures_and_they_are_those_of_tests_that_there_are():
    tests = noted()
    for row in ROWS:
        measured = {test.partition("[")[0] for test in read(row)}
        assert measured, f"{row}: nothing is measured, run `make figures`"
        assert measured == tests[row], row


def test_every_row_has_failed_without_a_defence_and_each_can_still_be_taken_away():
    assert {defence.row for defence in DEFENCES} == set(ROWS)
    said = read_without()
    for defence in DEFENCES:
        for file, text, _ in defence.edits:
            code = (ROOT / "tuner" / file).read_text(encoding="utf-8")
            assert code.count(text) == 1, f"{defence.row}, {defence.missing}: {text!r} stands not once in {file}"
        assert said.get(defence.title, "passed").strip() != "passed", "run `python -m tests.faults.without`"


def test_the_thirds_that_ci_runs_are_together_everything_once():
    for count in (0, 1, 2, 3, 80):
        thirds = [list(third_of(count, commits)) for commits in (300, 301, 302)]
        assert sorted(index for third in thirds for index in third) == list(range(count))
        assert max(map(len, thirds)) - min(map(len, thirds)) <= 1


def test_nothing_was_lost_or_duplicated():
    for row in ROWS:
        for test, figures in read(row).items():
            assert (figures["lost"], figures["duplicated"]) == (0, 0), test
            assert (figures["difference"] or 0) <= 1e-5, test


def test_the_readme_has_the_table_of_the_committed_figures():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_matrix(page) == page, "run `make readme`"
