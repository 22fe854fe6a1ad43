"""The process that a merge runs in: what it is asked to do, and how it is started, followed and ended.

Light, so that whoever promotes need not load torch; the work itself is in `tuner.promotion.merge`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuner.errors import DiskFullError, PromotionRefused, TunerError
from tuner.promotion.gate import Goal

Progress = Callable[[str], None]
"""Called with a line at the start of every step."""

_TAIL_LINES = 15


@dataclass(frozen=True)
class MergeJob:
    """What the fresh process is asked to do; paths are absolute."""

    config: dict[str, Any]
    """The `TrialConfig`."""
    spec: dict[str, Any]
    """That of the sweep, without secrets: whose evaluation set the model is measured on."""
    eval_fingerprint: str
    """Of that set; one that is gone or damaged is made again from the data, or refused."""
    checkpoint: str
    """Folder of the adapter, or of the whole model where `config["lora"]` is None."""
    prompting: dict[str, Any] | None
    """What the sweep's preparation found of its rows' prompts; None in a sweep of an earlier version."""
    output: str
    """Folder that the model is saved in."""
    cache: str
    """Where converted base models are kept."""
    merge_into: str
    """For quantised bases, `dequantized` or `original`."""
    eval_batch_size: int
    metric: str
    goal: Goal
    trial_score: float
    """What the merged model's `metric` is held against."""
    max_regression: float
    """Where it is worse by a larger share than this, the model is merged and saved in float32 instead."""
    base: dict[str, str]
    """What `identify` said of the base when the sweep began."""
    incumbent: str | None
    """Folder of the promoted model, where it has to be measured on this evaluation set."""
    samples: int
    """How many evaluation prompts to answer."""
    parent: int
    """Process id of who asked; without it the fresh process ends too."""


def run_fresh(job: MergeJob, working: Path, log: Path, progress: Progress) -> dict[str, Any]:
    """Run the job in a new Python process and return its result, as `tuner.promotion.merge.run` documents it.

    What the process and its libraries say is appended to `log`. The process never outlives the call.

    Raises:
        PromotionRefused: the checkpoint is broken.
        DiskFullError: there is too little room for the merged model.
        TunerError: the process failed; the message ends with the last lines of the log.
    """
    job_file, result_file = working / "job.json", working / "result.json"
    job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "tuner.promotion.merge", str(job_file), str(result_file)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        with process:
            try:
                for line in process.stdout or ():
                    progress(line.rstrip("\n"))
                code = process.wait()
            finally:
                process.kill()
    if code != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])
        raise TunerError(f"the merge process ended with exit code {code}; the end of {log}:\n{tail}")
    result = json.loads(result_file.read_text(encoding="utf-8"))
    if "refused" in result:
        raise PromotionRefused(result["refused"], result["broken"])
    if "full" in result:
        raise DiskFullError(result["full"])
    return result
