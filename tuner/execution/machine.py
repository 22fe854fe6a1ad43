"""The Ray cluster a sweep runs on: refusing one that would hang, starting one here, and what a trial gets of it."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from tuner.errors import MachineError
from tuner.spec.sweep import SweepSpec

# Read by Ray when it is imported or started, here and in every process it starts.
_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # each start and report of a trial waits for a poll; the default is 2 s
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the sweep has its own
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # the study is the state; Tune's snapshots are never read
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


@contextmanager
def ray_cluster() -> Iterator[Mapping[str, float]]:
    """Connect to the cluster of RAY_ADDRESS, or start one for the time of this block. Yields the cluster's resources.

    Raises MachineError where Ray would later hang without a word: no dashboard (Ray Train frees the workers of a
    stopped trial through it), or a second cluster on this host.
    """
    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    refuse_what_would_hang(address, clusters_on_this_host())
    context = ray.init(
        address=address or "local",
        include_dashboard=None if address else True,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        if not context.dashboard_url:
            raise MachineError("the Ray cluster runs no dashboard, which stopped trials need to free their workers")
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def clusters_on_this_host() -> set[str]:
    """Addresses of every Ray cluster that has a process here."""
    from ray._private.services import find_gcs_addresses

    return find_gcs_addresses()


def refuse_what_would_hang(address: str | None, running: set[str]) -> None:
    """Raise MachineError for an installation or a host on which sweeps are known to hang."""
    if importlib.util.find_spec("aiohttp_cors") is None:
        raise MachineError('Ray is installed without its dashboard: pip install "ray[default,tune,train]"')
    if address is None and running:
        raise MachineError(
            f"a Ray cluster runs on this host already, at {', '.join(sorted(running))}, and two block each other: "
            "use it (RAY_ADDRESS=auto) or stop it (ray stop)"
        )
    if len(running) > 1:
        addresses = ", ".join(sorted(running))
        raise MachineError(f"{len(running)} Ray clusters run on this host and block each other: {addresses}")


@dataclass(frozen=True)
class Placement:
    """What one trial gets, and how many run at once."""

    workers: int
    resources: dict[str, float]
    """Of one worker, as Ray names them."""
    threads: int
    concurrent: int


def place(spec: SweepSpec, cluster: Mapping[str, float]) -> Placement:
    """Divide the cluster among trials. Raises MachineError when not even one fits."""
    asked = spec.resources
    gpus = asked.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if cluster.get("GPU", 0) else 0.0
    resources = {"CPU": float(asked.cpus_per_worker)} | ({"GPU": gpus} if gpus else {})
    fits = min(
        int(cluster.get(kind, 0) // (amount * asked.workers_per_trial) if amount else spec.budget.trials)
        for kind, amount in resources.items()
    )
    if fits < 1:
        need = ", ".join(f"{amount * asked.workers_per_trial:g} {kind}" for kind, amount in resources.items())
        have = ", ".join(f"{cluster.get(kind, 0):g} {kind}" for kind in resources)
        raise MachineError(
            f"one trial needs {need} (resources.workers_per_trial: {asked.workers_per_trial}), the cluster has {have}"
        )
    limit = asked.max_concurrent_trials or spec.budget.trials
    return Placement(asked.workers_per_trial, resources, asked.cpus_per_worker, min(fits, limit, spec.budget.trials))
