"""The one way anything is scored: trials, the untuned base, the merged model.

Sums over a fixed, unpacked set of rows, divided once at the end, so that a score does not depend on the trial's
packing, the evaluation batch size, the padding or the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from trl.trainer.utils import add_fused_lm_head

from tuner.errors import TunerError
from tuner.training.watchdog import unwatched

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedModel

IGNORED = -100


@dataclass(frozen=True)
class Score:
    """Sums over the evaluation set, of all ranks."""

    nll_sum: float
    """Negative log-likelihood of every target token, summed (nats)."""
    correct: int
    """Target tokens that were the most likely next token."""
    tokens: int
    """Target tokens."""

    @property
    def eval_loss(self) -> float:
        """Mean negative log-likelihood per target token (nats); NaN without target tokens."""
        return self.nll_sum / self.tokens if self.tokens else math.nan

    @property
    def mean_token_accuracy(self) -> float:
        return self.correct / self.tokens if self.tokens else math.nan

    def as_dict(self) -> dict[str, float | int]:
        return {"eval_loss": self.eval_loss, "mean_token_accuracy": self.mean_token_accuracy, "tokens": self.tokens}


def score(
    model: nn.Module,
    rows: Dataset,
    batch_size: int = 8,
    device: torch.device | None = None,
    moved: Callable[[], None] = unwatched,
) -> Score:
    """Score a causal language model, or a PEFT model over one, on rows of `input_ids` and `labels`.

    Rows are sorted by length so that little is padded. The head is TRL's fused one, which computes log-probabilities in
    tiles: memory does not grow with tokens times vocabulary. In a distributed run every rank scores its share of the
    batches (empty ones fill up, so that sharded models stay in step) and all ranks return the same sums. `device` is
    where the model computes, if that is not where its weights are; `moved` is called after every batch.
    """
    device = device or next(model.parameters()).device
    dtype = _compute_dtype(model)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), eval_mode(model), _fused_lm_head(model), autocast:
        for batch in _batches(rows, batch_size):
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            output = model(**inputs, fused_lm_head=True)
            mask = output.label_mask
            sums[0] -= output.log_probs.double()[mask].sum()
            sums[1] += output.is_top1[mask].sum()
            sums[2] += mask.sum()
            moved()
    if _world_size() > 1:
        dist.all_reduce(sums)
    nll_sum, correct, tokens = sums.tolist()
    return Score(nll_sum, int(correct), int(tokens))


def refuse_other_head(model: PreTrainedModel, rows: Dataset) -> None:
    """Raise TunerError where a score is not that of the model's own logits.

    TRL's fused head, which trials are trained and scored with, is one matrix behind the last hidden state. A model may
    have more between them. One row, of at most 64 tokens, is computed both ways.
    """
    ids = min(rows["input_ids"], key=lambda row: abs(len(row) - 64))[:64]
    device, dtype = next(model.parameters()).device, _compute_dtype(model)
    inputs = torch.tensor([ids], device=device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), eval_mode(model), autocast:
        logits = model(input_ids=inputs, use_cache=False).logits[0, :-1].float()
        with _fused_lm_head(model):
            fused = model(input_ids=inputs, labels=inputs, fused_lm_head=True).log_probs.double().sum().item()
    plain = logits.log_softmax(-1).gather(1, inputs[0, 1:, None]).double().sum().item()
    if math.isnan(fused) and math.isnan(plain):
        return  # both ways agree; its score says what it is
    by_head, by_logits = (-sum_ / max(len(ids) - 1, 1) for sum_ in (fused, plain))
    if not abs(by_head - by_logits) <= (1e-3 if dtype == torch.float32 else 0.1):
        raise TunerError(
            f"model.name: a row of this base has an eval_loss of {by_head:.4f} by its head's weight, with which TRL "
            f"trains and scores, and of {by_logits:.4f} by its own logits: its head is more than one matrix, and no "
            "trial could be right"
        )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a block, except for 4-bit layers, which bitsandbytes repacks for inference on some CPUs.

    There is no way back from that: training on, or merging, would use garbage. They do not care otherwise.
    """
    was_training = model.training
    model.eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.train()
    try:
        yield
    finally:
        model.train(was_training)


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """The base's dtype: adapters are float32 whatever the base is, so the most common one decides."""
    return getattr(model, "dtype", None) or next(model.parameters()).dtype


def _batches(rows: Dataset, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's batches, padded on the right; every rank yields equally many."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rank, world = (dist.get_rank(), dist.get_world_size()) if _world_size() > 1 else (0, 1)
    for turn in range(math.ceil(len(batches) / world)):
        mine = turn * world + rank
        indices = batches[min(mine, len(batches) - 1)]
        yield _collate(rows, indices, counted=mine < len(batches))


def _collate(rows: Dataset, indices: list[int], counted: bool) -> dict[str, torch.Tensor]:
    examples = [rows[index] for index in indices]
    width = max(len(example["input_ids"]) for example in examples)
    batch = {
        "input_ids": torch.zeros(len(examples), width, dtype=torch.long),
        "attention_mask": torch.zeros(len(examples), width, dtype=torch.long),
        "labels": torch.full((len(examples), width), IGNORED),
    }
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        batch["input_ids"][row, :length] = torch.tensor(example["input_ids"])
        batch["attention_mask"][row, :length] = 1
        if counted:
            batch["labels"][row, :length] = torch.tensor(example["labels"])
    return batch


@contextmanager
def _fused_lm_head(model: Any) -> Iterator[None]:
    """Give the model's language-model head a fused form while scoring, and its own back afterwards."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = base.forward
    add_fused_lm_head(base, outputs=("log_probs", "is_top1"))
    try:
        yield
    finally:
        base.forward = forward


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
