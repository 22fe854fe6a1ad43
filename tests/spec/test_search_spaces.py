"""Every sweep that ships is right, and says how to launch it and why its ranges are what they are."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tuner.spec.load import check_file, dump_spec, load_spec
from tuner.spec.schema import SCHEMA
from tuner.spec.text import parse_yaml

FOLDER = Path(__file__).parents[2] / "search_spaces"
SHIPPED = sorted(FOLDER.glob("*.yaml"))


def test_three_sweeps_ship():
    assert [file.name for file in SHIPPED] == [
        "demo.yaml",
        "qwen2.5-0.5b-lora.yaml",
        "qwen2.5-7b-instruct-qlora.yaml",
    ]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_a_shipped_sweep_loads_and_survives_a_round_trip(file, tmp_path):
    spec, problems = check_file(file)
    assert problems == []
    copy = tmp_path / "spec.yaml"
    copy.write_text(dump_spec(spec))
    assert load_spec(copy) == spec


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_a_shipped_sweep_fits_the_schema_that_it_names(file):
    import jsonschema

    text = file.read_text()
    named = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert (file.parent / named).resolve() == SCHEMA.resolve()
    jsonschema.validate(parse_yaml(text), json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_a_shipped_sweep_says_its_launch_line_and_a_reason_for_every_range(file):
    lines = file.read_text().splitlines()
    assert any(line.startswith(f"#   tuner run search_spaces/{file.name}") for line in lines)
    for key in load_spec(file).space:
        at = next(index for index, line in enumerate(lines) if line.startswith(f"  {key}:"))
        assert lines[at - 1].lstrip().startswith("#"), key


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_the_advice_of_a_shipped_sweep_can_be_followed(file):
    comments = [line for line in file.read_text().splitlines() if line.startswith("#")]
    for line in comments:
        problems = check_file(file, re.findall(r"--set (\S+?)[,;]?(?=\s|$)", line))[1]
        elsewhere = [problem for problem in problems if problem.key == "data.path" or "pip install" in problem.allowed]
        assert problems == elsewhere, line
    assert {line.split()[2] for line in comments if line.startswith("#   tuner ")} <= {"check", "run"}
    for trials in (2, 4):
        assert check_file(file, [f"budget.trials={trials}"])[1] == []


def test_a_copy_of_the_demo_elsewhere_finds_no_data_and_says_so(tmp_path):
    copy = shutil.copy(FOLDER / "demo.yaml", tmp_path)
    (problem,) = check_file(copy)[1]
    assert problem.key == "data.path"
