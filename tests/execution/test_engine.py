"""The engine's process on real Ray: slots, trials that train apart beside them, and what its death costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from real_sweeps import trained_alone, write_spec

from tests.execution.serving import Serving
from tuner.execution.engine import start_engines
from tuner.execution.machine import place, ray_cluster
from tuner.spec.load import load_spec
from tuner.spec.trial import Ending

pytestmark = pytest.mark.timeout(300)

BUDGET, EVALS = 3000, 3


@pytest.fixture(scope="module")
def serving(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("engine")
    budget = {"trials": 4, "tokens_per_trial": BUDGET, "evals_per_trial": EVALS}
    spec = load_spec(write_spec(folder, tiny_model_dir, "engine", budget=budget, resources={}), root=folder / "runs")
    with ray_cluster() as nodes, start_engines(spec, place(spec, nodes)) as engines:
        yield Serving(spec, engines)


def processes(title: str) -> list[psutil.Process]:
    """What Ray runs under this title, `Class.method`, in a cluster that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [process] if f"ray::{title}" in " ".join(process.cmdline()) else []
    return found


def trials_apart() -> list[psutil.Process]:
    """What the engine's fork server has forked."""
    (engine,) = processes("EngineActor")
    return [one for one in engine.children(recursive=True) if one.ppid() != engine.pid]


def until(condition: Any, timeout_s: float = 60) -> Any:
    end = time.monotonic() + timeout_s
    while not (met := condition()):
        assert time.monotonic() < end, "it has not come in time"
        time.sleep(0.05)
    return met


def test_what_cannot_be_a_slot_trains_beside_the_slots(serving, tmp_path):
    import ray

    configs = [
        serving.config(0),
        serving.config(1, use_dora=True),  # seen in the spec
        serving.config(2, target_modules=["q_proj", "embed_tokens"]),  # found by the engine, when it builds the slot
    ]
    reports = [ray.get([serving.advance(config, tokens) for config in configs]) for tokens in serving.ahead]
    assert len(trials_apart()) == 2
    for config, *served in zip(configs, *reports, strict=True):
        alone = trained_alone(serving.spec, config, serving.facts, tmp_path)
        assert [report.tokens for report in served] == serving.ahead
        assert [report.eval_loss for report in served] == pytest.approx([one.eval_loss for one in alone], abs=1e-5)
        for report in served:
            assert report.adapter_path == str(serving.folder.adapter(config["number"], report.tokens))
            assert (Path(report.adapter_path) / "adapter_model.safetensors").exists()
        serving.engine.detach.remote(config["number"])
    until(lambda: not trials_apart())


def test_a_trial_apart_that_fails_says_why(serving):
    import ray

    config = serving.config(3)
    config["train"]["optim"] = "lomo"  # needs a package that is not installed
    ending = ray.get(serving.advance(config, serving.ahead[0]))
    assert isinstance(ending, Ending)
    assert (ending.outcome, ending.cause) == ("FAILED", "bug")
    assert "lomo" in ending.reason
    assert "Traceback" in ending.log_tail
    assert serving.folder.trial_log(3).exists()
    ray.get(serving.engine.detach.remote(3))


def test_an_engine_that_is_killed_is_started_again_and_a_trial_goes_on_there(serving):
    import ray

    def die() -> None:
        (engine,) = until(lambda: processes("EngineActor"))
        engine.kill()
        engine.wait(10)

    config = serving.config(4)
    call = serving.advance(config, serving.ahead[0])
    until(lambda: processes("EngineActor.advance"))
    die()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(call)
    up = serving.engine.__ray_ready__.remote()
    die()  # before it is up
    ray.get(up)
    first = ray.get(serving.advance(config, serving.ahead[0]))
    call = serving.advance(config, serving.ahead[1])
    die()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(call)
    ray.get(serving.engine.__ray_ready__.remote())
    assert ray.get(serving.advance(config, serving.ahead[0])) == first
    assert ray.get(serving.advance(config, serving.ahead[1])).tokens == serving.ahead[1]
