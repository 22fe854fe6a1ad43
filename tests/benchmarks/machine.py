"""What the machine is and can do: the frame for every figure that was measured on it."""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

REPEATS = 30


def describe_machine(base: Any) -> dict[str, Any]:
    """Processor, cores, memory and torch, and how fast products of the base's shape and type are (FLOP/s)."""
    flags = _cpuinfo("flags").split()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpuinfo("model name"),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "torch": torch.__version__,
        "bf16": [flag for flag in flags if "bf16" in flag],
        "matmul_flops": matmul_limit(base),
    }


def matmul_limit(base: Any, rows: int = 2048) -> float:
    """FLOP/s of the fastest product there is of a batch of activations with weights of the base's shape and type."""
    config = base.config
    return max(_flops(base, rows, config.hidden_size, out) for out in (config.intermediate_size, config.vocab_size))


def _flops(base: Any, rows: int, width: int, out: int) -> float:
    left = torch.randn(rows, width, device=base.device, dtype=base.dtype)
    right = torch.randn(out, width, device=base.device, dtype=base.dtype)
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        left @ right.t()
        if base.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * rows * width * out / best


def flops_per_token(base: nn.Module) -> int:
    """4 N: N weights in linear layers, forward and the backward to the activations; frozen weights have no gradient."""
    return 4 * sum(_weights(module) for module in base.modules() if isinstance(module, nn.Linear))


def _weights(linear: nn.Linear) -> int:
    return linear.in_features * linear.out_features


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{field}\s*: (.*)", path.read_text() if path.exists() else "", re.MULTILINE)
    return found[1] if found else platform.processor()
