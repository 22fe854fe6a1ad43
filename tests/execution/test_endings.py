"""What a trial's workers raised, and the outcome it is recorded with; the exceptions are those of Ray and torch."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path

import pytest
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from safetensors import SafetensorError

from tuner.errors import DataError, DiskFullError, InfeasibleError, TunerError
from tuner.execution import trial
from tuner.execution.endings import LOG_TAIL_LINES
from tuner.execution.trial import explain

DEAD = WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: Worker(...)", ActorDiedError())
KILLED_BY_RAY = WorkerHealthCheckFailedError(
    "A worker health check failed.", OutOfMemoryError("Worker was killed due to the node running low on memory.")
)
DISCONNECTED = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:11264")


def too_much_for_this_machine() -> Exception:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    return RuntimeError(str(caught.value))


def no_room_for_a_tensor() -> Exception:
    """As safetensors says it, which knows no errno."""
    return SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("failures", "outcome", "cause", "reason"),
    [
        ([torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")], "INFEASIBLE", "oom", "CUDA out of"),
        ([too_much_for_this_machine()], "INFEASIBLE", "oom", "DefaultCPUAllocator"),
        ([MemoryError()], "INFEASIBLE", "oom", "MemoryError"),
        ([KILLED_BY_RAY], "INFEASIBLE", "oom", "running low on memory"),
        ([InfeasibleError("diverged", "eval_loss is nan")], "INFEASIBLE", "diverged", "eval_loss is nan"),
        ([DataError("rows.jsonl has changed")], "FAILED", "data", "rows.jsonl has changed"),
        ([TunerError("asks for 2 workers, the trainer found 1")], "FAILED", "refused", "asks for 2 workers"),
        ([DEAD], "FAILED", "worker-lost", "The actor died unexpectedly"),
        ([OSError(errno.ENOSPC, "No space left on device")], "FAILED", "disk", "No space left on device"),
        ([OSError(errno.EDQUOT, "Disk quota exceeded")], "FAILED", "disk", "Disk quota exceeded"),
        ([no_room_for_a_tensor()], "FAILED", "disk", "No space left on device"),
        (
            [RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")],
            "FAILED",
            "disk",
            "pos",
        ),
        ([DiskFullError("the disk of /runs is full")], "FAILED", "disk", "the disk of /runs is full"),
        ([KeyError("lomo")], "FAILED", "bug", "KeyError: 'lomo'"),
        ([AssertionError()], "FAILED", "bug", "AssertionError"),
        # of several workers, the one that caused it
        ([DISCONNECTED, torch.OutOfMemoryError("CUDA out of memory.")], "INFEASIBLE", "oom", "CUDA out of memory."),
        ([DISCONNECTED, OSError(errno.ENOSPC, "No space left on device")], "FAILED", "disk", "No space left"),
        ([DISCONNECTED, DEAD], "FAILED", "worker-lost", "The actor died unexpectedly"),
        ([DISCONNECTED, RuntimeError("my own")], "FAILED", "bug", "RuntimeError: my own"),
        ([KeyError("mine"), torch.distributed.DistBackendError("NCCL error")], "FAILED", "bug", "KeyError: 'mine'"),
        ([DISCONNECTED], "FAILED", "worker-lost", "Connection closed by peer"),  # the other is seen a moment later
    ],
)
def test_what_the_workers_raised_decides_the_outcome(tmp_path: Path, failures, outcome, cause, reason):
    error = WorkerGroupError("[Rank 0 Error Snippet]: ...", dict(enumerate(failures)))
    ending = explain(pickle.loads(pickle.dumps(error)), tmp_path / "trial.log")
    assert (ending.outcome, ending.cause, ending.log_tail) == (outcome, cause, None)
    assert ending.reason is not None
    assert reason in ending.reason
    assert "\n" not in ending.reason


def test_workers_that_never_started_are_lost(tmp_path: Path):
    ending = explain(ControllerError(WorkerGroupStartupTimeoutError(2)), tmp_path / "trial.log")
    assert (ending.outcome, ending.cause) == ("FAILED", "worker-lost")


def test_the_end_of_the_log_stays_with_the_trial(tmp_path: Path):
    log = tmp_path / "trial.log"
    log.write_text("\n".join(f"line {n}" for n in range(1000)))
    ending = explain(WorkerGroupError("", {0: KeyError("x")}), log)
    assert ending.log_tail is not None
    assert ending.log_tail.splitlines() == [f"line {n}" for n in range(1000 - LOG_TAIL_LINES, 1000)]


@pytest.mark.parametrize(("train", "seconds"), [({}, 1800), ({"ddp_timeout": 90}, 90)])
def test_workers_wait_for_another_as_long_as_ddp_timeout_says(train, seconds, tmp_path):
    job = {"workers": 2, "resources": {"CPU": 1}, "spec": {"train": train, "resources": {"offload": False}}}
    assert trial._trainer(print, {"job": job}, tmp_path / "trial").backend_config.timeout_s == seconds
