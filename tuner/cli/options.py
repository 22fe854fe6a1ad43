"""What several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TrialNumber = Annotated[int | None, typer.Argument(metavar="TRIAL", help="Number of the trial. [the best]")]
RootOption = Annotated[
    str | None, typer.Option("--root", metavar="DIR", help="Folder or s3:// URL of all sweeps (or TUNER_ROOT). [runs]")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=V", help="Override a key of the spec.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only errors and the results.")]
SweepName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the sweep.")]
SpecFile = Annotated[Path, typer.Argument(metavar="FILE", help="The sweep's YAML file.")]
