"""What a running sweep looks like on a terminal of any width, and in a log."""

from __future__ import annotations

import io

import pytest
from made_by_hand import BUDGET, DATA, TRIALS, make_sweep
from rich.console import Console

from tuner.cli.live import Lines, LiveTable, watching
from tuner.cli.screens import from_here, show_table
from tuner.results.text import Column

BASE = {"eval_loss": 3.0, "mean_token_accuracy": 0.41}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_sweep(tmp_path_factory.mktemp("runs"))


def play(display, store):
    """Everything a sweep tells its display, in order."""
    display.stage("Loading some/base")
    for done in range(0, 1301, 100):
        display.progress("Tokenising", done, 1300)
    display.prepared(DATA, BASE, BUDGET)
    display.stage("Searching")
    records = store.trials()
    for record in records:
        display.trial_started(record.number, record.point)
        for report in record.reports:
            display.trial_reported(record.number, report)
        if record.outcome != "RUNNING":
            display.trial_finished(record)
    return records


def screen(table: LiveTable, console: Console) -> list[str]:
    console.print(table.render())
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    return printed.splitlines()


def make_table(store, width: int, height: int = 40, earlier=()) -> tuple[LiveTable, Console]:
    console = Console(file=io.StringIO(), width=width, height=height, highlight=False)
    return LiveTable(store.spec, earlier, console), console


def test_budgets_that_are_extended_meanwhile_are_said_and_counted(store):
    more = store.spec.model_copy(update={"budget": store.spec.budget.model_copy(update={"trials": 40})})
    table, console = make_table(store, 100)
    play(table, store)
    table.extended(more)
    assert "5 of 40 trials over" in screen(table, console)[0]
    log = Console(file=io.StringIO(), width=100)
    lines = Lines(store.spec, log)
    lines.extended(more)
    assert "budget.trials is 40 from now on, was 6" in log.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_every_trial_keeps_one_line_at_any_width(store, width):
    table, console = make_table(store, width)
    play(table, store)
    lines = screen(table, console)
    assert all(len(line) <= width for line in lines)
    rows = lines[2 : 2 + len(TRIALS)]
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert [row.split()[-1] for row in rows] == [made.outcome.lower() for made in TRIALS]
    assert all("eval_loss" in line for line in lines[1:2])


def test_80_columns_have_room_for_four_searched_keys_bar_and_scores(store):
    table, console = make_table(store, 80)
    play(table, store)
    lines = screen(table, console)
    assert lines[1].split() == ["trial", "lr", "packing", "r", "alpha/r", "budget", "eval_loss", "accuracy", "state"]
    assert lines[2].split() == ["0", "0.00021", "bfd", "16", "2", "━" * 8, "2.6000", "0.5000", "completed"]
    assert lines[3].split()[5] == "━━━━····"
    assert "untuned base: eval_loss 3.0000, accuracy 0.4100" in lines
    assert "best so far: trial 0, eval_loss 2.6000, accuracy 0.5000 (-13.3 %)" in lines
    assert "5 of 6 trials over" in lines[0]


def test_what_was_dropped_for_room_is_said(store):
    table, console = make_table(store, 60)
    play(table, store)
    assert "not shown: budget, accuracy" in screen(table, console)


def test_a_low_terminal_shows_what_runs_and_the_best(store):
    table, console = make_table(store, 100, height=10)
    play(table, store)
    lines = screen(table, console)
    assert len(lines) <= 10
    assert [line.split()[0] for line in lines[2:5]] == ["0", "2", "5"]
    assert any(line.startswith("not shown: 3 trials") for line in lines)


def test_progress_is_shown_until_the_next_stage(store):
    table, console = make_table(store, 80)
    table.progress("Tokenising", 650, 1300)
    assert "650 of 1,300" in screen(table, console)[0]
    table.stage("Searching")
    after, console = screen(table, console), console
    assert "Searching" in after[-1]
    assert "650" not in after[-1]


def test_a_resumed_sweep_shows_its_finished_trials_at_once(store):
    table, console = make_table(store, 100, earlier=store.trials())
    lines = screen(table, console)
    assert "5 of 6 trials over" in lines[0]
    assert [line.split()[0] for line in lines[2:7]] == ["0", "1", "2", "3", "4"]


def test_a_log_gets_one_line_per_event(store):
    console = Console(file=io.StringIO(), width=80, highlight=False)
    display = Lines(store.spec, console)
    records = play(display, store)
    display.sweep_finished(records, records[0])
    lines = [line.partition("] ")[2] for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert [line for line in lines if line.startswith("Tokenising")] == [
        "Tokenising: 400 of 1,300",
        "Tokenising: 700 of 1,300",
        "Tokenising: 1,000 of 1,300",
        "Tokenising: 1,300 of 1,300",
    ]
    for text in [
        "prompt_completion rows: 1,363 read, 1,300 to train on, 60 to evaluate on, 12 cut at max_length, "
        "1 in both, not trained on; 110,243 tokens",
        "dropped: 2 empty (rows 3, 9)",
        "untuned base: eval_loss 3.0000, accuracy 0.4100; 1,000 tokens a trial",
        "trial 0 starts: lr=0.00021 packing=bfd r=16 alpha/r=2",
        "trial 0 at 750 tokens: eval_loss 2.6000, accuracy 0.5000, 310 tokens/s",
        "trial 3 INFEASIBLE, eval_loss 2.5000, accuracy 0.5000 (diverged: eval_loss is nan after 503 tokens)",
        "6 trials are over; the best is 0",
    ]:
        assert text in lines, text


def test_quiet_says_nothing_and_a_pipe_gets_lines(store, capfd):
    with watching(store.spec, quiet=True) as display:
        play(display, store)
    assert capfd.readouterr().err == ""
    with watching(store.spec) as display:
        play(display, store)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "trial 0 COMPLETED" in printed.err
    assert "\x1b" not in printed.err


def test_a_table_that_is_piped_is_whole_and_plain(capfd):
    show_table([Column("key", ["a" * 300], right=False), Column("value", ["1"], drop=1)], ["bold"])
    assert capfd.readouterr().out == f"{'key':<300}  value\n{'a' * 300}      1\n"


def test_a_stage_is_said_once_however_often_it_is_reported(store):
    console = Console(file=io.StringIO(), width=80, highlight=False)
    display = Lines(store.spec, console)
    for stage in ("Preparing", "Reading", "Reading", "Loading", "Reading"):
        display.stage(stage)
    said = [line.partition("] ")[2] for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert said == ["Preparing", "Reading", "Loading", "Reading"]


def test_a_line_that_is_longer_than_the_terminal_is_cut_not_wrapped(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    columns = [Column("number", ["1"]), *(Column(f"column-{n}", ["x" * 20], drop=n) for n in range(1, 6))]
    show_table(columns, [""])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "not shown" in lines[-1]
    assert "…" in lines[-1]


def test_a_path_below_the_working_directory_is_shown_from_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert from_here(str(tmp_path / "runs" / "adapter")) == "runs/adapter"
    assert from_here("/elsewhere/adapter") == "/elsewhere/adapter"
    assert from_here(None) is None


def test_events_are_enough_to_draw_from_without_records(store):
    table, console = make_table(store, 120)
    table.trial_started(7, {"lora.r": 64})
    line = screen(table, console)[2]
    assert line.split() == ["7", "64", "········", "running"]
