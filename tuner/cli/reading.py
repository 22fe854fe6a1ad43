"""The commands that read: whatever a sweep does meanwhile, they change nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.cli.anywhere import anywhere
from tuner.cli.options import JsonOption, RootOption, SweepName, TrialNumber
from tuner.cli.output import Format, as_text, deliver, export, print_json, say, say_next


@anywhere
def ls(root: RootOption = None, as_json: JsonOption = False) -> None:
    """List the sweeps, newest first."""
    from tuner.api import overview
    from tuner.cli.screens import show_overview
    from tuner.results.record import finite, iso
    from tuner.spec.layout import absolute_root, default_root

    rows = overview(root)
    if as_json:
        print_json([finite(row | {"created": iso(row["created"])}) for row in rows])
    elif rows:
        show_overview(rows)
        say_next(f"status {rows[0]['name']}", root)
    else:
        say(f"no sweeps in {absolute_root(root) if root else default_root()} yet")
        say_next("run FILE", root)


@anywhere
def status(name: SweepName, root: RootOption = None, as_json: JsonOption = False) -> None:
    """Show how a sweep stands, on one screen."""
    from tuner.api import open
    from tuner.cli.screens import show_status
    from tuner.results.query import status_document

    sweep = open(name, root)
    state, records = sweep.state(), sweep.records()
    if as_json:
        print_json(status_document(sweep.spec, state, records))
    else:
        show_status(sweep.spec, state, records)
        resumable = state.status in ("queued", "interrupted", "cancelled")
        say_next(f"{'resume' if resumable else 'results'} {name}", root)


@anywhere
def results(
    name: SweepName,
    as_json: JsonOption = False,
    format: Annotated[Format | None, typer.Option("--format", help="Print a table in this format.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file.")] = None,
    sort: Annotated[str | None, typer.Option(help="Order by KEY, by -KEY descending. [best first]")] = None,
    where: Annotated[
        str | None, typer.Option(help='Only trials with, say, "lora.r>=16 and outcome==COMPLETED".')
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, help="At most so many trials.")] = None,
    root: RootOption = None,
) -> None:
    """Show or export the trials, best first.

    The leaderboard starts with the untuned base; --json and --format write every trial for programs.
    """
    from tuner.api import open

    sweep = open(name, root)
    if as_json and format:
        raise typer.BadParameter("--json and --format exclude each other")
    if as_json:
        deliver(as_text(sweep.results(where, sort, top)) + "\n", output)
    elif format:
        export(sweep.trials(where, sort, top), format, output)
    elif output:
        raise typer.BadParameter("--output goes with --json or --format")
    else:
        from tuner.cli.screens import show_endings, show_leaderboard
        from tuner.results.query import select

        records = sweep.records()
        shown = select(records, sweep.spec, where, sort, top)
        show_leaderboard(sweep.spec, sweep.state(), records, shown)
        show_endings(shown)
        say_next(f"show {name}", root)


@anywhere
def show(
    name: SweepName,
    trial: TrialNumber = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one trial: configuration, evaluations, reason, log."""
    from tuner.api import open
    from tuner.cli.screens import show_trial
    from tuner.errors import NotFoundError
    from tuner.results.query import trial_document

    sweep = open(name, root)
    record = sweep.best if trial is None else sweep.trial(trial)
    if record is None:
        raise NotFoundError(f"sweep {name!r} has no best trial yet; `tuner show {name} TRIAL` shows any other")
    if as_json:
        print_json(trial_document(record))
    else:
        show_trial(record)
        promotable = record.adapter_path and record.number != (sweep.state().promoted or {}).get("trial")
        say_next(f"promote {name} {record.number}" if promotable else f"report {name}", root)


def verify(
    name: SweepName,
    trial: TrialNumber = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rerun a trial alone, from its seed, and print the differences."""
    from tuner.api import open
    from tuner.cli.screens import show_comparison
    from tuner.execution.logs import library_output_to

    sweep = open(name, root)
    say(f"training a trial of {name} again, alone, as far as its record goes", err=True)
    with library_output_to(sweep.folder.verify_log):
        found = sweep.verify(trial)
    if as_json:
        print_json(found.as_dict())
    else:
        show_comparison(found)
        say_next(f"show {name} {found.number}", root)
    raise typer.Exit(0 if found.agrees else 1)


@anywhere
def report(
    name: SweepName,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file.")] = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the whole sweep as a Markdown page."""
    from tuner.api import open

    sweep = open(name, root)
    page = sweep.report()
    deliver(as_text({"sweep": name, "markdown": page}) + "\n" if as_json else page, output)
