"""What a trial of its own goes on from when it was cut off: its trainer's checkpoint at its last evaluation.

The trainer writes optimizer, schedule, position in the data, random numbers and adapter, each worker its part. The
trial's reports up to that evaluation are put beside them last, with what the files are: a checkpoint without them, or
with other files, is not whole, and nobody goes on from it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers.training_args import OptimizerNames

from tuner.spec.layout import CHECKPOINT_REPORT, Root
from tuner.spec.trial import Report
from tuner.training.cache import checksums

if TYPE_CHECKING:
    from trl import SFTConfig, SFTTrainer

_ONLY_WEIGHTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_STATE_ELSEWHERE = ("galore", "apollo", "lomo", "adalomo")
"""Optimizers whose state is no plain tensors, or not in their state at all: no checkpoint would hold it."""


def can_go_on(args: SFTConfig) -> bool:
    """Whether a trial with these settings, cut off, would go on as if it had not been; otherwise it begins again."""
    return not OptimizerNames(args.optim).value.startswith(_STATE_ELSEWHERE)


@dataclass(frozen=True)
class Checkpoint:
    """A whole one, as `Trainer.train(resume_from_checkpoint=...)` takes it, and the reports up to there."""

    folder: Path
    reports: list[Report]


@contextmanager
def only_weights() -> Iterator[None]:
    """Meanwhile `torch.load` reads tensors and plain values, whatever its caller allows: DeepSpeed allows all."""
    known: list[Any] = []
    if "deepspeed" in sys.modules:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        known = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    os.environ[_ONLY_WEIGHTS] = "1"
    try:
        with torch.serialization.safe_globals(known):
            yield
    finally:
        del os.environ[_ONLY_WEIGHTS]


def newest_checkpoint(folder: Path, root: Root) -> Checkpoint | None:
    """What the trial with this output folder goes on from; None where it is to begin."""
    whole = [name for name in _checkpoints(folder, root) if root.exists(folder / name / CHECKPOINT_REPORT)]
    if not whole:
        return None
    newest = root.fetch(folder / max(whole, key=lambda name: int(name.rpartition("-")[2])))
    try:  # a border: somebody else's hand or a disk may have been at it since
        written = json.loads((newest / CHECKPOINT_REPORT).read_text(encoding="utf-8"))
        reports = [Report.from_dict(report) for report in written["reports"]]
        there = checksums(newest)
        damaged = [name for name, checksum in written["files"].items() if there.get(name) != checksum]
    except (ValueError, KeyError, TypeError):
        damaged = [CHECKPOINT_REPORT]
    if damaged:
        print(f"{newest} is damaged ({', '.join(damaged)}): the trial begins again", flush=True)
        return None
    return Checkpoint(newest, reports)


def complete_checkpoint(trainer: SFTTrainer, reports: Sequence[Report], root: Root) -> None:
    """Say of the checkpoint that the trainer has just written that it is whole, and drop all others.

    `reports` are the trial's, the last of them made there. Every worker must call, when it has written its part.
    """
    folder = Path(str(trainer.args.output_dir))
    new = folder / f"checkpoint-{reports[-1].step}"
    root.keep(new, stays=True)
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
    if not trainer.is_world_process_zero():
        return
    files = {name: checksum for name, checksum in checksums(new).items() if name != CHECKPOINT_REPORT}  # of one before
    draft = new / f"{CHECKPOINT_REPORT}.new"
    written = {"reports": [report.as_dict() for report in reports], "files": files}
    draft.write_text(json.dumps(written), encoding="utf-8")
    root.keep(draft.replace(new / CHECKPOINT_REPORT), stays=True)
    for name in _checkpoints(folder, root):
        if name != new.name:
            root.forget(folder / name)


def _checkpoints(folder: Path, root: Root) -> list[str]:
    return [name for name in root.names(folder) if name.startswith("checkpoint-")]
