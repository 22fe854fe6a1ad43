"""How many slots: measured on this machine with this base, because where sharing pays depends on both.

A joint step of n slots takes `fixed + n * each` seconds. The fixed part, reading weights and starting kernels, is what
sharing saves; slots are added until what is left of it is small beside the rest, or memory ends.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch

from tuner.spec.sweep import SweepSpec
from tuner.training.baseline import Preparation
from tuner.training.shared.joint import Document, JointModel, MicroBatch
from tuner.training.shared.lora import Adapter

if TYPE_CHECKING:
    from tuner.training.shared.engine import Engine

WORTH_IT = 0.05
"""Slots are added while the fixed part is more than this share of a step: with fewer, the search decides oftener."""
MOST_SLOTS = 32
PROBE_TOKENS = 64
"""Most tokens of a slot when measuring; a step's own cost grows with its tokens, the fixed part does not."""
PROBE_SLOTS = 4
REPEATS = 2
MEMORY_SHARE = 0.8
"""Of the free memory, what slots may take."""


@dataclass(frozen=True)
class Plan:
    slots: int
    reason: str


def plan_slots(spec: SweepSpec, engine: Engine, sweep: Preparation) -> Plan:
    """As many slots as pay and fit; `resources.share_base` may fix the number instead."""
    asked = spec.resources.share_base
    if isinstance(asked, int):
        return Plan(asked, f"resources.share_base is {asked}")
    tokens = typical_step(spec, sweep)
    rank = largest_rank(spec)
    fixed, each = engine.between_turns(lambda: _step_seconds(engine.joint, rank, tokens))
    paying = max(1, round(fixed / (WORTH_IT * each)))
    free, needed = _free_memory(), memory_per_slot(engine.base, engine.joint.stack(rank).width, tokens)
    fitting = max(1, int(MEMORY_SHARE * free / needed))
    slots = min(paying, fitting, MOST_SLOTS, spec.budget.trials)
    return Plan(
        slots,
        f"a step takes {1000 * fixed:.0f} ms + {1000 * each:.0f} ms per slot of {tokens} tokens, so {paying} pay; "
        f"{fitting} of about {needed / 2**20:.0f} MiB fit; the sweep has {spec.budget.trials} trials",
    )


def typical_step(spec: SweepSpec, sweep: Preparation) -> int:
    """Tokens of one micro-batch of the spec's own batch size and mean sequence length."""
    rows = spec.train.get("per_device_train_batch_size", 8)
    return max(8, round(rows * sweep.data["train_tokens"] / sweep.data["sequences"]))


def largest_rank(spec: SweepSpec) -> int:
    """The largest rank a trial may have."""
    searched = spec.space.get("lora.r")
    if searched is None:
        return int((spec.lora or {}).get("r", 8))
    ranks: list[Any] = list(searched.values) if searched.type == "choice" else [searched.high]
    return int(max(ranks))


def memory_per_slot(base: Any, adapter_width: int, tokens: int) -> int:
    """An estimate, in bytes: the adapter with its optimizer, and the activations of one micro-batch.

    Per token and layer, backward needs the inputs of the linear layers and norms, what goes into and comes out of the
    attention, and the gate: about 12 vectors of the hidden size and 4 of the intermediate size.
    """
    config = base.config.get_text_config()
    vectors = 12 * config.hidden_size + 4 * config.intermediate_size
    activations = tokens * config.num_hidden_layers * vectors * base.dtype.itemsize
    copies = (
        4 * torch.float32.itemsize + base.dtype.itemsize
    )  # weights, gradients, two moments; weights to compute with
    return adapter_width * copies + activations


def _free_memory() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def _step_seconds(joint: JointModel, rank: int, tokens: int) -> tuple[float, float]:
    """The fixed part of a joint step, and what each slot of so many tokens adds, in seconds."""
    probe = min(tokens, PROBE_TOKENS)
    ids = torch.arange(probe)
    adapters = [Adapter.of_zeros(joint.stack(rank)) for _ in range(PROBE_SLOTS)]
    batches = [MicroBatch(adapter, [Document(ids, ids)], float(probe)) for adapter in adapters]
    try:
        joint.step(batches)  # warms up
        one = min(_seconds(joint, batches[:1]) for _ in range(REPEATS))
        some = min(_seconds(joint, batches) for _ in range(REPEATS))
    finally:
        for adapter in adapters:
            adapter.free()
    each = max((some - one) / (PROBE_SLOTS - 1), 1e-6)
    return max(one - each, 0.0), each * tokens / probe


def _seconds(joint: JointModel, batches: list[MicroBatch]) -> float:
    started = time.perf_counter()
    joint.step(batches)
    return time.perf_counter() - started
