"""What several workers do together: a trial, or the base's own score, each a Ray Train `TorchTrainer`."""

from __future__ import annotations

import json
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
from ray import tune
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError

from tuner.errors import TunerError
from tuner.execution.endings import explain_failure, tail
from tuner.execution.last_words import leave_stuck
from tuner.execution.logs import log_process_to
from tuner.execution.machine import Placement
from tuner.spec.layout import Root, Save, SweepFolder
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Ending, Report, TrialConfig
from tuner.training.watchdog import Watch

FAILURE = "failure"
"""Key of a Tune result that is no evaluation: the trial's `Ending`, as JSON because Tune flattens what is nested."""
PLACED = "placed"
"""Key of another, the first: every worker of the trial runs."""
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""Words of gloo and NCCL for a worker that is not there any more."""


def job_of_workers(spec: SweepSpec, facts: dict[str, Any], placement: Placement, strategy: str) -> dict[str, Any]:
    """What workers are told. `facts` is the sweep's `Preparation`, `strategy` how they share, now that it is known."""
    resources = spec.resources.model_copy(update={"strategy": strategy})
    return {
        "spec": spec.model_copy(update={"resources": resources}).model_dump(mode="json"),
        "preparation": facts,
        "workers": placement.workers,
        "resources": placement.resources,
        "threads": placement.threads,
    }


def dedicated_trial(config: TrialConfig, job: dict[str, Any]) -> None:
    """Tune's function trainable, for a job of `job_of_workers`.

    A trial that fails says so in a last result and ends well: to Tune, an outcome is data, not an error.
    """
    from ray.tune.integration.ray_train import TuneReportCallback

    folder = _folder(job)
    trainer = _trainer(
        train_worker, {"config": config, "job": job}, folder.trial(config["number"]), [TuneReportCallback()]
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        with suppress(FileNotFoundError):
            folder.root.fetch(folder.trial_log(config["number"]))
        ending = explain(error, folder.trial_log(config["number"]))
        tune.report({FAILURE: json.dumps(asdict(ending))})


def score_base_on_workers(job: dict[str, Any]) -> dict[str, float]:
    """The untuned base's scores, by a trial's workers. Raises TunerError with the reason where they cannot."""
    folder, came_to = _folder(job), Future[Any]()

    def fit() -> None:
        try:
            came_to.set_result(_trainer(score_worker, {"job": job}, folder.ray / "baseline").fit())
        except BaseException as error:
            came_to.set_exception(error)

    threading.Thread(target=fit, daemon=True).start()  # in the main one, Ray Train would take Ctrl-C for itself
    try:
        return came_to.result().return_value
    except TrainingFailedError as error:
        raise TunerError(f"the base could not be scored: {explain(error, folder.log).reason}") from error


def _trainer(
    worker: Callable[[dict[str, Any]], Any], loop: dict[str, Any], place: Path, callbacks: Sequence[Any] = ()
) -> Any:
    """Of a job's workers, all running `worker` on `loop`; Ray Train's own files are in `place`."""
    from ray.train.torch import TorchConfig, TorchTrainer

    job = loop["job"]
    return TorchTrainer(
        worker,
        train_loop_config=loop,
        scaling_config=ray.train.ScalingConfig(
            num_workers=job["workers"], use_gpu="GPU" in job["resources"], resources_per_worker=job["resources"]
        ),
        torch_config=TorchConfig(
            backend=_backend(job), timeout_s=job["spec"]["train"].get("ddp_timeout", TorchConfig.timeout_s)
        ),
        run_config=ray.train.RunConfig(
            name=place.name,
            storage_path=str(place.parent),
            callbacks=list(callbacks),
            failure_config=ray.train.FailureConfig(max_failures=0),
        ),
    )


def explain(error: TrainingFailedError, log: Path) -> Ending:
    """Turn what Ray Train raised into an ending, with the end of the trial's log.

    Where several workers failed, the one that says most counts, and one that only lost another says nothing of itself.
    """
    failures: list[Exception] = [error]
    if isinstance(error, WorkerGroupError):
        failures = list(error.worker_failures.values())
    elif isinstance(error, ControllerError):
        failures = [error.controller_failure]
    telling = ("oom", "diverged", "budget", "strategy", "disk", "data", "refused", "worker-lost", "bug")
    endings = [explain_failure(failure) for failure in failures if not _lost_another(failure)]
    endings = endings or [replace(explain_failure(failures[0]), cause="worker-lost")]
    ending = min(endings, key=lambda one: telling.index(one.cause) if one.cause in telling else 0)
    return replace(ending, log_tail=tail(log))


def _lost_another(failure: Exception) -> bool:
    """Whether a worker heard nothing more of another, as torch, gloo or NCCL put it."""
    return type(failure).__module__ == "torch.distributed" or any(words in str(failure) for words in _GONE)


def score_worker(loop: dict[str, Any]) -> dict[str, float]:
    """One Ray Train worker of those that score the base; each returns the scores."""
    job, folder = loop["job"], _folder(loop["job"])
    log_process_to(folder.log)
    import torch

    from tuner.training.baseline import Preparation
    from tuner.training.trial import score_untuned

    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory() as output_dir:
        spec, sweep = SweepSpec.model_validate(job["spec"]), Preparation(**job["preparation"])
        watch = Watch(spec.resources.stuck_after, partial(leave_stuck, folder, [], folder.log))
        with watch.working():
            return score_untuned(spec, sweep, Path(output_dir), watch.moved).as_dict()


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
        from tuner.training.room import keep_to_room
        from tuner.training.trial import run_trial

        torch.set_num_threads(job["threads"])
        spec, number = SweepSpec.model_validate(job["spec"]), config["number"]
        keep_to_room(spec.resources)
        watch = Watch(spec.resources.stuck_after, partial(leave_stuck, folder, [number], log))
        with watch.working():
            run_trial(
                spec,
                config,
                Preparation(**job["preparation"]),
                folder.trial_checkpoints(number),
                lambda report, save: _emit(folder, number, report, save, rank, watch),
                folder.root,
                watch.moved,
            )
    except Exception:
        with suppress(OSError):  # where the disk is full, the ending still says so
            traceback.print_exc()  # into the trial's log, whose tail goes into the record
            folder.root.keep(log, stays=True)
        raise


def _emit(folder: SweepFolder, number: int, report: Report, save: Save | None, rank: int, watch: Watch) -> None:
    """Report to Tune through Ray Train; rank 0 saves the adapter. Every rank must call: it is a barrier."""
    if rank == 0:
        report = replace(report, adapter_path=folder.keep_adapter(number, report.tokens, save))
    with watch.waiting():
        ray.train.report(report.as_dict())


def _backend(job: dict[str, Any]) -> str:
    """What is offloaded is also reduced on CPUs, which NCCL cannot."""
    if "GPU" not in job["resources"]:
        return "gloo"
    return "cpu:gloo,cuda:nccl" if job["spec"]["resources"]["offload"] else "nccl"


def _folder(job: dict[str, Any]) -> SweepFolder:
    spec = job["spec"]
    return Root.at(spec["storage"]["root"]).sweep(spec["name"])
