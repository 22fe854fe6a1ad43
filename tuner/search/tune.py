"""The search as Ray Tune sees it: a Searcher that proposes, a scheduler that stops. Both only pass calls on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tuner.spec.trial import TrialConfig


class NeverPickled:
    """Tune pickles its searcher and scheduler for a restore of its own; we never do that, and the study holds a URL."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (object, ())


class StudySearcher(NeverPickled, Searcher):
    """Hands out what `ask` proposes as Tune trial configs while there is `room`, and tells `ended` which is over.

    A trial that is tried again comes as another of Tune's, so there may be more to ask for as long as any runs.
    """

    def __init__(self, ask: Callable[[], TrialConfig | None], ended: Callable[[int], None], room: Callable[[], bool]):
        super().__init__()
        self._ask = ask
        self._ended = ended
        self._room = room
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        config = self._ask() if self._room() else None
        if config is not None:
            self._numbers[trial_id] = config["number"]
            return config
        return None if self._numbers else Searcher.FINISHED  # or Tune asks again

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._ended(self._numbers.pop(trial_id))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study is the state."""


class StudyScheduler(NeverPickled, FIFOScheduler):
    """Stops a trial when `take`, given its number and a result, returns True; or when it is told to."""

    def __init__(self, take: Callable[[int, dict[str, Any]], bool]):
        super().__init__()
        self._take = take
        self._trials: dict[int, tuple[Any, Any]] = {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._trials[trial.config["number"]] = tune_controller, trial

    def stop(self, number: int) -> None:
        """End a trial, whatever it is doing. Between two callbacks of Tune's only."""
        tune_controller, trial = self._trials[number]
        tune_controller.stop_trial(trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        stop = self._take(trial.config["number"], result)
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE
