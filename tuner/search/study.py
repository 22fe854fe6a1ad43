"""What to try next and what to stop: an Optuna study, seen as ask, report and tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import TrialState

from tuner.errors import TunerError
from tuner.search.samplers import make_pruner, make_sampler, suggest
from tuner.spec.space import in_order, is_active, resolve
from tuner.spec.trial import NO_IMPROVEMENT, Ending, Report, TrialConfig, milestones

if TYPE_CHECKING:
    from tuner.spec.sweep import SweepSpec

_FEASIBILITY = "infeasible"
"""Name of the one constraint: 1 for a point that could not be trained, 0 for every other."""

FAR_ABOVE = 2.0
"""A trial whose eval_loss is so many times the untuned base's has diverged, finite as it may be."""


def remaining_trials(spec: SweepSpec, study: optuna.Study) -> int:
    """How many trials are still to be run, or to be run again."""
    return spec.budget.trials - sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


class Search:
    """Proposes trials, decides which go on, and records in Optuna what became of each.

    Optuna sees every evaluation as an intermediate value at its token count; a trial is COMPLETE only after its full
    budget, or when its own patience is over, with its best value; stopped ones are PRUNED; infeasible ones are PRUNED
    and violate a constraint, so that samplers learn to keep away; only failures, which say nothing about the point, are
    FAIL.

    Trials that an earlier run left unfinished are proposed again first, under their own numbers.
    """

    def __init__(self, spec: SweepSpec, study: optuna.Study, tokens_per_trial: int, baseline_loss: float):
        """`baseline_loss` is the untuned base's eval_loss; a trial far above it has diverged."""
        self._spec = spec
        self._hopeless = FAR_ABOVE * baseline_loss
        self._study = study
        self._budget = tokens_per_trial
        trials = study.get_trials(deepcopy=False)
        study.sampler = make_sampler(spec.search, spec.space, told=len(trials))
        study.pruner = make_pruner(spec, milestones(tokens_per_trial, spec.budget.evals_per_trial))
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        self._unfinished = [optuna.Trial(study, trial._trial_id) for trial in running]
        self._passed = {trial.number: trial.last_step or 0 for trial in running}
        self._trials: dict[int, optuna.Trial] = {}
        self._values: dict[int, dict[int, float]] = {}
        """Of each trial, the objective at each token count it was evaluated at; one may come twice."""
        self._endings: dict[int, Ending] = {}
        if not trials:
            for point in spec.search.enqueue:
                study.enqueue_trial(point)
        self.remaining = remaining_trials(spec, study)
        """How many trials are still to be asked for."""

    def ask(self) -> TrialConfig | None:
        """The next trial, or None when the budget of trials is used up."""
        if self.remaining <= 0:
            return None
        self.remaining -= 1
        trial = self._unfinished.pop(0) if self._unfinished else self._study.ask()
        point: dict[str, object] = {}
        for key in in_order(self._spec.space):  # a trial asked before gets the values it was given then
            if is_active(self._spec.space[key], point):
                point[key] = suggest(trial, key, self._spec.space[key])
        self._trials[trial.number] = trial
        return resolve(self._spec, trial.number, point)

    def add(self, point: Mapping[str, Any]) -> int:
        """Have a point of the space tried next, keys it lacks suggested, as one of the trials to be asked for.

        Returns its trial's number. Raises TunerError when there is none left for it.
        """
        waiting = sum(trial.state == TrialState.WAITING for trial in self._study.get_trials(deepcopy=False))
        if self.remaining - len(self._unfinished) - waiting <= 0:
            trials = self._spec.budget.trials
            raise TunerError(
                f"none of the {trials} trials is left for it: "
                f"`tuner extend {self._spec.name} --set budget.trials={trials + 1}` makes room"
            )
        self._study.enqueue_trial(dict(point))
        return len(self._study.get_trials(deepcopy=False)) - 1

    def extend(self, spec: SweepSpec) -> None:
        """Go on with more trials, of a spec that differs in nothing else that a search looks at."""
        self.remaining += spec.budget.trials - self._spec.budget.trials
        self._spec = spec

    def report(self, number: int, report: Report) -> bool:
        """Take one evaluation; return True when the trial should stop now."""
        trial = self._trials[number]
        value: float = getattr(report, self._spec.objective.metric)
        trial.report(value, step=report.tokens)
        if not report.is_finite() or report.eval_loss > self._hopeless:
            reason = f"eval_loss is {report.eval_loss:.4g} after {report.trained_tokens} tokens"
            self._endings[number] = Ending("INFEASIBLE", "diverged", reason)
            return True
        values = self._values.setdefault(number, {})
        values[report.tokens] = value
        if report.tokens >= self._budget:
            self._endings[number] = Ending("COMPLETED")
            return False
        if report.tokens < self._passed.get(number, 0):
            return False  # a rerun, catching up with what it had already been allowed to pass
        patience = self._spec.stopping.patience
        if patience and self._since_improvement(values.values()) >= patience:
            reason = f"no better {self._spec.objective.metric} in {patience} evaluations, at {report.tokens} tokens"
            self._endings[number] = Ending("COMPLETED", NO_IMPROVEMENT, reason)
            return True
        if trial.should_prune():
            reason = f"{self._spec.stopping.type} at {report.tokens} tokens"
            self._endings[number] = Ending("STOPPED", "early stopping", reason)
            return True
        return False

    def recall(self, number: int, reports: Sequence[Report]) -> None:
        """Of a trial that begins another attempt, take the evaluations from which it goes on, if it does."""
        heard = self._values.get(number, {})
        self._passed[number] = max([self._passed.get(number, 0), *heard])
        self._values[number] = {report.tokens: getattr(report, self._spec.objective.metric) for report in reports}

    def is_decided(self, number: int) -> bool:
        """Whether it is settled already how the trial ends."""
        return number in self._endings

    def decide(self, number: int, ending: Ending) -> None:
        """Settle how a running trial ends, unless its reports have done so."""
        self._endings.setdefault(number, ending)

    def ending(self, number: int, failure: Ending | None = None) -> Ending:
        """How a trial that has just ended is to be recorded; `failure` is what the trial itself said, if anything."""
        decided = self._endings.get(number)
        if decided is not None:
            return decided
        return failure or Ending("FAILED", "worker-lost", "the trial's process ended without a word")

    def tell(self, number: int, ending: Ending) -> None:
        """Record the end of a trial in Optuna; nothing about the trial can change afterwards."""
        trial = self._trials.pop(number)
        trial.set_constraint(_FEASIBILITY, float(ending.outcome == "INFEASIBLE"))
        match ending.outcome:
            case "COMPLETED":
                self._study.tell(trial, self._best(self._values[number].values()))
            case "STOPPED" | "INFEASIBLE":
                self._study.tell(trial, state=TrialState.PRUNED)
            case _:
                self._study.tell(trial, state=TrialState.FAIL)

    def _best(self, values: Iterable[float]) -> float:
        return min(values) if self._spec.objective.goal == "minimize" else max(values)

    def _since_improvement(self, values: Iterable[float]) -> int:
        """Evaluations since the objective last became better by more than `stopping.min_delta`."""
        sign = 1 if self._spec.objective.goal == "minimize" else -1
        best, since = math.inf, 0
        for value in values:
            improved = sign * value < best - self._spec.stopping.min_delta
            best, since = (sign * value, 0) if improved else (best, since + 1)
        return since
