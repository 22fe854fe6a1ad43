"""Commands that answer here or, with --address, on a cluster: there they run as short jobs, and answer here, too."""

from __future__ import annotations

import base64
import functools
import inspect
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tuner.cli.output import asker, deliver, say
from tuner.errors import MachineError

AddressOption = Annotated[
    str | None, typer.Option("--address", metavar="URL", help="A cluster's dashboard, http://HEAD:8265.")
]
AllowOption = Annotated[
    bool, typer.Option("--allow-unauthenticated-cluster", help="Even if whoever reaches it can run code on it.")
]
FollowOption = Annotated[bool, typer.Option("--follow", help="Show the job's log until it ends.")]
OWN_OPTIONS = {"address": (AddressOption, None), "allow_unauthenticated_cluster": (AllowOption, False)}


def answer_to(client: tuple[str, str] | None) -> None:
    """Note for whom this command runs, in a job of theirs; another version would read a spec otherwise."""
    if client is None:
        return
    from importlib.metadata import version

    theirs, asker.address = client
    if theirs != version("tuner"):
        raise MachineError(f"the cluster has tuner {version('tuner')}, its client {theirs}: install the same on both")


def leave_the_job_s_folder() -> None:
    """Of a job on a cluster, whose folder Ray may replace when another node of the same machine needs it."""
    if asker.address:
        os.chdir(os.sep)


def anywhere(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command --address: with it, the same is run on the cluster and printed, or written to a file, here."""

    @functools.wraps(command)
    def here_or_there(
        ctx: typer.Context, address: str | None, allow_unauthenticated_cluster: bool, **given: Any
    ) -> None:
        if address is None:
            if asker.address:
                ctx.with_resource(stdout_as_one_line())
            return command(**given)
        from tuner.execution import dashboard, jobs

        there = dashboard.connect(dashboard.address_of(address), allow_unauthenticated_cluster)
        words = [str(ctx.info_name), *_words(ctx, given)]
        output: Path | None = given.get("output")
        with jobs.called(there, words, lambda line: say(line, err=True)) as (code, stdout):
            deliver(stdout, output if code == 0 else None)
            sys.stdout.flush()
        raise typer.Exit(code)

    signature = inspect.signature(command, eval_str=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [inspect.Parameter("ctx", keyword, annotation=typer.Context)]
    for name, (annotation, default) in OWN_OPTIONS.items():
        own.append(inspect.Parameter(name, keyword, annotation=annotation, default=default))
    here_or_there.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *own]
    )
    return here_or_there


def _words(ctx: typer.Context, given: Mapping[str, Any]) -> list[str]:
    """What was given to this command, as somebody would type it; a file is written here, not there."""
    options: list[str] = []
    arguments: list[str] = []
    for parameter in ctx.command.params:
        value = given.get(str(parameter.name))
        if parameter.name == "output" or value is None or value is False:
            continue
        if parameter.param_type_name == "argument":
            arguments += map(str, value if parameter.nargs == -1 else [value])
        elif parameter.multiple:
            options += [f"{parameter.opts[0]}={one}" for one in value]
        else:
            options.append(parameter.opts[0] if value is True else f"{parameter.opts[0]}={value}")
    return [*options, "--", *arguments]


@contextmanager
def stdout_as_one_line() -> Iterator[None]:
    """Keep what this process prints on stdout, and print it at the end as the line that `jobs.called` waits for.

    A job has one log for both streams, and not only tuner writes there.
    """
    from tuner.execution.jobs import RESULT

    before = os.dup(1)
    with tempfile.TemporaryFile() as kept:
        sys.stdout.flush()
        os.dup2(kept.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(before, 1)
            os.close(before)
            kept.seek(0)
            print(RESULT + base64.b64encode(kept.read()).decode(), flush=True)
