"""No way in and nothing out: what is never read, never run, and never written down."""

from __future__ import annotations

import ast
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import tuner
from tests.real_sweeps import Command, write_spec

SOURCES = sorted(Path(tuner.__file__).parent.rglob("*.py"))
PICKLES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
RUNS_WHAT_IT_READS = {"eval()", "exec()", "compile()", ".system()", ".popen()", ".read_pickle()", ".unsafe_load()"}


def _names(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported, and the functions and methods that are called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call):
            yield f"{node.func.id}()" if isinstance(node.func, ast.Name) else f".{getattr(node.func, 'attr', '')}()"


def test_no_module_reads_pickles_or_runs_what_it_reads():
    forbidden = PICKLES | RUNS_WHAT_IT_READS
    assert [
        (file.name, name) for file in SOURCES for name in _names(ast.parse(file.read_text())) if name in forbidden
    ] == []


@pytest.mark.parametrize("call", ["torch.load(", "yaml.load(", "shell=True", "allow_pickle", "weights_only=False"])
def test_no_line_loads_or_runs_in_a_way_that_can_run_code(call):
    assert [file.name for file in SOURCES if call in file.read_text()] == []


@pytest.mark.timeout(240)
def test_a_secret_of_the_environment_is_written_nowhere(tiny_model_dir, tmp_path):
    """Neither by a sweep that fails a trial and promotes another, nor by Ray beside it, nor by who reads afterwards."""
    secret, budget = "hf_canary4711", {"trials": 2, "tokens_per_trial": 200, "evals_per_trial": 1}
    space = {"train.learning_rate": {"type": "choice", "values": [1e-3, 1e30]}}
    file = write_spec(
        *(tmp_path, tiny_model_dir, "canary"),
        space=space,
        budget=budget,
        search={"enqueue": [{"train.learning_rate": rate} for rate in (1e-3, 1e30)]},
        resources={"max_concurrent_trials": 2},
        promotion={"max_regression": 10.0},
    )
    with tempfile.TemporaryDirectory(prefix="canary-", dir="/tmp") as scratch:  # short: a socket's path has a limit
        keys = dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"), secret)
        commands = [["run", file], ["show", "canary", "--json"], ["results", "canary"], ["verify", "canary"]]
        for number, arguments in enumerate(commands):
            command = Command(*arguments, cwd=tmp_path, TMPDIR=scratch, **keys)
            try:
                assert command.end() == 0, command.lines
            finally:
                command.kill()
            assert number or any("INFEASIBLE" in line or "diverged" in line for line in command.lines)
        written = [path for place in (tmp_path, Path(scratch)) for path in place.rglob("*") if path.is_file()]
        assert any("manifest.json" in path.name for path in written), "nothing was promoted"
        assert any("raylet" in path.name for path in written), "Ray's own logs are not among what is searched"
        assert [str(path) for path in written if secret.encode() in path.read_bytes()] == []
