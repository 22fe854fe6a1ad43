"""How many slots: measured on this machine with this base, because where sharing pays depends on both."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model

from tuner.spec.sweep import SweepSpec
from tuner.training.baseline import Preparation
from tuner.training.shared.joint import Document, JointModel, MicroBatch, share_weights

if TYPE_CHECKING:
    from tuner.training.shared.engine import Engine

WORTH_IT = 1.05
"""Twice the slots must train at least so many times the tokens per second: with fewer, the search decides oftener."""
MOST_SLOTS = 16
REPEATS = 2


@dataclass(frozen=True)
class Plan:
    slots: int
    reason: str


def plan_slots(spec: SweepSpec, engine: Engine, sweep: Preparation) -> Plan:
    """Double the slots while joint steps of the sweep's typical size get faster per token by enough.

    `resources.share_base` may fix the number. A number that runs out of memory is not gone beyond.
    """
    asked = spec.resources.share_base
    if isinstance(asked, int):
        return Plan(asked, f"resources.share_base is {asked}")
    tokens = typical_step(spec, sweep)
    speeds: dict[int, float] = {}
    slots = 1
    while slots <= min(MOST_SLOTS, spec.budget.trials):
        try:
            speeds[slots] = _tokens_per_second(engine.joint, engine.base, spec, slots, tokens)
        except (torch.OutOfMemoryError, MemoryError):
            break
        if slots > 1 and speeds[slots] < WORTH_IT * speeds[slots // 2]:
            break
        slots *= 2
    best = max(speeds, key=lambda count: speeds[count])
    enough = min(count for count in speeds if speeds[count] * WORTH_IT >= speeds[best])
    table = ", ".join(f"{count}: {speed:.0f}" for count, speed in speeds.items())
    return Plan(enough, f"tokens/s of {tokens}-token steps by slots: {table}")


def typical_step(spec: SweepSpec, sweep: Preparation) -> int:
    """Tokens of one micro-batch of the spec's own batch size and mean sequence length."""
    rows = spec.train.get("per_device_train_batch_size", 8)
    return max(8, round(rows * sweep.data["train_tokens"] / sweep.data["sequences"]))


def _tokens_per_second(joint: JointModel, base: object, spec: SweepSpec, slots: int, tokens: int) -> float:
    numbers = [-1 - slot for slot in range(slots)]  # no trial has these
    rows = max(1, spec.train.get("per_device_train_batch_size", 8))
    ids = torch.arange(tokens // rows) % 1000
    documents = [Document(ids, ids)] * rows
    rank = _rank(spec)
    trees = []
    try:
        for number in numbers:
            tree = get_peft_model(share_weights(base), LoraConfig(r=rank, target_modules="all-linear"))  # type: ignore[arg-type]
            trees.append(tree)
            joint.attach(number, tree.get_base_model(), torch.Generator())
        batches = [MicroBatch(number, documents, float(tokens)) for number in numbers]
        joint.step(batches)  # warm up
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            joint.step(batches)
            seconds.append(time.perf_counter() - started)
    finally:
        for number in numbers:
            joint.detach(number)
    return slots * tokens / statistics.median(seconds)


def _rank(spec: SweepSpec) -> int:
    """The largest rank a trial may have."""
    searched = spec.space.get("lora.r")
    if searched is None:
        return (spec.lora or {}).get("r", 8)
    ranks: list[Any] = list(searched.values) if searched.type == "choice" else [searched.high]
    return int(max(ranks))
