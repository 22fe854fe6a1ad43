"""How fast sweeps are, against other ways to run the same trials on this machine, in one table of ratios.

    python -m tests.benchmarks                                       # every workload in short, three turns
    python -m tests.benchmarks --full --workloads b --slots 1 2 4 8  # in full length, with forced numbers of slots
    python -m tests.benchmarks --gpu                                 # the shapes of a 0.5B and an 8B model
    python -m tests.benchmarks --from-results                        # the committed figures again

The peers take turns, so that what slows the machine down for a while slows all of them down.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import measure, prepare
from tests.benchmarks.table import RESULTS, largest_difference, read_results, table
from tests.benchmarks.workloads import FULL, GPU, Workload, short

AGREE = {"float32": 1e-3, "bfloat16": 0.1}
"""Nats that two peers' losses of one trial may differ by, for rounding alone."""
GRID = RESULTS / "grid.json"
GRID_TRIALS = 32
CLOSE = 1.01
"""A search has arrived at so many times the grid's best loss."""


def main() -> None:
    arguments = _arguments()
    if arguments.from_results:
        print(table(read_results()), end="")
        return
    works = GPU if arguments.gpu else FULL if arguments.full or arguments.grid else short()
    for work in works:
        if arguments.workloads and work.name not in arguments.workloads:
            continue
        if arguments.trials:
            work = replace(work, trials=arguments.trials)
        if arguments.grid:
            _write_grid(work)
            continue
        result = compare(work, _peers(work, arguments.peers, arguments.slots), arguments.turns)
        print(table([result]), flush=True)
        arguments.results.mkdir(parents=True, exist_ok=True)
        (arguments.results / f"{work.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        difference = largest_difference(result)
        if not work.searched and difference is not None and difference > AGREE[work.dtype]:
            sys.exit(f"workload {work.name}: the peers' losses differ by {difference:.2g}: they did not train the same")
    if not arguments.grid:
        (arguments.results / "table.txt").write_text(table(read_results(arguments.results)))


def compare(work: Workload, peers: list[str], turns: int) -> dict[str, Any]:
    """Every peer in every turn, every other turn in reverse."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = Path(scratch)
        prepared = prepare(work, folder)
        target = CLOSE * json.loads(GRID.read_text())[work.name]["best"] if work.searched else None
        measured: list[dict[str, Any]] = []
        for turn in range(turns):
            runs = {}
            for peer in peers if turn % 2 == 0 else reversed(peers):
                runs[peer] = asdict(measure(peer, prepared, folder, turn, target))
                print(
                    f"{work.name}, turn {turn + 1}, {peer}: {runs[peer]['wall_s']:.1f} s", file=sys.stderr, flush=True
                )
            measured.append({peer: runs[peer] for peer in peers})
    facts = {key: prepared[key] for key in ("work", "machine", "flops_per_token")}
    return {**facts, "target": target, "minutes": (time.monotonic() - began) / 60, "turns": measured}


def _write_grid(work: Workload) -> None:
    """Train every point of the searched space's grid to its end, as slots, and write down what each came to."""
    grid = replace(work, searched=False, trials=GRID_TRIALS)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        prepared = prepare(grid, Path(scratch))
        losses = measure("engine", prepared, Path(scratch)).losses
    found = json.loads(GRID.read_text()) if GRID.exists() else {}
    trials = [
        {**point, "best": min(loss for report, loss in losses.items() if report.startswith(f"{number}@"))}
        for number, point in enumerate(prepared["spec"]["search"]["enqueue"])
    ]
    found[work.name] = {"what": grid.describe(), "best": min(losses.values()), "trials": trials}
    GRID.write_text(json.dumps(found, indent=1) + "\n")


def _peers(work: Workload, asked: list[str] | None, slots: list[int]) -> list[str]:
    peers = [*(asked or work.peers)]
    forced = [f"{peer} {count}" for peer in ("shared", "engine") if peer in peers for count in slots]
    return peers + forced


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--workloads", nargs="+", help="names of workloads.py; default: all")
    parser.add_argument("--peers", nargs="+", help="'by hand', 'N processes', dedicated, shared, engine, 'no engine'")
    parser.add_argument(
        "--slots", nargs="+", type=int, default=[], help="also run shared and engine with so many slots"
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--trials", type=int, help="so many trials instead of the workload's")
    parser.add_argument("--full", action="store_true", help="all of every workload; this takes hours")
    parser.add_argument("--gpu", action="store_true", help="the workloads for a GPU")
    parser.add_argument("--grid", action="store_true", help="find the best losses that searches are measured by")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    parser.add_argument("--from-results", action="store_true", help="print the table of the committed figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
