"""A slot: one trial on the shared base, stepped from outside.

The trial's own SFTTrainer is built as for a dedicated trial, and then asked for all it would do around the base: its
data order, collator, accumulation, optimizer, schedule, clipping. Only its loop is not run: the engine takes the slot's
next micro-batch, has it computed together with those of others, and tells the slot its loss.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import safe_open, save_file
from torch.optim import SGD, Adagrad, AdamW, RMSprop
from transformers import Trainer

from tuner.errors import NotShareable
from tuner.spec.layout import refuse_full_disk
from tuner.spec.trial import Report
from tuner.training.budget import batches_of_epoch
from tuner.training.evaluation import Score
from tuner.training.shared.joint import Document, JointModel, MicroBatch
from tuner.training.trial import PlannedTrial, Reporter

if TYPE_CHECKING:
    from trl import SFTTrainer

ELEMENTWISE = (AdamW, SGD, Adagrad, RMSprop)
"""Optimizers that treat every number by itself, so that a whole adapter can be one vector to them."""


class Slot:
    """A trial's training between two uses of the base."""

    def __init__(self, trial: PlannedTrial, joint: JointModel, state: Path | None = None):
        """Take a place on the base, and go on from a state that a snapshot wrote, if there is one.

        Raises NotShareable for a trial that is more than LoRA on frozen linear layers, or whose optimizer looks at
        more than one number at a time.
        """
        self._trainer = trainer = trial.trainer
        self._plan = trial.plan
        tree: Any = trainer.model
        optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(trainer.args, tree)
        if optimizer not in ELEMENTWISE:
            raise NotShareable(f"train.optim {trainer.args.optim}: the optimizer is not elementwise")
        self._adapter = joint.attach(tree.get_base_model())
        weights = {"params": [self._adapter.weights], "weight_decay": trainer.args.weight_decay}
        self._optimizer = optimizer([weights], **settings)
        self._schedule = trainer.create_scheduler(trial.plan.max_steps, self._optimizer)
        self.step = 0
        """Optimizer steps taken."""
        self.report: Report | None = None
        """The newest."""
        if state is not None and state.exists():
            try:  # a border: somebody else's hand or a disk may have been at it since
                self._restore(state)
            except SafetensorError as damage:
                print(f"{state} is damaged ({damage}): the trial begins again", flush=True)
        self._reporter = Reporter(trial.plan, self.report)
        self._epoch = 0.0
        self._loss = 0.0
        self._logged_step = self.step
        self._steps = _steps(trainer, trainer.get_train_dataloader(), self.step)
        self._of_step: list[MicroBatch] = []
        self._learned: list[float] = []
        """Micro-batches of the present optimizer step, and the losses of those that are done."""

    @property
    def at_milestone(self) -> bool:
        """Whether the slot is to be scored now, before it trains on."""
        reported = self.report.step if self.report else 0
        return not self._of_step and self.step in self._plan.evaluations and self.step > reported

    def next_batch(self) -> MicroBatch:
        """The micro-batch to compute next; the same until `learn` is told its loss."""
        if not self._of_step:
            if self._logged_step == self.step:
                self._reporter.training_resumes()
            self._epoch, collated, divisor = next(self._steps)
            self._of_step = [self._micro_batch(inputs, divisor, number) for number, inputs in enumerate(collated)]
        return self._of_step[len(self._learned)]

    def learn(self, loss: float) -> None:
        """The micro-batch was computed and its gradients are there; takes an optimizer step when it was the last."""
        self._learned.append(loss)
        if len(self._learned) == len(self._of_step):
            self._loss += sum(self._learned)
            self._take_step()
            self._of_step, self._learned = [], []

    def restart_step(self) -> None:
        """Forget what the present optimizer step has computed: a joint step broke off with gradients half added."""
        self._adapter.grad.zero_()
        self._learned = []

    def _take_step(self) -> None:
        weights, limit = self._adapter.weights, self._trainer.args.max_grad_norm
        weights.grad = self._adapter.grad
        self._grad_norm = torch.nn.utils.clip_grad_norm_([weights], limit if limit > 0 else math.inf)
        self._optimizer.step()
        self._learning_rate = self._schedule.get_last_lr()[0]
        self._schedule.step()
        weights.grad.zero_()
        self._adapter.use_weights()
        self.step += 1
        if self.step in self._plan.evaluations:
            self._reporter.training_paused()

    def scored(self, score: Score) -> Report:
        """The report of the milestone that was reached."""
        train_loss = self._loss / (self.step - self._logged_step)
        self.report = self._reporter.report(
            self.step, self._epoch, train_loss, float(self._learning_rate), float(self._grad_norm), score
        )
        self._loss, self._logged_step = 0.0, self.step
        return self.report

    def to_score(self, documents: list[Document]) -> MicroBatch:
        return MicroBatch(self._adapter, documents)

    def leave(self) -> None:
        """Give up the place on the base."""
        self._adapter.free()

    def _micro_batch(self, inputs: dict[str, Any], divisor: float, number: int) -> MicroBatch:
        args = self._trainer.args
        noise = 0.0
        if args.neftune_noise_alpha:
            tree: Any = self._trainer.model
            width = tree.get_input_embeddings().weight.shape[1]
            noise = args.neftune_noise_alpha / math.sqrt(inputs["input_ids"].shape[1] * width)
        micro_step = self.step * args.gradient_accumulation_steps + number
        seed = args.seed * 1_000_003 + micro_step * 1009  # layers add their number
        return MicroBatch(self._adapter, to_documents(inputs), divisor, noise, seed)

    def snapshot(self, report: Report) -> Callable[[Path, Path], None]:
        """A copy of what it takes to go on from this report, as a function that writes it: (adapter folder, state)."""
        state = self._optimizer.state[self._adapter.weights]
        tensors = {f"optimizer.{name}": value.clone() for name, value in state.items() if torch.is_tensor(value)}
        tensors["weights"] = self._adapter.weights.detach().clone()
        tree: Any = self._trainer.model

        def write(folder: Path, state: Path) -> None:
            refuse_full_disk(folder, sum(one.nbytes for one in tensors.values()) + tensors["weights"].nbytes)
            self._adapter.write_back(tensors["weights"])
            tree.save_pretrained(folder)
            new = state.with_suffix(".new")
            save_file(tensors, new, {"report": json.dumps(report.as_dict())})
            new.replace(state)

        return write

    def _restore(self, file: Path) -> None:
        weights = self._adapter.weights
        with safe_open(file, "pt", device=str(weights.device)) as state:
            names = [name for name in state.keys() if name.startswith("optimizer.")]  # noqa: SIM118
            known = {name.removeprefix("optimizer."): state.get_tensor(name) for name in names}
            with torch.no_grad():
                weights.copy_(state.get_tensor("weights"))
            self._optimizer.state[weights] = known
            self.report = Report.from_dict(json.loads(state.metadata()["report"]))
        self._adapter.use_weights()
        self.step = self.report.step
        for _ in range(self.step):
            self._schedule.step()


