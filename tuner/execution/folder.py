"""The driver's watch over its sweep's folder: a sweep that somebody removes while it runs has nothing to go on with."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tuner.errors import TunerError
from tuner.spec.layout import SweepFolder

LOOK_S = 2.0


@contextmanager
def watched_folder(folder: SweepFolder) -> Iterator[None]:
    """End this block of a sweep's driver, as Ctrl-C would, when the sweep's folder is not there any more.

    Raises TunerError then, whatever else may have failed for that reason. A thread that is not the main one cannot be
    ended so: it learns of it at its next write.
    """
    over, gone = threading.Event(), threading.Event()
    driver, main = threading.get_ident(), threading.current_thread() is threading.main_thread()

    def watch() -> None:
        while not over.wait(LOOK_S):
            if _is_gone(folder):
                gone.set()
                if main:
                    signal.pthread_kill(driver, signal.SIGINT)
                return

    thread = threading.Thread(target=watch, name="folder", daemon=True)
    thread.start()
    try:
        yield
    except (Exception, KeyboardInterrupt):
        if not gone.is_set() and not _is_gone(folder):
            raise
        raise TunerError(
            f"{folder.path}, the folder of sweep {folder.name!r}, was removed or renamed while the sweep ran: "
            "it has ended, and what was only there is lost"
        ) from None
    finally:
        over.set()
        thread.join()


def _is_gone(folder: SweepFolder) -> bool:
    try:
        folder.path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # a file system that does not answer is not gone
        return False
    return False
