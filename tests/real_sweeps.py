"""Tiny sweeps for real Ray, and the `tuner` command as a process that is watched from outside."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report

TUNER = Path(sys.executable).with_name("tuner")
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]


def write_rows(path: Path, start: int, count: int, rng: random.Random) -> None:
    rows = [
        {"prompt": f"List {i}:", "completion": " " + " ".join(rng.choice(WORDS) for _ in range(12))}
        for i in range(start, start + count)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))


def write_spec(folder: Path, model: Path, name: str, **sections: dict[str, Any] | None) -> Path:
    """A spec file, one trial at a time and none stopped early, with 32 rows to train on beside it."""
    rng = random.Random(0)
    write_rows(folder / "train.jsonl", 0, 32, rng)
    write_rows(folder / "eval.jsonl", 100, 16, rng)
    spec = {
        "name": name,
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"path": "train.jsonl", "eval_path": "eval.jsonl"},
        "train": {"max_length": 64, "per_device_train_batch_size": 4, "gradient_checkpointing": False},
        "lora": {"r": 8},
        "space": {"train.learning_rate": {"type": "log_uniform", "low": 1e-3, "high": 5e-3}},
        "search": {"sampler": "random"},
        "stopping": {"type": "none"},
        "resources": {"max_concurrent_trials": 1, "share_base": "off"},
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(spec | sections))  # JSON is YAML, too
    return file


def trained_alone(spec: SweepSpec, config: Any, facts: dict[str, Any], folder: Path) -> list[Report]:
    """What a stock SFTTrainer reports of a trial, uninterrupted, in this process."""
    import torch

    from tuner.training.baseline import Preparation
    from tuner.training.trial import run_trial

    reports: list[Report] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several that wait for each other stand still on a busy machine
    try:
        with tempfile.TemporaryDirectory(dir=folder) as fresh:  # or it would go on from another's checkpoint
            run_trial(spec, config, Preparation(**facts), Path(fresh), lambda report, save: reports.append(report))
    finally:
        torch.set_num_threads(threads)
    return reports


def _environment() -> dict[str, str]:
    """Of a user who has activated the virtual environment, and has no cluster."""
    path = f"{TUNER.parent}{os.pathsep}{os.environ['PATH']}"
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PATH": path}


def writes(process: psutil.Process, file: Path) -> bool:
    """Whether the process has this file open."""
    try:
        return str(file) in {opened.path for opened in process.open_files()}
    except psutil.Error:
        return False


def _title(process: psutil.Process) -> str:
    """What it is called by `ps`; nothing when it is gone."""
    try:
        return " ".join(process.cmdline()).rstrip()
    except psutil.Error:
        return ""


class Command:
    """A `tuner` command in a terminal of its own: what it says, what it starts, and what is left of that."""

    def __init__(self, *arguments: object, cwd: Path, **environment: str):
        self._said = cwd / f"said-{time.monotonic_ns()}.txt"
        self._family: dict[int, psutil.Process] = {}
        with self._said.open("w") as said:
            self.process = subprocess.Popen(
                [str(TUNER), *map(str, arguments)],
                cwd=cwd,
                env=_environment() | environment,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        parent = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            try:
                self._family |= {child.pid: child for child in parent.children(recursive=True)}
            except psutil.NoSuchProcess:
                return
            time.sleep(0.2)

    @property
    def lines(self) -> list[str]:
        return self._said.read_text().splitlines()

    def wait_for(self, text: str, timeout_s: float = 120) -> None:
        """Until a line holds this text."""
        end = time.monotonic() + timeout_s
        while not any(text in line for line in self.lines):
            assert self.process.poll() is None, f"it ended without saying {text!r}: {self.lines}"
            assert time.monotonic() < end, f"it has not said {text!r} in {timeout_s} s: {self.lines}"
            time.sleep(0.1)

    def kill_actor(self, name: str) -> None:
        """Kill the one process of a Ray actor of this class, as the kernel would when memory runs out."""
        living = [process for process in list(self._family.values()) if process.is_running()]
        (victim,) = [process for process in living if _title(process).startswith(f"ray::{name}")]
        victim.kill()

    def kill_writer(self, log: Path) -> None:
        """Kill the process that writes this file, which is the trial's own where it is a trial's log."""
        victims = {process for process in psutil.process_iter() if writes(process, log)}
        assert victims, f"nobody writes {log}"
        for victim in victims:
            victim.kill()

    def ctrl_c(self) -> None:
        """As a terminal sends it: to the command and to all that it has started in its group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, timeout_s: float = 180) -> int:
        """Wait for the end and return the exit code; nothing that it started may be left 15 seconds later."""
        code = self.process.wait(timeout_s)
        _, left = psutil.wait_procs(list(self._family.values()), timeout=15)
        assert not left, f"still there: {[process.cmdline() for process in left]}"
        return code

    def kill_driver(self) -> list[psutil.Process]:
        """Kill the command alone: all that it has started must end by itself, in 15 seconds.

        Returns what may take a minute: Ray's agents of a node, which look that long for a cluster that died while they
        were coming up.
        """
        self.process.kill()
        self.process.wait(10)
        agents = [process for process in self._family.values() if "agent" in _title(process).lower()]
        _, left = psutil.wait_procs([one for one in self._family.values() if one not in agents], timeout=15)
        assert not left, f"still there: {[_title(process) for process in left]}"
        return agents

    def kill(self) -> None:
        """End it and whatever it has started, by process id."""
        for process in [psutil.Process(self.process.pid)] if self.process.poll() is None else []:
            process.kill()
            process.wait(10)
        for process in self._family.values():
            if process.is_running():
                process.kill()
