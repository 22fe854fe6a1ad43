"""Which points no worker has the memory for: by estimate, and by what ran out of it before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tuner.spec.batch import halved
from tuner.spec.layout import Root
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import TrialConfig

if TYPE_CHECKING:
    from tuner.training.memory import Estimate


class Impossible:
    """Judges points before they start. What it judges by takes torch to import, so only where there is a reason to."""

    def __init__(self, spec: SweepSpec, room: dict[str, Any] | None = None, strategy: str | None = None):
        """`room` is `Room` as a plain dict, where it is known; `strategy` is how the workers of a trial share it."""
        self._resources = spec.resources.model_copy(update={"strategy": strategy} if strategy else {})
        self._cache = Root.of(spec).cache
        self._room = room
        self._ran_out: dict[int, Estimate] = {}

    def why(self, config: TrialConfig) -> str | None:
        """Why no worker has the memory for this trial, not even at half its rows at once; None if one may have."""
        room = self._room
        if room is None or (room["holds_all"] and not self._ran_out):
            return None
        fewer = halved(config["train"], self._resources.workers_per_trial)
        needed = self._needed({**config, "train": config["train"] | (fewer or {})})
        if needed is None:
            return None
        if needed.total > room["size"]:
            return f"needs {needed} by estimate, a worker has {room['size'] / 2**30:.1f} GiB"
        for number, other in self._ran_out.items():
            if needed.is_at_least(other):
                return f"needs at least the memory of trial {number}, which ran out of it"
        return None

    def ran_out(self, number: int, config: Any) -> None:
        """Learn that a trial ran out of memory with this `TrialConfig`, its last."""
        if self._room is not None and (needed := self._needed(config)):
            self._ran_out[number] = needed

    def _needed(self, config: TrialConfig) -> Estimate | None:
        from tuner.training.memory import estimate_if_any

        assert self._room is not None
        row_tokens, device = self._room["row_tokens"], self._room["device"]
        return estimate_if_any(config, self._resources, self._cache, row_tokens, device)
