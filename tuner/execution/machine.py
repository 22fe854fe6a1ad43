"""The Ray cluster a sweep runs on: refusing one that would hang, starting one here, and what a trial gets of it."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.authentication.authentication_token_setup import (
    ensure_token_if_auth_enabled,
    maybe_enable_token_auth_if_token_available,
)
from ray._private.services import find_gcs_addresses
from ray._private.state import available_resources_per_node
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # made by Cython
from ray.exceptions import AuthenticationError, RpcError

from tuner.errors import MachineError
from tuner.execution.session import free_port, remove_dead_sessions, removed_afterwards, short_folder
from tuner.spec.checks.needs import why_gpu
from tuner.spec.in_time import in_time
from tuner.spec.sweep import SweepSpec

# Read by Ray when it is imported or started, here and in every process it starts.
_SETTINGS = {
    "OMP_WAIT_POLICY": "PASSIVE",  # as in tuner/__init__.py, for workers of a cluster that runs already
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


AHEAD = 8
"""Trials to ask a cluster for beyond what fits, where nodes may join."""

_GCS_S = 20.0
"""How long a cluster's head may take to let us in."""
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
    if ray.is_initialized():
        yield _usable(ray.init(ignore_reinit_error=True), dashboard)
        return
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    address, running = os.environ.get("RAY_ADDRESS") or "local", clusters_on_this_host()
    refuse_what_would_hang(address, running)
    with _started(dashboard) if address == "local" else _joined(address, running) as context:
        yield _usable(context, dashboard)


def _usable(context: Any, dashboard: bool) -> list[Mapping[str, float]]:
    if dashboard and not context.dashboard_url:
        raise MachineError("the Ray cluster runs no dashboard, which stopped trials need to free their workers")
    return live_nodes()


@contextmanager
def _started(dashboard: bool) -> Iterator[Any]:
    with short_folder(), ExitStack() as afterwards:
        remove_dead_sessions()
        port = free_port()
        os.environ[_STATE_API] = f"http://127.0.0.1:{port}"
        afterwards.callback(os.environ.pop, _STATE_API, None)
        context = _init("local", dashboard_port=port, include_dashboard=dashboard)
        afterwards.enter_context(removed_afterwards(Path(context.address_info["session_dir"])))
        afterwards.callback(ray.shutdown)
        yield context


@contextmanager
def _joined(address: str, running: Collection[str]) -> Iterator[Any]:
    address = address_for_every_node(address, running)
    if address in running:
        _take_this_machine_s_token()
    refuse_silence(address)
    environment = {**_SETTINGS, "RAY_ADDRESS": address}  # what runs already has an environment of its own
    context = _init(address, runtime_env={"env_vars": environment})
    try:
        yield context
    finally:
        ray.shutdown()


def _init(address: str, **options: Any) -> Any:
    before = set(psutil.Process().children(recursive=True))
    try:  # the border to Ray, which has an error of its own for each of its steps
        return ray.init(address, **options, **_QUIET)
    except Exception as error:
        ray.shutdown()
        for process in set(psutil.Process().children(recursive=True)) - before:  # half a cluster, which Ray leaves
            with suppress(psutil.NoSuchProcess):
                process.kill()
        what = "Ray cannot be started here" if address == "local" else f"the Ray cluster at {address} cannot be joined"
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MachineError(f"{what}: {said}") from error


def _take_this_machine_s_token() -> None:
    """Join a cluster here as Ray does when it looks for one: with the token that Ray wrote down here, if any."""
    logging.getLogger(maybe_enable_token_auth_if_token_available.__module__).setLevel(logging.ERROR)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def clusters_on_this_host() -> set[str]:
    """Addresses of every Ray cluster that has a process here, at this moment."""
    find_gcs_addresses.cache_clear()  # type: ignore[attr-defined]  # set on the function itself
    return set(find_gcs_addresses())


def address_for_every_node(address: str, running: Collection[str]) -> str:
    """Where the cluster of this RAY_ADDRESS is for its other nodes, too: `auto` and loopback mean this host's."""
    here = address == "auto" or address.rpartition(":")[0] in ("localhost", "127.0.0.1", "[::1]")
    return next(iter(running)) if here and running else address


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
    host, _, port = address.rpartition(":")
    if address not in ("local", "auto") and (not (host and port.isdecimal()) or "/" in host):
        raise MachineError(f"RAY_ADDRESS is {address!r}; allowed: auto, local, HOST:PORT")


