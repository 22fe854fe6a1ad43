"""How many optimizer steps a token budget is, and at which of them to evaluate.

The batches a trainer will draw are known before it starts: their order is a function of the seed. Walking through that
order once, without touching the data, turns "2,000,000 tokens, 8 evaluations" into a step count that a stock trainer
understands, so that its learning-rate schedule ends exactly where the budget does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tuner.errors import InfeasibleError
from tuner.training.workers import WorkersTrainer

if TYPE_CHECKING:
    from trl import SFTTrainer


@dataclass(frozen=True)
class StepPlan:
    """The whole of a trial's training, in optimizer steps."""

    max_steps: int
    evaluations: dict[int, tuple[int, int]]
    """Step -> (budget milestone, tokens actually trained by then)."""


def plan_steps(trainer: SFTTrainer, milestones: list[int]) -> StepPlan:
    """Find the first step at or past each milestone (token counts, ascending; the last is the budget).

    Raises InfeasibleError when one step trains past two milestones, since such a trial could not be compared, and when
    an epoch has no batch.
    """
    evaluations: dict[int, tuple[int, int]] = {}
    pending = list(milestones)
    tokens = 0
    for step, step_tokens in enumerate(_tokens_of_steps(trainer), start=1):
        tokens += step_tokens
        if tokens >= pending[0]:
            evaluations[step] = (pending.pop(0), tokens)
            if pending and tokens >= pending[0]:
                raise InfeasibleError(
                    "budget",
                    f"one optimizer step trains {step_tokens} tokens, more than the {milestones[0]} between two "
                    "evaluations: lower the batch size, gradient accumulation or budget.evals_per_trial",
                )
            if not pending:
                return StepPlan(step, evaluations)
    raise AssertionError("an endless stream of steps ended")


def _tokens_of_steps(trainer: SFTTrainer) -> Iterator[int]:
    """Tokens of each optimizer step, over all ranks, epoch after epoch without end."""
    accumulation = trainer.args.gradient_accumulation_steps
    rows: Any = trainer.train_dataset
    lengths = [len(ids) for ids in rows["input_ids"]]
    if isinstance(trainer, WorkersTrainer):
        lengths[-1] = 0  # the row that fills up
    with torch.random.fork_rng():
        loader = trainer.get_train_dataloader()
    epoch = 0
    while True:
        batches = [sum(lengths[index] for index in batch) for batch in batches_of_epoch(loader, epoch)]
        if not batches:
            raise InfeasibleError("budget", _no_batch(trainer))
        steps = [sum(batches[start : start + accumulation]) for start in range(0, len(batches), accumulation)]
        yield from _summed_over_ranks(steps, trainer.args.device)
        epoch += 1


def _no_batch(trainer: SFTTrainer) -> str:
    """Only whole batches are trained, and the rows fill none: the same on every rank."""
    own: Any = trainer.own_rows if isinstance(trainer, WorkersTrainer) else trainer.train_dataset
    args: Any = trainer.args
    size = trainer.batch_of_one if isinstance(trainer, WorkersTrainer) else args.per_device_train_batch_size
    packed = " after packing" if args.packing else ""
    return (
        f"an epoch has no batch: there are {len(own)} rows to train on{packed}, a batch takes {size} "
        "(train.per_device_train_batch_size), and train.dataloader_drop_last leaves out what fills no batch"
    )


def batches_of_epoch(loader: Any, epoch: int) -> Iterator[list[int]]:
    """Row numbers of this rank's batches, in the order `Trainer._run_epoch` will draw them from accelerate's loader."""
    loader.set_epoch(epoch)
    return iter(loader.batch_sampler)


def _summed_over_ranks(tokens: list[int], device: torch.device) -> list[int]:
    if not (dist.is_available() and dist.is_initialized()):
        return tokens
    total = torch.tensor(tokens, dtype=torch.long, device=device)
    dist.all_reduce(total)
    return total.tolist()
