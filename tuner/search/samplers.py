"""Optuna's samplers and pruners, as the spec names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import TrialState

from tuner.spec.space import Choice, Int, LogUniform, Uniform

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import BaseTrial

    from tuner.spec.space import Distribution
    from tuner.spec.sweep import SearchSpec, StoppingSpec, SweepSpec


def make_sampler(search: SearchSpec, space: dict[str, Distribution], told: int) -> BaseSampler:
    """The sampler of `search.sampler`; `told` is how many trials the study has, so that none is repeated."""
    seed = search.seed + told
    startup = search.startup_trials
    match search.sampler:
        case "tpe":
            # Searched keys interact (rate and rank), some exist only under a condition, and several run at once.
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True
            )
        case "random":
            return optuna.samplers.RandomSampler(seed=seed)
        case "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
        case "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
        case "qmc":
            # A sequence continues by itself where the study left off; another seed would start another sequence.
            return optuna.samplers.QMCSampler(seed=search.seed, scramble=True, warn_independent_sampling=False)
        case "grid":
            return _AskedGridSampler({key: grid_values(space[key]) for key in space}, seed=search.seed)


class _AskedGridSampler(optuna.samplers.GridSampler):
    """Optuna's grid for a study that is asked and told: the original stops `Study.optimize`, which we never call."""

    def after_trial(self, *args: Any) -> None:
        pass

    def is_exhausted(self, study: optuna.Study) -> bool:
        """Whether every point has been asked for, those of running trials as well, and no enqueued one waits."""
        trials = study.get_trials(deepcopy=False)
        waits = any(trial.state == TrialState.WAITING for trial in trials)
        asked = {trial.system_attrs["grid_id"] for trial in trials if "grid_id" in trial.system_attrs}
        return len(asked) == self._n_min_trials and not waits


def grid_values(distribution: Distribution) -> list[Any]:
    """Every value of a finite distribution; `tuner check` has refused infinite ones."""
    match distribution:
        case Choice():
            return list(distribution.values)
        case Int():
            return list(range(distribution.low, distribution.high + 1, distribution.step))
        case Uniform(step=float(step)):
            count = int((distribution.high - distribution.low) / step + 1e-9)
            return [distribution.low + step * k for k in range(count + 1)]
    raise ValueError(f"{distribution} is not finite")


def suggest(trial: BaseTrial, key: str, distribution: Distribution) -> Any:
    """Ask Optuna for one value; a quantised log-uniform is rounded here, which Optuna has no form for."""
    match distribution:
        case Choice():
            return trial.suggest_categorical(key, distribution.values)
        case Int():
            return trial.suggest_int(
                key, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
        case Uniform():
            return trial.suggest_float(key, distribution.low, distribution.high, step=distribution.step)
        case LogUniform():
            value = trial.suggest_float(key, distribution.low, distribution.high, log=True)
            return value if distribution.step is None else max(round(value / distribution.step), 1) * distribution.step


def make_pruner(spec: SweepSpec, milestones: list[int]) -> BasePruner:
    """The rule of `stopping.type`, over trained tokens; no trial is stopped before its `grace_evals`-th evaluation."""
    stopping: StoppingSpec = spec.stopping
    first_rung = milestones[min(stopping.grace_evals, len(milestones)) - 1]
    match stopping.type:
        case "asha":
            return optuna.pruners.SuccessiveHalvingPruner(first_rung, stopping.reduction_factor)
        case "hyperband":
            return optuna.pruners.HyperbandPruner(first_rung, milestones[-1], stopping.reduction_factor)
        case "median":
            return optuna.pruners.MedianPruner(n_warmup_steps=first_rung - 1)
        case "none":
            return optuna.pruners.NopPruner()
