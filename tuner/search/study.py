"""What to try next and what to stop: an Optuna study, seen as ask, report and tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.samplers import GridSampler
from optuna.trial import TrialState

from tuner.errors import TunerError
from tuner.search.samplers import make_pruner, make_sampler, suggest
from tuner.spec.space import in_order, is_active, resolve
from tuner.spec.trial import NO_IMPROVEMENT, Ending, Report, TrialConfig, milestones

if TYPE_CHECKING:
    from optuna.trial import BaseTrial, FrozenTrial

    from tuner.spec.sweep import SweepSpec

_FEASIBILITY = "infeasible"
"""Name of the one constraint: 1 for a point that could not be trained, 2 for one that was not even tried, else 0."""
_NOT_TRIED = 2.0

AT_RANDOM_AFTER = 10
"""So many proposals in a row that are known to be impossible, and points are drawn at random until one is not."""
MOST_IN_VAIN = 100
"""So many in a row, and the search is over: at random, a space of which a thirtieth is possible would have shown it."""

FAR_ABOVE = 2.0
"""A trial whose eval_loss is so many times the untuned base's has diverged, finite as it may be."""


def remaining_trials(spec: SweepSpec, study: optuna.Study) -> int:
    """How many trials are still to be run, or to be run again."""
    trials = study.get_trials(deepcopy=False)
    return spec.budget.trials - sum(trial.state.is_finished() and _violation(trial) != _NOT_TRIED for trial in trials)


def _violation(trial: FrozenTrial) -> float:
    return trial.constraints.get(_FEASIBILITY, 0.0)


class Search:
    """Proposes trials, decides which go on, and records in Optuna what became of each.

    Optuna sees every evaluation as an intermediate value at its token count; a trial is COMPLETE only after its full
    budget, or when its own patience is over, with its best value; stopped ones are PRUNED; infeasible ones are PRUNED
    and violate a constraint, so that samplers learn to keep away; only failures, which say nothing about the point, are
    FAIL.

    Trials that an earlier run left unfinished are proposed again first, under their own numbers. A point that is known
    to be impossible, or has been infeasible before, is not tried: it is infeasible at once, and no trial of the budget.
    """

    def __init__(
        self,
        spec: SweepSpec,
        study: optuna.Study,
        tokens_per_trial: int,
        baseline_loss: float,
        why_impossible: Callable[[TrialConfig], str | None] = lambda config: None,
        not_tried: Callable[[TrialConfig, Ending], None] = lambda config, ending: None,
    ):
        """`baseline_loss` is the untuned base's eval_loss; a trial far above it has diverged.

        `why_impossible` says of a point why no worker has the memory for it. `not_tried` is told of each that is not
        tried, before Optuna is.
        """
        self._spec = spec
        self._why_impossible, self._not_tried = why_impossible, not_tried
        self._hopeless = FAR_ABOVE * baseline_loss
        self._study = study
        self._budget = tokens_per_trial
        trials = study.get_trials(deepcopy=False)
        self._sampler = make_sampler(spec.search, spec.space, told=len(trials))
        study.sampler = self._sampler
        self._at_random = optuna.samplers.RandomSampler(spec.search.seed + len(trials) + 1)
        self._in_vain = 0
        """Proposals since the last that was tried."""
        self._infeasible = {
            frozenset(self._point(trial).items()): (trial.number, trial.user_attrs.get("cause"))
            for trial in trials
            if trial.state.is_finished() and _violation(trial) not in (0.0, _NOT_TRIED)
        }
        """Points that turned out to be, with the trial and its cause."""
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
        self.over: str | None = None
        """Why there are no more, where the budget is not the reason."""

    def ask(self) -> TrialConfig | None:
        """The next trial; None when the budget of trials is used up, or the search is `over` before."""
        while self.remaining > 0 and not self._is_over():
            trial, point = self._propose()
            self._trials[trial.number] = trial
            config = resolve(self._spec, trial.number, point)
            began = "started" in trial.user_attrs  # in an earlier run, says the store: then it goes on
            known = None if began else self._what_is_known(config)
            if known is None:
                self._in_vain = 0
                self.remaining -= 1
                return config
            self._in_vain += 1
            self._not_tried(config, known)
            self.tell(trial.number, known, tried=False)
        return None

    def _propose(self) -> tuple[optuna.Trial, dict[str, Any]]:
        """An unfinished trial or a new one, and its point.

        Where the sampler only proposes what is known to be impossible, from which not every sampler learns, it is drawn
        at random; but a grid has all its points.
        """
        is_grid = isinstance(self._sampler, GridSampler)
        self._study.sampler = self._sampler if is_grid or self._in_vain < AT_RANDOM_AFTER else self._at_random
        trial = self._unfinished.pop(0) if self._unfinished else self._study.ask()
        point = self._point(trial)
        self._study.sampler = self._sampler
        return trial, point

    def _point(self, trial: BaseTrial) -> dict[str, Any]:
        """The values of a trial; one asked before has those it was given then."""
        point: dict[str, Any] = {}
        for key in in_order(self._spec.space):
            if is_active(self._spec.space[key], point):
                point[key] = suggest(trial, key, self._spec.space[key])
        return point

    def _what_is_known(self, config: TrialConfig) -> Ending | None:
        """How a point would end, if that is known."""
        if before := self._infeasible.get(frozenset(config["point"].items())):
            number, cause = before
            return Ending("INFEASIBLE", cause, f"trial {number} had this point and was infeasible: not tried again")
        if why := self._why_impossible(config):
            return Ending("INFEASIBLE", "oom", f"{why}: not tried")
        return None

    def _is_over(self) -> bool:
        if isinstance(self._sampler, GridSampler):
            if not self._unfinished and self._sampler.is_exhausted(self._study):
                self.over = "every point of the grid has been proposed"
        elif self._in_vain >= MOST_IN_VAIN:
            self.over = f"the last {MOST_IN_VAIN} points proposed are all known to be impossible"
        if self.over:
            self.remaining = 0
        return self.over is not None

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
        self.over, self._in_vain = None, 0
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

    def tell(self, number: int, ending: Ending, tried: bool = True) -> None:
        """Record the end of a trial in Optuna; nothing about the trial can change afterwards."""
        trial, infeasible = self._trials.pop(number), ending.outcome == "INFEASIBLE"
        trial.set_constraint(_FEASIBILITY, float(infeasible) if tried else _NOT_TRIED)
        if infeasible and tried:
            self._infeasible[frozenset(self._point(trial).items())] = number, ending.cause
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