def _steps(trainer: SFTTrainer, loader: Any, skip: int) -> Iterator[tuple[float, list[dict[str, Any]], float]]:
    """Optimizer steps, but the first so many: the epoch when one is done, its collated micro-batches, their divisor."""
    accumulation = trainer.args.gradient_accumulation_steps
    for epoch in count():
        batches = list(batches_of_epoch(loader, epoch))
        for start in range(0, len(batches), accumulation):
            if skip > 0:
                skip -= 1
                continue
            of_step = batches[start : start + accumulation]
            collated = (loader.collate_fn(loader.dataset.__getitems__(rows)) for rows in of_step)
            inputs, targets = trainer.get_batch_samples(collated, len(of_step), trainer.args.device)
            if targets is None:
                raise NotShareable("its trainer averages over micro-batches, not over tokens")
            yield epoch + (start + len(of_step)) / len(batches), inputs, max(float(targets), 1.0)


def to_documents(inputs: dict[str, torch.Tensor]) -> list[Document]:
    """Take a collated micro-batch apart: padded rows lose their padding, flat ones split where positions restart."""
    if "attention_mask" in inputs:
        lengths = inputs["attention_mask"].sum(1).tolist()
        rows = zip(inputs["input_ids"], inputs["labels"], lengths, strict=True)
        return [Document(ids[:length], labels[:length]) for ids, labels, length in rows]
    starts = (inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    lengths = [stop - start for start, stop in zip(starts, [*starts[1:], inputs["input_ids"].shape[1]], strict=True)]
    split = zip(inputs["input_ids"][0].split(lengths), inputs["labels"][0].split(lengths), strict=True)
    return [Document(ids, labels) for ids, labels in split]
