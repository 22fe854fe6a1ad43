"""One sweep's records: an Optuna study and, in the same database, the tables Optuna has no place for.

The driver is the only writer while a sweep runs, but for requests to it; any number of processes may read, during and
after. Nothing is pickled, and opening a store neither creates nor migrates anything.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import time
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tuner.errors import NotFoundError, Superseded, TunerError
from tuner.results import schema, tables
from tuner.results.alive import BEAT_S, driver_lives, may_live
from tuner.results.database import (
    connect,
    database_url,
    engine_options,
    leave_wal,
    one_at_a_time,
    persistent,
    readable,
    say_away,
    use_wal,
)
from tuner.results.ranking import best_report
from tuner.results.record import ACTIVE, Status, SweepStatus, TrialRecord, finite, utc_now
from tuner.results.requests import Requests
from tuner.results.sweeps import already_there, spec_of
from tuner.spec.layout import SweepFolder
from tuner.spec.load import dump_spec
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Attempt, Outcome, Report, TrialConfig

if TYPE_CHECKING:
    import optuna


class Store:
    """The records of one sweep. `Store.create` for a new one, `Store.open` for one that exists."""

    def __init__(self, spec: SweepSpec, folder: SweepFolder, url: sa.URL):
        self.spec = spec
        self.folder = folder
        self._url = url
        self._engine = connect(url)
        self._began: float | None = None
        """Of the driver: when it would have begun, by its monotonic clock, had the sweep never been without one."""
        self._optunas: list[optuna.storages.RDBStorage] = []
        """Optuna's own connections to the same database."""
        self._before: str | None = None
        """The token that this driver's replaced."""
        self.has_run = False
        """Whether this driver has come further than preparing."""
        self._token: str | None = None
        """Of the driver: what a successor replaces in the sweep's row, and every write of this one is held against."""
        self.requests = Requests(self._engine, spec.name, self._writing)

    @classmethod
    def create(cls, spec: SweepSpec) -> Store:
        """Claim the sweep's name, in the root and in the database, and write spec.yaml.

        The folder is made under another name and renamed when it is complete, or in an object store spec.yaml is put
        there last, so that a reader finds a whole sweep or none. Raises `TunerError` when the sweep exists, or the
        database does not take it.
        """
        cls.refuse_existing(spec)
        folder, token = SweepFolder.of(spec), secrets.token_hex(8)
        draft = SweepFolder(folder.path.with_name(f".{folder.name}.{secrets.token_hex(4)}"), folder.root)
        draft.path.mkdir(parents=True)
        try:
            cls(spec, draft, database_url(spec, draft, "rwc"))._create_tables(token)
            if folder.root.url is None:
                draft.root.create(draft.spec, dump_spec(spec))
                draft.path.rename(folder.path)
            else:
                folder.root.create(folder.spec, dump_spec(spec))
        except OSError:
            if folder.exists():  # somebody else was faster
                raise already_there(folder, spec) from None
            raise
        finally:
            shutil.rmtree(draft.path, ignore_errors=True)
        store = cls(spec, folder, database_url(spec, folder, "rw"))
        store._token = token
        return store

    @staticmethod
    def refuse_existing(spec: SweepSpec) -> None:
        """Raise `TunerError` when a sweep of that name is there already."""
        folder = SweepFolder.of(spec)
        if folder.exists():
            raise already_there(folder, spec)

    @classmethod
    def open(cls, folder: SweepFolder) -> Store:
        """The sweep in a folder, for reading and, by its driver, for going on.

        Raises `NotFoundError`, and `TunerError` when its records are damaged or those of another version.
        """
        spec = spec_of(folder)
        if spec.storage.study is None and not folder.study.exists():
            raise NotFoundError(f"sweep {folder.name!r} has lost its records: {folder.study} is not there")
        url, borrowed = database_url(spec, folder, "rw"), ExitStack()
        if spec.storage.study is None and not os.access(folder.path, os.W_OK):
            url = borrowed.enter_context(readable(folder.study))
        store = cls(spec, folder, url)
        weakref.finalize(store, borrowed.close)
        schema.check_tables(store._engine, spec.name)
        return store

    def _create_tables(self, token: str) -> None:
        import optuna

        with one_at_a_time(self._engine):
            use_wal(self._engine)
            storage = self._optuna_storage(create=True)
            try:
                optuna.create_study(study_name=self.spec.name, storage=storage, direction=self.spec.objective.goal)
            except optuna.exceptions.DuplicatedStudyError:
                raise TunerError(
                    f"the database of storage.study already holds a study {self.spec.name!r}, whose folder is not "
                    f"under {self.spec.storage.root}: choose another name, or the --root that it was started with"
                ) from None
            schema.bring_up_to_date(self._engine)
            values = {"name": self.spec.name, "status": "queued", "spec": self.spec.model_dump(mode="json")}
            values["driver"] = token
            with self._engine.begin() as connection:
                connection.execute(tables.SWEEPS.insert().values(created=utc_now(), **values))
        self._close()

    def _optuna_storage(self, create: bool) -> optuna.storages.RDBStorage:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        url = self._url.render_as_string(hide_password=False)
        options = engine_options(self._url, durable=False)
        try:
            storage = optuna.storages.RDBStorage(url, engine_kwargs=options, skip_table_creation=not create)
        except RuntimeError as error:  # its tables are a newer Optuna's
            raise TunerError(f"the study of sweep {self.spec.name!r} cannot be read: {error}") from error
        self._optunas.append(storage)
        return storage

    # The study and its trials

    @cached_property
    def _storage(self) -> optuna.storages.BaseStorage:
        return self._optuna_storage(create=False)

    @persistent
    def hold_study(self) -> None:
        """Be the study's only writer from now on, who needs no query to know what is in it."""
        from tuner.results.held import HeldStorage

        for known in ("study", "_study_id"):
            self.__dict__.pop(known, None)
        database = self._optuna_storage(create=False)
        sa.event.listen(database.engine, "handle_error", say_away)
        self._storage = HeldStorage(database, self.spec.name, self.refuse_superseded)

    @cached_property
    def study(self) -> optuna.Study:
        """The sweep's own study. The search sets `study.sampler`; direction and name come from the spec."""
        import optuna

        try:
            return optuna.load_study(study_name=self.spec.name, storage=self._storage)
        except KeyError as error:
            raise TunerError(f"sweep {self.spec.name!r} has lost its study in the database") from error

    @cached_property
    def _study_id(self) -> int:
        return self._storage.get_study_id_from_name(self.spec.name)

    @persistent
    def start_trial(self, number: int, config: TrialConfig, goes_on: bool = False) -> None:
        """Record what a trial runs with and that it starts now.

        An earlier attempt is forgotten; its reports stay if the trial goes on from the last of them.
        """
        forgotten = dict.fromkeys(("outcome", "cause", "reason", "log_tail", "finished"))
        self._set_attributes(number, config=config, started=utc_now().isoformat(), **forgotten)
        if goes_on:
            return
        mine = (tables.REPORTS.c.sweep == self.spec.name) & (tables.REPORTS.c.trial == number)
        with self._writing() as connection:
            connection.execute(tables.REPORTS.delete().where(mine))

    def tried(self, number: int) -> list[Attempt]:
        """The attempts of a trial that have failed so far."""
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        return tables.attempts(self._storage.get_trial(trial_id).user_attrs)

    def set_tried(self, number: int, tried: Sequence[Attempt]) -> None:
        """Record the attempts of a trial that have failed so far, before another begins."""
        self._set_attributes(number, tried=[asdict(attempt) for attempt in tried])

    def pass_over_trial(self, number: int, config: TrialConfig, cause: str | None, reason: str | None) -> None:
        """Record a trial that never starts, its point being known to be infeasible. Call before Optuna is told."""
        ended = {"cause": cause, "reason": reason, "finished": utc_now().isoformat()}
        self._set_attributes(number, config=config, outcome="INFEASIBLE", **ended)

    def finish_trial(
        self,
        number: int,
        outcome: Outcome,
        cause: str | None = None,
        reason: str | None = None,
        log_tail: str | None = None,
    ) -> None:
        """Record how a trial ended. Call before Optuna is told: it lets nobody touch a finished trial."""
        self._set_attributes(
            number, outcome=outcome, cause=cause, reason=reason, log_tail=log_tail, finished=utc_now().isoformat()
        )

    def _set_attributes(self, number: int, **attributes: Any) -> None:
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        known = self._storage.get_trial(trial_id).user_attrs
        for key, value in attributes.items():
            if known.get(key) != value:  # each is a transaction
                self._storage.set_trial_user_attr(trial_id, key, value)

    @persistent
    def add_report(self, number: int, report: Report) -> None:
        """Record one evaluation. Reports come at least once: the same tokens again replace what stood there."""
        key = {"sweep": self.spec.name, "trial": number, "tokens": report.tokens}
        same = sa.and_(*(tables.REPORTS.c[column] == value for column, value in key.items()))
        with self._writing() as connection:
            connection.execute(tables.REPORTS.delete().where(same))
            connection.execute(tables.REPORTS.insert().values({**report.as_dict(), **key, "time": utc_now()}))

    @persistent
    def forget_adapter(self, number: int, tokens: int) -> None:
        """Record that the adapter of one report is kept no longer."""
        table = tables.REPORTS
        this = (table.c.sweep == self.spec.name) & (table.c.trial == number) & (table.c.tokens == tokens)
        with self._writing() as connection:
            connection.execute(table.update().where(this).values(adapter_path=None))

    @persistent
    def reports(self, numbers: Iterable[int] | None = None) -> list[dict[str, Any]]:
        """Every report of these trials, or of all, as {trial, tokens, ..., time}, in order of trial and tokens."""
        table = tables.REPORTS
        query = sa.select(table).where(table.c.sweep == self.spec.name).order_by(table.c.trial, table.c.tokens)
        if numbers is not None:
            query = query.where(table.c.trial.in_(numbers))
        with self._engine.connect() as connection:
            return [tables.report_row(row) for row in connection.execute(query).mappings()]

    @persistent
    def with_adapters(self) -> list[int]:
        """The trials of which an adapter is kept."""
        table = tables.REPORTS
        mine = (table.c.sweep == self.spec.name) & table.c.adapter_path.is_not(None)
        with self._engine.connect() as connection:
            return list(connection.execute(sa.select(table.c.trial).where(mine).distinct()).scalars())

    def trials(self, numbers: Collection[int] | None = None) -> list[TrialRecord]:
        """Every trial that was started, or those of these numbers, in order of number.

        Points only enqueued in Optuna are not trials yet.
        """
        import optuna

        reports: dict[int, list[Report]] = {}
        for row in self.reports(numbers):
            reports.setdefault(row["trial"], []).append(Report.from_dict(row))
        trials = self.study.get_trials(deepcopy=False)
        asked = trials if numbers is None else [trials[number] for number in sorted(numbers) if number < len(trials)]
        return [
            tables.record(trial, reports.get(trial.number, []), self._best_of)
            for trial in asked
            if trial.state != optuna.trial.TrialState.WAITING
        ]

    def record(self, number: int) -> TrialRecord:
        """One trial. Raises `NotFoundError`."""
        if 0 <= number < 2**31:  # what a column holds
            for record in self.trials([number]):
                return record
        raise NotFoundError(f"sweep {self.spec.name!r} has no trial {number}")

    def _best_of(self, reports: list[Report]) -> Report | None:
        return best_report(reports, self.spec.objective)

    # The sweep as a whole

    @property
    def _mine(self) -> sa.ColumnElement[bool]:
        """Of the table of sweeps, the row of this one."""
        return tables.SWEEPS.c.name == self.spec.name

    def set_status(self, status: Status, message: str | None = None) -> None:
        """Record where the sweep stands. Who sets `preparing` or `running` becomes its driver."""
        values: dict[str, Any] = {"status": status, "message": message}
        self.has_run = self.has_run or status == "running"
        if status in ACTIVE:
            if self._began is None:
                self._began = time.monotonic() - self.status().elapsed_s
            values |= self._driven_from_here()
        elif status != "queued":
            values |= {"finished": utc_now(), **self._driven()}
            self._began = None
        self._update(values)
        if status not in (*ACTIVE, "queued") and self.spec.storage.study is None:
            self._close()
            leave_wal(self.folder.study)

    def _close(self) -> None:
        """Give up every connection; the next question makes a new one."""
        self._engine.dispose()
        for storage in self._optunas:
            storage.remove_session()
            storage.engine.dispose()

    def take_over(self, seen: SweepStatus) -> None:
        """Become the driver of a sweep that has none; of several who have seen it so, one does.

        One that is only taken for dead is given the time to show that it lives; if it wakes up later, it can write
        nothing any more. Tables of an older version are brought up to date. Raises `TunerError` when there is a driver.
        """
        self.refuse_driven(seen)
        if may_live(seen):
            time.sleep(BEAT_S)
        with one_at_a_time(self._engine):
            use_wal(self._engine)
            schema.bring_up_to_date(self._engine)
        self._began = time.monotonic() - seen.elapsed_s
        token = secrets.token_hex(8)
        self._before = self._driver()
        unchanged = tables.SWEEPS.c.heartbeat.is_not_distinct_from(seen.heartbeat)
        values = {"status": "preparing", "message": None, "driver": token, **self._driven_from_here()}
        if not self._update(values, unchanged):
            raise TunerError(f"sweep {self.spec.name!r} is running already")
        self._token = token
        self.requests.forget_open()

    def refuse_driven(self, seen: SweepStatus) -> None:
        """Raise `TunerError` when the sweep has a driver."""
        if seen.status in ACTIVE:
            raise TunerError(f"sweep {self.spec.name!r} is running already")

    def give_back(self, seen: SweepStatus, spec: SweepSpec) -> None:
        """Leave the sweep as it was before this driver took it over, which came to nothing."""
        if self.spec != spec:
            self.set_spec(spec)
        self._began = None
        unchanged = {"driver": self._before, "status": seen.status, "message": seen.message, "finished": seen.finished}
        self._update({**unchanged, "heartbeat": seen.heartbeat, "pid": seen.pid, "host": seen.host})

    @persistent
    def refuse_superseded(self) -> None:
        """Raise `Superseded` when this store was the driver's and no longer is."""
        if self._token is None:
            return
        if self._driver() != self._token:
            raise Superseded(self.spec.name)

    def _driver(self) -> str | None:
        """The token of the driver, as it is recorded now."""
        with self._engine.connect() as connection:
            return connection.execute(sa.select(tables.SWEEPS.c.driver).where(self._mine)).scalar()

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """A transaction in which nobody takes the sweep over. Raises `Superseded` when somebody has."""
        with self._engine.begin() as connection:
            if self._token is not None:
                driven = self._mine & (tables.SWEEPS.c.driver == self._token)
                held = connection.execute(tables.SWEEPS.update().where(driven).values(driver=self._token))
                if held.rowcount != 1:
                    raise Superseded(self.spec.name)
            yield connection

    def set_spec(self, spec: SweepSpec) -> None:
        """Put another spec in the place of the sweep's, whose driver this is."""
        text = self.folder.spec.with_name(".spec.yaml")
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(dump_spec(spec), encoding="utf-8")
        self.folder.root.keep(text.replace(self.folder.spec))
        self._update({"spec": spec.model_dump(mode="json")})
        self.spec = spec

    def set_message(self, message: str | None) -> None:
        """Record what the running sweep waits for; None when it goes on."""
        self._update({"message": message})

    def heartbeat(self) -> None:
        """Say that the driver lives; expected every `BEAT_S` or oftener."""
        self._update({"heartbeat": utc_now(), **self._driven()})

    def _driven(self) -> dict[str, float]:
        """How long drivers have been at work, when this process is one. No clock that is set counts."""
        return {} if self._began is None else {"driven_s": time.monotonic() - self._began}

    def _driven_from_here(self) -> dict[str, Any]:
        """What to record of a sweep that this process drives from now on."""
        now = utc_now()
        values = {"pid": os.getpid(), "host": socket.gethostname(), "heartbeat": now, "finished": None}
        return {**values, "started": sa.func.coalesce(tables.SWEEPS.c.started, now), **self._driven()}

    def set_prepared(self, tokens_per_trial: int, data_summary: Mapping[str, Any], baseline: Mapping[str, Any]) -> None:
        values = {"data": finite(dict(data_summary)), "baseline": finite(dict(baseline))}
        self._update({"tokens_per_trial": tokens_per_trial, **values})

    def set_sharing(self, sharing: Mapping[str, Any]) -> None:
        """Record how trials ran: `slots` on each of so many `engines`, none if each had its own base; the `reason`."""
        self._update({"sharing": finite(dict(sharing))})

    def set_promoted(self, promoted: Mapping[str, Any]) -> None:
        """Record what was promoted, or `{"refused": [reasons]}`."""
        self._update({"promoted": finite(dict(promoted))})

    @persistent
    def _update(self, values: Mapping[str, Any], condition: sa.ColumnElement[bool] | None = None) -> bool:
        """Change the sweep's row, if a condition on it holds; return whether it did."""
        with self._writing() as connection:
            where = self._mine if condition is None else self._mine & condition
            return connection.execute(tables.SWEEPS.update().where(where).values(values)).rowcount == 1

    @persistent
    def status(self) -> SweepStatus:
        """How the sweep stands, as seen from here: a driver that is gone makes it `interrupted`."""
        with self._engine.connect() as connection:
            read = [column for column in tables.SWEEPS.columns if column not in schema.OPTIONAL]
            query = sa.select(*read).where(self._mine)
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise NotFoundError(f"sweep {self.spec.name!r} is not in its database")
        status = tables.sweep_status(row)
        return status if status.status not in ACTIVE or driver_lives(status) else tables.interrupted(status)
