"""Every error a user may see, with the exit code the command ends with.

They cross process borders: what `__init__` takes is passed to `super().__init__`, so that each can be unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


class TunerError(Exception):
    """The sweep could not do what was asked (exit code 1)."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a spec: where, what was given, what would have been right."""

    key: str
    got: str
    allowed: str
    nearest: str | None = None

    def __str__(self) -> str:
        hint = f"; did you mean {self.nearest}?" if self.nearest else ""
        return f"{self.key}: got {self.got}; allowed: {self.allowed}{hint}"


class SpecError(TunerError):
    """The spec is wrong; `problems` holds every finding, not only the first (exit code 2)."""

    exit_code = 2

    def __init__(self, problems: list[Problem], source: str = "spec"):
        super().__init__(problems, source)
        self.problems = problems
        self.source = source

    def __str__(self) -> str:
        noun = "problem" if len(self.problems) == 1 else "problems"
        lines = [f"{self.source}: {len(self.problems)} {noun}", *(f"  {problem}" for problem in self.problems)]
        return "\n".join(lines)


class DataError(TunerError):
    """The data cannot be read or holds nothing to learn from (exit code 2)."""

    exit_code = 2


class MachineError(TunerError):
    """The machine or the cluster does not fit what was asked (exit code 3)."""

    exit_code = 3


class DiskFullError(TunerError):
    """So little of a file system is free that it is left to the records (exit code 1)."""


class NotFoundError(TunerError):
    """No sweep, trial or alias of that name (exit code 2)."""

    exit_code = 2


class JobError(TunerError):
    """What a command said that failed on the cluster, and the exit code it ended with."""

    def __init__(self, said: str, exit_code: int):
        super().__init__(said, exit_code)
        self.said = said
        self.exit_code = exit_code

    def __str__(self) -> str:
        return self.said


class InfeasibleError(TunerError):
    """A point of the space that cannot be trained: out of memory, diverged. The search learns from it."""

    def __init__(self, cause: str, reason: str):
        super().__init__(cause, reason)
        self.cause = cause
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class NotShareable(TunerError):
    """A trial that cannot be a slot on the shared base: it needs a model of its own."""


class Superseded(TunerError):
    """Another driver has taken the sweep over, or it was cancelled: this one may write nothing any more."""

    def __init__(self, sweep: str):
        super().__init__(sweep)
        self.sweep = sweep

    def __str__(self) -> str:
        return (
            f"sweep {self.sweep!r} was taken over by another driver, or cancelled, while this one showed no sign of "
            f"life: this one ends, `tuner status {self.sweep}` shows the other"
        )


class AliasMoved(TunerError):
    """Another node moved an alias after it was looked at: what was decided then may no longer be right."""

    def __init__(self, alias: str):
        super().__init__(alias)
        self.alias = alias

    def __str__(self) -> str:
        return f"alias {self.alias!r} was moved by somebody else meanwhile: try again"


class PromotionRefused(TunerError):
    """The gate said no; the alias stays where it was. `reasons` says why, one sentence each.

    `broken`: what speaks against it is the trial's own checkpoint; another trial's may be sound.
    """

    def __init__(self, reasons: list[str], broken: bool = False):
        super().__init__(reasons, broken)
        self.reasons = reasons
        self.broken = broken

    def __str__(self) -> str:
        return "not promoted: " + "; ".join(self.reasons)


_NO_SPACE = (
    "No space left on device",  # the system itself, safetensors, arrow
    "Disk quota exceeded",
    "database or disk is full",  # SQLite
    "PytorchStreamWriter failed writing",  # torch.save, which says no more,
    ". unexpected pos ",  # or not even that
)


def all_that_led_to(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_full_disk(error: BaseException | None) -> bool:
    """Whether this, or what led to it, is any library's way of saying so."""
    return any(
        isinstance(one, DiskFullError) or any(words in str(one) for words in _NO_SPACE)
        for one in all_that_led_to(error)
    )


_NO_MEMORY = (
    "out of memory",  # CUDA, and torch.OutOfMemoryError
    "not enough memory",  # torch's allocator on a CPU
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "running low on memory",  # Ray has killed the worker before the kernel does
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is any library's way of saying so."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)
