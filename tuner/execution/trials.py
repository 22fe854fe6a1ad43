"""The trials of a running sweep: what is asked, reported and ended becomes records."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tuner.execution.alike import Alike
from tuner.execution.endings import tail
from tuner.execution.events import Display
from tuner.execution.halt import Halt
from tuner.execution.impossible import Impossible
from tuner.execution.last_words import in_its_own_words
from tuner.execution.retention import drop_worse_adapters, keep_best_adapters
from tuner.execution.retries import as_changed, failed_attempt, may_pass
from tuner.execution.steering import Steering
from tuner.results.store import Store
from tuner.search.study import Search
from tuner.spec.trial import Ending, Report, TrialConfig


class Trials:
    """What whoever runs trials calls, in the driver's main thread."""

    def __init__(self, store: Store, facts: dict[str, Any], display: Display, impossible: Impossible | None = None):
        self.halt = Halt(store, display)
        store.hold_study()
        budget, baseline = facts["tokens_per_trial"], facts["baseline"]["eval_loss"]
        self._impossible = impossible or Impossible(store.spec)
        self._search = Search(store.spec, store.study, budget, baseline, self._impossible.why, self._pass_over)
        self._steering = Steering(store, self._search, display)
        self._store = store
        self._display = display
        self._running: dict[int, TrialConfig] = {}
        self._again: list[TrialConfig] = []
        """Of those that run, the ones that wait for a place to be tried again in."""
        self._reached: dict[int, int] = {}
        self._over: list[int] = []
        self._failures: dict[int, Ending] = {}
        before = store.trials()
        self._alike = Alike(before)
        self._kept = set(store.with_adapters())
        for record in before:
            if record.is_over and record.cause == "oom":
                self._impossible.ran_out(record.number, record.config)

    @property
    def remaining(self) -> int:
        """How many trials are still to be asked for."""
        return self._search.remaining + len(self._again)

    @property
    def over(self) -> str | None:
        """Why no more are to be asked for, where the budget is not the reason."""
        return self._alike.said or self._search.over

    def ask(self) -> TrialConfig | None:
        """The next trial, which starts now; None when there is none, or none is to start any more."""
        if self.halt.stop_all():
            return None
        again = bool(self._again)
        config = self._again.pop(0) if again else self._search.ask()
        if config is not None:
            number, folder = config["number"], self._store.folder
            config = as_changed(config, self._store.tried(number))
            goes_on = folder.goes_on(number)
            if not goes_on:
                folder.root.forget(folder.trial(number))  # what an earlier attempt left
                self.halt.begins(number)
            folder.root.forget(folder.last_words(number))
            self._store.start_trial(number, config, goes_on)
            reports = [Report.from_dict(row) for row in self._store.reports([number])]
            self._search.recall(number, reports)
            heard = reports if again else reports[:-1]  # of the last, a driver that was killed may not have told Optuna
            self._reached[number] = heard[-1].tokens if heard else 0
            self._running[number] = config
            self._display.trial_started(number, config["point"])
        return config

    def steer(self) -> list[int]:
        """Do what has been asked of the sweep since the last look; returns those in places that are to end now."""
        cancelled = self._steering.look(self._running)
        for config in [config for config in self._again if config["number"] in cancelled]:
            self._again.remove(config)
            self.ended(config["number"])
        return [number for number in cancelled if number in self._running]

    def is_cancelled(self, number: int) -> bool:
        """Whether a running trial is to end, whatever it comes to."""
        return self._steering.is_cancelled(number)

    def reached(self, number: int) -> int:
        """The milestone up to which this process has heard of a running trial."""
        return self._reached[number]

    def reported(self, number: int, report: Report) -> bool:
        """Take one evaluation; return True when the trial should stop now."""
        if report.tokens <= self._reached[number]:
            return False  # from where another attempt goes on
        self._reached[number] = report.tokens
        self._store.add_report(number, report)
        self.halt.spend(number, report)
        drop_worse_adapters(self._store, number)
        self._display.trial_reported(number, report)
        return self._search.report(number, report)

    def failed(self, number: int, ending: Ending) -> None:
        """What a trial says of its own end, which is about to come."""
        self._failures[number] = in_its_own_words(self._store.folder, number, ending)

    def ended(self, number: int) -> None:
        """Take the end of a trial's attempt, however it came: it is recorded, or the trial is tried again."""
        config, failure = self._running.pop(number), self._failures.pop(number, None)
        cut_off = self.halt.interrupted or (self._alike.said and failure is None)
        if cut_off and not self._search.is_decided(number):
            return  # whatever it was: it stays unfinished, for `tuner resume`
        if self.halt.reason and failure is None:
            failure = Ending("STOPPED", self.halt.cause, self.halt.reason)
        ending = self._with_log(number, self._search.ending(number, failure))
        if not self.halt.reason and self._try_again(config, ending):
            return
        self._store.finish_trial(number, ending.outcome, ending.cause, ending.reason, ending.log_tail)
        self._search.tell(number, ending)
        others = [self._reached[one] for one in self._running]
        most = self._store.spec.budget.max_failures
        if said := self._alike.ended(ending, self._reached[number], others, most):
            self.halt.end("failed alike", said)
        if ending.cause == "oom":
            self._impossible.ran_out(number, config)
        folder = self._store.folder
        folder.root.forget(folder.trial_state(number))
        folder.root.forget(folder.trial_checkpoints(number))
        self._over.append(number)
        self._kept = keep_best_adapters(self._store, self._kept | {number})
        self._steering.ended(number)
        self._display.trial_finished(self._store.record(number))

    def _pass_over(self, config: TrialConfig, ending: Ending) -> None:
        """Record a point that is not tried."""
        self._store.pass_over_trial(config["number"], config, ending.cause, ending.reason)
        self._display.trial_finished(self._store.record(config["number"]))

    def _with_log(self, number: int, ending: Ending) -> Ending:
        """The ending of a trial that failed, with the last words of whatever process it was in."""
        if ending.outcome not in ("FAILED", "INFEASIBLE") or ending.log_tail is not None:
            return ending
        folder = self._store.folder
        return replace(ending, log_tail=tail(folder.trial_log(number)) or tail(folder.log))

    def _try_again(self, config: TrialConfig, ending: Ending) -> bool:
        if not may_pass(ending):
            return False
        number = config["number"]
        tried, workers = self._store.tried(number), self._store.spec.resources.workers_per_trial
        reports = self._store.reports([number])
        reached = reports[-1]["tokens"] if reports else 0
        attempt = failed_attempt(config, ending, reached, tried, workers)
        if attempt is None:
            return False
        self._store.set_tried(number, [*tried, attempt])
        self._running[number] = config
        self._again.append(config)
        self._display.stage(f"Trial {number} is tried again after {attempt}")
        return True

    def end_the_rest(self) -> None:
        """Those that were running when all were told to stop, of which nobody has said more."""
        for number in sorted(self._running):
            self.ended(number)
        self._steering.close()
        folder = self._store.folder
        for number in self._over:  # workers under Ray Train live on for some seconds, and may have come to a checkpoint
            folder.root.forget(folder.trial_checkpoints(number))
