"""Sweeps on a Ray cluster that runs already, and clusters that are refused: by the command, with real Ray."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from raylets import RAY, WRITTEN_DOWN, kill_with_family
from real_sweeps import Command, write_spec

import tuner
from tuner.execution.machine import clusters_on_this_host, ray_cluster
from tuner.spec.space import resolve
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report

pytestmark = pytest.mark.timeout(300)

FORMATTER = """
def as_pair(row):
    return {"prompt": row["question"], "completion": row["answer"]}
"""
DRIVER = """
import ray, time
ray.init("local", num_cpus=1, include_dashboard=False)
print("up", flush=True)
time.sleep(99)
"""


@contextmanager
def ray_started(*options: str) -> Iterator[None]:
    """A cluster of two CPUs that somebody else has started; ended with all its processes, by their ids."""
    command = [str(RAY), "start", "--head", "--block", "--port=0", "--num-cpus=2", *options]
    head = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while not clusters_on_this_host():
            assert head.poll() is None, "ray start has failed"
            assert time.monotonic() < end, "ray start takes too long"
            time.sleep(0.2)
        time.sleep(3)  # until the node has registered
        yield
    finally:
        kill_with_family(head)
        WRITTEN_DOWN.unlink(missing_ok=True)


@pytest.fixture
def left_behind() -> Iterator[None]:
    """The address that a cluster leaves written down when it ends without `ray stop`."""
    before = WRITTEN_DOWN.read_text() if WRITTEN_DOWN.exists() else None
    WRITTEN_DOWN.parent.mkdir(exist_ok=True)
    WRITTEN_DOWN.write_text("127.0.0.1:1")
    yield
    if before is None:
        WRITTEN_DOWN.unlink()
    else:
        WRITTEN_DOWN.write_text(before)


def ended(command: Command) -> tuple[int, list[str]]:
    """Exit code and what was said. Of a cluster of its own nothing is left; the workers of another are not its own."""
    try:
        return command.end(), command.lines
    finally:
        command.kill()


def move(rows: Path, names: dict[str, str]) -> None:
    """Rename the columns of a JSONL file."""
    old = [json.loads(line) for line in rows.read_text().splitlines()]
    rows.write_text("\n".join(json.dumps({names[key]: value for key, value in row.items()}) for row in old))


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two specs: one of a trial with two workers whose rows need a formatter, one whose file is broken."""
    folder = tmp_path_factory.mktemp("cluster")
    write_spec(
        folder,
        tiny_model_dir,
        "two-workers",
        data={"path": "train.jsonl", "eval_path": "eval.jsonl", "formatter": "shape_rows:as_pair"},
        train={"max_length": 64, "per_device_train_batch_size": 4, "gradient_checkpointing": False, "seed": 3},
        space={"train.learning_rate": {"type": "choice", "values": [0.003]}},
        budget={"trials": 1, "epochs_per_trial": 6, "evals_per_trial": 3},
        resources={"workers_per_trial": 2},
        promotion=None,
    )
    for rows in ("train.jsonl", "eval.jsonl"):
        move(folder / rows, {"prompt": "question", "completion": "answer"})
    (folder / "shape_rows.py").write_text(FORMATTER)
    (folder / "broken.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": three}\n')
    broken = json.loads((folder / "two-workers.yaml").read_text())
    broken |= {"name": "broken", "data": {"path": "broken.jsonl"}, "resources": {}}
    (folder / "broken.yaml").write_text(json.dumps(broken))
    return folder


def test_a_cluster_whose_driver_was_killed_is_not_in_the_way():
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert driver.stdout is not None
    assert driver.stdout.readline() == b"up\n"
    assert len(clusters_on_this_host()) == 1
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait(10)
    time.sleep(1)
    assert not clusters_on_this_host()
    for process in family:  # agents that take half a minute to notice
        if process.is_running():
            process.kill()


def test_the_workers_of_stopped_trials_are_found_whatever_cluster_was_here_before(left_behind):
    import ray
    from ray.train.v2._internal.state.util import is_actor_alive  # by which Ray Train frees them
    from ray.util.queue import Queue

    with ray_cluster():
        asker = ray.remote(num_cpus=0)(is_actor_alive)
        queue = Queue(actor_options={"num_cpus": 0})
        assert queue.empty()
        assert ray.get(asker.remote(queue.actor._actor_id.hex(), 10), timeout=30)


