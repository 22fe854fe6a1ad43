"""The table: what the committed results say, and the README's copy of it.

`python -m tests.benchmarks.table README.md` writes it there; a test fails when it no longer fits the results.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.workloads import Workload
from tuner.spec.reference import put_between

RESULTS = Path(__file__).parent / "results"
BASELINES = ("by hand", "1 process", "2 processes")

Result = dict[str, Any]
"""Of one workload: `work`, `machine`, `flops_per_token`, `target`, `minutes`, and `turns`: each peer's Measurement."""

LEGEND = """\
by hand      Ray Tune, OptunaSearch, TorchTrainer and SFTTrainer, as tests/benchmarks/hand_glued.py joins them
N processes  loops of SFTTrainers, each over a base loaded once, on its share of the cores
dedicated    tuner run, a base for every trial; shared: on one base, with as many slots as the planner found, or N
engine       the same slots without Ray, search and records; no engine: all of these without training
wall         seconds from the start of the first process to the end of the last
x P          how many times faster than P, in wall time: the median over turns of the ratio within a turn
start-up     share of the wall time before the first training step
a trial      seconds from the first step to the last report, by the number of trials
step         tokens/s of training alone, against one process: what a joint step gains over as many solo steps
padding      share of attention's rows that is padding
memory       most resident memory of all processes together; on a GPU, most that a process allocated
matmul       training's 4 N FLOPs per token, as a share of what a matrix product of the model's shape reaches here
"""


def read_results(folder: Path = RESULTS) -> list[Result]:
    others = ("grid", "scale")
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.stem not in others]


def table(results: Iterable[Result]) -> str:
    """The results as text, a block for every workload; or how to get some."""
    blocks = ["\n".join(_block(result)) for result in results]
    if not blocks:
        return "Nothing has been measured yet.\n"
    return "\n\n".join([*blocks, LEGEND])


def _block(result: Result) -> Iterator[str]:
    work = Workload(**result["work"])
    yield f"{work.name}: {work.describe()}"
    yield _machine(result)
    yield from _aligned(_search_rows(result, work) if work.searched else _rows(result, work))
    yield from _notes(result, work)


def _machine(result: Result) -> str:
    machine, turns = result["machine"], len(result["turns"])
    bf16 = f", {' '.join(machine['bf16'])}" if machine["bf16"] else ", no bf16 instructions"
    return (
        f"{machine['device']}, {machine['cores']} cores{bf16}, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"torch {machine['torch']}, matrix products {machine['matmul_flops'] / 1e9:,.0f} GFLOP/s; "
        f"{'1 turn' if turns == 1 else f'median of {turns} turns'} in {result['minutes']:.0f} min"
    )


def _rows(result: Result, work: Workload) -> Iterator[list[str]]:
    baselines = [peer for peer in BASELINES if peer in result["turns"][0]]
    yield [
        *("peer", "wall s", "tokens/s", *(f"x {peer}" for peer in baselines)),
        *("start-up", "a trial", "step", "padding", "memory", "matmul"),
    ]
    solo = _median(result, "1 process", "step_tokens_per_s")
    for peer in result["turns"][0]:
        wall, step = _median(result, peer, "wall_s"), _median(result, peer, "step_tokens_per_s")
        assert wall is not None
        startup, works = _median(result, peer, "startup_s"), _median(result, peer, "work_s")
        peak, padding = _median(result, peer, "peak_bytes"), _median(result, peer, "padding")
        trained = peer != "no engine"
        yield [
            _with_slots(result, peer),
            f"{wall:.1f}",
            f"{work.trials * work.tokens_per_trial / wall:,.0f}" if trained else "",
            *(f"{_ratio(result, peer, other, 'wall_s'):.2f}" if trained else "" for other in baselines),
            _show(startup and startup / wall, "{:.0%}"),
            _show(works and works / work.trials, "{:.2f}"),
            _show(step and solo and step / solo, "{:.2f}"),
            _show(padding, "{:.0%}"),
            _show(peak and peak / 2**30, "{:.2f} GiB"),
            _show(step and step * result["flops_per_token"] / result["machine"]["matmul_flops"], "{:.1%}"),
        ]


