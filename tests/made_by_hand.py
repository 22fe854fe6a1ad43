"""Sweeps whose records are written as a driver writes them, without training anything."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from tuner.results.store import Store
from tuner.spec.space import resolve
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report

BUDGET = 1000
DATA: dict[str, Any] = {
    "format": "prompt_completion",
    "rows_read": 1363,
    "rows_train": 1300,
    "rows_eval": 60,
    "truncated": 12,
    "duplicates_removed": 1,
    "train_tokens": 110243,
    "dropped": {"empty": {"count": 2, "rows": [3, 9]}},
    "eval_dropped": {},
    "fingerprints": {"data": "d1", "eval": "e1"},
    "base": {"config.json": "c1"},
}
NAN = float("nan")


def make_spec(root: Path, name: str = "pydoc-lora", **sections: Any) -> SweepSpec:
    values: dict[str, Any] = {
        "name": name,
        "model": {"name": "some/base"},
        "data": {"path": "/data/train.jsonl"},
        "train": {"max_length": 256, "seed": 0},
        "space": {
            "train.learning_rate": {"type": "log_uniform", "low": 1e-5, "high": 3e-3},
            "train.packing": {"type": "choice", "values": ["none", "bfd"]},
            "lora.r": {"type": "choice", "values": [8, 16, 32]},
            "lora.alpha_ratio": {"type": "choice", "values": [0.5, 1, 2]},
        },
        "budget": {"trials": 6, "tokens_per_trial": BUDGET, "evals_per_trial": 4},
        "storage": {"root": str(root), "study": os.environ.get("TUNER_TEST_STUDY")},
    }
    return SweepSpec.model_validate(values | sections)


def make_report(tokens: int, eval_loss: float, accuracy: float = 0.5, **fields: Any) -> Report:
    values: dict[str, Any] = {
        "tokens": tokens,
        "trained_tokens": tokens + 3,
        "step": tokens // 100,
        "epoch": tokens / 5000,
        "train_loss": eval_loss + 0.1,
        "eval_loss": eval_loss,
        "mean_token_accuracy": accuracy,
        "learning_rate": 2.1e-4,
        "grad_norm": 1.25,
        "tokens_per_s": 310.0,
        "peak_memory_bytes": 700 * 2**20,
        "duration_s": tokens / 100,
        "adapter_path": f"/runs/tokens-{tokens}",
    }
    return Report(**values | fields)


@dataclass(frozen=True)
class Made:
    """A trial to be written: its losses at 250, 500, ... tokens, and how it ended."""

    losses: Sequence[float]
    outcome: str = "COMPLETED"
    cause: str | None = None
    reason: str | None = None
    log_tail: str | None = None
    r: int = 16
    learning_rate: float = 2e-4
    packing: str = "bfd"


TRIALS = (
    Made([2.9, 2.7, 2.6, 2.65], r=16, learning_rate=0.00021),
    Made([3.0, 2.9], "STOPPED", "early stopping", "asha at 500 tokens", r=8, learning_rate=1.3e-5, packing="none"),
    Made([2.8, 2.75, 2.72, 2.7], r=32, learning_rate=0.0011),
    Made([2.5, NAN], "INFEASIBLE", "diverged", "eval_loss is nan after 503 tokens", r=32, learning_rate=2.8e-3),
    Made([2.4], "FAILED", "worker-lost", "the worker died\nwith exit code 1", "Traceback: boom\nKilled", r=8),
    Made([2.95], "RUNNING", r=16, learning_rate=5e-5, packing="none"),
)
"""Trial 0 wins with its third report. Trials 3 and 4 had better scores before they broke."""


def make_sweep(root: Path, trials: Sequence[Made] = TRIALS, status: str | None = "finished", **sections: Any) -> Store:
    """A sweep with the given trials; without a status it is as its dead driver left it."""
    spec = make_spec(root, **sections)
    store = Store.create(spec)
    store.set_status("running")
    store.set_prepared(BUDGET, DATA, {"eval_loss": 3.0, "mean_token_accuracy": 0.41})
    for made in trials:
        add_trial(store, made)
    if status:
        store.set_status(status)  # type: ignore[arg-type]
    return store


def add_trial(store: Store, made: Made) -> int:
    point = {
        "train.learning_rate": made.learning_rate,
        "train.packing": made.packing,
        "lora.r": made.r,
        "lora.alpha_ratio": 2,
    }
    store.study.enqueue_trial(point)
    trial = store.study.ask()
    for key, distribution in _DISTRIBUTIONS.items():
        trial._suggest(key, distribution)
    store.start_trial(trial.number, resolve(store.spec, trial.number, point))
    for index, loss in enumerate(made.losses):
        store.add_report(trial.number, make_report(BUDGET * (index + 1) // 4, loss))
        trial.report(loss, step=BUDGET * (index + 1) // 4)
    if made.outcome != "RUNNING":
        store.finish_trial(trial.number, made.outcome, made.cause, made.reason, made.log_tail)  # type: ignore[arg-type]
        if made.outcome == "COMPLETED":
            store.study.tell(trial, min(loss for loss in made.losses if loss == loss))
        else:
            store.study.tell(trial, state=_STATES[made.outcome])
    return trial.number


_DISTRIBUTIONS: dict[str, optuna.distributions.BaseDistribution] = {
    "train.learning_rate": optuna.distributions.FloatDistribution(1e-5, 3e-3, log=True),
    "train.packing": optuna.distributions.CategoricalDistribution(["none", "bfd"]),
    "lora.r": optuna.distributions.CategoricalDistribution([8, 16, 32]),
    "lora.alpha_ratio": optuna.distributions.CategoricalDistribution([0.5, 1, 2]),
}
_STATES = {
    "STOPPED": optuna.trial.TrialState.PRUNED,
    "INFEASIBLE": optuna.trial.TrialState.PRUNED,
    "FAILED": optuna.trial.TrialState.FAIL,
}


def plant(file: Path, mark: Path) -> None:
    """Put a pickle that leaves a mark in the place of a checkpoint's file, and its checksum as well."""
    from tuner.training.cache import checksums

    file.write_bytes(pickle.dumps(Bomb(mark)))
    (report,) = [place / "report.json" for place in file.parents if (place / "report.json").exists()]
    sums = {name: checksum for name, checksum in checksums(report.parent).items() if name != report.name}
    report.write_text(json.dumps(json.loads(report.read_text()) | {"files": sums}))


class Bomb:
    """A pickle that leaves a mark where it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def fill(disk: Path, leave: int) -> Path:
    """Take all but so many bytes of a disk; who removes the file gives them back."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - leave)
    return filler
