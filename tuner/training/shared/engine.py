"""The engine: holds the base once, and trains every slot that has been asked to advance, all of them in one batch.

Continuous batching, for training. One turn of the engine's loop is the whole story: a micro-batch of every slot goes
through the base together; each slot takes its optimizer step when its last micro-batch is done; slots that have come to
a milestone are scored together. Slots that are being built or wait for a decision are not in the turn, and nobody waits
for an adapter to be written.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import load_from_disk

from tuner.errors import is_out_of_memory
from tuner.spec.layout import Root
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report, TrialConfig
from tuner.training.baseline import Preparation
from tuner.training.evaluation import Score
from tuner.training.shared.joint import Document, JointModel, MicroBatch, share_weights
from tuner.training.shared.slot import Slot
from tuner.training.trial import plan_trial, refuse_divergence

T = TypeVar("T")

EVAL_TOKENS = 2048
"""Most tokens of a joint evaluation batch, over all slots that are scored together."""


class Tenancy:
    """A trial's stay on the engine: what it has been asked for, and what has come of it."""

    def __init__(self, config: TrialConfig):
        self.number = config["number"]
        self.slot: Slot | None = None
        """None until it is built."""
        self.until = 0
        """Token count that the trial may train up to."""
        self.reports: list[Report] = []
        self.error: Exception | None = None
        self.wanted = True
        self.work: list[Future[None]] = []
        """Its building and savings, in threads of their own."""

    def report_at(self, milestone: int) -> Report | None:
        return next((report for report in self.reports if report.tokens >= milestone), None)

    @property
    def may_train(self) -> bool:
        if self.slot is None or self.error is not None:
            return False
        return self.slot.report is None or self.slot.report.tokens < self.until


