"""How a command hands over what it found: as JSON, to a file, and with the next command to type."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import typer

from tuner.errors import DiskFullError, is_full_disk
from tuner.results.plain import plain, plain_json

if TYPE_CHECKING:
    import pandas as pd


class Format(StrEnum):
    """What `tuner results` exports to."""

    csv = "csv"
    parquet = "parquet"


@dataclass
class Asker:
    """Who has this command run, in a job on a cluster, and types the next one elsewhere."""

    address: str | None = None


asker = Asker()


def say(text: str = "", err: bool = False) -> None:
    """Print for a person. Whatever is in the text, the terminal is told nothing by it.

    All that a command prints goes through here or `deliver`, but for rich's tables, which are made of `screens.line`.
    """
    typer.echo(plain(text), err=err)


def say_next(command: str, root: str | None, err: bool = False, address: str | None = None) -> None:
    """Print the next command to type, with its root, as it can be typed here: by this one's path unless PATH has it.

    In a job it is typed where the job was asked for: with the cluster's address.
    """
    called, found = Path(sys.argv[0]), shutil.which("tuner")
    here = not asker.address and called.name == "tuner" and not (found and called.exists() and called.samefile(found))
    at = f" --root {shlex.quote(root)}" if root else ""
    if address := address or asker.address:
        at += f" --address {shlex.quote(address)}"
    say(f"{shlex.quote(str(called)) if here else 'tuner'} {command}{at}", err=err)


def as_text(document: Any) -> str:
    return plain_json(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def print_json(document: Any) -> None:
    typer.echo(as_text(document))


def deliver(content: str | bytes, output: Path | None) -> None:
    """To a file, or to stdout; bytes are taken as they are where that is no terminal."""
    if output:
        with _opened(output) as file:
            file.write(content.encode() if isinstance(content, str) else content)
        say(f"wrote {output}", err=True)
    elif isinstance(content, bytes) and not sys.stdout.isatty():
        typer.echo(content, nl=False)
    else:
        typer.echo(plain(content if isinstance(content, str) else content.decode(errors="replace")), nl=False)


@contextmanager
def _opened(output: Path) -> Iterator[BinaryIO]:
    """A file to write. Raises BadParameter where it cannot be written, DiskFullError where there is no room for it."""
    try:  # a border: the user names the file
        with output.open("wb") as file:
            yield file
    except OSError as error:
        if is_full_disk(error):
            raise DiskFullError(f"cannot write all of {output}: its disk is full") from None
        raise typer.BadParameter(f"cannot write {output}: {error.strerror or error}") from None


def export(frame: pd.DataFrame, format: Format, output: Path | None) -> None:
    """A frame to a file, or to stdout; Parquet is binary and never goes to a terminal."""
    from tuner.results.query import write_frame

    if output:
        with _opened(output) as file:
            write_frame(frame, format.value, file)
        say(f"wrote {output}", err=True)
    elif format is Format.parquet and sys.stdout.isatty():
        raise typer.BadParameter("parquet is binary: give --output FILE, or redirect")
    else:
        buffer = io.BytesIO()
        write_frame(frame, format.value, buffer)
        deliver(buffer.getvalue(), None)