def _search_rows(result: Result, work: Workload) -> Iterator[list[str]]:
    yield ["peer", "s to the target", "x by hand", "reached", "reports"]
    for peer in result["turns"][0]:
        runs = [turn[peer] for turn in result["turns"]]
        yield [
            _with_slots(result, peer),
            f"{statistics.median(map(_to_target, runs)):.1f}",
            f"{statistics.median(_to_target(turn['by hand']) / _to_target(turn[peer]) for turn in result['turns']):.2f}"
            if "by hand" in result["turns"][0]
            else "",
            f"{sum(run['reached_s'] is not None for run in runs)} of {len(runs)}",
            f"{statistics.median(len(run['losses']) for run in runs):.0f}",
        ]


def _to_target(run: dict[str, Any]) -> float:
    """A search that misses the target has taken at least its whole time."""
    return run["wall_s"] if run["reached_s"] is None else run["reached_s"]


def _notes(result: Result, work: Workload) -> Iterator[str]:
    if work.searched:
        yield f"target: eval_loss {result['target']:.4f}, 1 % above the best of the grid (results/grid.json)"
        return
    if (difference := largest_difference(result)) is not None:
        yield f"largest difference of an eval_loss between two peers: {difference:.1e} nats"
    for peer in result["turns"][0]:
        slots = result["turns"][0][peer]["slots"] or 0
        one = _median(result, "engine 1", "peak_bytes")
        if peer.startswith("engine") and slots > 1 and one:
            each = (_median(result, peer, "peak_bytes") - one) / (slots - 1)  # type: ignore[operator]
            yield f"memory per slot, {slots} against 1: {each / 2**20:.0f} MiB"
    alone = {turn["slots"]: peer for peer, turn in result["turns"][0].items() if peer.startswith("engine")}
    for peer, run in result["turns"][0].items():
        if peer.startswith("shared") and run["slots"] in alone:
            share = 1 - 1 / _ratio(result, alone[run["slots"]], peer, "work_s")
            yield f"orchestration, {peer} against {alone[run['slots']]}: {share:.1%} of the time from the first step on"


def largest_difference(result: Result) -> float | None:
    """Of any loss of any trial, between any two peers of one turn; None where fewer than two were scored."""
    spreads = []
    for turn in result["turns"]:
        by_report: dict[str, list[float]] = {}
        for run in turn.values():
            for report, loss in run["losses"].items():
                by_report.setdefault(report, []).append(loss)
        spreads += [max(losses) - min(losses) for losses in by_report.values() if len(losses) > 1]
    return max(spreads, default=None)


def _with_slots(result: Result, peer: str) -> str:
    slots = [turn[peer]["slots"] for turn in result["turns"]]
    planned = peer in ("shared", "engine")
    return f"{peer} ({'/'.join(map(str, sorted(set(slots))))})" if planned else peer


def _median(result: Result, peer: str, figure: str) -> float | None:
    values = [turn[peer][figure] for turn in result["turns"] if peer in turn and turn[peer][figure] is not None]
    return statistics.median(values) if values else None


def _ratio(result: Result, peer: str, baseline: str, figure: str) -> float:
    return statistics.median(turn[baseline][figure] / turn[peer][figure] for turn in result["turns"])


def _show(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _aligned(rows: Iterable[list[str]]) -> Iterator[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


BEGIN, END = "<!-- measured by `make bench`, put here by `make readme` -->\n", "<!-- end of what was measured -->"


def with_table(page: str) -> str:
    """Return a page with the table of the committed results between its markers."""
    return put_between(page, BEGIN, END, f"\n```text\n{table(read_results())}```\n\n")


if __name__ == "__main__":
    (page,) = map(Path, sys.argv[1:])
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
