"""Runs one peer on one workload, watched from outside: wall time, memory, and what its reports say."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.workloads import Workload

LOOK_S = 0.1
"""Seconds between two looks at the memory."""
MOST_S = 3600
"""Seconds that one run may take."""


@dataclass(frozen=True)
class Measurement:
    """One run of one peer."""

    wall_s: float
    """From the start of its first process to the end of its last."""
    startup_s: float | None
    """Until the first training step."""
    work_s: float | None
    """From there to the last report."""
    reached_s: float | None
    """Of a search: from the start to the report that reached the target; None if none did."""
    step_tokens_per_s: float | None
    """Training alone, as trials report it, times how many train at once."""
    peak_bytes: int
    """Most resident memory of all its processes together; on a GPU, most that one process allocated there."""
    slots: int | None
    padding: float | None
    """Share of attention's rows that is padding."""
    plan: str | None
    losses: dict[str, float]
    """eval_loss by `TRIAL@TOKENS`."""


class PeerFailed(Exception):
    """A peer's process ended with an error."""


def prepare(work: Workload, folder: Path) -> dict[str, Any]:
    """What every peer finds done; see `peers.prepare`. Its files stay in the folder."""
    (outcome,) = _watch([{"peer": "prepare", "work": asdict(work), "folder": str(folder)}], folder)[0]
    return {**outcome, "work": asdict(work)}


def measure(
    peer: str, prepared: dict[str, Any], folder: Path, seed: int = 0, target: float | None = None
) -> Measurement:
    """Run a peer: `by hand`, `N process(es)`, `dedicated`, `shared [SLOTS]`, `engine [SLOTS]` or `no engine`."""
    work, cores = Workload(**prepared["work"]), os.cpu_count() or 1
    name, processes, slots = _parse(peer)
    job = {**prepared, "peer": name, "slots": slots, "threads": cores, "seed": seed, "target": target}
    numbers = range(work.trials)
    parts = [
        {**job, "numbers": list(numbers[part::processes]), "threads": max(1, cores // processes)}
        for part in range(processes)
    ]
    with tempfile.TemporaryDirectory(dir=folder, prefix="run-") as scratch:
        started = time.time()
        outcomes, wall_s, peak_bytes = _watch([{**part, "folder": scratch} for part in parts], Path(scratch))
    reports = sorted((report for outcome in outcomes for report in outcome["reports"]), key=lambda report: report["at"])
    first_step = min((report["began"] for report in reports), default=None)
    at_once = {"by hand": cores, "dedicated": cores, "process": processes}.get(name, outcomes[0].get("slots") or 1)
    speeds = [report["tokens_per_s"] for report in reports if "tokens_per_s" in report]
    in_use = [report["peak_memory_bytes"] for report in reports if "peak_memory_bytes" in report]
    return Measurement(
        wall_s=wall_s,
        startup_s=first_step - started if first_step else None,
        work_s=reports[-1]["at"] - first_step if first_step else outcomes[0]["work_s"],
        reached_s=next((r["at"] - started for r in reports if target and r["eval_loss"] <= target), None),
        step_tokens_per_s=min(at_once, work.trials) * statistics.median(speeds) if speeds else None,
        peak_bytes=max(in_use) if in_use and prepared["device"] == "cuda" else peak_bytes,
        slots=outcomes[0].get("slots"),
        padding=outcomes[0].get("padding"),
        plan=outcomes[0].get("plan"),
        losses={f"{report['trial']}@{report['tokens']}": report["eval_loss"] for report in reports},
    )


def _parse(peer: str) -> tuple[str, int, int | None]:
    """Name of the function in peers.py, number of processes that share the trials, number of slots asked for."""
    if found := re.fullmatch(r"(\d+) process(es)?", peer):
        return "process", int(found[1]), None
    if found := re.fullmatch(r"(shared|engine) (\d+)", peer):
        return found[1], 1, int(found[2])
    return peer, 1, None


def _watch(jobs: list[dict[str, Any]], folder: Path) -> tuple[list[dict[str, Any]], float, int]:
    """Run a process for every job, all at once; return what they found, the wall time, and the peak of their memory."""
    for number, job in enumerate(jobs):
        job["outcome"] = str(folder / f"outcome-{number}.json")
        (folder / f"job-{number}.json").write_text(json.dumps(job))
    with (folder / "log").open("w") as log:
        started = time.perf_counter()
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.benchmarks.peers", str(folder / f"job-{number}.json")],
                stdout=log,
                stderr=log,
                env=os.environ | ({"OMP_NUM_THREADS": str(job["threads"])} if job["peer"] == "process" else {}),
            )
            for number, job in enumerate(jobs)
        ]
        peak_bytes = 0
        try:
            for process in processes:
                while process.returncode is None:
                    peak_bytes = max(peak_bytes, sum(map(_resident_bytes, processes)))
                    if time.perf_counter() - started > MOST_S:
                        raise PeerFailed(f"{jobs[0]['peer']}: not done after {MOST_S} s")
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=LOOK_S)
            wall_s = time.perf_counter() - started
        finally:
            for process in processes:
                process.kill()
    if any(process.returncode for process in processes):
        raise PeerFailed(f"{jobs[0]['peer']}: " + (folder / "log").read_text()[-4000:])
    return [json.loads(Path(job["outcome"]).read_text()) for job in jobs], wall_s, peak_bytes


def _resident_bytes(process: subprocess.Popen[bytes]) -> int:
    """Of a process and all that came from it; what they share counts for each."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        for one in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += one.memory_info().rss
    return total