def refuse_silence(address: str) -> None:
    """Raise MachineError where no Ray cluster answers, or it does not let us in: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    gone = f"RAY_ADDRESS is {address}, but no Ray cluster answers there"
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise MachineError(f"{gone}: {error}") from None
    try:
        ensure_token_if_auth_enabled(create_token_if_missing=False)  # or the client below ends this process
        in_time(_GCS_S, "it", lambda: GcsClient(address=address).internal_kv_get(b"", namespace=b"tuner", timeout=5))
    except AuthenticationError:
        raise MachineError(
            f"the Ray cluster at {address} demands its token: "
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH as on the cluster"
        ) from None
    except (MachineError, RpcError) as error:
        raise MachineError(f"{gone}: {str(error).splitlines()[0]}") from None


def others_use_it() -> bool:
    """Whether the cluster was there before the sweep: others may wait for its resources, and nodes may join it."""
    return (os.environ.get("RAY_ADDRESS") or "local") != "local"


def live_nodes() -> list[Mapping[str, float]]:
    """The resources of every node that is there now."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def free_nodes() -> list[Mapping[str, float]]:
    """What of every node nobody has reserved now."""
    return list(available_resources_per_node().values())


@dataclass(frozen=True)
class Placement:
    """What one trial gets, and how many run at once."""

    workers: int
    resources: dict[str, float]
    """Of one worker, as Ray names them."""
    threads: int
    concurrent: int
    """On the nodes that were there when it was made."""
    most: int
    """However large the cluster becomes."""
    ahead: int = 0
    """How many more than fit to ask Ray for: what its autoscaler starts nodes for."""

    def fits(self, nodes: Iterable[Mapping[str, float]]) -> int:
        """How many trials these nodes hold, whether or not the sweep has so many."""
        return sum(_room(node, self.resources) for node in nodes) // self.workers

    def wanted(self, nodes: Iterable[Mapping[str, float]]) -> int:
        """How many trials to ask Ray for at once."""
        return min(self.fits(nodes) + self.ahead, self.most)

    def beside(self, nodes: Iterable[Mapping[str, float]]) -> int:
        """How many workers one of these nodes may have at once."""
        return max(1, min(self.workers * self.most, max(_room(node, self.resources) for node in nodes)))

    def __str__(self) -> str:
        return f"{self.workers} x ({_amounts(self.resources, self.resources)})"


def place(spec: SweepSpec, nodes: Sequence[Mapping[str, float]], fixed: bool = True) -> Placement:
    """Divide the cluster among trials, given each node's resources.

    Raises MachineError when not even one trial fits and the cluster is `fixed`: no node will ever join it.
    """
    asked = spec.resources
    gpus = asked.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU") for node in nodes) else 0.0
    worker = {"CPU": float(asked.cpus_per_worker)} | ({"GPU": gpus} if gpus else {})
    if asked.strategy == "fsdp" and not gpus:
        raise MachineError(
            "resources.strategy is fsdp, which becomes ddp on workers without a GPU: use ddp, zero1, zero2 or zero3"
        )
    for reason in [] if gpus else why_gpu(spec):
        raise MachineError(f"{reason}, and the workers have none")
    most = min(asked.max_concurrent_trials or spec.budget.trials, spec.budget.trials)
    ahead = 0 if fixed else AHEAD
    placement = Placement(asked.workers_per_trial, worker, asked.cpus_per_worker, 0, most, ahead)
    fits = placement.fits(nodes)
    if fixed and fits < 1:
        raise MachineError(f"resources: one trial needs {placement}, the cluster has {_each(nodes, worker)}")
    return replace(placement, concurrent=min(fits, most))


def cores_of_nodes(placement: Placement) -> dict[str, int]:
    """The cores that trials may use on each node with room for one, by node id, the largest first.

    What others use of a node now is left out, but for a node that is full.
    """
    free, cores, left = available_resources_per_node(), {}, placement.most
    room = {}
    for node in ray.nodes():
        if node["Alive"]:
            whole = _room(node["Resources"], placement.resources)
            room[node["NodeID"]] = _room(free.get(node["NodeID"], {}), placement.resources) or whole
    for node, workers in sorted(room.items(), key=lambda item: -item[1]):
        if take := min(workers, left):
            cores[node] = take * placement.threads
            left -= take
    return cores


def shortage(placement: Placement) -> str:
    """What a trial needs, what the cluster has, and what of that is free now."""
    kinds = placement.resources
    there, free = _each(live_nodes(), kinds), _each(free_nodes(), kinds)
    return f"no room: one trial needs {placement}, the cluster has {there}, of which free: {free}"


def _room(node: Mapping[str, float], worker: Mapping[str, float]) -> int:
    """How many such workers fit on a node: a worker does not spread over nodes."""
    return min(int(node.get(kind, 0) / amount + 1e-9) for kind, amount in worker.items())  # 1 holds 0.1 ten times


def _each(nodes: Iterable[Mapping[str, float]], kinds: Iterable[str]) -> str:
    """The nodes in words, equal ones together."""
    counts = Counter(_amounts(node, list(kinds)) for node in nodes)
    return " and ".join(f"{count} x ({one})" if count > 1 else one for one, count in counts.items())


def _amounts(resources: Mapping[str, float], kinds: Iterable[str]) -> str:
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in kinds)
