"""A lane: a thread that trains the slots which have been asked to advance, all of them in one batch.

Continuous batching, for training. One turn of the lane's loop is the whole story: a micro-batch of every slot goes
through the base together; each slot takes its optimizer step when its last micro-batch is done; slots that have come to
a milestone are scored together. Slots that are being built or wait for a decision are not in the turn, and nobody waits
for an adapter to be written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tuner.errors import is_out_of_memory
from tuner.spec.trial import Report
from tuner.training.evaluation import Score
from tuner.training.shared.joint import Document, JointModel, MicroBatch
from tuner.training.trial import refuse_divergence
from tuner.training.watchdog import Watch

if TYPE_CHECKING:
    from tuner.training.shared.slot import Slot

T = TypeVar("T")

EVAL_TOKENS = 2048
"""Most tokens of a joint evaluation batch, over all slots that are scored together."""


class Tenancy:
    """A trial's stay on a lane: what it has been asked for, and what has come of it. Guarded by `lane.changed`."""

    def __init__(self, number: int, lane: Lane):
        self.number = number
        self.lane = lane
        self.slot: Slot | None = None
        """None until it is built."""
        self.until = 0
        """Token count that the trial may train up to."""
        self.reports: list[Report] = []
        self.error: Exception | None = None
        self.wanted = True

    def report_at(self, milestone: int) -> Report | None:
        return next((report for report in self.reports if report.tokens >= milestone), None)

    @property
    def may_train(self) -> bool:
        if self.slot is None or self.error is not None:
            return False
        return self.slot.report is None or self.slot.report.tokens < self.until

    def enter(self, slot: Slot) -> None:
        """The slot is built; one that goes on has a report already."""
        with self.lane.changed:
            self.slot = slot
            self.reports = [slot.report] if slot.report else []
            self.lane.changed.notify_all()

    def told(self, report: Report) -> None:
        with self.lane.changed:
            self.reports.append(report)
            self.lane.changed.notify_all()

    def ended(self, error: Exception) -> None:
        with self.lane.changed:
            self.error = error
            self.lane.changed.notify_all()

    @contextmanager
    def ends_alone(self) -> Iterator[None]:
        """Whatever fails in this block ends this tenancy, and no other."""
        try:
            yield
        except Exception as error:
            self.ended(error)

    def leave(self) -> None:
        """Give the place up, between two turns."""
        self.lane.tenancies = [other for other in self.lane.tenancies if other is not self]
        if self.slot is not None:
            self.slot.leave()


class Lane:
    """A thread with a joint model of its own. Several share a base: on a CPU, two of one thread can beat one of two."""

    def __init__(
        self,
        joint: JointModel,
        eval_documents: list[Document],
        save: Callable[[Tenancy, Report], None],
        threads: int,
        watch: Callable[[Callable[[], list[int]]], Watch],
        eval_batch_size: int | None = None,
    ):
        """`save` is called with what was scored, and is to report it; `threads` are torch's, for this lane alone.

        `watch` makes what watches the lane, given what tells of which trials it does something. `eval_batch_size` is
        the most documents of each slot in a joint evaluation batch; None: as many as EVAL_TOKENS allows.
        """
        self.joint = joint
        self.tenancies: list[Tenancy] = []
        self._eval_documents = eval_documents
        self._eval_batch_size = eval_batch_size or len(eval_documents)
        self._save = save
        self._most_together = 2**31
        """Slots that one joint step has memory for, as far as is known."""
        self._errands: list[tuple[Future[Any], Callable[[], Any]]] = []
        """What is to be done between two turns."""
        self.changed = threading.Condition()
        """Notified when there is something to do, or to say."""
        self._closed = False
        self._watch = watch(lambda: [tenancy.number for tenancy in self._training()])
        self._thread = threading.Thread(target=self._serve, args=(threads,), name="lane", daemon=True)
        self._thread.start()

    def between_turns(self, call: Callable[[], T]) -> T:
        """Run something in the lane's thread, when nothing else uses its joint model, and return its result."""
        errand: Future[T] = Future()
        with self.changed:
            self._errands.append((errand, call))
            self.changed.notify_all()
        return errand.result()

    def close(self) -> None:
        with self.changed:
            self._closed = True
            self.changed.notify_all()
        self._thread.join()
        self._watch.close()

    def _serve(self, threads: int) -> None:
        torch.set_num_threads(threads)
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._closed or self._errands or self._training())
                if self._closed:
                    return
                errands, self._errands = self._errands, []
            with self._watch.working():
                for errand, call in errands:
                    try:
                        errand.set_result(call())
                    except Exception as error:
                        errand.set_exception(error)
                self._turn(self._training())

    def _training(self) -> list[Tenancy]:
        return [tenancy for tenancy in self.tenancies if tenancy.may_train]

    def _turn(self, tenancies: list[Tenancy]) -> None:
        """One micro-batch of every slot, then the scores of those that have come to a milestone."""
        for start in range(0, len(tenancies), self._most_together):
            self._learn(tenancies[start : start + self._most_together])
        due = [tenancy for tenancy in tenancies if tenancy.may_train and _slot(tenancy).at_milestone]
        if due:
            scores = self.score([_slot(tenancy).to_score for tenancy in due])
            for tenancy, score in zip(due, scores, strict=True):
                with tenancy.ends_alone():
                    report = _slot(tenancy).scored(score)
                    refuse_divergence(report)
                    self._save(tenancy, report)

    def _learn(self, tenancies: list[Tenancy]) -> None:
        """One joint step. What fails together is tried apart, from the beginning of each slot's optimizer step."""
        try:
            losses = self.joint.step([_slot(tenancy).next_batch() for tenancy in tenancies])
        except Exception as error:
            if len(tenancies) == 1:
                tenancies[0].ended(error)
                return
            half = len(tenancies) // 2
            if is_out_of_memory(error):
                self._most_together = half
            for tenancy in tenancies:
                _slot(tenancy).restart_step()
            self._learn(tenancies[:half])
            self._learn(tenancies[half:])
            return
        self._watch.moved()
        for tenancy, loss in zip(tenancies, losses, strict=True):
            with tenancy.ends_alone():
                _slot(tenancy).learn(loss)

    def score(self, to_score: list[Callable[[list[Document]], MicroBatch]]) -> list[Score]:
        """The scores of several slots on the sweep's evaluation set, a few documents of each at a time."""
        sums: list[tuple[float, int, int]] = [(0.0, 0, 0)] * len(to_score)
        tokens = EVAL_TOKENS // len(to_score)
        for documents in _joint_batches(self._eval_documents, tokens, self._eval_batch_size):
            parts = self.joint.score([micro_batch(documents) for micro_batch in to_score])
            self._watch.moved()
            sums = [(a + x, b + y, c + z) for (a, b, c), (x, y, z) in zip(sums, parts, strict=True)]
        return [Score(*parts) for parts in sums]


def _slot(tenancy: Tenancy) -> Slot:
    assert tenancy.slot is not None
    return tenancy.slot


def _joint_batches(documents: list[Document], tokens: int, most: int) -> list[list[Document]]:
    """Consecutive documents, at most `most` and of at most so many tokens together, but at least one."""
    batches: list[list[Document]] = []
    room = 0
    for document in documents:
        room -= len(document.input_ids)
        if room < 0 or len(batches[-1]) == most:
            batches.append([])
            room = tokens - len(document.input_ids)
        batches[-1].append(document)
    return batches
