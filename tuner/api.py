"""The Python API: load a spec, run it, and ask any sweep, running or over, what came out."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tuner.errors import NotFoundError, SpecError, TunerError
from tuner.results import query
from tuner.results.ranking import best_trial
from tuner.results.record import ACTIVE, Status, SweepStatus, TrialRecord, as_seen
from tuner.results.requests import Kind
from tuner.results.store import Store
from tuner.results.sweeps import sweep_names
from tuner.spec.changes import with_more_budget
from tuner.spec.checks.space import check_point
from tuner.spec.layout import Root, SweepFolder, absolute_root, default_root
from tuner.spec.load import load_spec as _load_spec
from tuner.spec.sweep import SweepSpec

if TYPE_CHECKING:
    import pandas as pd

    from tuner.execution.events import Display
    from tuner.execution.jobs import Job
    from tuner.execution.verify import Comparison
    from tuner.promotion.promote import Promotion
    from tuner.promotion.registry import Version
    from tuner.training.worst_case import WorstCase


def load_spec(path: str | Path, *overrides: str, root: str | Path | None = None) -> SweepSpec:
    """The checked, resolved spec of a YAML file, with `"a.b=value"` overrides laid over it.

    `root` is where sweeps are kept: this argument, else TUNER_ROOT, else the spec's, else `runs`.
    Raises `SpecError` with every problem at once.
    """
    return _load_spec(path, overrides, root)


def worst_case(spec: SweepSpec) -> WorstCase:
    """What the sweep takes at most: trials, tokens, memory of a worker, disk. Reads the model's config, no weights."""
    from tuner.training.worst_case import worst_case

    return worst_case(spec)


def run(
    spec: SweepSpec | str | Path,
    *overrides: str,
    root: str | Path | None = None,
    display: Display | None = None,
    log_output: bool = False,
) -> Sweep:
    """Run a sweep to its end on this machine and return it; `display` is told what happens meanwhile.

    With `log_output`, what this process prints meanwhile goes to the sweep's log, and not to stdout and stderr.
    Raises `SpecError`, `DataError` and `MachineError` before anything is trained, `TunerError` when the name is taken.
    A sweep without a successful trial does not raise: look at `Sweep.status` and `Sweep.best`.
    """
    from tuner.execution.sweep import run_sweep

    if not isinstance(spec, SweepSpec):
        spec = load_spec(spec, *overrides, root=root)
    elif overrides or root:
        raise TunerError("overrides and root go with a path; this spec is loaded: give them to tuner.load_spec")
    run_sweep(spec, display, log_output)
    return open(spec.name, spec.storage.root)


def submit(
    spec: SweepSpec | str | Path,
    *overrides: str,
    address: str | None = None,
    root: str | Path | None = None,
    allow_unauthenticated: bool = False,
    join: bool = False,
) -> Job:
    """Run a sweep on the Ray cluster with this dashboard, `http://HEAD:8265`; return when it has begun there.

    Without an `address`, RAY_ADDRESS names it. The spec is sent, the data are not: its paths, and the `root`, are the
    cluster's. Raises `SpecError`, `MachineError` for a cluster that takes no job, or takes anybody's unless
    `allow_unauthenticated`, and `TunerError` for what `tuner run` refuses there, or when this sweep runs there already:
    with `join` its job is returned instead.
    """
    from tuner.execution import dashboard, jobs

    if not isinstance(spec, SweepSpec):
        spec = _load_spec(spec, overrides, root, elsewhere=True)
    elif overrides:
        raise TunerError("overrides go with a path; this spec is loaded: give them to tuner.load_spec")
    there = dashboard.connect(dashboard.address_of(address), allow_unauthenticated)
    return jobs.submit_sweep(there, spec, root, join)


def resume(
    name: str,
    *overrides: str,
    root: str | Path | None = None,
    display: Display | None = None,
    log_output: bool = False,
) -> Sweep:
    """Continue a sweep that was cut off: finished trials stay, the total is what was asked for.

    The overrides may give it more of a budget for all its trials together, such as `"budget.trials=N"`, when it is
    finished as well. Raises `NotFoundError`, `SpecError` for any other change, and `TunerError` when the sweep is
    running, or finished and nothing is added.
    """
    from tuner.execution.sweep import resume_sweep

    sweep = open(name, root)
    resume_sweep(sweep.folder, overrides, display, log_output)
    return open(name, root)


def open(name: str, root: str | Path | None = None) -> Sweep:
    """The sweep of that name. Raises `NotFoundError`, naming the nearest."""
    return Sweep(Store.open(_root(root).sweep(name)))


def sweeps(root: str | Path | None = None) -> pd.DataFrame:
    """One row a sweep: name, status, trials (by now), asked, best, score, baseline, metric, created, elapsed_s."""
    import pandas as pd

    return pd.DataFrame(overview(root), columns=["name", *_OVERVIEW])


