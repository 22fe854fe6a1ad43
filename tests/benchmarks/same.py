"""The same spec in one process, in two workers, and on a cluster of three raylets: the same trials and scores.

`python -m tests.benchmarks.same` prints every trial's last eval_loss each way, and the largest difference of any
evaluation from the first way. The cluster's nodes are in network namespaces where the system allows it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tuner
from tests.benchmarks.workloads import FULL, make_model, write_data
from tests.raylets import raylets
from tests.real_sweeps import TUNER, Command

RESULTS = Path(__file__).parent / "results" / "same.txt"
POINTS: list[dict[str, Any]] = [
    {"train.learning_rate": 3e-3, "lora.r": 4, "train.packing": "none"},
    {"train.learning_rate": 1e-2, "lora.r": 16, "train.packing": "bfd"},
    {"train.learning_rate": 3e-2, "lora.r": 8, "train.packing": "wrapped"},
]
TWO = {"workers_per_trial": 2}
WAYS: dict[str, dict[str, Any]] = {
    "one process, shared base": {},
    "one process, own base": {"share_base": "off"},
    "two workers, ddp": {**TWO, "strategy": "ddp"},
    "two workers, zero2": {**TWO, "strategy": "zero2"},
    "two workers, zero3": {**TWO, "strategy": "zero3"},
    "three raylets, zero2": {**TWO, "strategy": "zero2"},
}


def main() -> None:
    os.environ["PATH"] = f"{TUNER.parent}{os.pathsep}{os.environ['PATH']}"  # where the cluster's nodes find `tuner`
    with tempfile.TemporaryDirectory(prefix="same-", dir="/tmp") as scratch:
        folder = Path(scratch)
        work = FULL[0]
        write_data(work, folder)
        base = make_model(work, folder)
        found = {way: _losses(way, resources, base, folder) for way, resources in WAYS.items()}
    first, *_ = found.values()
    lines = [f"{'':<26}" + "".join(f"  trial {number:>2}" for number in range(len(POINTS))) + "  largest difference"]
    for way, losses in found.items():
        assert losses.keys() == first.keys(), f"{way}: other evaluations"
        last = [losses[number, max(tokens for one, tokens in losses if one == number)] for number in range(len(POINTS))]
        most = max(abs(loss - first[key]) for key, loss in losses.items())
        lines.append(f"{way:<26}" + "".join(f"  {loss:8.5f}" for loss in last) + f"  {most:.1e}")
    text = "\n".join(lines) + "\n"
    print(text, end="")
    RESULTS.write_text(text)


def _losses(way: str, resources: dict[str, Any], base: dict[str, Any], folder: Path) -> dict[tuple[int, int], float]:
    """The eval_loss of each trial at each milestone."""
    name = way.replace(", ", "-").replace(" ", "-")
    spec = {
        "name": name,
        "model": base | {"dtype": "float32"},
        "data": {"path": "train.jsonl", "eval_path": "eval.jsonl", "max_eval_examples": 32},
        "train": {"max_length": 64, "per_device_train_batch_size": 4, "gradient_checkpointing": False},
        "space": {
            "train.learning_rate": {"type": "log_uniform", "low": 1e-4, "high": 1e-1},
            "lora.r": {"type": "choice", "values": [4, 8, 16]},
            "train.packing": {"type": "choice", "values": ["none", "bfd", "wrapped"]},
        },
        "budget": {"trials": len(POINTS), "tokens_per_trial": 6000, "evals_per_trial": 3},
        "search": {"enqueue": POINTS},
        "stopping": {"type": "none"},
        "resources": resources,
        "promotion": None,
        "storage": {"root": "runs"},
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(spec))
    with _command(way, file, folder) as command:
        assert command.process.wait(600) == 0, "\n".join(command.lines)
    reports = tuner.open(name, folder / "runs").store.reports()
    return {(report["trial"], report["tokens"]): report["eval_loss"] for report in reports}


@contextmanager
def _command(way: str, file: Path, folder: Path) -> Iterator[Command]:
    if not way.startswith("three raylets"):
        command = Command("run", file, cwd=folder)
        try:
            yield command
        finally:
            command.kill()
        return
    with raylets(1, 1) as cluster:
        where = ("--address", cluster.dashboard, "--follow")
        command = Command("submit", file, *where, cwd=folder, **cluster.environment)
        try:
            yield command
        finally:
            command.kill()


if __name__ == "__main__":
    main()
