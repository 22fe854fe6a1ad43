"""How much memory a worker of a trial has, and how its process is kept to that."""

from __future__ import annotations

import math
import resource
from pathlib import Path

import psutil
import torch

from tuner.spec.sweep import ResourcesSpec

USABLE = 0.9
"""Of a device's memory, what workers may take: the rest is for the libraries and between allocations."""
_LIMITS_OF_CONTAINERS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def room_of_worker(resources: ResourcesSpec, beside: int = 1) -> int:
    """Bytes that a worker may take of this process's GPU, or of this machine that `beside` workers divide."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0).total_memory * _share_of_gpu(resources)
    else:
        device = _memory_here() / beside
    return int(min(USABLE * device, resources.memory_per_worker or math.inf))


def keep_to_room(resources: ResourcesSpec) -> None:
    """Make every allocation of this process beyond a worker's room fail as out of memory, where it has a bound.

    On a GPU that is `memory_per_worker`, and the share of a worker that does not have all of it. On a CPU it is
    `memory_per_worker` beyond what the process has by now, libraries and all, and counts what is asked for, as Linux's
    RLIMIT_DATA does.
    """
    asked = resources.memory_per_worker
    if torch.cuda.is_available():
        if asked is not None or _share_of_gpu(resources) < 1:
            device = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(room_of_worker(resources) / device)
    elif asked is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (psutil.Process().memory_info().data + asked, hard))


def _share_of_gpu(resources: ResourcesSpec) -> float:
    return min(resources.gpus_per_worker or 1.0, 1.0)


def _memory_here() -> int:
    """What this machine has, or the container allows."""
    limits = [Path(file).read_text().strip() for file in _LIMITS_OF_CONTAINERS if Path(file).exists()]
    return min([psutil.virtual_memory().total, *(int(limit) for limit in limits if limit.isdigit())])