_OVERVIEW = ("status", "trials", "asked", "best", "score", "baseline", "metric", "created", "elapsed_s", "problem")


def overview(root: str | Path | None = None) -> list[dict[str, Any]]:
    """The rows of `sweeps()`, newest first. A sweep that cannot be read is listed with its problem."""
    place = _root(root)
    rows = []
    for name in sweep_names(place):
        try:
            rows.append({"name": name} | Sweep(Store.open(place.sweep(name))).summary())
        except Exception as error:  # a border: whatever one sweep has become, the others are listed
            problem = str(error) if isinstance(error, TunerError) else f"{type(error).__name__}: {error}"
            rows.append({"name": name, **dict.fromkeys(_OVERVIEW), "status": "unreadable", "problem": problem})
    return sorted(rows, key=lambda row: (row["created"] is not None, row["created"]), reverse=True)


def rollback(
    alias: str, root: str | Path | None = None, progress: Callable[[str], None] = lambda line: None
) -> tuple[Version, Version]:
    """Point an alias back at the version before its present one; return (from, to).

    `progress` is called with a line where this has to wait for a promotion. Raises `NotFoundError`, and `TunerError`
    where the alias moved meanwhile or cannot be read.
    """
    from tuner.promotion import registry

    return registry.rollback(_root(root), alias, progress)


def _root(root: str | Path | None) -> Root:
    return Root.at(absolute_root(root) if root else default_root())


