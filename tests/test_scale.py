"""The committed measurements of scale: their table is made from them, and the README has it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.scale import SIZES, text
from tests.benchmarks.table import RESULTS


def test_the_readme_has_the_table_of_the_committed_measurements():
    results = json.loads((RESULTS / "scale.json").read_text())
    table = (RESULTS / "scale.txt").read_text()
    assert [result["trials"] for result in results] == list(SIZES)
    assert text(results) == table
    assert f"```text\n{table}```" in (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_a_trial_of_a_thousand_costs_no_more_than_twice_one_of_a_hundred():
    hundred, thousand = json.loads((RESULTS / "scale.json").read_text())[1:]
    each = [(one["wall_s"] - one["parts_s"].get("TPE", 0)) / one["results"] for one in (hundred, thousand)]
    assert each[1] < 2 * each[0]
