"""A sweep from its spec to its promoted model: prepare, search, compare, promote; the store says where it stands."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from tuner.errors import DiskFullError, PromotionRefused, Superseded, TunerError, is_full_disk
from tuner.execution.engine import Engines, start_engines
from tuner.execution.events import BEGUN, Display, Silent
from tuner.execution.folder import watched_folder
from tuner.execution.head import watched_head
from tuner.execution.logs import library_output_to
from tuner.execution.machine import Placement, live_nodes, others_use_it, place, ray_cluster
from tuner.execution.nodes import refuse_what_a_node_lacks
from tuner.execution.preparation import prepare_on_ray
from tuner.execution.promote import promote_trial
from tuner.execution.search import search
from tuner.execution.waiting import Waiting
from tuner.results.ranking import best_trial
from tuner.results.record import SweepStatus, TrialRecord
from tuner.results.store import Store
from tuner.search.study import remaining_trials
from tuner.spec.changes import with_more_budget
from tuner.spec.checks.unread import without_effect
from tuner.spec.layout import SweepFolder
from tuner.spec.sweep import SweepSpec
from tuner.training.identity import with_commit

HEARTBEAT_S = 15.0


def run_sweep(spec: SweepSpec, display: Display | None = None, log_output: bool = False) -> Store:
    """Run a new sweep to its end. Returns its store; see `_driving` for what is raised.

    With `log_output`, everything the libraries print goes to the sweep's log meanwhile.
    """
    Store.refuse_existing(spec)
    spec = with_commit(spec)
    display = display or Silent()
    for sentence in without_effect(spec):
        display.stage(sentence)
    display.stage("Starting Ray")
    with ray_cluster(dashboard=spec.resources.on_ray_train) as nodes:
        placement = place(spec, nodes, fixed=not others_use_it())
        refuse_what_a_node_lacks(spec)
        with start_engines(spec, placement) as engines:  # first, because it imports for seconds
            store = Store.create(spec)
            with watched_folder(store.folder), _driving(store, display, log_output):
                over = _search(store, engines, placement, display)
                _conclude(store, display, over)
    return store


def resume_sweep(
    folder: SweepFolder, overrides: Sequence[str] = (), display: Display | None = None, log_output: bool = False
) -> Store:
    """Go on with a sweep that was cut off: finished trials stay, unfinished ones run again under their numbers.

    The overrides may give it more of its budget, such as `budget.trials=N`, when it is finished as well.
    """
    store = Store.open(folder)
    seen, spec = store.status(), with_more_budget(store.spec, overrides)
    if seen.status == "finished" and spec == store.spec:
        raise TunerError(
            f"sweep {folder.name!r} is finished: nothing to resume; it takes more of its budget, --set budget.trials=N"
        )
    store.refuse_driven(seen)
    display = display or Silent()
    if remaining_trials(spec, store.study) <= 0:
        with _taken_over(store, seen, spec), watched_folder(store.folder), _driving(store, display, log_output):
            _conclude(store, display)
        return store
    display.stage("Starting Ray")
    with ray_cluster(dashboard=spec.resources.on_ray_train) as nodes:
        placement = place(spec, nodes, fixed=not others_use_it())
        refuse_what_a_node_lacks(spec)
        prepared = _known_facts(store) is not None
        with (
            start_engines(spec, placement, prepared) as engines,
            _taken_over(store, seen, spec),
            watched_folder(store.folder),
            _driving(store, display, log_output),
        ):
            over = _search(store, engines, placement, display)
            _conclude(store, display, over)
    return store


@contextmanager
def _taken_over(store: Store, seen: SweepStatus, spec: SweepSpec) -> Iterator[None]:
    """Be the driver from here on, with this spec. What is refused before the search goes on leaves all as it was."""
    before = store.spec
    store.take_over(seen)
    if spec != before:
        store.set_spec(spec)
    try:
        yield
    except TunerError:
        if store.status().status == "failed" and not store.has_run:
            store.give_back(seen, before)
        raise


@contextmanager
def _driving(store: Store, display: Display, log_output: bool) -> Iterator[None]:
    """Be the driver of the sweep for this block, and record how it ended if it did not end well.

    Raises what made it impossible to go on, and KeyboardInterrupt when it was interrupted, by Ctrl-C or a SIGTERM; the
    store says so either way, and `tuner resume` continues.
    """
    display.stage(f"{BEGUN}{store.spec.storage.root}")
    try:
        output = library_output_to(store.folder.log) if log_output else nullcontext()
        with _terminable(), _heartbeat(store), watched_head(store, display), output:
            yield
    except KeyboardInterrupt:
        store.set_status("interrupted")
        raise
    except Superseded:
        raise
    except Exception as error:
        if not is_full_disk(error):
            store.set_status("failed", str(error).splitlines()[0] if str(error) else type(error).__name__)
            raise
        name, root = store.spec.name, store.spec.storage.root
        said = f"the disk of {root} is full: make space, then `tuner resume {name} --root {root}` goes on"
        with suppress(Exception):  # there may be no room to record even that
            store.set_status("failed", said)
        raise DiskFullError(said) from error
    finally:
        if log_output:
            store.folder.root.keep(store.folder.log, stays=True)


def _search(store: Store, engines: Engines, placement: Placement, display: Display) -> str | None:
    """Prepare and run the trials, on a cluster that is up; what `search` returns."""
    store.set_status("preparing")
    facts = prepare_on_ray(engines, _known_facts(store), display, Waiting(store, placement, display))
    strategy = engines.strategy() if store.spec.resources.on_ray_train else None
    room = engines.room(facts, placement.beside(live_nodes()))
    if strategy and not facts["baseline"]:
        from tuner.execution.trial import job_of_workers, score_base_on_workers  # Ray Train takes long to import

        engines.close()  # what it holds of the cluster is the workers' now
        display.stage("Measuring the base")
        job = job_of_workers(store.spec, facts, placement, strategy["name"])
        facts = {**facts, "baseline": score_base_on_workers(job)}
    store.set_prepared(facts["tokens_per_trial"], facts["data"], facts["baseline"])
    display.prepared(facts["data"], facts["baseline"], facts["tokens_per_trial"])
    store.set_status("running")
    return search(store, facts, engines, placement, display, strategy, room)


def _known_facts(store: Store) -> dict[str, Any] | None:
    """What an earlier preparation of this sweep found."""
    status = store.status()
    if status.tokens_per_trial is None:
        return None
    return {"tokens_per_trial": status.tokens_per_trial, "data": status.data, "baseline": status.baseline}


def _conclude(store: Store, display: Display, over: str | None = None) -> None:
    """Choose the best of the trials that are over and promote it. Without any that completed, the sweep is `failed`.

    `over` is why there were no more trials, where that is not the budget.
    """
    store.set_status("running")
    records = store.trials()
    found = best_trial(records, store.spec.objective, store.status().tokens_per_trial)
    winner = found[0] if found else None
    display.sweep_finished(records, winner)
    if winner is None:
        store.set_status("failed", "no trial completed its budget" + (f": {over}" if over else ""))
        return
    promoted = store.status().promoted or {}
    if store.spec.promotion is not None and (promoted.get("trial"), "version" in promoted) != (winner.number, True):
        display.stage(f"Promoting trial {winner.number}")
        _promote(store, winner, display)
    store.set_status("finished", over)


def _promote(store: Store, record: TrialRecord, display: Display) -> None:
    """Promote the winner if the gate agrees; a refusal is a result of the sweep, not its failure.

    So is a promotion that could not be finished: the trials are over, and `tuner promote` tries it again.
    """
    try:
        promote_trial(store, record, progress=display.stage)
    except PromotionRefused as refusal:
        reasons = refusal.reasons
    except (DiskFullError, Superseded):
        raise
    except Exception as error:  # a border: whatever a promotion dies of, the search it follows has its result
        if is_full_disk(error):
            raise
        if not isinstance(error, TunerError):
            traceback.print_exc()
        again = f"tuner promote {store.spec.name} {record.number} --root {store.spec.storage.root}"
        reasons = [f"the promotion failed: {_in_short(error)}", f"`{again}` tries it again"]
    else:
        return
    store.set_promoted({"refused": reasons, "trial": record.number})
    display.stage(str(PromotionRefused(reasons)))


def _in_short(error: Exception) -> str:
    """The first line of what an error says, and the last, where a process's own error stands."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1].strip()}"


@contextmanager
def _terminable() -> Iterator[None]:
    """A SIGTERM is a Ctrl-C: so `ray job stop`, `kill` and batch systems end what runs. Ray would exit at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _heartbeat(store: Store) -> Iterator[None]:
    """Show readers, from a thread of its own, that this driver is alive; and end it if one on another host asks so."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT_S):
            try:
                store.heartbeat()
                for request in store.requests.take("end"):
                    os.kill(os.getpid(), signal.SIGTERM)
                    store.requests.answer(request.id)
            except Superseded:
                os.kill(os.getpid(), signal.SIGTERM)  # the main thread then finds it, too, and says so
                return
            except Exception:  # the next may pass; where none does, readers rightly take this driver for dead
                continue

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
