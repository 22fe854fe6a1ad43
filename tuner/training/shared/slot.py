"""A slot: one trial on the shared base, as a real SFTTrainer that runs in a thread of its own.

The trainer does all it always does: its data order, collator, accumulation, clipping, optimizer, schedule, callbacks.
Only the forward and backward of a micro-batch, and the scoring at a milestone, are asked of the engine, which answers
for all slots at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState, ThreadLocalSharedDict
from trl import SFTTrainer

from tuner.training.shared.joint import Document, MicroBatch

if TYPE_CHECKING:
    from torch import nn

# accelerate keeps its state, such as whether gradients are complete, in dictionaries of the process, and every new
# trainer resets some. Trainers in threads need their own: the same dictionaries accelerate uses for threads on TPUs.
for _state in (PartialState, AcceleratorState, GradientState):
    _state._shared_state = ThreadLocalSharedDict()


class SlotTrainer(SFTTrainer):
    """An SFTTrainer whose micro-batches are computed by the engine, together with those of other slots."""

    slot: int
    step_jointly: Callable[[MicroBatch], float]
    """Adds the micro-batch's gradients to the slot's adapter and returns its loss, when the joint step is done."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        documents = to_documents(inputs)
        divisor = float(num_items_in_batch) if num_items_in_batch is not None else _targets(documents)
        if num_items_in_batch is None:
            divisor *= self.current_gradient_accumulation_steps
        loss = self.step_jointly(MicroBatch(self.slot, documents, max(divisor, 1.0), self._noise(inputs)))
        return torch.tensor(loss, device=self.args.device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # would count all parameters at every step, for a figure nobody reads

    def _noise(self, inputs: dict[str, Any]) -> float:
        """Size of NEFTune's noise, which depends on the shape that the trainer's own batch has."""
        if not self.args.neftune_noise_alpha:
            return 0.0
        model: Any = self.model
        width = model.get_input_embeddings().weight.shape[1]
        return self.args.neftune_noise_alpha / math.sqrt(inputs["input_ids"].shape[1] * width)


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


def _targets(documents: Sequence[Document]) -> float:
    return float(sum(int((document.labels[1:] != -100).sum()) for document in documents))
