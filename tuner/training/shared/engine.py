"""The engine: holds the base once, and steps together every slot that has something to compute.

Continuous batching, for training. Each slot's trainer runs in its own thread until it needs the base; the engine's
thread waits until every slot that is on its way has asked, and answers all of them with one joint forward and backward.
A slot that is being built, waits for a decision or is over is not waited for.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk

from tuner.errors import InfeasibleError
from tuner.spec.layout import Root
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report, TrialConfig
from tuner.training.baseline import Preparation
from tuner.training.evaluation import Score
from tuner.training.shared.joint import Document, JointModel, MicroBatch, share_weights
from tuner.training.shared.slot import SlotTrainer
from tuner.training.trial import planned_trainer

EVAL_TOKENS = 2048
"""Most tokens of a joint evaluation batch, over all slots that are scored together."""


class Detached(BaseException):
    """Raised in a slot's thread to unwind its trainer: the trial is not wanted any more."""


class Slot:
    """One trial on the engine: its thread, and what passes between that thread and the others."""

    def __init__(self, engine: Engine, config: TrialConfig):
        self.number = config["number"]
        self.config = config
        self.until = 0
        """Token count that the trial may train up to; reports beyond it wait."""
        self.reports: list[Report] = []
        self.error: Exception | None = None
        self.over = False
        self.detached = False
        self.asked: MicroBatch | None = None
        """What the slot waits for: a step of this batch, or, when `scoring`, its score."""
        self.scoring = False
        self.answer: Any = None
        self.thread = threading.Thread(target=engine.run_slot, args=(self,), name=f"slot-{self.number}", daemon=True)


