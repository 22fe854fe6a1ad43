"""The study of a sweep as its only writer has it: read from memory, every write in the database as well.

Optuna's own cache reads every trial that runs again at every question, because somebody else might have written. With
many trials at once that is most of what a driver does: see the README on scale.

A write is made again where the database was away: see `persistent`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from tuner.results.database import persistent


class HeldStorage(InMemoryStorage):
    """One study of a database. Writes reach the database first; the numbers of its trials are their ids here."""

    def __init__(self, database: BaseStorage, name: str, may_write: Callable[[], None]):
        """`may_write` is called before each write, and raises where this process is the writer no longer."""
        super().__init__()
        self._may_write = may_write
        self._database = database
        self._study = database.get_study_id_from_name(name)
        here = super().create_new_study(database.get_study_directions(self._study), name)
        for key, value in database.get_study_system_attrs(self._study).items():
            super().set_study_system_attr(here, key, value)
        self._ids: list[int] = []
        for trial in database.get_all_trials(self._study):
            self._ids.append(trial._trial_id)
            super().create_new_trial(here, trial)

    def _write(self, call: Callable[..., Any], *arguments: Any, again: Callable[..., Any] | None = None) -> Any:
        self._may_write()
        return persistent(call, again)(*arguments)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._write(self._database.set_study_system_attr, self._study, key, value)
        super().set_study_system_attr(study_id, key, value)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        make = self._database.create_new_trial
        self._ids.append(self._write(make, self._study, template_trial, again=self._created))
        return super().create_new_trial(study_id, template_trial)

    def _created(self, study_id: int, template_trial: FrozenTrial | None) -> int:
        """The trial that a lost commit has made all the same, or a new one."""
        for trial in self._database.get_all_trials(study_id, deepcopy=False)[len(self._ids) :]:
            return trial._trial_id
        return self._database.create_new_trial(study_id, template_trial)

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        self._write(self._database.set_trial_param, self._ids[trial_id], param_name, param_value_internal, distribution)
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        self._write(self._database.set_trial_state_values, self._ids[trial_id], state, values, again=self._told)
        return super().set_trial_state_values(trial_id, state, values)

    def _told(self, trial_id: int, state: TrialState, values: Sequence[float] | None) -> bool:
        """Tell what a lost commit may have told."""
        try:
            return self._database.set_trial_state_values(trial_id, state, values)
        except UpdateFinishedTrialError:
            return True

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        self._write(self._database.set_trial_intermediate_value, self._ids[trial_id], step, intermediate_value)
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._write(self._database.set_trial_user_attr, self._ids[trial_id], key, value)
        super().set_trial_user_attr(trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._write(self._database.set_trial_system_attr, self._ids[trial_id], key, value)
        super().set_trial_system_attr(trial_id, key, value)
