"""The benchmark: its peers train the same, its table says what was measured, and the README has that table."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import impossible
from tests.benchmarks.measure import Measurement, PeerFailed, measure
from tests.benchmarks.peers import PEERS
from tests.benchmarks.table import LEGEND, largest_difference, read_results, table, with_table
from tests.benchmarks.workloads import FULL, GPU, TINY, Workload

MINUTE = Workload("m", TINY, trials=3, rows=2, length=16, steps=3, evals=3, eval_rows=4, peers=())
MACHINE = {
    "device": "A processor",
    "cores": 2,
    "memory_bytes": 24 * 2**30,
    "torch": "2.13.0",
    "bf16": ["avx512_bf16"],
    "matmul_flops": 1e11,
}


def run(wall_s: float, **figures: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "wall_s": wall_s,
        "startup_s": wall_s / 4,
        "work_s": wall_s / 2,
        "reached_s": None,
        "step_tokens_per_s": 1000 / wall_s,
        "peak_bytes": 2**30,
        "slots": None,
        "padding": None,
        "plan": None,
        "losses": {"0@64": 2.0},
    }
    return asdict(Measurement(**values | figures))


def result(work: Workload, *turns: dict[str, Any], **figures: Any) -> dict[str, Any]:
    facts = {"work": asdict(work), "machine": MACHINE, "flops_per_token": 10**7, "target": None, "minutes": 5.0}
    return {**facts, "turns": list(turns), **figures}


def row(text: str, peer: str) -> list[str]:
    lines = text.replace(LEGEND, "").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{peer}  ")]
    return line.removeprefix(peer).split()


def train_here(peer: str, prepared: dict[str, Any], folder: Path, **job: Any) -> dict[str, float]:
    """The losses of a peer that runs in this process, without the price of starting one."""
    threads = torch.get_num_threads()
    try:
        outcome = PEERS[peer]({**prepared, "peer": peer, "folder": str(folder), "threads": 1, **job})
    finally:
        torch.set_num_threads(threads)
    return {f"{report['trial']}@{report['tokens']}": report["eval_loss"] for report in outcome["reports"]}


def prepare_here(work: Workload, folder: Path) -> dict[str, Any]:
    job = {"work": asdict(work), "folder": str(folder)}
    return job | PEERS["prepare"](job)


def test_loops_and_slots_train_the_same(tmp_path):
    prepared = prepare_here(MINUTE, tmp_path)
    loop = train_here("process", prepared, tmp_path, numbers=[0, 1, 2])
    halves = [train_here("process", prepared, tmp_path, numbers=numbers) for numbers in ([0, 2], [1])]
    slots = measure("engine 2", prepared, tmp_path)  # in a process of its own, and watched
    assert len(loop) == len(set(loop.values())) == MINUTE.trials * MINUTE.evals
    turn = {"1 process": run(9, losses=loop), "2 processes": run(5, losses=halves[0] | halves[1])}
    together = result(MINUTE, turn | {"engine 2": asdict(slots)})
    assert slots.losses.keys() == loop.keys()
    assert largest_difference(together) < 1e-4  # float32
    assert 0 < slots.startup_s < slots.startup_s + slots.work_s < slots.wall_s
    assert slots.slots == 2
    assert slots.peak_bytes > 2**27
    assert row(table([together]), "engine 2")


def test_a_peer_that_fails_says_why(tmp_path):
    with pytest.raises(PeerFailed, match="KeyError: 'flowers'"):
        measure("flowers", {"work": asdict(MINUTE)}, tmp_path)


def test_ratios_are_medians_of_ratios_within_a_turn():
    work = FULL[0]
    turns = [
        {"1 process": run(wall), "engine 4": run(wall / speed, slots=4)} for wall, speed in ((40, 2), (80, 5), (400, 4))
    ]
    cells = row(table([result(work, *turns)]), "engine 4")
    wall, tokens_per_s, ratio, startup, a_trial, step = cells[:6]
    assert (wall, tokens_per_s, ratio) == ("20.0", f"{16 * 2560 / 20:,.0f}", "4.00")
    assert (startup, a_trial, step) == ("25%", f"{10 / 16:.2f}", "4.00")


def test_memory_of_a_slot_and_the_price_of_orchestration_are_told():
    turn = {
        "engine 1": run(30, slots=1),
        "engine 5": run(10, slots=5, peak_bytes=3 * 2**30),
        "shared": run(20, slots=5, work_s=10.0),
    }
    text = table([result(FULL[0], turn)])
    assert "memory per slot, 5 against 1: 512 MiB" in text
    assert "orchestration, shared against engine 5: 50.0%" in text


def test_a_search_is_timed_to_its_target():
    (work,) = [work for work in FULL if work.name == "c"]
    hit, miss = run(90, reached_s=60.0), run(240)
    turns = [{"by hand": miss, "shared": hit | {"slots": 8}}, {"by hand": hit, "shared": hit | {"slots": 16}}]
    text = table([result(work, *turns, target=2.5)])
    assert row(text, "by hand")[:4] == ["150.0", "1.00", "1", "of"]
    assert row(text, "shared (8/16)")[:2] == ["60.0", f"{(240 / 60 + 60 / 60) / 2:.2f}"]


def test_losses_that_differ_are_noticed():
    turn = {"1 process": run(9), "engine 2": run(3, slots=2, losses={"0@64": 2.25})}
    assert largest_difference(result(FULL[0], turn)) == 0.25


@pytest.mark.parametrize("name", ["0.5B-1", "8B-nf4-2"])
def test_the_workloads_for_a_gpu_run_at_toy_size(tmp_path, name):
    (work,) = [work for work in GPU if work.name == name]
    toy = replace(work, model=TINY, trials=3, length=16, steps=2, eval_rows=2)
    prepared = prepare_here(toy, tmp_path)
    loop = train_here("process", prepared, tmp_path, numbers=[0, 1, 2])
    slots = train_here("engine", prepared, tmp_path, slots=2)
    assert len(loop) == toy.trials
    turn = {"1 process": run(9, losses=loop), "engine 2": run(3, slots=2, losses=slots)}
    assert largest_difference(result(toy, turn)) < 0.05  # bfloat16


def test_the_readme_has_the_table_of_the_committed_results():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert with_table(readme) == readme, "run `make readme`"


def test_a_corner_without_memory_costs_plain_optuna_trials_and_this_service_few_or_none(tmp_path):
    impossible.write_data(impossible.WORK, tmp_path)
    found = impossible.alone(tmp_path, seed=0)
    assert {len(started) for started in found.values()} == {impossible.SEARCHED}
    plain, learning, estimating = (impossible.wasted(started) for started in found.values())
    assert plain > learning > estimating == 0
    assert impossible.again(found[impossible.LEARNING]) == 0


def test_the_readme_has_what_was_measured_of_such_a_corner():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"```text\n{impossible.RESULTS.read_text()}```" in readme


def test_without_results_the_table_says_so(tmp_path):
    assert table(read_results(tmp_path)) == "Nothing has been measured yet.\n"
