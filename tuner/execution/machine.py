"""The Ray cluster a sweep runs on: refusing one that would hang, starting one here, and what a trial gets of it."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from tuner.errors import MachineError
from tuner.spec.sweep import SweepSpec

# Read by Ray when it is imported or started, here and in every process it starts.
_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # each start and report of a trial waits for a poll; the default is 2 s
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process for every trial, and what it would say is no retry here
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the sweep has its own
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # the study is the state; Tune's snapshots are never read
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}

# Where Ray's State API is, for the process that frees the workers of stopped trials. Left to itself it follows the
# address that the last `ray start` on this host wrote down, and hangs where that cluster has ended without `ray stop`.
_STATE_API = "RAY_API_SERVER_ADDRESS"


@contextmanager
def ray_cluster(dashboard: bool = True) -> Iterator[list[Mapping[str, float]]]:
    """Connect to the cluster of RAY_ADDRESS, or start one for the time of this block. Yields each node's resources.

    A `dashboard` is what Ray Train frees the workers of a stopped trial through; it takes a second to start. Raises
    MachineError where there is no cluster to connect to, and where Ray would later hang without a word: that dashboard
    is not there, or a second cluster is on this host.
    """
    ours = not ray.is_initialized()
    try:
        context = _connect(dashboard) if ours else ray.init(ignore_reinit_error=True)
        if dashboard and not context.dashboard_url:
            raise MachineError("the Ray cluster runs no dashboard, which stopped trials need to free their workers")
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        if ours:
            ray.shutdown()
            os.environ.pop(_STATE_API, None)


def _connect(dashboard: bool) -> Any:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    address, running = os.environ.get("RAY_ADDRESS") or "local", clusters_on_this_host()
    refuse_what_would_hang(address, running)
    if address == "local":
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        os.environ[_STATE_API] = f"http://127.0.0.1:{port}"
        return ray.init("local", dashboard_port=port, include_dashboard=dashboard, **_QUIET)
    address = running.pop() if address == "auto" else address
    environment = {**_SETTINGS, "RAY_ADDRESS": address}  # what runs already has an environment of its own
    return ray.init(address, runtime_env={"env_vars": environment}, **_QUIET)


def clusters_on_this_host() -> set[str]:
    """Addresses of every Ray cluster that has a process here, at this moment."""
    from ray._private.services import find_gcs_addresses

    find_gcs_addresses.cache_clear()  # type: ignore[attr-defined]  # set on the function itself
    return set(find_gcs_addresses())


def refuse_what_would_hang(address: str, running: Collection[str]) -> None:
    """Raise MachineError for an installation or a host on which a sweep at this RAY_ADDRESS is known to hang.

    `running` are the addresses of the clusters on this host.
    """
    there = ", ".join(sorted(running))
    if importlib.util.find_spec("aiohttp_cors") is None:
        raise MachineError('Ray is installed without its dashboard: pip install "ray[default,tune,train]"')
    if address == "local" and running:
        raise MachineError(
            f"a Ray cluster runs on this host already, at {there}, and two block each other: "
            "use it (RAY_ADDRESS=auto) or stop it (ray stop)"
        )
    if len(running) > 1:
        raise MachineError(f"{len(running)} Ray clusters run on this host and block each other: {there}")
    if address == "auto" and not running:
        raise MachineError("RAY_ADDRESS is auto, but no Ray cluster runs on this host")
    if address not in ("local", "auto"):
        _refuse_silence(address)


def _refuse_silence(address: str) -> None:
    """Ray itself tries for minutes to reach a cluster that is gone."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()) or "/" in host:
        raise MachineError(f"RAY_ADDRESS is {address!r}; allowed: auto, local, HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise MachineError(f"RAY_ADDRESS is {address}, but no Ray cluster answers there: {error}") from None


@dataclass(frozen=True)
class Placement:
    """What one trial gets, and how many run at once."""

    workers: int
    resources: dict[str, float]
    """Of one worker, as Ray names them."""
    threads: int
    concurrent: int


def place(spec: SweepSpec, nodes: Sequence[Mapping[str, float]]) -> Placement:
    """Divide the cluster among trials, given each node's resources. Raises MachineError when not even one fits."""
    asked = spec.resources
    gpus = asked.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU") for node in nodes) else 0.0
    worker = {"CPU": float(asked.cpus_per_worker)} | ({"GPU": gpus} if gpus else {})
    room = [_room(node, worker) for node in nodes]
    fits = sum(room) // asked.workers_per_trial
    if fits < 1:
        raise MachineError(
            f"resources: one trial needs {asked.workers_per_trial} x ({_amounts(worker, worker)}), "
            f"the cluster has {' and '.join(_amounts(node, worker) for node in nodes)}"
        )
    limit = asked.max_concurrent_trials or spec.budget.trials
    return Placement(asked.workers_per_trial, worker, asked.cpus_per_worker, min(fits, limit, spec.budget.trials))


def _room(node: Mapping[str, float], worker: Mapping[str, float]) -> int:
    """How many such workers fit on a node: a worker does not spread over nodes."""
    return min(int(node.get(kind, 0) / amount + 1e-9) for kind, amount in worker.items())  # 1 holds 0.1 ten times


def _amounts(resources: Mapping[str, float], kinds: Iterable[str]) -> str:
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in kinds)
