"""Whether the driver of a sweep lives: by its heartbeat and, on its own host, by its process."""

from __future__ import annotations

import socket

import psutil

from tuner.results.record import SweepStatus, utc_now

STALE_AFTER_S = 60.0
"""A driver whose last sign of life is so long ago is taken for dead."""
BEAT_S = 20.0
"""A driver gives one at least so often."""


def driver_lives(status: SweepStatus) -> bool:
    """Whether the driver has shown a sign of life lately and, when it is on this host, is still that process."""
    if status.heartbeat is None or abs((utc_now() - status.heartbeat).total_seconds()) > STALE_AFTER_S:
        return False
    born = _born(status)
    return born is not None and born <= status.heartbeat.timestamp() + 5


def may_live(status: SweepStatus) -> bool:
    """Whether a driver that looks dead may not be: until it beats again, a clock that was set makes it look so."""
    return status.finished is None and status.heartbeat is not None and _born(status) is not None


def _born(status: SweepStatus) -> float | None:
    """When the process with the driver's id was born, by this host's clock; None when there is none, 0 elsewhere."""
    if status.pid is None or status.host != socket.gethostname():
        return 0.0
    try:
        process = psutil.Process(status.pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
