"""How many slots, and on how many lanes: measured on this machine with this base, because what pays depends on both.

A joint step of n slots takes `fixed + n * each` seconds. The fixed part, reading weights and starting kernels, is what
sharing saves; slots are added until what is left of it is small beside the rest, or memory ends.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import psutil
import torch

from tuner.spec.batch import batch_of_one
from tuner.spec.sharing import most_to_learn_from
from tuner.spec.sweep import SweepSpec
from tuner.training.baseline import Preparation
from tuner.training.shared.joint import Document, JointModel, MicroBatch
from tuner.training.shared.lora import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tuner.training.shared.engine import Engine
    from tuner.training.shared.lane import Lane

WORTH_IT = 0.05
"""Slots are added while the fixed part is more than this share of a step: with fewer, the search decides oftener."""
MOST_SLOTS = 32
PROBE_TOKENS = 64
"""Most tokens of a slot when measuring; a step's own cost grows with its tokens, the fixed part does not."""
PROBE_SLOTS = 3
DTYPE_MATTERS = 1.5
"""Advise another dtype when it multiplies so many times as fast."""
MEMORY_SHARE = 0.8
"""Of the free memory, what slots may take."""


@dataclass(frozen=True)
class Plan:
    slots: int
    lanes: int
    reason: str


def plan_slots(spec: SweepSpec, engine: Engine, sweep: Preparation, engines: int = 1) -> Plan:
    """As many slots as pay and fit, on the lanes that serve them best, which the engine uses from here on.

    `resources.share_base` may fix the number of slots. No trial may be attached yet.
    """
    rank, tokens = largest_rank(spec), typical_step(spec, sweep)
    lane = engine.lanes[0]
    needed = lane.between_turns(lambda: memory_per_slot(engine.base, lane.joint, rank, tokens))
    fitting = max(1, int(MEMORY_SHARE * _free_memory() / needed))
    asked, most = spec.resources.share_base, math.ceil(most_to_learn_from(spec) / engines)
    plans: list[tuple[float, Plan]] = []
    for lanes in (1, 2) if engine.base.device.type == "cpu" and engine.threads > 1 else (1,):
        engine.use_lanes(lanes)
        fixed, each = _step_seconds(engine.lanes, rank, tokens)
        paying = lanes * max(1, round(fixed / (WORTH_IT * each)))
        slots = asked if isinstance(asked, int) else min(paying, fitting, MOST_SLOTS, most)
        reason = (
            f"{lanes} x {engine.threads // lanes} threads: a step takes {1000 * fixed:.0f} ms and "
            f"{1000 * each:.0f} ms for each slot of {tokens} tokens, so {paying} slots pay"
        )
        if slots >= lanes:
            plans.append((slots * tokens / (fixed + each * slots / lanes), Plan(slots, lanes, reason)))
    best = plans[-1] if plans[-1][0] > (1 + WORTH_IT) * plans[0][0] else plans[0]
    engine.use_lanes(best[1].lanes)
    said = [f"{plan.reason}, {speed:.0f} tokens/s" for speed, plan in plans]
    said.append(f"{fitting} of about {needed / 2**20:.0f} MiB fit")
    said.append(
        f"resources.share_base is {asked}"
        if isinstance(asked, int)
        else f"a search of {spec.budget.trials} trials has use for {most_to_learn_from(spec)}"
        + (f" on {engines} engines" if engines > 1 else "")
    )
    said.append(engine.lanes[0].between_turns(lambda: dtype_advice(engine.base)))
    return replace(best[1], reason="; ".join(said))


def typical_step(spec: SweepSpec, sweep: Preparation) -> int:
    """Tokens of one micro-batch of the spec's own batch size and mean sequence length."""
    rows, _ = batch_of_one(spec.train)
    return max(8, round(rows * sweep.data["train_tokens"] / sweep.data["sequences"]))


def largest_rank(spec: SweepSpec) -> int:
    """The largest rank a trial may have."""
    searched = spec.space.get("lora.r")
    if searched is None:
        return int((spec.lora or {}).get("r", 8))
    ranks: list[Any] = list(searched.values) if searched.type == "choice" else [searched.high]
    return int(max(ranks))


def memory_per_slot(base: PreTrainedModel, joint: JointModel, rank: int, tokens: int) -> int:
    """In bytes: the adapter with its optimizer, and what one micro-batch keeps for backward, seen in a probe of it."""
    probe = min(tokens, PROBE_TOKENS)
    weights = {tensor.untyped_storage().data_ptr() for tensor in base.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _seconds(joint, rank, probe, slots=1)
    # Of every parameter of the adapter: its value, gradient and two moments, and the value to compute with.
    adapter = joint.stack(rank).width * (4 * torch.float32.itemsize + base.dtype.itemsize)
    return adapter + sum(kept.values()) * tokens // probe


def dtype_advice(base: Any) -> str:
    """What `model.dtype` costs here: CPUs with bfloat16 instructions compute with it several times as fast, others not.

    The spec decides all the same: a score is worth something only beside others of the same type.
    """
    speed = {dtype: _products_per_second(dtype, base.device) for dtype in (torch.bfloat16, torch.float32)}
    other = torch.float32 if base.dtype == torch.bfloat16 else torch.bfloat16
    ratio = speed[other] / speed.get(base.dtype, speed[other])
    advice = f": model.dtype {str(other).removeprefix('torch.')} would be faster" if ratio > DTYPE_MATTERS else ""
    return f"bfloat16 products are {speed[torch.bfloat16] / speed[torch.float32]:.1f} times as fast as float32{advice}"


def _products_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """Products of matrices of 512 x 512, the best of a few."""
    matrix = torch.ones(512, 512, dtype=dtype, device=device)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        times.append(time.perf_counter() - started)
    return 1 / min(times)


def _free_memory() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def _step_seconds(lanes: list[Lane], rank: int, tokens: int) -> tuple[float, float]:
    """The fixed part of a joint step on every lane at once, and what a slot on each adds, in seconds."""
    probe = min(tokens, PROBE_TOKENS)
    with ThreadPoolExecutor(len(lanes)) as pool:

        def seconds(slots: int) -> float:
            times = pool.map(lambda lane: lane.between_turns(lambda: _seconds(lane.joint, rank, probe, slots)), lanes)
            return max(times)

        seconds(1)  # warms up
        one, some = seconds(1), seconds(PROBE_SLOTS)
    each = max((some - one) / (PROBE_SLOTS - 1), 1e-6)
    return max(one - each, 0.0), each * tokens / probe


def _seconds(joint: JointModel, rank: int, tokens: int, slots: int) -> float:
    """What one joint step of slots with so many tokens each takes."""
    ids = torch.arange(tokens)
    adapters = [Adapter.of_zeros(joint.stack(rank)) for _ in range(slots)]
    try:
        started = time.perf_counter()
        joint.step([MicroBatch(adapter, [Document(ids, ids)], float(tokens)) for adapter in adapters])
        return time.perf_counter() - started
    finally:
        for adapter in adapters:
            adapter.free()