class Engine:
    """One base on one device. Every public method may be called from any thread; `advance` and `detach` wait."""

    def __init__(self, spec: SweepSpec, base: Any, sweep: Preparation, eval_rows: Path):
        self._spec = spec
        self._sweep = sweep
        self._folder = Root(Path(spec.storage.root)).sweep(spec.name)
        self.base = base
        self.joint = JointModel(base, activation_checkpointing=spec.train.get("gradient_checkpointing", True))
        self._eval_documents = _documents(eval_rows)
        self._tenancies: dict[int, Tenancy] = {}
        self._most_together = 2**31
        """Slots that one joint step has memory for, as far as is known."""
        self._changed = threading.Condition()
        """Guards the tenancies; notified when one of them may have something to do or to say."""
        self._errands: list[tuple[Future[Any], Callable[[], Any]]] = []
        """What is to be done between two turns."""
        self._builder = ThreadPoolExecutor(1, "builder")  # one: a trainer seeds the process, then draws its adapter
        self._writer = ThreadPoolExecutor(1, "writer")
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    # What a trial's coordinator calls

    def attach(self, config: TrialConfig) -> None:
        """Give a trial a slot, which is built in the background. A trial that left a state goes on from there."""
        tenancy = Tenancy(config)
        with self._changed:
            self._tenancies[tenancy.number] = tenancy
        tenancy.work.append(self._builder.submit(self._build, tenancy, config))

    def advance(self, number: int, milestone: int) -> Report:
        """Let a trial train up to a milestone; returns its report there. Raises what ended the trial before."""
        tenancy = self._tenancies[number]
        with self._changed:
            tenancy.until = max(tenancy.until, milestone)
            self._changed.notify_all()
            self._changed.wait_for(lambda: tenancy.report_at(milestone) or tenancy.error)
            report = tenancy.report_at(milestone)
        if report is None:
            assert tenancy.error is not None
            raise tenancy.error
        return report

    def detach(self, number: int) -> None:
        """End a trial, whatever it is doing, and free its slot; afterwards nothing of it is written any more."""
        with self._changed:
            tenancy = self._tenancies.pop(number, None)
        if tenancy is None:
            return
        tenancy.wanted = False
        for work in tenancy.work:
            work.result()
        if tenancy.slot is not None:
            self.between_turns(tenancy.slot.leave)
        self._folder.trial_state(number).unlink(missing_ok=True)

    def score_base(self) -> Score:
        """The base without any adapter, on the sweep's evaluation set."""
        return self.between_turns(lambda: self._score([lambda documents: MicroBatch(None, documents)])[0])

    def between_turns(self, call: Callable[[], T]) -> T:
        """Run something in the engine's thread, when nothing else uses the joint model, and return its result."""
        errand: Future[T] = Future()
        with self._changed:
            self._errands.append((errand, call))
            self._changed.notify_all()
        return errand.result()

    def close(self) -> None:
        """Detach every slot and end the engine's threads."""
        for number in list(self._tenancies):
            self.detach(number)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._builder.shutdown()
        self._writer.shutdown()

    # In the engine's thread

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._errands or self._training())
                if self._closed:
                    return
                errands, self._errands = self._errands, []
            for errand, call in errands:
                try:
                    errand.set_result(call())
                except Exception as error:
                    errand.set_exception(error)
            self._turn(self._training())

    def _training(self) -> list[Tenancy]:
        return [tenancy for tenancy in list(self._tenancies.values()) if tenancy.may_train]

    def _turn(self, tenancies: list[Tenancy]) -> None:
        """One micro-batch of every slot, then the scores of those that have come to a milestone."""
        for start in range(0, len(tenancies), self._most_together):
            self._learn(tenancies[start : start + self._most_together])
        due = [tenancy for tenancy in tenancies if tenancy.may_train and _slot(tenancy).at_milestone]
        if due:
            scores = self._score([_slot(tenancy).to_score for tenancy in due])
            for tenancy, score in zip(due, scores, strict=True):
                with self._alone(tenancy):
                    self._report(tenancy, score)

    def _learn(self, tenancies: list[Tenancy]) -> None:
        """One joint step. What fails together is tried apart, from the beginning of each slot's optimizer step."""
        try:
            losses = self.joint.step([_slot(tenancy).next_batch() for tenancy in tenancies])
        except Exception as error:
            if len(tenancies) == 1:
                self._end(tenancies[0], error)
                return
            half = len(tenancies) // 2
            if is_out_of_memory(error):
                self._most_together = half
            for tenancy in tenancies:
                _slot(tenancy).restart_step()
            self._learn(tenancies[:half])
            self._learn(tenancies[half:])
            return
        for tenancy, loss in zip(tenancies, losses, strict=True):
            with self._alone(tenancy):
                _slot(tenancy).learn(loss)

    def _score(self, to_score: list[Callable[[list[Document]], MicroBatch]]) -> list[Score]:
        """The scores of several slots on the sweep's evaluation set, a few documents of each at a time."""
        sums: list[tuple[float, int, int]] = [(0.0, 0, 0)] * len(to_score)
        for documents in _joint_batches(self._eval_documents, EVAL_TOKENS // len(to_score)):
            parts = self.joint.score([micro_batch(documents) for micro_batch in to_score])
            sums = [(a + x, b + y, c + z) for (a, b, c), (x, y, z) in zip(sums, parts, strict=True)]
        return [Score(*parts) for parts in sums]

    def _report(self, tenancy: Tenancy, score: Score) -> None:
        slot = _slot(tenancy)
        report = slot.scored(score)
        refuse_divergence(report)
        report = replace(report, adapter_path=str(self._folder.adapter(tenancy.number, report.tokens)))
        tenancy.work.append(self._writer.submit(self._save, tenancy, report, slot.snapshot(report)))

    # In threads of their own

    def _build(self, tenancy: Tenancy, config: TrialConfig) -> None:
        if not tenancy.wanted:
            return
        with self._alone(tenancy), tempfile.TemporaryDirectory() as output_dir:
            trial = plan_trial(self._spec, config, self._sweep, share_weights(self.base), Path(output_dir))
            slot = self.between_turns(lambda: Slot(trial, self.joint, self._folder.trial_state(tenancy.number)))
            with self._changed:
                tenancy.reports = [slot.report] if slot.report else []
                tenancy.slot = slot
                self._changed.notify_all()

    def _save(self, tenancy: Tenancy, report: Report, write: Callable[[Path, Path], None]) -> None:
        """Write what was scored. Only then is it reported: whoever hears of an adapter finds it."""
        with self._alone(tenancy):
            write(self._folder.adapter(tenancy.number, report.tokens), self._folder.trial_state(tenancy.number))
            with self._changed:
                tenancy.reports.append(report)
                self._changed.notify_all()

    @contextmanager
    def _alone(self, tenancy: Tenancy) -> Iterator[None]:
        """Whatever fails in this block ends this tenancy, and no other."""
        try:
            yield
        except Exception as error:
            self._end(tenancy, error)

    def _end(self, tenancy: Tenancy, error: Exception) -> None:
        with self._changed:
            tenancy.error = error
            self._changed.notify_all()


def _slot(tenancy: Tenancy) -> Slot:
    assert tenancy.slot is not None
    return tenancy.slot


def _documents(eval_rows: Path) -> list[Document]:
    """The evaluation set, longest first, so that documents of one batch are about equally long."""
    rows = load_from_disk(str(eval_rows))
    documents = [Document(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in rows]
    return sorted(documents, key=lambda document: len(document.input_ids), reverse=True)


def _joint_batches(documents: list[Document], tokens: int) -> list[list[Document]]:
    """Consecutive documents of at most so many tokens together, but at least one."""
    batches: list[list[Document]] = []
    room = 0
    for document in documents:
        room -= len(document.input_ids)
        if room < 0:
            batches.append([])
            room = tokens - len(document.input_ids)
        batches[-1].append(document)
    return batches
