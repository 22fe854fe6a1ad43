"""Notices that the head of a Ray cluster is gone. Ray itself ends a driver then, after a minute and without a word."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import ray
from ray._private import worker as ray_worker
from ray.exceptions import RpcError

from tuner.errors import MachineError
from tuner.execution.events import Display
from tuner.results.store import Store

LOOK_S = 2.0
PATIENCE_S = 30.0
"""How long a head may be silent: half as long as Ray's own patience."""
GOOD_ORDER_S = 12.0
"""How long the driver may take to end: some calls of Ray wait for the head, and nothing interrupts them."""


@contextmanager
def watched_head(store: Store, display: Display) -> Iterator[None]:
    """End this block of a sweep's driver, as Ctrl-C would, when its cluster's head answers no more.

    Raises MachineError then, with the command that goes on; a driver that cannot be interrupted is ended, with the
    same exit code and words. A thread that is not the main one is left to itself.
    """
    if not ray.is_initialized() or threading.current_thread() is not threading.main_thread():
        yield
        return
    over, lost = threading.Event(), threading.Event()
    client: Any = ray_worker.global_worker.gcs_client  # type: ignore[attr-defined]  # set when it connects
    driver = threading.get_ident()
    again = f"when there is a cluster again, `tuner resume {store.spec.name} --root {store.spec.storage.root}` goes on"
    said = f"the head of the Ray cluster at {client.address} does not answer: {again}"

    def watch() -> None:
        answered = time.monotonic()
        while not over.wait(LOOK_S):
            try:
                client.internal_kv_get(b"head", namespace=b"tuner", timeout=LOOK_S)
                answered = time.monotonic()
            except RpcError:
                if time.monotonic() - answered > PATIENCE_S:
                    break
        if over.is_set():
            return
        lost.set()
        signal.pthread_kill(driver, signal.SIGINT)
        if not over.wait(GOOD_ORDER_S):
            store.set_status("failed", said)
            display.stage(said)
            for process in psutil.Process().children(recursive=True):  # the cluster it has started, if any
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            os._exit(MachineError.exit_code)

    thread = threading.Thread(target=watch, name="head", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if not lost.is_set():
            raise
        raise MachineError(said) from None
    finally:
        over.set()
        thread.join()
