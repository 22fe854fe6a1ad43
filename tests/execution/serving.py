"""An engine on real Ray that has prepared a sweep, and the calls it takes."""

from __future__ import annotations

from typing import Any

from tuner.execution.engine import Engines
from tuner.execution.events import Silent
from tuner.execution.preparation import prepare_on_ray
from tuner.spec.layout import SweepFolder
from tuner.spec.space import resolve
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import TrialConfig, milestones


class Serving:
    """The engine of a sweep whose trials have `ahead` of them the milestones of a budget."""

    def __init__(self, spec: SweepSpec, engines: Engines):
        self.spec = spec
        self.folder = SweepFolder.of(spec)
        self.engine = engines.actors[0]
        self.facts = prepare_on_ray(engines, None, Silent())
        self.ahead = milestones(self.facts["tokens_per_trial"], spec.budget.evals_per_trial)

    def config(self, number: int, **lora: Any) -> TrialConfig:
        config = resolve(self.spec, number, {"train.learning_rate": 0.003})
        return {**config, "lora": {**(config["lora"] or {}), **lora}}

    def advance(self, config: TrialConfig, until_tokens: int) -> Any:
        """The call, as a reference that `ray.get` takes."""
        return self.engine.advance.remote(config, self.facts, until_tokens)
