"""A train loop that sleeps for ever, in a trial's own process and in a lane of the engine, on real Ray."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.execution.serving import Serving
from tests.real_sweeps import write_spec, writes
from tests.sleeper import Sleeper
from tuner.execution.endings import explain_failure
from tuner.execution.engine import Engines, start_engines
from tuner.execution.last_words import in_its_own_words
from tuner.execution.machine import place, ray_cluster
from tuner.spec.load import load_spec
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Ending, Report, TrialConfig

pytestmark = pytest.mark.timeout(200)

BUDGET, EVALS = 3000, 3
REASON = r"no step for \d+ s; the slowest before took \d+\.\d s"


class Stuck(Serving):
    """An engine whose base falls asleep when it is told to."""

    def __init__(self, spec: SweepSpec, engines: Engines, sleeper: Sleeper):
        super().__init__(spec, engines)
        self.sleeper = sleeper

    def came_to(self, config: TrialConfig, until_tokens: int) -> Report | Ending:
        """What the driver makes of a call."""
        import ray

        try:
            came_to = ray.get(self.advance(config, until_tokens))
        except ray.exceptions.RayActorError as error:
            came_to = explain_failure(error)
        if isinstance(came_to, Ending):
            return in_its_own_words(self.folder, config["number"], came_to)
        return came_to


@pytest.fixture(scope="module")
def serving(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stuck]:
    folder = tmp_path_factory.mktemp("stuck")
    sleeper = Sleeper(tiny_model_dir, folder)
    file = write_spec(
        folder,
        sleeper.path,
        "stuck",
        budget={"trials": 4, "tokens_per_trial": BUDGET, "evals_per_trial": EVALS},
        resources={"stuck_after": "3s"},
    )
    spec = load_spec(file, ["model.trust_remote_code=true"], root=folder / "runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
        with ray_cluster() as nodes, start_engines(spec, place(spec, nodes)) as engines:
            yield Stuck(spec, engines, sleeper)


def test_a_trial_in_its_own_process_that_sleeps_for_ever_is_ended_with_its_stacks(serving):
    config = serving.config(0, use_dora=True)
    assert isinstance(serving.came_to(config, serving.ahead[0]), Report)
    serving.sleeper.sleep()
    ending = serving.came_to(config, serving.ahead[1])
    assert (ending.outcome, ending.cause) == ("FAILED", "stuck")
    assert re.fullmatch(REASON, ending.reason)
    assert "in fall_asleep\n    time.sleep(1_000_000)" in ending.log_tail.split("Thread MainThread:")[-1]


def test_a_trial_whose_process_was_stopped_by_a_signal_is_ended(serving):
    config = serving.config(1, use_dora=True)
    assert isinstance(serving.came_to(config, serving.ahead[0]), Report)
    (process,) = [one for one in psutil.process_iter() if writes(one, serving.folder.trial_log(1))]
    process.suspend()
    ending = serving.came_to(config, serving.ahead[1])
    assert (ending.cause, ending.reason) == ("stuck", "its process was stopped by a signal")
    serving.engine.detach.remote(1)
    process.wait(30)


def test_a_lane_that_sleeps_for_ever_ends_its_engine_and_says_so_of_the_trials_in_it(serving):
    config = serving.config(2)
    assert isinstance(serving.came_to(config, serving.ahead[0]), Report)
    serving.sleeper.sleep()
    ending = serving.came_to(config, serving.ahead[1])
    assert (ending.outcome, ending.cause) == ("FAILED", "stuck")
    assert re.fullmatch(REASON, ending.reason)
    assert "in fall_asleep\n    time.sleep(1_000_000)" in ending.log_tail.split("Thread lane:")[-1]
    assert isinstance(serving.came_to(config, serving.ahead[1]), Report)  # Ray has started it again
