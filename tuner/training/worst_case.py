"""What a sweep takes at most, from its spec and the model's config alone: no weights and no rows are read."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from textwrap import shorten
from typing import Any

from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from tuner.errors import MachineError, TunerError, all_that_led_to
from tuner.spec.batch import batch_of_one
from tuner.spec.layout import Root
from tuner.spec.sweep import ResourcesSpec, SweepSpec
from tuner.training.dataset import DEFAULT_MAX_LENGTH
from tuner.training.memory import Estimate, choose_strategy, estimate, largest_trial

_ADAM = 3
"""What a trial goes on from, in adapters: itself and two moments."""


@dataclass(frozen=True)
class WorstCase:
    """No trial stopped early, each with the value of every searched key that takes most."""

    trials: int
    tokens: int | None
    """Trained by all trials together; None where the budget is given in epochs, which only the data tell."""
    evaluated_rows: int
    """Rows of the evaluation set, as often as they are scored."""
    memory: Estimate
    """Of one worker of a trial with a base of its own."""
    strategy: str
    """How its workers share it, and why."""
    adapter_bytes: int
    """Of one evaluation's checkpoint: the adapter, or the whole model."""
    disk_bytes: int
    """Of the sweep's folder with its promoted model; the cache of prepared data and converted bases is not in it."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"memory_bytes": self.memory.total}


def worst_case(spec: SweepSpec) -> WorstCase:
    """What this sweep takes at most. The model's config is read, from the hub if it is there.

    Raises TunerError where the config cannot be had, or no such model can be made of it; MachineError where the hub is
    out of reach.
    """
    budget, cache = spec.budget, Root.of(spec).cache
    try:  # a border: the config is somebody's, and the code that reads it may be the model's own
        chosen, config = choose_strategy(spec, cache), largest_trial(spec, cache)
        alone = estimate(config, ResourcesSpec(), cache)  # nothing sharded: what is saved is whole
    except MachineError:
        raise
    except Exception as error:
        own = error.__cause__ if isinstance(error, TunerError) and error.__cause__ else error  # the library's words
        said = " ".join(shorten(line, 300, placeholder=" ...") for line in str(own).strip().splitlines()[:2])
        kind = MachineError if _is_out_of_reach(error) else TunerError
        raise kind(f"there is no plan, since model.name {spec.model.name} gives no model: {said}") from error
    adapter = alone.trained if config["lora"] is not None else alone.base + alone.trained
    at_once = min(spec.resources.max_concurrent_trials or budget.trials, budget.trials)
    # A running trial has its best adapter, its last, one being written, and the state it would go on from.
    kept = at_once * (3 + _ADAM) + spec.storage.keep_best
    model = 2 * (alone.base + alone.trained)  # at worst a bfloat16 base merged in float32
    return WorstCase(
        trials=budget.trials,
        tokens=_tokens(spec, config["train"]),
        evaluated_rows=(budget.trials * budget.evals_per_trial + 1) * spec.data.max_eval_examples,
        memory=chosen.estimate,
        strategy=chosen.reason,
        adapter_bytes=adapter,
        disk_bytes=kept * adapter + (model if spec.promotion is not None else 0),
    )


def _is_out_of_reach(error: BaseException) -> bool:
    """Whether this, or what led to it, is that the hub could not be asked, and its cache has no answer."""
    return any(isinstance(one, LocalEntryNotFoundError | OfflineModeIsEnabled) for one in all_that_led_to(error))


def _tokens(spec: SweepSpec, train: dict[str, Any]) -> int | None:
    """Of all trials; a budget in steps counts them with rows that are all full, as large as the spec's own batch."""
    budget, each = spec.budget, spec.budget.tokens_per_trial
    if budget.steps_per_trial is not None:
        rows = math.prod(batch_of_one(spec.train))
        each = budget.steps_per_trial * rows * (train.get("max_length") or DEFAULT_MAX_LENGTH)
    total = None if each is None else budget.trials * each
    return total if budget.tokens is None or (total is not None and total < budget.tokens) else budget.tokens
