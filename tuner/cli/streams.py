"""The streams of a command. They may be closed, or lead to a full disk, or to a program that has ended."""

from __future__ import annotations

import os
import sys


def have_streams() -> None:
    """See to it that stdin, stdout and stderr are there, and that any text can be written to the last two.

    A stream that is closed leads nowhere. Its number must be taken: the next file to be opened would get it, and
    whatever is printed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            into_nothing(number)
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # for good
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # an ASCII terminal gets ? for what it lacks


def into_nothing(number: int) -> None:
    """Lead a stream nowhere: what is still buffered for it must not fail when this process ends."""
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing != number:
        os.dup2(nothing, number)
        os.close(nothing)