class Sweep:
    """One sweep, as it stands at the moment of each question; the driver may be another process, or gone."""

    def __init__(self, store: Store):
        self.store = store

    def __repr__(self) -> str:
        return f"<Sweep {self.name} {self.status}>"

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def spec(self) -> SweepSpec:
        return self.store.spec

    @property
    def folder(self) -> SweepFolder:
        return self.store.folder

    @property
    def status(self) -> Status:
        """queued, preparing, running, finished, failed, interrupted or cancelled."""
        return self.state().status

    def state(self) -> SweepStatus:
        """Status, message, times, driver, data, baseline and what was promoted."""
        return self.store.status()

    @property
    def baseline(self) -> dict[str, Any]:
        """Scores of the untuned base on the same eval set: eval_loss (nats per token), mean_token_accuracy, ...

        Empty until measured.
        """
        return self.state().baseline

    @property
    def best(self) -> TrialRecord | None:
        """The winner among the trials that completed their budget; `.report` is the evaluation it wins by.

        That may be an earlier one than its last, and `.adapter_path` is the adapter as it was scored there.
        """
        state, records = self._stands()
        found = best_trial(records, self.spec.objective, state.tokens_per_trial)
        return found[0] if found else None

    def records(self) -> list[TrialRecord]:
        """Every trial, in order of number; none is RUNNING where no driver is at work."""
        return self._stands()[1]

    def _stands(self) -> tuple[SweepStatus, list[TrialRecord]]:
        """The state, and the trials as it shows them."""
        state = self.state()
        return state, as_seen(self.store.trials(), state.status)

    def trial(self, number: int) -> TrialRecord:
        """One trial, as in `records`. Raises `NotFoundError`."""
        return as_seen([self.store.record(number)], self.status)[0]

    def select(self, where: str | None = None, sort: str | None = None, top: int | None = None) -> list[TrialRecord]:
        """Trials, best first, filtered by `where` such as `lora.r>=16 and outcome==COMPLETED`; see `query.select`."""
        return query.select(self.records(), self.spec, where, sort, top)

    def trials(self, where: str | None = None, sort: str | None = None, top: int | None = None) -> pd.DataFrame:
        """One row a trial, best first: outcome, scores, tokens, times, and a column for each searched key."""
        return query.trials_frame(self.select(where, sort, top))

    def reports(self) -> pd.DataFrame:
        """One row an evaluation: trial, outcome, tokens, step, train_loss, eval_loss, ..., adapter_path."""
        return query.reports_frame(self.records())

    def importances(self) -> dict[str, float]:
        """Share of the score's variation that each searched key explains; empty with under two completed trials."""
        return query.importances(self.store.study)[0]

    def results(self, where: str | None = None, sort: str | None = None, top: int | None = None) -> dict[str, Any]:
        """The document that `tuner results NAME --json` prints; `tuner.results.query.document` defines it."""
        state, records = self._stands()
        return query.document(self.spec, state, records, query.select(records, self.spec, where, sort, top))

    def report(self) -> str:
        """The whole sweep as a Markdown page."""
        from tuner.results.report import markdown_report

        return markdown_report(self.spec, *self._stands(), *query.importances(self.store.study))

    def summary(self) -> dict[str, Any]:
        """One row of `tuner.sweeps()`, without the name."""
        (state, records), metric = self._stands(), self.spec.objective.metric
        best = best_trial(records, self.spec.objective, state.tokens_per_trial)
        return {
            "status": state.status,
            "trials": sum(record.is_over for record in records),
            "asked": self.spec.budget.trials,
            "best": best[0].number if best else None,
            "score": getattr(best[1], metric) if best else None,
            "baseline": state.baseline.get(metric),
            "metric": metric,
            "created": state.created,
            "elapsed_s": state.elapsed_s,
            "problem": state.message,
        }

    def verify(self, number: int | None = None) -> Comparison:
        """Rerun the best trial, or the one of that number, as a stock SFTTrainer, here, and compare its reports."""
        from tuner.execution.verify import verify_trial

        record = self.best if number is None else self.trial(number)
        if record is None:
            raise NotFoundError(f"sweep {self.name!r} has no best trial: none completed its budget")
        return verify_trial(self.store, record)

    def promote(
        self,
        number: int | None = None,
        alias: str | None = None,
        force: bool = False,
        push_to_hub: str | None = None,
        progress: Callable[[str], None] = lambda step: None,
    ) -> Promotion:
        """Merge, measure again and, if the gate agrees, promote the best trial or the one of that number.

        Raises `PromotionRefused` with the reasons, `NotFoundError` when there is nothing to promote.
        """
        from tuner.execution.promote import promote_trial

        state = self.state()
        if state.status in ACTIVE:
            raise TunerError(f"{self.name!r} is {state.status}: it promotes its best trial itself, or cancel it first")
        record = self.best if number is None else self.trial(number)
        if record is None:
            raise NotFoundError(f"sweep {self.name!r} has no best trial: none completed its budget")
        return promote_trial(self.store, record, alias=alias, force=force, push_to_hub=push_to_hub, progress=progress)

    def cancel(self, number: int | None = None, timeout_s: float = 300) -> None:
        """Have the driver end a running trial or, without a number, itself; cleanly, and wait until it has.

        The trial is STOPPED (`cancelled`) and keeps its reports; another starts in its place. Raises `NotFoundError`,
        and `TunerError` when it does not run, the driver cannot be reached from here, or does not end it in time.
        """
        state = self.state()
        if state.status not in ACTIVE:
            raise TunerError(f"nothing to cancel: {self.name!r} is {state.status}")
        if number is not None:
            record = self.trial(number)
            if record.outcome != "RUNNING":
                raise TunerError(f"nothing to cancel: trial {number} is {record.outcome}")
            self._ask("cancel", number, timeout_s)
            return
        if state.host == socket.gethostname() and state.pid is not None:
            driver = psutil.Process(state.pid)
            driver.send_signal(signal.SIGTERM)  # in a job of Ray's a SIGINT would be blocked
            with suppress(psutil.TimeoutExpired):
                driver.wait(timeout_s)
        else:
            until = time.monotonic() + timeout_s
            self._ask("end", None, timeout_s)
            while self.status in ACTIVE and time.monotonic() < until:
                time.sleep(1)
        if self.status in ACTIVE:
            raise TunerError(f"{self.name!r} is still ending after {timeout_s:.0f} s (pid {state.pid} on {state.host})")
        if (state := self.state()).status == "interrupted":
            self.store.take_over(state)  # so that a driver which only stood still goes on with nothing
            self.store.set_status("cancelled", "by tuner cancel")

    def add(self, point: Mapping[str, Any], timeout_s: float = 60) -> int:
        """Have the running sweep try a point next, keys it lacks suggested by the sampler; return its trial's number.

        It is one of `budget.trials`. Raises `SpecError` for what is not in the space, and `TunerError` when the sweep
        does not run, has no trial left for it, or its driver cannot be reached from here or does not answer in time.
        """
        if problems := check_point(self.spec.space, point):
            raise SpecError(problems, "point")
        number: int = self._ask("add", dict(point), timeout_s)
        return number

    def extend(self, *overrides: str, timeout_s: float = 60) -> None:
        """Give the running sweep more of a budget for all its trials together: `"budget.trials=40"`, `time_limit`, ...

        Raises `SpecError` for any other change, and `TunerError` when the sweep does not run, or its driver cannot be
        reached from here or does not answer in time.
        """
        with_more_budget(self.spec, overrides)  # what is wrong with them needs no driver to say
        self._ask("extend", list(overrides), timeout_s)
        self.store = Store.open(self.folder)

    def _ask(self, kind: Kind, value: Any, timeout_s: float) -> Any:
        """What the driver answers."""
        state, requests = self.state(), self.store.requests
        if state.status not in ACTIVE:
            raise TunerError(
                f"{self.name!r} is {state.status}, so nothing can be asked of it: `tuner resume {self.name}` goes on "
                "with it, with --set budget.trials=N to N trials"
            )
        if requests.of_one_host and state.host != socket.gethostname():
            raise TunerError(f"{self.name!r} runs on {state.host} (pid {state.pid}): say it there, or with --address")
        return requests.wait(requests.ask(kind, value), lambda: self.status in ACTIVE, timeout_s)
