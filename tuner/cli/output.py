"""How a command hands over what it found: as JSON, to a file, and with the next command to type."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import typer

if TYPE_CHECKING:
    import pandas as pd


class Format(StrEnum):
    """What `tuner results` exports to."""

    csv = "csv"
    parquet = "parquet"


def say_next(command: str, root: Path | None, err: bool = False) -> None:
    """Print the next command to type, as it can be typed here: by this one's path unless PATH has it, with its root."""
    called, found = Path(sys.argv[0]), shutil.which("tuner")
    here = called.name == "tuner" and not (found and called.exists() and called.samefile(found))
    at = f" --root {shlex.quote(str(root))}" if root else ""
    typer.echo(f"{shlex.quote(str(called)) if here else 'tuner'} {command}{at}", err=err)


def as_text(document: Any) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def print_json(document: Any) -> None:
    typer.echo(as_text(document))


def deliver(text: str, output: Path | None) -> None:
    """To a file, or to stdout."""
    if output:
        with _opened(output) as file:
            file.write(text.encode())
        typer.echo(f"wrote {output}", err=True)
    else:
        typer.echo(text, nl=False)


def _opened(output: Path) -> BinaryIO:
    try:  # a border: the user names the file
        return output.open("wb")
    except OSError as error:
        raise typer.BadParameter(f"cannot write {output}: {error.strerror}") from None


def export(frame: pd.DataFrame, format: Format, output: Path | None) -> None:
    """A frame to a file, or to stdout; Parquet is binary and never goes to a terminal."""
    from tuner.results.query import write_frame

    if output:
        with _opened(output) as file:
            write_frame(frame, format.value, file)
        typer.echo(f"wrote {output}", err=True)
    elif format is Format.parquet and sys.stdout.isatty():
        raise typer.BadParameter("parquet is binary: give --output FILE, or redirect")
    else:
        buffer = io.BytesIO()
        write_frame(frame, format.value, buffer)
        typer.echo(buffer.getvalue(), nl=False)
