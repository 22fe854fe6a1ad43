"""The command line on sweeps made by hand: what is printed where, and the exit codes."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
from made_by_hand import TRIALS, Made, make_spec, make_sweep
from typer.testing import CliRunner, Result

import tuner
from tuner.cli import commands
from tuner.errors import TunerError
from tuner.results.requests import Request
from tuner.results.store import Store
from tuner.spec.layout import Root, SweepFolder

TESTS = Path(__file__).parent

PROMOTED = {
    "alias": "production",
    "version": "v2",
    "path": "/runs/models/production/v2",
    "metric": "eval_loss",
    "score_before": 2.6,
    "score_after": 2.6012,
    "baseline": 3.0,
    "incumbent": None,
    "scores": {
        "merged": {"eval_loss": 2.6012, "mean_token_accuracy": 0.4987},
        "trial": {"eval_loss": 2.6, "mean_token_accuracy": 0.5},
        "baseline": {"eval_loss": 3.0, "mean_token_accuracy": 0.41},
        "incumbent": None,
    },
    "forced": False,
    "samples": [{"prompt": "What does copyfileobj do?", "before": "It is a module.", "after": "Copy data from fsrc."}],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    make_sweep(root).set_promoted(PROMOTED)
    return root


def tuner_command(root: Path, *arguments: object) -> Result:
    """Run a command in this process with TUNER_ROOT set; its errors must not escape."""
    result = CliRunner().invoke(commands.app, [str(one) for one in arguments], env={"TUNER_ROOT": str(root)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def process(root: Path, *arguments: object, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "tuner.cli", *map(str, arguments)]
    environment = os.environ | {"TUNER_ROOT": str(root)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_results_start_with_the_base_and_end_with_the_next_command(root):
    result = tuner_command(root, "results", "pydoc-lora")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[0].split() == (
        "trial lr packing r alpha/r eval_loss accuracy vs base tokens time outcome".split()  # noqa: SIM905
    )
    assert lines[1].split() == ["base", "3.0000", "0.4100", "untuned"]
    assert lines[2].split()[:7] == ["*0", "0.00021", "bfd", "16", "2", "2.6000", "0.5000"]
    assert [line.split()[0] for line in lines[2:8]] == ["*0", "2", "1", "5", "3", "4"]
    assert "trial 4 FAILED: worker-lost: the worker died" in lines
    assert lines[-1] == "tuner show pydoc-lora"


def test_results_as_json_are_the_document_of_the_api(root):
    result = tuner_command(root, "results", "pydoc-lora", "--json", "--where", "lora.r>=16", "--top", 2)
    assert json.loads(result.stdout) == tuner.open("pydoc-lora", root).results(where="lora.r>=16", top=2)
    assert result.stderr == ""


def test_results_as_csv_and_parquet_go_to_stdout_or_a_file(root, tmp_path):
    csv = tuner_command(root, "results", "pydoc-lora", "--format", "csv", "--sort", "number").stdout
    assert list(pd.read_csv(io.StringIO(csv))["number"]) == [0, 1, 2, 3, 4, 5]
    target = tmp_path / "trials.parquet"
    result = tuner_command(root, "results", "pydoc-lora", "--format", "parquet", "--output", target)
    assert (result.exit_code, result.stdout) == (0, "")
    assert len(pd.read_parquet(target)) == 6
    piped = tuner_command(root, "results", "pydoc-lora", "--format", "parquet")
    assert len(pd.read_parquet(io.BytesIO(piped.stdout_bytes))) == 6


@pytest.mark.parametrize("command", [("report",), ("results", "--json"), ("results", "--format", "csv")])
def test_a_disk_that_is_full_under_the_output_is_a_sentence(root, command):
    result = tuner_command(root, command[0], "pydoc-lora", *command[1:], "--output", "/dev/full")
    assert result.exit_code == 1
    assert result.stderr == "tuner: cannot write all of /dev/full: its disk is full\n"


def test_what_others_wrote_is_no_html_in_the_report(tmp_path):
    store = make_sweep(tmp_path)
    store.set_promoted({"refused": ["<script>alert(1)</script> ![x](http://u) | `"], "trial": 0})
    page = tuner.open(store.spec.name, tmp_path).report()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; !\\[x\\](http://u) \\| \\`" in page
    assert "<script>" not in page


def test_a_winner_without_its_checkpoint_names_the_next_best_and_nothing_is_promoted(tmp_path):
    store = make_sweep(tmp_path)
    result = tuner_command(tmp_path, "promote", store.spec.name, "0")
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert "trial 0 has no checkpoint at" in said
    assert "no other trial was promoted instead; the next best is trial 2: tuner promote pydoc-lora 2" in said
    assert store.status().promoted is None


def test_a_repository_that_cannot_be_is_refused_before_the_merge(tmp_path):
    store = make_sweep(tmp_path)
    for name in ("a/b/c", "me/", "https://huggingface.co/me/x", "me/x y"):
        result = tuner_command(tmp_path, "promote", store.spec.name, "0", "--push-to-hub", name)
        assert (result.exit_code, f"push_to_hub: got {name!r}" in result.stderr) == (2, True), name


def test_json_goes_to_a_file_when_asked(root, tmp_path):
    result = tuner_command(root, "results", "pydoc-lora", "--json", "--output", tmp_path / "results.json")
    assert result.exit_code == 0
    assert json.loads((tmp_path / "results.json").read_text())["best"] == 0


def test_the_list_of_sweeps_is_newest_first_and_names_what_cannot_be_read(tmp_path):
    make_sweep(tmp_path, TRIALS[:1], name="older")
    make_sweep(tmp_path, TRIALS, name="newer")
    make_sweep(tmp_path, [], name="broken").folder.study.unlink()
    result = tuner_command(tmp_path, "ls")
    assert [line.split()[:4] for line in result.stdout.splitlines()[1:3]] == [
        ["newer", "finished", "5/6", "0"],
        ["older", "finished", "1/6", "0"],
    ]
    assert "broken" in result.stdout
    assert "has lost its records" in result.stderr
    rows = json.loads(tuner_command(tmp_path, "ls", "--json").stdout)
    assert [row["name"] for row in rows] == ["newer", "older", "broken"]
    assert (rows[0]["score"], rows[0]["baseline"], rows[2]["status"]) == (2.6, 3.0, "unreadable")
    assert list(tuner.sweeps(tmp_path)["name"]) == ["newer", "older", "broken"]


UNREADABLE = {
    "empty": lambda sweep: sweep.spec.write_text(""),
    "no_mapping": lambda sweep: sweep.spec.write_text("- a list"),
    "no_text": lambda sweep: sweep.spec.write_bytes(b"\xff\xfe\x00"),
    "newer_key": lambda sweep: sweep.spec.write_text(sweep.spec.read_text() + "\nfuture: 1\n"),
    "newer_inner_key": lambda sweep: sweep.spec.write_text(
        sweep.spec.read_text().replace("objective:", "objective:\n  future: 2")
    ),
    "a_folder": lambda sweep: (sweep.spec.unlink(), sweep.spec.mkdir()),
    "leads_out": lambda sweep: (sweep.spec.unlink(), sweep.spec.symlink_to("/nowhere")),
    "loops": lambda sweep: (shutil.rmtree(sweep.path), sweep.path.symlink_to(sweep.path)),
    "cut": lambda sweep: sweep.study.write_bytes(sweep.study.read_bytes()[:9000]),
    "no_file": lambda sweep: (sweep.study.unlink(), sweep.study.mkdir()),
    "newer_optuna": lambda sweep: sql(sweep, "update alembic_version set version_num = 'v9.9.9.a'"),
    "no_study": lambda sweep: sql(sweep, "delete from studies"),
    "no_json": lambda sweep: sql(sweep, "update trial_user_attributes set value_json = '{'"),
    "no_database": lambda sweep: sweep.spec.write_text(
        sweep.spec.read_text().replace("study: null", "study: nosuch://host/base")
    ),
}
"""What somebody's hand, a disk or a newer version may do to one sweep of many."""


