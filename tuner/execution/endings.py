"""How a trial that failed is recorded: what its workers raised, turned into an outcome with a cause."""

from __future__ import annotations

from pathlib import Path

from ray.exceptions import NodeDiedError

from tuner.errors import DataError, InfeasibleError, TunerError, is_full_disk, is_out_of_memory
from tuner.spec.trial import Ending

LOG_TAIL_LINES = 200


def explain_failure(failure: Exception) -> Ending:
    """The ending of a trial that one exception ended: only what lies in the point itself is INFEASIBLE."""
    failure = getattr(failure, "health_check_failure", failure)
    reason = _one_line(failure)
    if isinstance(failure, InfeasibleError):
        return Ending("INFEASIBLE", failure.cause, reason)
    if is_out_of_memory(failure):
        return Ending("INFEASIBLE", "oom", reason)
    if is_full_disk(failure):
        return Ending("FAILED", "disk", reason)
    if isinstance(failure, DataError):
        return Ending("FAILED", "data", reason)
    if isinstance(failure, TunerError):
        return Ending("FAILED", "refused", reason)
    if type(failure).__module__.startswith("ray."):  # Ray's own words: the worker said none
        return Ending("FAILED", "preempted" if _lost_its_node(failure) else "worker-lost", reason)
    return Ending("FAILED", "bug", f"{type(failure).__name__}: {reason}")


def _lost_its_node(failure: Exception) -> bool:
    """Whether it was not the process that ended, but the whole node around it."""
    lost = getattr(failure, "preempted", False) or isinstance(failure, NodeDiedError)
    return lost or "node has died" in str(failure)


def tail(log: Path) -> str | None:
    """The last lines of a trial's log; None where it never began one."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]) if log.exists() else None


def _one_line(failure: Exception) -> str:
    """Ray puts the cause last, everybody else first."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()] or [type(failure).__name__]
    return lines[-1] if type(failure).__module__.startswith("ray.") else lines[0]
