"""The `tuner` command: parse, call, print. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from tuner.cli import reading
from tuner.cli.anywhere import (
    AddressOption,
    AllowOption,
    FollowOption,
    answer_to,
    anywhere,
    leave_the_job_s_folder,
)
from tuner.cli.options import JsonOption, QuietOption, RootOption, SetOption, SpecFile, SweepName, TrialNumber
from tuner.cli.output import print_json, say, say_next
from tuner.cli.streams import have_streams, into_nothing
from tuner.errors import TunerError, is_full_disk

if TYPE_CHECKING:
    from tuner.api import Sweep
    from tuner.execution.jobs import Job
    from tuner.spec.sweep import SweepSpec

EXIT_INTERRUPTED = 130


class Commands(TyperGroup):
    """The border where errors meet the user: a sentence and an exit code for ours, a traceback for all others."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TunerError as error:
            say(f"tuner: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:  # `| head` has seen enough; what is still buffered has nowhere to go
            into_nothing(1)
            raise typer.Exit(0) from None

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)  # in the order a sweep goes through them, not the alphabet's


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        say(f"tuner {version('tuner')}")
        raise typer.Exit()


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


@app.callback()
def tuner(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    client: Annotated[tuple[str, str] | None, typer.Option(hidden=True, metavar="VERSION ADDRESS")] = None,
) -> None:
    """Hyperparameter search for fine-tuning language models: one YAML in, a verified, promoted model out."""
    answer_to(client)