class Engine:
    """One base on one device. Every public method may be called from any thread; `advance` and `attach` wait."""

    def __init__(self, spec: SweepSpec, base: Any, sweep: Preparation, eval_rows: Path):
        self._spec = spec
        self.base = base
        self._sweep = sweep
        self.joint = JointModel(base, activation_checkpointing=spec.train.get("gradient_checkpointing", True))
        self._eval_documents = _documents(eval_rows)
        self._slots: dict[int, Slot] = {}
        self._on_the_way: set[int] = set()
        """Slots that will ask for something without anybody's doing: training, between two steps."""
        self._changed = threading.Condition()
        self._building = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    # What a trial's coordinator calls

    def attach(self, config: TrialConfig) -> None:
        """Give a trial a slot. Its trainer is built in the background."""
        slot = Slot(self, config)
        with self._changed:
            self._slots[slot.number] = slot
        slot.thread.start()

    def advance(self, number: int, until_tokens: int) -> Report:
        """Let a trial train up to a milestone; returns its report there. Raises what ended the trial before."""
        slot = self._slots[number]
        with self._changed:
            slot.until = until_tokens
            self._changed.notify_all()
            self._changed.wait_for(lambda: slot.over or (slot.reports and slot.reports[-1].tokens >= until_tokens))
            if slot.error is not None:
                raise slot.error
            return slot.reports[-1]

    def detach(self, number: int) -> None:
        """End a trial, whatever it is doing, and free its slot."""
        slot = self._slots.get(number)
        if slot is None:
            return
        with self._changed:
            slot.detached = True
            self._changed.notify_all()
        slot.thread.join()
        with self._changed:
            del self._slots[number]

    def close(self) -> None:
        """Detach every slot and end the engine's thread."""
        for number in list(self._slots):
            self.detach(number)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    # In a slot's thread

    def run_slot(self, slot: Slot) -> None:
        """The life of a slot: build the trainer, wait to be advanced, train."""
        generator = torch.Generator().manual_seed(slot.config["train"].get("seed", 42))
        output_dir = tempfile.mkdtemp()
        try:
            with self._building:  # a trainer seeds the whole process before it draws its adapter
                trainer = self._build(slot, Path(output_dir))
            tree: Any = trainer.model
            self.joint.attach(slot.number, tree.get_base_model(), generator)
            self._wait_for_permission(slot, 0)
            trainer.train()
        except Detached:
            pass
        except Exception as error:
            slot.error = error
        finally:
            self.joint.detach(slot.number)
            shutil.rmtree(output_dir, ignore_errors=True)
            with self._changed:
                slot.over = True
                self._on_the_way.discard(slot.number)
                self._changed.notify_all()

    def _build(self, slot: Slot, output_dir: Path) -> SlotTrainer:
        folder = Root(Path(self._spec.storage.root)).sweep(self._spec.name)

        def emit(report: Report, save: Callable[[Path], None]) -> None:
            path = folder.adapter(slot.number, report.tokens)
            save(path)
            with self._changed:
                slot.reports.append(Report(**{**report.as_dict(), "adapter_path": str(path)}))
                self._on_the_way.discard(slot.number)
                self._changed.notify_all()
            if report.tokens < self._sweep.tokens_per_trial:
                self._wait_for_permission(slot, report.tokens)

        trainer = planned_trainer(
            self._spec,
            slot.config,
            self._sweep,
            share_weights(self.base),
            output_dir,
            emit,
            trainer_class=SlotTrainer,
            score=lambda model, rows, batch_size: self._ask(slot, MicroBatch(slot.number, (), 1.0), scoring=True),
        )
        assert isinstance(trainer, SlotTrainer)
        trainer.slot = slot.number
        trainer.step_jointly = lambda batch: self._ask(slot, batch)
        return trainer

    def _wait_for_permission(self, slot: Slot, reached: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: slot.detached or slot.until > reached)
            if slot.detached:
                raise Detached
            self._on_the_way.add(slot.number)

    def _ask(self, slot: Slot, batch: MicroBatch, scoring: bool = False) -> Any:
        """Hand something to the engine and wait for the answer."""
        with self._changed:
            slot.asked, slot.scoring, slot.answer = batch, scoring, None
            self._changed.notify_all()
            self._changed.wait_for(lambda: slot.answer is not None or slot.detached)
            if slot.detached:
                slot.asked = None
                raise Detached
            if isinstance(slot.answer, Exception):
                raise slot.answer
            return slot.answer

    # In the engine's thread

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._ready())
                if self._closed:
                    return
                asking = [slot for slot in self._slots.values() if slot.asked is not None]
                # Scores first: a slot that waits for its score waits for a decision after it.
                scoring = [slot for slot in asking if slot.scoring]
                served = scoring or asking
                batches = [slot.asked for slot in served if slot.asked is not None]
            answers = self._score(batches) if scoring else self._step(batches)
            with self._changed:
                for slot, answer in zip(served, answers, strict=True):
                    slot.asked, slot.answer = None, answer
                self._changed.notify_all()

    def _ready(self) -> bool:
        """Whether somebody asks, and nobody else is about to."""
        asking = {slot.number for slot in self._slots.values() if slot.asked is not None and not slot.detached}
        return bool(asking) and self._on_the_way <= asking

    def _step(self, batches: list[MicroBatch]) -> list[float | Exception]:
        """Losses, or for a slot that cannot be computed, the reason; what fails together is tried apart."""
        try:
            return list(self.joint.step(batches))
        except (torch.OutOfMemoryError, MemoryError) as error:
            if len(batches) == 1:
                return [InfeasibleError("oom", f"one micro-batch does not fit beside the base: {error}")]
        except Exception as error:
            if len(batches) == 1:
                return [error]
        half = len(batches) // 2
        return self._step(batches[:half]) + self._step(batches[half:])

    def _score(self, asked: list[MicroBatch]) -> list[Score]:
        """The scores of several slots on the sweep's evaluation set, a few documents of each at a time."""
        sums = {batch.slot: [0.0, 0, 0] for batch in asked}
        for documents in _joint_batches(self._eval_documents, EVAL_TOKENS // len(asked)):
            parts = self.joint.score([MicroBatch(batch.slot, documents, 1.0) for batch in asked])
            for batch, part in zip(asked, parts, strict=True):
                sums[batch.slot] = [total + value for total, value in zip(sums[batch.slot], part, strict=True)]
        return [Score(nll, int(correct), int(tokens)) for nll, correct, tokens in sums.values()]


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
