"""A trial of several workers: a Tune function that starts a Ray Train `TorchTrainer`, whose workers run the trial."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray.train
from ray import tune
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError

from tuner.execution.endings import explain_failure, tail
from tuner.execution.logs import log_process_to
from tuner.spec.layout import Root, SweepFolder
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Ending, Report, TrialConfig

FAILURE = "failure"
"""Key of a Tune result that is no evaluation: the trial's `Ending`, as JSON because Tune flattens what is nested."""
PLACED = "placed"
"""Key of another, the first: every worker of the trial runs."""


def dedicated_trial(config: TrialConfig, job: dict[str, Any]) -> None:
    """Tune's function trainable. `job` holds the spec, the sweep's `Preparation` and the workers' resources.

    A trial that fails says so in a last result and ends well: to Tune, an outcome is data, not an error.
    """
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    folder = _folder(job)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": config, "job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=job["workers"], use_gpu="GPU" in job["resources"], resources_per_worker=job["resources"]
        ),
        torch_config=TorchConfig(backend=_backend(job)),
        run_config=ray.train.RunConfig(
            name=folder.trial(config["number"]).name,
            storage_path=str(folder.trial(config["number"]).parent),
            callbacks=[TuneReportCallback()],  # type: ignore[list-item]
            failure_config=ray.train.FailureConfig(max_failures=0),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        with suppress(FileNotFoundError):
            folder.root.fetch(folder.trial_log(config["number"]))
        ending = explain(error, folder.trial_log(config["number"]))
        tune.report({FAILURE: json.dumps(asdict(ending))})


def explain(error: TrainingFailedError, log: Path) -> Ending:
    """Turn what Ray Train raised into an ending, with the end of the trial's log.

    Where several workers failed, the one that says most counts: those that only lost another one come last.
    """
    failures: list[Exception] = [error]
    if isinstance(error, WorkerGroupError):
        failures = list(error.worker_failures.values())
    elif isinstance(error, ControllerError):
        failures = [error.controller_failure]
    telling = ("oom", "diverged", "budget", "strategy", "data", "refused", "worker-lost", "bug")
    endings = [explain_failure(failure) for failure in failures]
    ending = min(endings, key=lambda one: telling.index(one.cause) if one.cause in telling else 0)
    return replace(ending, log_tail=tail(log))


def train_worker(loop: dict[str, Any]) -> None:
    """One Ray Train worker of a trial."""
    config, job, folder = loop["config"], loop["job"], _folder(loop["job"])
    log = folder.trial_log(config["number"])
    rank = ray.train.get_context().get_world_rank()
    log_process_to(log)  # all ranks: any may be the one that fails
    try:
        ray.train.report({PLACED: True})
        import torch

        from tuner.training.baseline import Preparation
        from tuner.training.trial import run_trial

        torch.set_num_threads(job["threads"])
        run_trial(
            SweepSpec.model_validate(job["spec"]),
            config,
            Preparation(**job["preparation"]),
            folder.trial_checkpoints(config["number"]),
            lambda report, save: _emit(folder, config["number"], report, save, rank),
            folder.root,
        )
    except Exception:
        traceback.print_exc()  # into the trial's log, whose tail goes into the record
        folder.root.keep(log, stays=True)
        raise


def _emit(folder: SweepFolder, number: int, report: Report, save: Callable[[Path], None], rank: int) -> None:
    """Report to Tune through Ray Train; rank 0 saves the adapter. Every rank must call: it is a barrier."""
    if rank == 0:
        adapter = folder.adapter(number, report.tokens)
        save(adapter)
        report = replace(report, adapter_path=folder.root.keep(adapter))
    ray.train.report(report.as_dict())


def _backend(job: dict[str, Any]) -> str:
    """What is offloaded is also reduced on CPUs, which NCCL cannot."""
    if "GPU" not in job["resources"]:
        return "gloo"
    return "cpu:gloo,cuda:nccl" if job["spec"]["resources"]["offload"] else "nccl"


def _folder(job: dict[str, Any]) -> SweepFolder:
    spec = job["spec"]
    return Root.at(spec["storage"]["root"]).sweep(spec["name"])
