"""Trials as slots on a shared base: for each a light coordinator, which turns Tune's steps into calls of an engine."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.result import RESULT_DUPLICATE

from tuner.execution.endings import explain_failure
from tuner.execution.engine import Engines
from tuner.execution.trial import FAILURE
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import TrialConfig, milestones


class SlotTrial(tune.Trainable):
    """Tune's side of a slot: each step is one evaluation. The actors are reused, and import no torch."""

    def setup(  # type: ignore[override]
        self, config: TrialConfig, engines: list[Any], facts: dict[str, Any], milestones: list[int]
    ) -> None:
        self._engines = engines
        self._facts = facts
        self._milestones = milestones
        self._begin(config)

    def _begin(self, config: TrialConfig) -> None:
        self._trial = config
        self._engine = self._engines[config["number"] % len(self._engines)]
        self._ahead = list(self._milestones)

    def step(self) -> dict[str, Any]:
        if not self._ahead:  # Tune shows the scheduler no result that says done: that is a step of its own
            return {RESULT_DUPLICATE: True, "done": True}
        result = self._advance(self._ahead.pop(0))
        if FAILURE in result:
            self._ahead = []
            return result
        return {**result, "checkpoint_path": result["adapter_path"]}

    def _advance(self, until_tokens: int) -> dict[str, Any]:
        try:
            return ray.get(self._engine.advance.remote(self._trial, self._facts, until_tokens))
        except RayActorError as error:  # Ray has asked again, as often as an engine's death is survived
            return {FAILURE: json.dumps(asdict(explain_failure(error)))}

    def reset_config(self, new_config: TrialConfig) -> bool:  # type: ignore[override]
        self.cleanup()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        with suppress(RayActorError):  # with the engine, the slot is gone, too
            ray.get(self._engine.detach.remote(self._trial["number"]))


def slot_trial(engines: Engines, spec: SweepSpec, facts: dict[str, Any]) -> Any:
    """The trainable of a sweep on a shared base, for `tune.Tuner`."""
    ahead = milestones(facts["tokens_per_trial"], spec.budget.evals_per_trial)
    return tune.with_parameters(SlotTrial, engines=engines.actors, facts=facts, milestones=ahead)
