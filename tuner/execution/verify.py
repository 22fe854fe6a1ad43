"""Reruns a trial of a sweep as a stock SFTTrainer, alone in this process, and says where its reports differ."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.errors import NotFoundError
from tuner.results.record import TrialRecord
from tuner.results.store import Store
from tuner.spec.layout import Save
from tuner.spec.sweep import ResourcesSpec
from tuner.spec.trial import Report, TrialConfig

FIGURES = ("step", "trained_tokens", "learning_rate", "train_loss", "grad_norm", "eval_loss", "mean_token_accuracy")
EXACT, STATISTICAL = 1e-4, 0.05
"""Largest difference of eval_loss (nats) that rounding explains in float32, and elsewhere."""


@dataclass(frozen=True)
class Comparison:
    """The recorded reports of a trial beside those of its rerun, evaluation by evaluation."""

    number: int
    recorded: tuple[Report, ...]
    rerun: tuple[Report, ...]
    bound: float
    why_this_bound: str

    @property
    def largest(self) -> dict[str, float]:
        """The largest absolute difference of every figure."""
        pairs = list(zip(self.recorded, self.rerun, strict=True))
        return {name: max(abs(getattr(a, name) - getattr(b, name)) for a, b in pairs) for name in FIGURES}

    @property
    def agrees(self) -> bool:
        """Whether the scores are as close as they should be, and the steps the same."""
        return self.largest["eval_loss"] <= self.bound and self.largest["step"] == 0

    def as_dict(self) -> dict[str, Any]:
        """What `tuner verify --json` prints: the figures of both at every evaluation, and the verdict."""
        reports = [
            {"tokens": a.tokens} | {name: {"recorded": getattr(a, name), "rerun": getattr(b, name)} for name in FIGURES}
            for a, b in zip(self.recorded, self.rerun, strict=True)
        ]
        verdict = {"agrees": self.agrees, "bound": self.bound, "why_this_bound": self.why_this_bound}
        return {"trial": self.number, **verdict, "largest_difference": self.largest, "reports": reports}


class _Enough(BaseException):
    """The rerun has come as far as the record."""


def verify_trial(store: Store, record: TrialRecord) -> Comparison:
    """Train the trial again from its seed, as far as its record goes; nothing of the sweep is changed.

    Raises NotFoundError for a trial without a finite report, DataError when the data have changed since.
    """
    from tuner.training.baseline import Preparation
    from tuner.training.trial import run_trial

    recorded = tuple(report for report in record.reports if report.is_finite())
    if not recorded:
        raise NotFoundError(f"trial {record.number} of sweep {store.spec.name!r} has no finite report to compare with")
    status = store.status()
    assert status.tokens_per_trial is not None
    sweep = Preparation(status.tokens_per_trial, status.data, status.baseline)
    rerun: list[Report] = []

    def emit(report: Report, save: Save | None) -> None:
        rerun.append(report)
        if len(rerun) == len(recorded):
            raise _Enough

    config: Any = record.config
    alone = store.spec.model_copy(update={"resources": ResourcesSpec()})
    with tempfile.TemporaryDirectory() as folder, suppress(_Enough):
        run_trial(alone, config, sweep, Path(folder), emit)
    return Comparison(record.number, recorded, tuple(rerun), *_bound(config))


def _bound(config: TrialConfig) -> tuple[float, str]:
    """How far the scores may be apart, and why."""
    random = bool((config["lora"] or {}).get("lora_dropout")) or bool(config["train"].get("neftune_noise_alpha"))
    if random:
        return STATISTICAL, "dropout or noise: other random numbers"
    if config["model"]["dtype"] != "float32":
        return STATISTICAL, f"{config['model']['dtype']} rounds each path its own way"
    return EXACT, "float32 and nothing random"