def sql(sweep: SweepFolder, statement: str) -> None:
    with closing(sqlite3.connect(sweep.study)) as connection:
        connection.execute(statement)
        connection.commit()


def test_a_sweep_that_cannot_be_read_hides_no_other(tmp_path):
    """Every walker of a root: `ls`, its JSON, the API, and what is near a name that is not there."""
    for name, damage in UNREADABLE.items():
        damage(make_sweep(tmp_path, TRIALS[:1], name=name).folder)
    make_sweep(tmp_path, TRIALS[:1], name="sound")
    (tmp_path / "sweeps" / "a_file").write_text("no sweep")
    result = tuner_command(tmp_path, "ls")
    assert result.exit_code == 0
    assert ["sound", "finished"] in [line.split()[:2] for line in result.stdout.splitlines()]
    rows = {row["name"]: row for row in json.loads(tuner_command(tmp_path, "ls", "--json").stdout)}
    assert set(rows) == {*UNREADABLE, "sound"}
    assert {name for name, row in rows.items() if row["status"] != "unreadable"} == {"sound"}
    for name in UNREADABLE:
        assert rows[name]["problem"]
        assert f"{name}: " in result.stderr
    assert set(tuner.sweeps(tmp_path)["name"]) == set(rows)
    assert "did you mean sound?" in tuner_command(tmp_path, "status", "sounds").stderr


