"""The engine: holds the base once and gives trials slots on it. What trains them are its lanes."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk

from tuner.errors import TunerError
from tuner.spec.fields import checkpoints_activations
from tuner.spec.layout import SweepFolder
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report, TrialConfig
from tuner.training.baseline import Preparation
from tuner.training.evaluation import Score
from tuner.training.shared.joint import Document, JointModel, MicroBatch, share_weights
from tuner.training.shared.lane import Lane, Tenancy
from tuner.training.shared.slot import Slot
from tuner.training.trial import plan_trial, sft_config
from tuner.training.watchdog import Watch


class Engine:
    """One base on one device. Every method may be called from any thread; `advance` and `detach` wait."""

    def __init__(
        self,
        spec: SweepSpec,
        base: Any,
        sweep: Preparation,
        eval_rows: Path,
        lanes: int = 1,
        last_words: Callable[[list[int], str], None] = lambda numbers, reason: None,
    ):
        """`last_words` is called when the process is about to end, because it is stuck in these trials, and why."""
        self._spec = spec
        self._sweep = sweep
        self._folder = SweepFolder.of(spec)
        self.base = base
        self._eval_documents = _documents(eval_rows)
        self._last_words = last_words
        self.threads = torch.get_num_threads()
        self.lanes: list[Lane] = []
        self.use_lanes(lanes)
        self._tenancies: dict[int, Tenancy] = {}
        self._work: dict[int, list[Future[None]]] = {}
        """Of each trial, its building and its savings, in threads of their own."""
        self._arriving = threading.Lock()
        self._builder = ThreadPoolExecutor(1, "builder")  # one: a trainer seeds the process, then draws its adapter
        self._writer = ThreadPoolExecutor(1, "writer")
        self._building = self._watch(lambda: self._at_work(slice(0, 1)))
        self._writing = self._watch(lambda: self._at_work(slice(1, None)))

    def use_lanes(self, count: int) -> None:
        """Divide the threads among so many lanes. No trial may be there."""
        for lane in self.lanes:
            lane.close()
        checkpointing = checkpoints_activations(self._spec.train)
        threads = max(1, self.threads // count)
        self.lanes = [
            Lane(
                JointModel(self.base, checkpointing),
                self._eval_documents,
                self._save,
                threads,
                self._watch,
                self._spec.train.get("per_device_eval_batch_size"),
            )
            for _ in range(count)
        ]

    def _watch(self, trials: Callable[[], list[int]]) -> Watch:
        """What ends this process when a thread is stuck; `trials` tells in which."""
        return Watch(self._spec.resources.stuck_after, lambda reason: self._last_words(trials(), reason))

    def _at_work(self, part: slice) -> list[int]:
        """The trials of which something is done just now, in this part of their work."""
        return [number for number, work in list(self._work.items()) if any(one.running() for one in work[part])]

    def attach(self, config: TrialConfig) -> None:
        """Give a trial a slot, which is built in the background. A trial that left a state goes on from there."""
        number = config["number"]
        with self._arriving:
            lane = min(self.lanes, key=lambda lane: len(lane.tenancies))
            tenancy = self._tenancies[number] = Tenancy(number, lane)
            lane.tenancies = [*lane.tenancies, tenancy]
        self._work[number] = [self._builder.submit(self._build, tenancy, config)]

    def advance(self, number: int, milestone: int) -> Report:
        """Let a trial train up to a milestone; returns its report there. Raises what ended the trial before."""
        tenancy = self._tenancies[number]
        changed = tenancy.lane.changed
        with changed:
            tenancy.until = max(tenancy.until, milestone)
            changed.notify_all()
            changed.wait_for(lambda: tenancy.report_at(milestone) or tenancy.error)
            report = tenancy.report_at(milestone)
        if report is None:
            assert tenancy.error is not None
            raise tenancy.error
        return report

    def detach(self, number: int) -> None:
        """End a trial, whatever it is doing, and free its slot; afterwards nothing of it is written any more."""
        tenancy = self._tenancies.pop(number, None)
        if tenancy is None:
            return
        tenancy.wanted = False
        building = self._work[number][0]
        building.result()
        tenancy.lane.between_turns(tenancy.leave)  # no turn has it any more, and none will save it again
        for work in self._work.pop(number):
            work.result()
        tenancy.ended(TunerError(f"trial {number} is detached"))  # for who still waits in `advance`

    def score_base(self) -> Score:
        """The base without any adapter, on the sweep's evaluation set."""
        lane = self.lanes[0]
        return lane.between_turns(lambda: lane.score([lambda documents: MicroBatch(None, documents)])[0])

    def close(self) -> None:
        """Detach every slot and end all threads."""
        for number in list(self._tenancies):
            self.detach(number)
        for lane in self.lanes:
            lane.close()
        self._builder.shutdown()
        self._writer.shutdown()
        self._building.close()
        self._writing.close()

    def _build(self, tenancy: Tenancy, config: TrialConfig) -> None:
        if not tenancy.wanted:
            return
        with self._building.working(), tenancy.ends_alone(), tempfile.TemporaryDirectory() as output_dir:
            args = sft_config(config, Path(output_dir))
            trial = plan_trial(self._spec, config, self._sweep, share_weights(self.base), args)
            lane, state = tenancy.lane, self._folder.trial_state(tenancy.number)
            with suppress(FileNotFoundError):
                self._folder.root.fetch(state)
            slot = lane.between_turns(lambda: Slot(trial, lane.joint, state))
            if slot.step:
                print(f"trial {tenancy.number} goes on from its last evaluation", flush=True)
            tenancy.enter(slot)

    def _save(self, tenancy: Tenancy, report: Report) -> None:
        """Have an adapter written. Only then is its report known: whoever hears of an adapter finds it."""
        adapter = self._folder.adapter(tenancy.number, report.tokens)
        report = replace(report, adapter_path=self._folder.root.address(adapter))
        assert tenancy.slot is not None
        write = tenancy.slot.snapshot(report)
        self._work[tenancy.number].append(self._writer.submit(self._write, tenancy, report, write))

    def _write(self, tenancy: Tenancy, report: Report, write: Callable[[Path, Path], None]) -> None:
        with self._writing.working(), tenancy.ends_alone():
            folder = self._folder
            adapter, state = folder.adapter(tenancy.number, report.tokens), folder.trial_state(tenancy.number)
            write(adapter, state)
            folder.root.keep(adapter)
            folder.root.keep(state)
            tenancy.told(report)


def _documents(eval_rows: Path) -> list[Document]:
    """The evaluation set, longest first, so that documents of one batch are about equally long."""
    rows = load_from_disk(str(eval_rows))
    documents = [Document(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in rows]
    return sorted(documents, key=lambda document: len(document.input_ids), reverse=True)
