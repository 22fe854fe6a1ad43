"""Where the libraries' own words go: into a file, not over the user's screen."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def log_process_to(path: Path) -> None:
    """Send everything this process says from now on, native libraries included, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    logging.captureWarnings(True)


@contextmanager
def library_output_to(path: Path) -> Iterator[None]:
    """The same for the time of a block. Whoever shows progress meanwhile writes to a duplicate made before."""
    before = os.dup(1), os.dup(2)
    log_process_to(path)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, original in enumerate(before, start=1):
            os.dup2(original, stream)
            os.close(original)
        logging.captureWarnings(False)