def test_an_address_where_no_cluster_answers_is_refused(folder):
    code, lines = ended(Command("run", "broken.yaml", "--root", "refused", cwd=folder, RAY_ADDRESS="auto"))
    assert code == 3, lines
    assert lines[-1] == "tuner: RAY_ADDRESS is auto, but no Ray cluster runs on this host"
    assert not (folder / "refused").exists()


def test_a_cluster_without_a_dashboard_is_refused_where_ray_train_needs_it(folder):
    with ray_started("--include-dashboard=false"):
        code, lines = ended(Command("run", "two-workers.yaml", "--root", "refused", cwd=folder, RAY_ADDRESS="auto"))
    assert code == 3, lines
    assert "no dashboard" in lines[-1]
    assert not (folder / "refused").exists()


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[None]:
    with ray_started():
        yield


def test_a_second_cluster_on_the_host_is_refused_and_nothing_is_left(cluster, folder):
    code, lines = ended(Command("run", "broken.yaml", "--root", "refused", cwd=folder))
    assert code == 3
    assert "a Ray cluster runs on this host already" in lines[-1]
    assert not (folder / "refused").exists()


def test_what_is_wrong_with_the_data_ends_the_sweep_before_any_trial(cluster, folder):
    code, lines = ended(Command("run", "broken.yaml", "--root", "runs", cwd=folder, RAY_ADDRESS="auto"))
    assert code == 2, lines
    assert lines[-1] == "tuner: broken.jsonl, line 3, column 10: not JSON: Expecting value"
    sweep = tuner.open("broken", folder / "runs")
    assert (sweep.status, sweep.state().message) == ("failed", lines[-1].removeprefix("tuner: "))
    assert sweep.records() == []


@pytest.fixture(scope="module")
def two_workers(cluster: None, folder: Path) -> tuner.Sweep:
    code, lines = ended(Command("run", "two-workers.yaml", "--root", "runs", cwd=folder, RAY_ADDRESS="auto"))
    assert code == 0, lines
    return tuner.open("two-workers", folder / "runs")


def test_two_workers_divide_the_rows_of_a_step(two_workers):
    (trial,) = two_workers.records()
    tokens = two_workers.state().data["train_tokens"]
    assert trial.outcome == "COMPLETED", trial
    # 32 rows, 2 a worker: 8 steps are an epoch
    assert [(report.step, report.trained_tokens) for report in trial.reports] == [
        (8 * epochs, tokens * epochs) for epochs in (2, 4, 6)
    ]


def test_two_workers_learn_what_one_learns(two_workers, monkeypatch, tmp_path, folder):
    from tuner.training.baseline import Preparation
    from tuner.training.trial import run_trial

    (trial,) = two_workers.records()
    state = two_workers.state()
    asked = two_workers.spec.model_dump()
    asked["resources"]["workers_per_trial"] = 1
    spec = SweepSpec.model_validate(asked)
    reports: list[Report] = []
    facts = Preparation(state.tokens_per_trial, state.data, state.baseline)
    monkeypatch.chdir(folder)  # where the formatter is
    config = resolve(spec, 0, {"train.learning_rate": 0.003})
    run_trial(spec, config, facts, tmp_path, lambda report, save: reports.append(report))
    assert [report.eval_loss for report in reports] == pytest.approx([r.eval_loss for r in trial.reports], abs=1e-4)
    assert [report.step for report in reports] == [report.step for report in trial.reports]


def test_the_adapter_of_two_workers_is_saved_once_and_scores_what_was_reported(two_workers, tiny_model_dir):
    import torch
    from datasets import load_from_disk
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    best = two_workers.best
    adapters = list(two_workers.folder.path.glob("trials/*/*/adapter_model.safetensors"))
    assert [str(path.parent) for path in adapters] == [best.adapter_path]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), best.adapter_path).eval()
    nll, targets = 0.0, 0
    for row in load_from_disk(str(two_workers.folder.eval_rows)):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        nll += torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum").item()
        targets += int((labels[1:] != -100).sum())
    assert best.eval_loss == pytest.approx(nll / targets, abs=1e-5)
    assert math.isfinite(best.eval_loss)