@pytest.mark.parametrize("name", ["empty", "newer_key", "a_folder", "no_text", "newer_optuna", "no_study", "cut"])
def test_a_command_says_what_is_wrong_with_a_sweep_that_cannot_be_read(name, tmp_path):
    UNREADABLE[name](make_sweep(tmp_path, TRIALS[:1], name=name).folder)
    result = tuner_command(tmp_path, "status", name)
    assert result.exit_code in (1, 2)
    assert result.stderr.startswith("tuner: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("number", [-1, -(2**70), 6, 2**31, 2**63, 2**70])
def test_a_trial_that_is_not_there_is_not_found_whatever_its_number(root, number):
    with pytest.raises(TunerError, match=f"has no trial {number}$"):
        tuner.open("pydoc-lora", root).trial(number)


def test_the_version_is_that_of_the_package(root):
    assert tuner_command(root, "--version").stdout == f"tuner {version('tuner')}\n"


def test_the_next_command_can_be_typed_where_tuner_is_not_on_the_path(root, tmp_path):
    (tmp_path / "tuner").write_text("from tuner.cli import main; main()")
    command = [sys.executable, tmp_path / "tuner", "results", "pydoc-lora"]
    for path, called in (("/usr/bin:/bin", str(tmp_path / "tuner")), (f"{tmp_path}:/usr/bin:/bin", "tuner")):
        (tmp_path / "tuner").chmod(0o755)
        done = subprocess.run(
            command,
            env=os.environ | {"TUNER_ROOT": str(root), "PATH": path},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.splitlines()[-1] == f"{called} show pydoc-lora", done.stderr


def test_the_next_command_names_the_root_that_the_spec_names(tmp_path):
    spec = make_spec(tmp_path / "elsewhere")
    assert commands._root_of(spec, None) == str(tmp_path / "elsewhere")
    assert commands._root_of(spec, "given") == "given"
    assert commands._root_of(make_spec(Path("runs").resolve()), None) is None


def test_show_proposes_to_promote_only_what_can_be_promoted_and_is_not_yet(tmp_path):
    store = make_sweep(tmp_path)
    store.set_promoted(PROMOTED | {"trial": 0})
    for report in store.reports([1]):
        store.forget_adapter(1, report["tokens"])
    proposed = {
        number: tuner_command(tmp_path, "show", "pydoc-lora", number).stdout.splitlines() for number in (0, 1, 2)
    }
    assert {number: lines[-1] for number, lines in proposed.items()} == {
        0: "tuner report pydoc-lora",
        1: "tuner report pydoc-lora",
        2: "tuner promote pydoc-lora 2",
    }


def test_an_empty_root_lists_nothing(tmp_path):
    result = tuner_command(tmp_path, "ls")
    assert (result.exit_code, result.stdout.splitlines()) == (0, [f"no sweeps in {tmp_path} yet", "tuner run FILE"])
    assert json.loads(tuner_command(tmp_path, "ls", "--json").stdout) == []


def test_the_status_is_one_screen(root):
    result = tuner_command(root, "status", "pydoc-lora")
    assert result.exit_code == 0
    for text in [
        "finished",
        "2 COMPLETED, 1 STOPPED",
        "6 asked for",
        "eval_loss 3.0000",
        "best: trial 0",
        "production v2",
    ]:
        assert text in result.stdout, text
    assert len(result.stdout.splitlines()) <= 24
    document = json.loads(tuner_command(root, "status", "pydoc-lora", "--json").stdout)
    assert document["trials"] == {"COMPLETED": 2, "STOPPED": 1, "INTERRUPTED": 1, "INFEASIBLE": 1, "FAILED": 1}
    assert (document["best"], document["score"], document["asked"]) == (0, 2.6, 6)


def test_the_status_of_an_interrupted_sweep_ends_with_resume(tmp_path):
    make_sweep(tmp_path, TRIALS[:1], status="interrupted")
    result = tuner_command(tmp_path, "status", "pydoc-lora")
    assert result.stdout.splitlines()[-1] == "tuner resume pydoc-lora"


def test_show_takes_the_best_and_shows_all_that_is_known(root):
    result = tuner_command(root, "show", "pydoc-lora")
    lines = result.stdout.splitlines()
    assert lines[0] == "trial 0: COMPLETED"
    assert "* lora.r = 16" in lines
    assert "  train.max_length = 256" in lines
    assert "* lora.alpha_ratio = 2" in lines
    assert any(line.split()[:2] == ["*750", "7"] for line in lines)
    assert lines[-1] == "tuner promote pydoc-lora 0"


def test_show_of_a_failed_trial_has_its_reason_and_its_last_words(root):
    result = tuner_command(root, "show", "pydoc-lora", 4)
    assert "with exit code 1" in result.stdout
    assert "Traceback: boom" in result.stdout
    document = json.loads(tuner_command(root, "show", "pydoc-lora", 4, "--json").stdout)
    assert (document["cause"], document["log_tail"]) == ("worker-lost", "Traceback: boom\nKilled")
    assert document["full_config"]["train"]["max_length"] == 256
    assert [report["tokens"] for report in document["reports"]] == [250]


def test_a_report_with_a_nan_is_json_all_the_same(root):
    document = json.loads(tuner_command(root, "show", "pydoc-lora", 3, "--json").stdout, parse_constant=pytest.fail)
    assert [report["eval_loss"] for report in document["reports"]] == [2.5, None]


def test_the_report_is_markdown_on_stdout_or_in_a_file(root, tmp_path):
    page = tuner_command(root, "report", "pydoc-lora").stdout
    assert page.startswith("# Sweep pydoc-lora\n")
    tuner_command(root, "report", "pydoc-lora", "--output", tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == page


def test_the_end_of_a_run_shows_base_best_promotion_and_answers(root, capsys):
    code = commands._print_end(tuner.open("pydoc-lora", root), None)
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert lines[1].split()[0] == "base"
    assert "best: trial 0, eval_loss 2.6000, accuracy 0.5000 (eval_loss -13.3 % against the base)" in lines
    assert "promoted: production v2, /runs/models/production/v2" in lines
    assert (
        "  merged and loaded again: eval_loss 2.6012, accuracy 0.4987; the trial: eval_loss 2.6000, accuracy 0.5000; "
        "the base: eval_loss 3.0000, accuracy 0.4100"
    ) in lines
    assert "  before  It is a module." in lines
    assert "  after   Copy data from fsrc." in lines
    assert lines[-1] == "tuner show pydoc-lora"


def test_the_end_of_a_run_says_why_nothing_was_promoted(tmp_path, capsys):
    make_sweep(tmp_path).set_promoted({"refused": ["not better than the base"], "trial": 0})
    assert commands._print_end(tuner.open("pydoc-lora", tmp_path), None) == 0
    assert "not promoted: not better than the base" in capsys.readouterr().out


def test_a_run_without_a_successful_trial_ends_with_1_and_points_at_a_trial(tmp_path, capsys):
    failed = [Made([], "FAILED", "error", "no such file")]
    make_sweep(tmp_path, failed, status=None).set_status("failed", "no trial completed its budget")
    assert commands._print_end(tuner.open("pydoc-lora", tmp_path), str(tmp_path)) == 1
    printed = capsys.readouterr()
    assert "trial 0 FAILED: error: no such file" in printed.out
    assert "no trial completed its budget" in printed.err
    assert printed.out.splitlines()[-1] == f"tuner show pydoc-lora 0 --root {tmp_path}"


def test_an_interrupted_run_ends_with_130_and_says_how_to_resume(tmp_path, capsys):
    make_sweep(tmp_path, TRIALS[:1], status="interrupted")
    assert commands._print_end(tuner.open("pydoc-lora", tmp_path), None) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "tuner resume pydoc-lora"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["status", "pydoc-lore"], 2, "did you mean pydoc-lora"),
        (["results", "../../etc"], 2, "allowed are"),
        (["show", "pydoc-lora", "99"], 2, "has no trial 99"),
        (["show", "pydoc-lora", "best"], 2, "a valid integer"),
        (["results", "pydoc-lora", "--where", "lora.R>1"], 2, "did you mean lora.r"),
        (["results", "pydoc-lora", "--sort", "eval_los"], 2, "did you mean eval_loss"),
        (["results", "pydoc-lora", "--format", "xlsx"], 2, "xlsx"),
        (["results", "pydoc-lora", "--json", "--format", "csv"], 2, "exclude each other"),
        (["results", "pydoc-lora", "--output", "x"], 2, "--json or --format"),
        (["results", "pydoc-lora", "--top", "0"], 2, "--top"),
        (["results", "pydoc-lora", "--json", "-o", "no/such.json"], 2, "cannot write no/such.json: No such file"),
        (["results", "pydoc-lora", "--format", "csv", "-o", "/"], 2, "cannot write /: Is a directory"),
        (["check", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["cancel", "pydoc-lora"], 1, "nothing to cancel: 'pydoc-lora' is finished"),
        (["cancel", "pydoc-lora", "0"], 1, "nothing to cancel: 'pydoc-lora' is finished"),
        (
            ["add", "pydoc-lora", "lora.r=16"],
            1,
            "'pydoc-lora' is finished, so nothing can be asked of it: `tuner resume",
        ),
        (["add", "pydoc-lora", "lora.R=16"], 2, "did you mean lora.r"),
        (["add", "pydoc-lora", "lora.r=7"], 2, "lora.r: got 7; allowed: 8, 16 or 32"),
        (["add", "pydoc-lora", "lora.r"], 2, "lora.r: got 'lora.r'; allowed: KEY=VALUE, such as lora.r=16"),
        (["add", "pydoc-lora"], 2, "KEY=VALUE"),
        (["extend", "pydoc-lora", "--set", "budget.trials=9"], 1, "with --set budget.trials=N to N trials"),
        (
            ["extend", "pydoc-lora", "--set", "budget.trials=9", "--set", "train.seed=1"],
            2,
            "train.seed: got 1; allowed: 0, as the sweep began: only budget.trials, budget.time_limit, ",
        ),
        (["extend", "pydoc-lora"], 2, "--set"),
        (["rollback", "production"], 2, "nothing is promoted"),
        (["reslts"], 2, "reslts"),
        (["resume", "unknown"], 2, "no sweep 'unknown'"),
    ],
)
def test_what_is_wrong_is_said_on_stderr_with_the_exit_code(root, arguments, code, message):
    result = tuner_command(root, *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_a_bug_keeps_its_traceback(root, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("tuner.api.open", broken)
    result = CliRunner().invoke(commands.app, ["status", "pydoc-lora"], env={"TUNER_ROOT": str(root)})
    assert isinstance(result.exception, ZeroDivisionError)


SPEC = """
name: tiny
model: {name: some/base}
data: {path: data.jsonl}
space:
  train.learning_rate: {type: log_uniform, low: 1.0e-5, high: 1.0e-3}
budget: {trials: 4, tokens_per_trial: 10_000}
"""


def test_check_says_what_a_sound_spec_asks_for_and_what_to_type(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "hello"}\n')
    (tmp_path / "tiny.yaml").write_text(SPEC)
    result = tuner_command(tmp_path, "check", tmp_path / "tiny.yaml", "--set", "budget.trials=6")
    assert result.exit_code == 0, result.stderr
    assert "6 trials of 10,000 tokens" in result.stdout
    assert "train.learning_rate: 1e-05 to 0.001 (log)" in result.stdout
    assert result.stdout.splitlines()[-1] == f"tuner run {tmp_path / 'tiny.yaml'} --set budget.trials=6"
    document = json.loads(tuner_command(tmp_path, "check", tmp_path / "tiny.yaml", "--json").stdout)
    assert (document["valid"], document["problems"], document["spec"]["budget"]["trials"]) == (True, [], 4)


def test_check_says_what_a_sweep_takes_at_most(tiny_model_dir, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "hello"}\n')
    (tmp_path / "tiny.yaml").write_text(SPEC)
    asked = ("check", tmp_path / "tiny.yaml", "--plan", "--set", f"model.name={tiny_model_dir}")
    result = tuner_command(tmp_path, *asked)
    assert result.exit_code == 0, result.stderr
    assert "at most    4 trials, 40,000 tokens trained" in result.stdout
    assert result.stderr == ""
    plan = json.loads(tuner_command(tmp_path, *asked, "--json").stdout)["plan"]
    assert (plan["trials"], plan["tokens"]) == (4, 40_000)
    assert plan["disk_bytes"] > plan["adapter_bytes"] > 0


def test_check_names_every_problem_at_once_and_ends_with_2(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "hello"}\n')
    (tmp_path / "bad.yaml").write_text(SPEC.replace("trials: 4", "trails: 4").replace("name: tiny", "name: ../x"))
    result = tuner_command(tmp_path, "check", tmp_path / "bad.yaml")
    assert result.exit_code == 2
    assert "trials" in result.stderr
    assert "../x" in result.stderr
    as_json = tuner_command(tmp_path, "check", tmp_path / "bad.yaml", "--json")
    document = json.loads(as_json.stdout)
    assert (as_json.exit_code, document["valid"], document["spec"]) == (2, False, None)
    assert len(document["problems"]) >= 2
    assert set(document["problems"][0]) == {"key", "got", "allowed", "nearest"}


def test_root_on_the_command_line_wins_over_the_environment_and_is_carried_on(root, tmp_path):
    result = tuner_command(tmp_path, "results", "pydoc-lora", "--root", root)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == f"tuner show pydoc-lora --root {root}"


def test_a_reader_that_has_seen_enough_is_no_error(root):
    for command in (["report", "pydoc-lora"], ["results", "pydoc-lora", "--json"]):
        writer = process(root, *command)
        assert writer.stdout
        assert writer.stderr
        writer.stdout.close()
        assert writer.stderr.read() == ""
        assert writer.wait(timeout=60) == 0


DRIVER = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.default_int_handler)  # as a driver does
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from made_by_hand import TRIALS, make_sweep
store = make_sweep(Path(sys.argv[1]), TRIALS[:1], None)
print("ready", flush=True)
try:
    time.sleep(120)
except KeyboardInterrupt:
    time.sleep(0.5)
    store.set_status("interrupted")
    sys.exit(130)
"""


def test_cancel_ends_the_driver_and_waits_until_it_has(tmp_path):
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, tmp_path, TESTS], stdout=subprocess.PIPE, text=True)
    assert driver.stdout
    assert driver.stdout.readline() == "ready\n"
    cancel = process(tmp_path, "cancel", "pydoc-lora")
    assert driver.wait(timeout=60) == 130
    out, err = cancel.communicate(timeout=60)
    assert (cancel.returncode, out.splitlines()) == (0, ["pydoc-lora is cancelled", "tuner resume pydoc-lora"]), err
    again = tuner_command(tmp_path, "cancel", "pydoc-lora")
    assert (again.exit_code, again.stderr) == (1, "tuner: nothing to cancel: 'pydoc-lora' is cancelled\n")


def test_of_a_sweep_on_another_host_with_its_records_it_is_said_where_it_runs(tmp_path, monkeypatch):
    store = make_sweep(tmp_path, TRIALS[-1:], status=None)
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    for command in (["cancel"], ["cancel", 0], ["add", "lora.r=8"], ["extend", "--set=budget.trials=9"]):
        result = tuner_command(tmp_path, command[0], "pydoc-lora", *command[1:])
        assert result.exit_code == 1
        assert f"(pid {os.getpid()}): say it there, or with --address" in result.stderr
    assert store.status().status == "running"


@contextmanager
def answering(store: Store, answers: dict[str, object]) -> Iterator[list[Request]]:
    """A driver that gives the same answer to every request of a kind; yields those that it has had."""
    had: list[Request] = []
    over = threading.Event()

    def drive() -> None:
        while not over.wait(0.05):
            for request in store.requests.take("cancel", "add", "extend"):
                had.append(request)
                answer = answers[request.kind]
                refusal = str(answer) if isinstance(answer, Exception) else None
                store.requests.answer(request.id, None if refusal else answer, refusal)

    driver = threading.Thread(target=drive)
    driver.start()
    try:
        yield had
    finally:
        over.set()
        driver.join()


def test_what_is_asked_of_a_running_sweep_is_its_driver_s_to_answer(tmp_path):
    store = make_sweep(tmp_path, status=None)
    with answering(store, {"cancel": None, "add": 6, "extend": None}) as had:
        cancelled = tuner_command(tmp_path, "cancel", "pydoc-lora", 5)
        added = tuner_command(tmp_path, "add", "pydoc-lora", "lora.r=16", "train.packing=none", "lora.alpha_ratio=0.5")
        extended = tuner_command(
            tmp_path, "extend", "pydoc-lora", "--set", "budget.trials=9", "--set", "budget.tokens=null"
        )
    assert [(one.kind, one.value) for one in had] == [
        ("cancel", 5),
        ("add", {"lora.r": 16, "train.packing": "none", "lora.alpha_ratio": 0.5}),
        ("extend", ["budget.trials=9", "budget.tokens=null"]),
    ]
    assert cancelled.stdout.splitlines() == ["trial 5 of pydoc-lora is RUNNING", "tuner show pydoc-lora 5"]
    assert added.stdout.splitlines() == ["trial 6 of pydoc-lora will try it", "tuner status pydoc-lora"]
    assert (extended.exit_code, extended.stdout) == (0, "tuner status pydoc-lora\n")


def test_what_a_driver_refuses_ends_with_its_reason(tmp_path):
    store = make_sweep(tmp_path, status=None)
    with answering(store, {"add": TunerError("none of the 6 trials is left for it")}):
        refused = tuner_command(tmp_path, "add", "pydoc-lora", "lora.r=16")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr == "tuner: none of the 6 trials is left for it\n"


def test_a_trial_that_is_over_or_unknown_is_not_asked_for(tmp_path):
    make_sweep(tmp_path, status=None)
    over = tuner_command(tmp_path, "cancel", "pydoc-lora", 0)
    assert (over.exit_code, over.stderr.splitlines()[-1]) == (1, "tuner: nothing to cancel: trial 0 is COMPLETED")
    assert tuner_command(tmp_path, "cancel", "pydoc-lora", 99).exit_code == 2


@pytest.mark.parametrize(
    ("command", "words"), [("add", ["lora.r=16", "train.packing=none"]), ("extend", ["--set=a=1", "--set=b=2"])]
)
def test_a_command_for_a_cluster_is_said_there_as_it_was_said_here(command, words, monkeypatch):
    said = []
    monkeypatch.setattr("tuner.execution.dashboard.connect", lambda *_: None)

    @contextmanager
    def called(there: object, words: list[str], tell: object) -> Iterator[tuple[int, str]]:
        said.append(words)
        yield 0, ""

    monkeypatch.setattr("tuner.execution.jobs.called", called)
    done = CliRunner().invoke(commands.app, [command, "demo", *words, "--address", "http://head:8265"])
    (there,) = said
    assert done.exit_code == 0
    assert [word for word in there if word != "--"] == (
        ["add", "demo", *words] if command == "add" else ["extend", *words, "demo"]
    )


def test_ctrl_c_while_a_sweep_runs_ends_with_130_and_the_command_to_resume(tmp_path):
    code = (
        "import sys, time, tuner.api, tuner.cli\n"
        "def wait(*arguments, **options):\n"
        "    print('ready', flush=True); time.sleep(120)\n"
        "tuner.api.resume = wait\n"
        "sys.argv = ['tuner', 'resume', 'pydoc-lora']\n"
        "tuner.cli.main()\n"
    )
    make_sweep(tmp_path, TRIALS[:1], status="interrupted")
    environment = os.environ | {"TUNER_ROOT": str(tmp_path)}
    run = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout
    assert run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert err.splitlines()[-1] == "tuner resume pydoc-lora"


def test_the_api_reads_what_the_driver_wrote(root):
    sweep = tuner.open("pydoc-lora", root)
    assert (sweep.name, sweep.status, sweep.baseline["eval_loss"]) == ("pydoc-lora", "finished", 3.0)
    assert sweep.best is not None
    assert sweep.best.report is not None
    assert (sweep.best.number, sweep.best.report.tokens) == (0, 750)
    assert sweep.best.adapter_path == "/runs/tokens-750"
    assert list(sweep.trials(sort="number", top=2)["lora.r"]) == [16, 8]
    assert len(sweep.reports()) == sum(len(made.losses) for made in TRIALS)
    assert sum(sweep.importances().values()) == pytest.approx(1)
    assert repr(sweep) == "<Sweep pydoc-lora finished>"


def test_nothing_can_be_promoted_while_the_sweep_runs_or_without_a_best(tmp_path):
    running = make_sweep(tmp_path, TRIALS[:1], status=None, name="running")
    result = tuner_command(tmp_path, "promote", running.spec.name)
    assert (result.exit_code, "is running" in result.stderr) == (1, True)
    make_sweep(tmp_path, TRIALS[1:2], name="stopped")
    result = tuner_command(tmp_path, "promote", "stopped")
    assert (result.exit_code, "has no best trial" in result.stderr) == (2, True)
    assert Store.open(Root(tmp_path).sweep("stopped")).status().promoted is None