@app.command()
def check(
    file: SpecFile,
    set_: SetOption = None,
    root: RootOption = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it takes at most, too; loads the libraries.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say all that is wrong with a spec, or what it asks for."""
    from tuner.spec.load import check_file

    spec, problems = check_file(file, set_ or [], root)
    most = None
    if plan and spec is not None:
        from tuner import api

        with redirect_stderr(StringIO()):  # what the libraries say when they are loaded
            most = api.worst_case(spec)
    if as_json:
        found = [dict(vars(problem)) for problem in problems]
        shown = {"valid": spec is not None, "problems": found, "spec": spec and spec.model_dump(mode="json")}
        print_json(shown | ({"plan": most.as_dict()} if most else {}))
    elif spec is None:
        from tuner.errors import SpecError

        raise SpecError(problems, str(file))
    else:
        from tuner.cli.screens import show_spec

        show_spec(spec, most)
        say_next(_command("run", file, set_), root)
    raise typer.Exit(0 if spec else 2)


@app.command()
def run(file: SpecFile, set_: SetOption = None, root: RootOption = None, quiet: QuietOption = False) -> None:
    """Search, train, compare and promote, on this machine."""
    from tuner import api
    from tuner.cli.live import watching

    spec = api.load_spec(file, *(set_ or []), root=root)
    leave_the_job_s_folder()
    with _resumable(spec, root, _command("run", file, set_)), watching(spec, quiet) as display:
        sweep = api.run(spec, display=display, log_output=True)
    raise typer.Exit(_print_end(sweep, _root_of(spec, root)))


@app.command()
def submit(
    file: SpecFile,
    set_: SetOption = None,
    root: RootOption = None,
    address: AddressOption = None,
    follow: FollowOption = False,
    allow_unauthenticated_cluster: AllowOption = False,
) -> None:
    """Run the sweep on a Ray cluster, as a job.

    The paths of the spec are the cluster's. Returns when the sweep has begun there, or says what was refused.
    """
    from tuner import api

    say("waiting for the cluster to begin the sweep, or to refuse it", err=True)
    allow = allow_unauthenticated_cluster
    try:
        job = api.submit(file, *(set_ or []), address=address, root=root, allow_unauthenticated=allow, join=follow)
    except KeyboardInterrupt:
        say("no longer waited for; what has been submitted goes on", err=True)
        say_next(_command("submit", file, set_) + " --follow", root, err=True, address=address)
        raise
    raise typer.Exit(_print_job(job, follow))


@app.command()
def resume(
    name: SweepName,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="budget.X=V", help="Spend more, such as trials.")
    ] = None,
    root: RootOption = None,
    quiet: QuietOption = False,
    address: AddressOption = None,
    follow: FollowOption = False,
    allow_unauthenticated_cluster: AllowOption = False,
) -> None:
    """Continue an interrupted sweep, or one that is given more of its budget; finished trials stay."""
    from tuner import api
    from tuner.cli.live import watching

    if address:
        from tuner.execution import dashboard, jobs

        there = dashboard.connect(dashboard.address_of(address), allow_unauthenticated_cluster)
        job = jobs.resume_sweep(there, name, set_ or [], root, join=follow)
        raise typer.Exit(_print_job(job, follow))
    if follow or allow_unauthenticated_cluster:
        raise typer.BadParameter("--follow and --allow-unauthenticated-cluster go with --address")
    before = api.open(name, root)
    leave_the_job_s_folder()
    with _resumable(before.spec, root), watching(before.spec, quiet, before.records()) as display:
        sweep = api.resume(name, *(set_ or []), root=root, display=display, log_output=True)
    raise typer.Exit(_print_end(sweep, root))


for command in (reading.ls, reading.status, reading.results, reading.show, reading.verify, reading.report):
    app.command()(command)


@app.command()
@anywhere
def cancel(
    name: SweepName,
    trial: Annotated[int | None, typer.Argument(metavar="TRIAL", help="Only this one. [the sweep]")] = None,
    root: RootOption = None,
) -> None:
    """End a running sweep, or one trial of it, cleanly.

    `tuner resume` continues a sweep. In the place of a trial another one starts.
    """
    from tuner.api import open
    from tuner.results.record import ACTIVE

    sweep = open(name, root)
    if sweep.status in ACTIVE:
        say(f"asking the driver of {name} to end{'' if trial is None else f' trial {trial}'}, and waiting", err=True)
    sweep.cancel(trial)
    if trial is None:
        say(f"{name} is {sweep.status}")
        say_next(f"resume {name}", root)
    else:
        say(f"trial {trial} of {name} is {sweep.trial(trial).outcome}")
        say_next(f"show {name} {trial}", root)


@app.command()
@anywhere
def add(
    name: SweepName,
    point: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="Searched keys, such as lora.r=16.")],
    root: RootOption = None,
) -> None:
    """Have a running sweep try a point of its space next.

    It is one of budget.trials; the sampler fills in keys that are not named.
    """
    from tuner.api import open
    from tuner.spec.load import parse_point

    number = open(name, root).add(parse_point(point))
    say(f"trial {number} of {name} will try it")
    say_next(f"status {name}", root)


@app.command()
@anywhere
def extend(
    name: SweepName,
    set_: Annotated[list[str], typer.Option("--set", metavar="budget.X=V", help="Trials, time_limit, tokens, ...")],
    root: RootOption = None,
) -> None:
    """Give a running sweep more trials, time, tokens, GPU hours or disk."""
    from tuner.api import open
    from tuner.spec.changes import differences

    sweep = open(name, root)
    before = sweep.spec
    sweep.extend(*set_)
    for key, (old, new) in differences(before, sweep.spec).items():
        say(f"{key} of {name} is {new}, was {old}")
    say_next(f"status {name}", root)


@app.command()
@anywhere
def promote(
    name: SweepName,
    trial: TrialNumber = None,
    alias: Annotated[str | None, typer.Option(help="Name the model gets. [the spec's]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Promote even if the gate says no, and record that.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(metavar="REPO", help="Upload it there, too.")] = None,
    root: RootOption = None,
) -> None:
    """Merge the best trial, measure it, promote it if better."""
    from dataclasses import asdict

    from tuner.api import open
    from tuner.cli.screens import show_promoted

    sweep = open(name, root)
    options = {"--alias": alias, "--push-to-hub": push_to_hub}
    again = ["promote", name, *([] if trial is None else [str(trial)]), *(["--force"] if force else [])]
    again += [part for option, value in options.items() if value for part in (option, value)]
    with _interruptible(shlex.join(again), root):
        done = sweep.promote(trial, alias, force, push_to_hub, progress=lambda step: say(step, err=True))
    show_promoted(asdict(done))
    say_next(f"rollback {done.alias}", root)


@app.command()
@anywhere
def rollback(
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="Name of the promoted model.")], root: RootOption = None
) -> None:
    """Point an alias back at the version before."""
    from tuner import api

    before, now = api.rollback(alias, root, progress=lambda line: say(line, err=True))
    say(f"{alias}: {before.name} -> {now.name}, {now.place}")
    say_next("ls", root)


def main() -> None:
    """Run the command line of this process; exits."""
    have_streams()
    try:
        app()
    except OSError as error:
        if not is_full_disk(error):
            raise
        into_nothing(1)
        with suppress(OSError):  # the same disk may be behind both
            print("tuner: cannot write what was found: the disk is full", file=sys.stderr, flush=True)
        into_nothing(2)
        sys.exit(1)


@contextmanager
def _interruptible(command: str, root: str | None) -> Iterator[None]:
    """Take SIGTERM for Ctrl-C while a promotion runs: it removes what it wrote and ends its merge process.

    `command` is said to be the one to type then.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted; what was promoted before stays", err=True)
        say_next(command, root, err=True)
        raise
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _resumable(spec: SweepSpec, root: str | None, not_begun: str = "") -> Iterator[None]:
    """Say, as the last line after an interrupt, how to go on: by `not_begun` where there is no sweep yet."""
    from tuner.spec.layout import SweepFolder

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job starts with SIGINT ignored
    try:
        yield
    except KeyboardInterrupt:
        if SweepFolder.of(spec).exists():
            _say_how_to_resume(spec.name, _root_of(spec, root))
        else:
            say("interrupted before the sweep began", err=True)
            say_next(not_begun, root, err=True)
        raise


def _say_how_to_resume(name: str, root: str | None) -> None:
    say("interrupted; finished trials are kept", err=True)
    say_next(f"resume {name}", root, err=True)


def _print_end(sweep: Sweep, root: str | None) -> int:
    """Print what came out of a sweep and return the exit code."""
    from tuner.cli.screens import show_best, show_endings, show_leaderboard, show_promoted

    state, records = sweep.state(), sweep.records()
    show_leaderboard(sweep.spec, state, records)
    show_endings(records)
    show_best(sweep.spec, state, records)
    show_promoted(state.promoted)
    if state.status in ("interrupted", "cancelled"):
        _say_how_to_resume(sweep.name, root)
        return EXIT_INTERRUPTED
    if state.status != "finished":
        say(f"tuner: {state.message or 'no trial succeeded'}", err=True)
    number = "" if sweep.best or not records else f" {records[0].number}"
    say_next(f"show {sweep.name}{number}", root)
    return 0 if state.status == "finished" else 1


def _print_job(job: Job, follow: bool) -> int:
    """Print the name of a sweep that has begun on a cluster and, if asked, its log; return the exit code."""
    say(job.sweep)
    say(f"job {job.id} on {job.address}", err=True)
    if follow:
        try:
            return job.follow(lambda line: say(line, err=True))
        except KeyboardInterrupt:
            say("no longer followed; the sweep goes on", err=True)
    say_next(f"status {job.sweep}", job.root, err=True, address=job.address)
    return EXIT_INTERRUPTED if follow else 0


def _command(name: str, file: Path, overrides: list[str] | None) -> str:
    return f"{name} {shlex.quote(str(file))}" + "".join(
        f" --set {shlex.quote(override)}" for override in overrides or []
    )


def _root_of(spec: SweepSpec, root: str | None) -> str | None:
    """The root that later commands must be told: that of the option, or the spec's own where it is not the default."""
    from tuner.spec.layout import default_root

    own = spec.storage.root
    return root or (None if own == default_root() else own)
