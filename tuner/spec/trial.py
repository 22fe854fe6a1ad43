"""The messages that cross between the search and a trial. All are plain dicts on Ray's wire."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypedDict

Outcome = Literal["RUNNING", "INTERRUPTED", "COMPLETED", "STOPPED", "INFEASIBLE", "FAILED"]
NO_IMPROVEMENT = "no improvement"
"""Cause of a trial that completed before its budget was spent: `stopping.patience` gave the rest back."""


class TrialConfig(TypedDict):
    """One resolved point of the space: what one trial trains with."""

    number: int
    point: dict[str, Any]
    """The searched values only, by dotted key."""
    model: dict[str, Any]
    """Fields of `ModelSpec`."""
    train: dict[str, Any]
    """Fields of trl.SFTConfig, except that `packing` is none, bfd, bfd_split or wrapped."""
    lora: dict[str, Any] | None
    """Fields of peft.LoraConfig, or None for full fine-tuning."""


@dataclass(frozen=True)
class Report:
    """One evaluation of one trial."""

    tokens: int
    """The budget milestone: the same for every trial of a sweep at the same evaluation."""
    trained_tokens: int
    """Tokens actually trained, padding excluded: the first optimizer step at or past the milestone."""
    step: int
    epoch: float
    train_loss: float
    """Mean of the loss since the last report, as the trainer logs it (nats per token)."""
    eval_loss: float
    """Mean negative log-likelihood per target token of the evaluation set (nats)."""
    mean_token_accuracy: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    """Training speed since the last report, evaluation excluded."""
    peak_memory_bytes: int
    duration_s: float
    """Wall time since the trial's worker started."""
    adapter_path: str | None = None
    """Folder of the adapter (or of the full model) as it was scored here."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """Take what is ours out of a result that Ray has added its own keys to."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def is_finite(self) -> bool:
        return math.isfinite(self.eval_loss) and math.isfinite(self.mean_token_accuracy)


@dataclass(frozen=True)
class Ending:
    """How a trial ended. A trial that reached its full budget needs no cause."""

    outcome: Outcome
    cause: str | None = None
    reason: str | None = None
    log_tail: str | None = None


@dataclass(frozen=True)
class Attempt:
    """One that failed, and was followed by another under the same number."""

    tokens: int
    """The milestone of the trial's last evaluation then; 0 before the first."""
    cause: str
    reason: str | None = None
    log_tail: str | None = field(default=None, repr=False)
    changed: dict[str, Any] = field(default_factory=dict)
    """What every later attempt trains with instead, by dotted key."""

    def __str__(self) -> str:
        changed = ", ".join(f"{key}={value}" for key, value in self.changed.items())
        return f"{self.cause} ({self.reason})" + (f", now with {changed}" if changed else "")


def milestones(tokens_per_trial: int, evals_per_trial: int) -> list[int]:
    """Token counts of a trial's evaluations, evenly spaced, the last at the end of the budget."""
    return [round(tokens_per_trial * k / evals_per_trial) for k in range(1, evals_per_trial + 1)]
