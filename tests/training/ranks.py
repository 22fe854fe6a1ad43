"""The workers of one trial as plain processes over gloo, without Ray: fast, and with a hard limit."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from tuner.spec.layout import Save
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report, TrialConfig
from tuner.training.baseline import Preparation

LIMIT_S = 120


@dataclass(frozen=True)
class Trained:
    """What the first worker says of a trial."""

    reports: list[Report]
    folder: Path
    """Where its adapters are, each in `tokens-N`."""
    error: tuple[str, str] | None
    """Its type, and what it says."""


@contextmanager
def processes() -> Iterator[Any]:
    """A context of multiprocessing whose processes begin with everything imported; its server ends with the block."""
    from multiprocessing.forkserver import _forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tuner.training.trial", "deepspeed"])
    try:
        yield context
    finally:
        _forkserver._stop()


def train(
    context: Any, spec: SweepSpec, config: TrialConfig, sweep: Preparation, folder: Path, fsdp_on_cpus: bool = False
) -> Trained:
    """Train a trial in as many processes as its spec has workers; what is in the folder already, it goes on from."""
    queue, workers = context.Queue(), spec.resources.workers_per_trial
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    job = (spec.model_dump(mode="json"), config, asdict(sweep), folder, fsdp_on_cpus)
    ranks = [context.Process(target=_train, args=(rank, workers, port, job, queue)) for rank in range(workers)]
    try:
        for process in ranks:
            process.start()
        said = dict(queue.get(timeout=LIMIT_S) for _ in ranks)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    reports, error = said[0]
    assert [said[rank] for rank in range(workers)] == [said[0]] * workers  # every worker says the same
    return Trained([Report(**report) for report in reports], folder, error)


def _train(rank: int, workers: int, port: int, job: tuple[Any, ...], queue: Queue[Any]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(workers), "LOCAL_WORLD_SIZE": str(workers)}
    import torch

    from tuner.training import trial

    spec, config, facts, folder, fsdp_on_cpus = job
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=workers)
    if fsdp_on_cpus:
        _let_accelerate_shard_on_cpus(trial)
    reports: list[dict[str, Any]] = []

    def emit(report: Report, save: Save | None) -> None:
        reports.append(asdict(report) | {"tokens_per_s": 0.0, "duration_s": 0.0})  # each worker has its own
        if rank == 0 and save is not None:
            save(folder / f"tokens-{report.tokens}")

    error = None
    try:
        trial.run_trial(SweepSpec.model_validate(spec), config, Preparation(**facts), folder / "checkpoints", emit)
    except Exception as raised:
        traceback.print_exc()
        error = (type(raised).__name__, str(raised))
    queue.put((rank, (reports, error)))
    queue.close()
    queue.join_thread()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _let_accelerate_shard_on_cpus(trial: Any) -> None:
    """Accelerate picks FSDP only where it sees accelerators; elsewhere it silently takes DDP."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    plan = trial.plan_trial

    def plan_sharded(*arguments: Any) -> Any:
        _ = arguments[-1].device  # TrainingArguments finds out who the workers are
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        return plan(*arguments)

    trial.plan_trial = plan_sharded
